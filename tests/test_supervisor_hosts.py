"""moepp_ds.supervisor.hosts: hostfiles, and which host this one is."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moepp_ds.config import RecipeError
from moepp_ds.supervisor.hosts import Host, own_host, read_hostfile

HOSTS = [Host("10.77.0.1", 8), Host("node-b", 4)]


def test_a_hostfile_in_order_with_comments(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the racks\n\n10.77.0.1 slots=8\n  node-b\tslots=4   # spare\nfd00::1 slots=1\n")
    assert read_hostfile(path) == [*HOSTS, Host("fd00::1", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb\n", "hosts, line 2: 'b' is no host; a line is `name slots=8`"),
        ("a slots=0\n", "line 1: 'a slots=0' is no host"),
        ("../a slots=1\n", "line 1: '../a slots=1' is no host"),  # names become names of files
        ("a slots=1\na slots=2\n", "line 2: a is there twice; give it all its slots in one line"),
        ("# nobody\n", "hosts names no host; it has a line"),
    ],
)
def test_wrong_hostfiles_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_hostfile(path)


def test_a_hostfile_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the hostfile .*nowhere cannot be read: .*No such file"):
        read_hostfile(tmp_path / "nowhere")


def test_the_own_host_by_number_by_name_or_by_address() -> None:
    own, path = socket.gethostname(), Path("hosts")
    assert own_host(HOSTS, "1", path) == HOSTS[1]
    assert own_host([*HOSTS, Host(own, 1)], "auto", path) == Host(own, 1)
    assert own_host([*HOSTS, Host(f"{own.split('.')[0]}.cluster", 1)], "auto", path).slots == 1
    # 192.0.2.0/24 is for documentation: an address no host has; every host has 127.0.0.1
    assert own_host([Host("192.0.2.1", 2), Host("127.0.0.1", 1)], "auto", path) == Host("127.0.0.1", 1)


@pytest.mark.parametrize(
    ("hosts", "node_rank", "message"),
    [
        (HOSTS, "2", "--node_rank 2: give auto, or 0 to 1, a line of hosts in hosts"),
        (HOSTS, "-1", "--node_rank -1: give auto"),
        ([Host("192.0.2.1", 2)], "auto", "is none of the hosts in hosts \\(192.0.2.1\\); say which by --node_rank N"),
        ([Host("127.0.0.1", 1), Host("127.0.0.2", 1)], "auto", "is 2 of the hosts in hosts"),
    ],
)
def test_hosts_that_are_not_this_one(hosts: list[Host], node_rank: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        own_host(hosts, node_rank, Path("hosts"))
