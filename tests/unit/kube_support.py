"""A simulated API server with a node, a client for it, and quick paces: what the driver.kube tests share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driver.kube.client import ApiClient, Limits, connect
from driver.kube.retry import BackOff
from driver.kube.slices import Pace
from driver.model import AttributeValue, DeviceName, NodeName, OfferedDevice, Taint
from kndsim.api import SimApi

DRIVER = "knd.internal"
NODE = NodeName("node-a")
QUICK = Limits(connect=1.0, read=2.0, total=5.0, silence=1.0, answer=4 << 20, line=1 << 20, page=100)
FAST = BackOff(first=0.02, cap=0.2, slow=0.2, slow_cap=0.4)
FAST_PACE = Pace(heal=(0.01, 0.05), heal_doublings=3, calm=300.0, between_offers=0.0)


class RealClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


@dataclass
class ManualClock:
    """Time that the test moves."""

    now: float = 1_000_000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


@contextmanager
def client_of(api: SimApi, tmp_path: Path, limits: Limits = QUICK) -> Iterator[ApiClient]:
    client = connect(api.kubeconfig(tmp_path / "kubeconfig"), limits)
    try:
        yield client
    finally:
        client.close()


def offered(
    name: str,
    attributes: Mapping[str, AttributeValue] | None = None,
    capacities: Mapping[str, str] | None = None,
    taints: Sequence[Taint] = (),
) -> OfferedDevice:
    return OfferedDevice(
        name=DeviceName(name),
        attributes={"kind": "vf"} if attributes is None else attributes,
        capacities=capacities or {},
        taints=tuple(taints),
    )


def offered_many(count: int, **more: Any) -> list[OfferedDevice]:
    return [offered(f"vf-{index}", {"kind": "vf", "vfIndex": index}, **more) for index in range(count)]


@dataclass
class Recorder:
    """A handler of a watch that remembers what it was told."""

    lists: list[list[Any]] = field(default_factory=list)
    changes: list[tuple[str, Any]] = field(default_factory=list)

    def replaced(self, items: Sequence[Any], version: str) -> None:
        self.lists.append(list(items))

    def changed(self, change: Any, item: Any) -> None:
        self.changes.append((str(change), item))


@contextmanager
def running(*parts: Any) -> Iterator[None]:
    """Threads that are started, and must have ended a few seconds after they were told to."""
    started = []
    try:
        for part in parts:
            part.start()
            started.append(part)
        yield
    finally:
        for part in started:
            part.stop()
        stuck = [part for part in started if not part.join(5.0)]
        assert not stuck, f"threads did not end: {stuck}"


def rate(times: Sequence[float], seconds: Callable[[], float] = time.monotonic) -> float:
    """Requests a second from the first until now."""
    return len(times) / max(1e-9, seconds() - times[0]) if times else 0.0
