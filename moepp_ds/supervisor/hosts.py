"""The hosts of a hostfile, and which of them this one is."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moepp_ds.config import RecipeError


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: a name or an address that the other hosts can reach, and how many ranks it holds."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file of lines `name slots=8`, in its order; RecipeError names the line that is none.

    Raises OSError where the file system fails, which may pass; a missing file is a RecipeError.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError(f"the hostfile {path} cannot be read: {error}") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([\w.:-]+)\s+slots=([1-9]\d*)", text)
        if found is None:
            raise RecipeError(f"{path}, line {number}: {text!r} is no host; a line is `name slots=8`")
        if found[1] in hosts:
            raise RecipeError(f"{path}, line {number}: {found[1]} is there twice; give it all its slots in one line")
        hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts:
        raise RecipeError(f"the hostfile {path} names no host; it has a line `name slots=8` for each")
    return list(hosts.values())


def own_host(hosts: Sequence[Host], node_rank: str, path: Path) -> Host:
    """The host that this one is: the one of that number, or for `auto` the one that has its name or an address of it.

    Raises RecipeError.
    """
    if node_rank != "auto":
        if not node_rank.isdigit() or int(node_rank) >= len(hosts):
            last = len(hosts) - 1
            raise RecipeError(f"--node_rank {node_rank}: give auto, or 0 to {last}, a line of hosts in {path}")
        return hosts[int(node_rank)]
    own = socket.gethostname()
    named = [host for host in hosts if host.name == own]
    named = named or [host for host in hosts if host.name.split(".")[0] == own.split(".")[0]]
    found = named or [host for host in hosts if _is_local(host.name)]
    if len(found) != 1:
        which = f"{len(found)} of the hosts" if found else "none of the hosts"
        names = ", ".join(host.name for host in hosts)
        raise RecipeError(f"this host, {own}, is {which} in {path} ({names}); say which by --node_rank N, from 0")
    return found[0]


def _is_local(name: str) -> bool:
    """Whether a name stands for an address of this host: only to such a one a socket can be bound."""
    try:
        places = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
            return True
        except OSError:
            continue
    return False


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
