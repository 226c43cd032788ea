"""What the devices and hosts of a run have free, as all its ranks agree.

A host's free memory is what the kernel says is available, or what the limits of this process's control groups leave
if that is less; the ranks of a node share it evenly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moepp_ds.agreement import gather

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Room:
    """Bytes free for each rank, where there is least. None: not known, or (device) the host's memory is the device's.

    ranks_per_node: most ranks that share a host.
    """

    device: int | None
    host: int | None
    ranks_per_node: int


def agreed_room(device: torch.device) -> Room:
    """The room of the rank that has least of it. Collective; a process that is alone needs no process group."""
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    node = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return least_room(gather((node, on_device, free_on_host())))


def least_room(found: list[tuple[str, int | None, int | None]]) -> Room:
    """From (node, free on the device, free on the host) of every rank."""
    nodes = [node for node, _, _ in found]
    devices = [free for _, free, _ in found if free is not None]
    hosts = [free // nodes.count(node) for node, _, free in found if free is not None]
    return Room(min(devices, default=None), min(hosts, default=None), max(nodes.count(node) for node in nodes))


def free_on_host(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this host can still give, or None where nothing says so."""
    found = [*_available(proc / "meminfo"), *_under_limits(proc / "self/cgroup", groups)]
    return min(found, default=None)


def _available(meminfo: Path) -> Iterator[int]:
    for line in _lines(meminfo):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _under_limits(membership: Path, groups: Path) -> Iterator[int]:
    """What each limited control group above this process leaves: of version 2, or of version 1's memory controller."""
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = groups if not controllers else groups / "memory"
            names = ("memory.max", "memory.current", "inactive_file")
            if controllers:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            folder = root / path.lstrip("/")
            # In a container the path may be the host's, and what is mounted the group itself.
            for at in (folder, *folder.parents):
                if at == root.parent:
                    break
                yield from _left(at, *names)


def _left(group: Path, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    limits, uses = _lines(group / limit), _lines(group / used)
    if not limits or not uses or not limits[0].isdigit():  # no such group, or `max`
        return
    stat = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat"))
    cached = int(stat.get(reclaimable, 0))  # pages of files, given up when memory is asked for
    yield max(0, int(limits[0]) - int(uses[0]) + cached)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
