"""Hosts of a small network, real to every program on them: own addresses and names, own processes, links to cut.

One room holds everything: a network, a mount and a PID namespace, whose first process reads from this one's pipe. When
that pipe closes, whatever way this process ends, the first process ends, and with it the kernel ends every process of
the room and takes apart its interfaces: nothing can be left behind, and nothing of it is ever seen outside.

    room        bridge br0, /etc/hosts with all names, its own /run/netns
      host a    `ip netns` network namespace, eth0 10.77.0.1/24; own PID and UTS namespaces: killing its first
      host b    process kills the host
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT

NAMES = ("node-a", "node-b", "node-c", "node-d")

_ROOM = """
set -e
mount -t proc proc /proc
mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns
mount --bind {hosts} /etc/hosts
ip link set lo up
ip link add br0 type bridge
ip link set br0 up
for n in {numbers}; do
    ip netns add host$n
    ip link add port$n type veth peer name eth0 netns host$n
    ip link set port$n master br0 up
    ip -n host$n addr add 10.77.0.$n/24 dev eth0
    ip -n host$n link set lo up
    ip -n host$n link set eth0 up
done
echo ready
exec cat
"""


class Room:
    """The network and what runs on it."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.names = tuple(names)
        hosts = folder / "etc-hosts"
        hosts.write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{self.address(name)} {name}\n" for name in self.names)
        )
        numbers = " ".join(str(number) for number in range(1, len(names) + 1))
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c"]
        self._room = subprocess.Popen(
            [*command, _ROOM.format(hosts=hosts, numbers=numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._room.stdout is not None
        said = self._room.stdout.readline().decode().strip()
        if said != "ready":
            self.close()
            raise OSError(said)
        self._inside = _only_child(self._room.pid)
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        for name in self.names:
            self.boot(name)

    def address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    def boot(self, name: str) -> None:
        """Start a host: its first process, which reaps what others leave and otherwise does nothing."""
        first = f"mount -t proc proc /proc; hostname {name}; while :; do sleep 1000 & wait; done"
        space = ["unshare", "--pid", "--uts", "--mount", "--fork", "--kill-child", "sh", "-c", first]
        self._inits[name] = subprocess.Popen(self._in_room("ip", "netns", "exec", self._space(name), *space))
        while self.on(name, ["hostname"]).stdout.decode().strip() != name:
            time.sleep(0.05)

    def on(self, name: str, command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        """Run a short command on a host."""
        return subprocess.run(self._on(name, command), capture_output=True, timeout=60)

    def start(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command on a host; the process that is returned ends as it does, and passes no signal on."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self._on(name, command), cwd=ROOT, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT
            )

    def kill(self, name: str) -> None:
        """The host is gone, all of its processes at once."""
        os.kill(self._first_process(name), signal.SIGKILL)
        self._inits.pop(name).wait()

    def cut(self, name: str) -> None:
        """Pull a host's cable: what is sent vanishes, and no side is told."""
        self._run("ip", "link", "set", f"port{self.names.index(name) + 1}", "nomaster")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        self._run("ip", "link", "set", f"port{self.names.index(name) + 1}", "master", "br0")

    def close(self) -> None:
        """End the room and all in it."""
        assert self._room.stdin is not None
        self._room.stdin.close()
        self._room.wait(60)  # the kernel lets it end when all in it have ended
        for init in getattr(self, "_inits", {}).values():
            init.wait()

    def _space(self, name: str) -> str:
        return f"host{self.names.index(name) + 1}"

    def _in_room(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self._inside}", "--net", "--mount", "--pid", *command]

    def _on(self, name: str, command: Sequence[str]) -> list[str]:
        first = self._first_process(name)
        return ["nsenter", f"--target={first}", "--net", "--mount", "--pid", "--uts", "--wdns=" + str(ROOT), *command]

    def _first_process(self, name: str) -> int:
        """nsenter -> (ip, now unshare) -> sh"""
        pid = self._inits[name].pid
        return _only_child(_only_child(pid))

    def _run(self, *command: str) -> None:
        subprocess.run(self._in_room(*command), check=True, timeout=60)


def _only_child(pid: int) -> int:
    """The one child of a process, once it has one."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    end = time.monotonic() + 30
    while not (children := path.read_text().split()):
        assert time.monotonic() < end, f"process {pid} has no child"
        time.sleep(0.01)
    return int(children[0])


@contextmanager
def room(names: Sequence[str], folder: Path) -> Iterator[Room]:
    made = Room(names, folder)
    try:
        yield made
    finally:
        made.close()


def why_not() -> str | None:
    """Why there can be no such network here; None if there can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    command = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "sh", "-c"]
    try:
        done = subprocess.run(
            [*command, "mount -t tmpfs tmpfs /mnt && ip link add br0 type bridge"], capture_output=True, timeout=60
        )
    except OSError as error:
        return str(error)
    return done.stderr.decode().strip() or None if done.returncode else None
