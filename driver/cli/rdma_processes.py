"""Of `knd devices --rdma`: what processes have made on RDMA devices, and which pods they are of.

Invariant: only reads. A process that this one's pid namespace does not show is a row without a name.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from driver.cli.output import Row
from driver.execute.resources import KINDS, Made, made_on, word
from driver.lifecycle.resources import cgroup_of, container_in, pod_in
from driver.model import Attachment, PodUid
from hw.errors import HwError
from hw.netns import NetnsHandle, open_netns
from hw.rdma.netlink import RdmaSocket

COLUMNS = ("rdma", "pid", "process", "pod", "container", *map(word, KINDS))

Open = Callable[[NetnsHandle | None], RdmaSocket]


def read(
    proc: Path, attachments: Iterable[Attachment], opener: Open = RdmaSocket
) -> tuple[list[Row], list[str]]:
    """Rows of the devices at home and in the pods of these attachments; and sentences about what could not be
    read."""
    attached = tuple(attachments)
    pods = {each.pod.uid: f"{each.pod.namespace}/{each.pod.name}" for each in attached}
    rows: dict[tuple[str, int], Row] = {}
    problems: list[str] = []
    for path in (None, *dict.fromkeys(each.netns_path for each in attached)):
        try:
            for name, made in _devices(path, opener):
                rows |= {(name, pid): row for pid, row in _rows(name, made, proc, pods)}
        except (HwError, OSError) as error:
            problems.append(f"RDMA resources {f'of {path}' if path else 'at home'}: {error}")
    return [row for _, row in sorted(rows.items())], problems


def _devices(path: Path | None, opener: Open) -> Iterator[tuple[str, Made]]:
    with contextlib.ExitStack() as stack:
        netns = stack.enter_context(open_netns(path)) if path is not None else None
        socket = stack.enter_context(opener(netns))
        for device in socket.devices():
            yield device.name, made_on(socket, device.index)


def _rows(name: str, made: Made, proc: Path, pods: Mapping[PodUid, str]) -> Iterator[tuple[int, Row]]:
    processes: dict[int, Counter[str]] = {}
    for (kind, pid), number in made.items():
        processes.setdefault(pid, Counter())[word(kind)] = number
    for pid, numbers in processes.items():
        cgroup = cgroup_of(proc, pid) if pid else ""
        pod = pod_in(cgroup)
        row: dict[str, str | int | bool | None] = {
            "rdma": name,
            "pid": pid or None,
            "process": _name_of(proc, pid) if pid else None,
            "pod": pods.get(pod, pod) if pod is not None else None,
            "container": container_in(cgroup)[:12] or None,
        }
        yield pid, row | {word(kind): numbers[word(kind)] for kind in KINDS}


def _name_of(proc: Path, pid: int) -> str | None:
    try:
        return (proc / str(pid) / "comm").read_text(errors="surrogateescape").strip()
    except OSError:
        return None
