"""netdevsim devices for the nodes of a kind cluster.

Invariant: the number of a device is on disk before the device is made, so that it is found and deleted
whatever happens to whoever made it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from kndsim.kind.model import DeviceId
from kndsim.kind.namespaces import FIRST, find
from kndsim.waiting import TooLate, wait_until

BUS = Path("/sys/bus/netdevsim")
_FIRST_NUMBER = 5000
"""Far from what people type."""
_PATIENCE = 30.0


class NoNetdevsim(Exception):
    """A sentence: what the kernel did not do."""


def available() -> bool:
    return (BUS / "new_device").exists()


def port(number: int, index: int) -> DeviceId:
    return DeviceId("netdevsim", f"netdevsim{number}", f"p{index}")


def vf(number: int, index: int) -> DeviceId:
    return DeviceId("netdevsim", f"netdevsim{number}", f"pf0vf{index}")


def cables(nodes: Sequence[str], ports: int) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Pairs of (node, port) that the kernel joins: port N of a node with port N of its neighbour. A node
    without a neighbour has its own ports joined, the first with the second and so on."""
    pairs: list[tuple[tuple[str, int], tuple[str, int]]] = []
    for one, other in zip(nodes[::2], nodes[1::2], strict=False):
        pairs += [((one, index), (other, index)) for index in range(1, ports + 1)]
    if len(nodes) % 2:
        pairs += [((nodes[-1], index), (nodes[-1], index + 1)) for index in range(1, ports, 2)]
    return pairs


class Register:
    """The numbers of the devices that were made for one cluster, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def numbers(self) -> list[int]:
        try:
            return [int(word) for word in self.path.read_text().split()]
        except FileNotFoundError:
            return []

    def note(self, number: int) -> None:
        with self.path.open("a") as file:
            file.write(f"{number}\n")

    def delete_all(self) -> list[int]:
        """Delete what is left of them, wherever their ports are; the numbers of those there were."""
        there = [number for number in self.numbers() if _there(number)]
        for number in there:
            delete(number)
        self.path.unlink(missing_ok=True)
        return there


def delete(number: int) -> None:
    """Nothing happens if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        if _there(number):
            (BUS / "del_device").write_text(str(number))


@contextlib.contextmanager
def device(register: Register, ports: int, vfs: int = 0) -> Iterator[int]:
    """A new device, its ports and VFs in the caller's namespace; its number. NoNetdevsim."""
    number = next(n for n in range(_FIRST_NUMBER, _FIRST_NUMBER + 1000) if not _there(n))
    register.note(number)
    try:
        _written(BUS / "new_device", f"{number} {ports}", f"make a device of {ports} ports")
        if vfs:
            _make_vfs(number, vfs)
        for id in [port(number, index + 1) for index in range(ports)] + [vf(number, i) for i in range(vfs)]:
            _wait_for(id)
        yield number
    finally:
        delete(number)


def join(one: DeviceId, other: DeviceId) -> None:
    """Have the kernel carry frames between two ports of the caller's namespace, wherever they go."""
    ends = [_wait_for(id) for id in (one, other)]
    fd = os.open(FIRST, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _written(BUS / "link_device", f"{fd}:{ends[0]} {fd}:{ends[1]}", f"join {one} and {other}")
    finally:
        os.close(fd)


def _make_vfs(number: int, count: int) -> None:
    _written(
        BUS / "devices" / f"netdevsim{number}" / "sriov_numvfs", str(count), f"make {count} VFs of {number}"
    )
    # Only in this mode do its VFs have links.
    argv = ["devlink", "dev", "eswitch", "set", f"netdevsim/netdevsim{number}", "mode", "switchdev"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    if done.returncode != 0:
        raise NoNetdevsim(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")


def _wait_for(id: DeviceId) -> int:
    try:
        link = wait_until(lambda: find(id), _PATIENCE, f"a link for {id}")
    except TooLate as error:
        raise NoNetdevsim(str(error)) from error
    assert link is not None
    return link.ifindex


def _there(number: int) -> bool:
    return (BUS / "devices" / f"netdevsim{number}").exists()


def _written(path: Path, value: str, what: str) -> None:
    try:
        path.write_text(value)
    except OSError as error:
        raise NoNetdevsim(f"netdevsim does not {what}: {path}: {error.strerror}") from error
