"""The links of two namespaces as the kernel keeps them for IPoIB: what is made on a port's own interface,
moved, deleted, and given back when a namespace ends; and what each counts for itself. No such hardware was
there to ask."""

from __future__ import annotations

import errno
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from bpf.attach import LinkPair, LinkState
from bpf.layout import Cell, Framing, Hook, Slot, TrafficKind
from bpf.sys import LinkId, ProgramId
from driver.clock import SystemClock
from driver.execute.actions import NodeActs
from driver.execute.engine import Engine
from driver.execute.target import Target
from driver.model import NicConfig, Preparation
from driver.rdma import IpoibConfig, RdmaConfig
from hw.errors import NotFound, Refused
from hw.ipoib import IpoibMode, is_child
from hw.model import Direction, IfIndex, IfName, LinkFlags, LinkInfo
from tests.unit.infiniband_world import Mlx5, address, prepared
from tests.unit.journal_values import attachment
from tests.unit.no_foreign import NO_FOREIGN

T = TypeVar("T")
PARTITION = 0x0001
WISH = IpoibConfig(name=IfName("ib1"), mtu=2000)


@dataclass
class Netns:
    """Its links and the addresses on them; LinkSocket and NetnsHandle in one."""

    world: World
    links: dict[IfIndex, LinkInfo] = field(default_factory=dict)
    given: dict[IfIndex, list[object]] = field(default_factory=dict)

    def dump(self) -> tuple[LinkInfo, ...]:
        return tuple(self.links.values())

    def by_index(self, ifindex: IfIndex) -> LinkInfo | None:
        return self.links.get(ifindex)

    def statistics(self, ifindex: IfIndex) -> dict[str, int]:
        if ifindex not in self.links:
            raise NotFound("read the counters", errno.ENODEV)
        return dict(self.world.counters[ifindex])

    def add_ipoib(self, parent: IfIndex, name: IfName, pkey: int, mode: IpoibMode) -> None:
        found = self.links.get(parent)
        if found is None:
            raise NotFound("make", errno.ENODEV)
        if is_child(found) or (mode is IpoibMode.CONNECTED and not self.world.connected):
            raise Refused("make", errno.EINVAL)
        index = IfIndex(max(self.world.known()) + 1)
        self.world.made.append((pkey, mode))
        self.links[index] = replace(
            found, ifindex=index, name=name, kind="ipoib", peer=parent, parent_bus=None, mtu=2044
        )

    def move(
        self, ifindex: IfIndex, netns: Netns, *, name: IfName, mtu: int | None = None, **more: Any
    ) -> None:
        link = self.links.pop(ifindex)
        self.given.pop(ifindex, None)
        arrived = replace(link, name=name, flags=link.flags & ~LinkFlags.UP)
        netns.links[ifindex] = arrived
        if mtu is not None and is_child(link) and mtu > self.world.largest:
            raise Refused("move", errno.EINVAL)
        netns.links[ifindex] = replace(arrived, mtu=mtu or link.mtu)

    def delete(self, ifindex: IfIndex) -> None:
        if self.links.pop(ifindex, None) is not None:
            self.world.programs.gone(ifindex)

    def set_up(self, ifindex: IfIndex) -> None:
        self.change(ifindex, set_flags=LinkFlags.UP)

    def set_down(self, ifindex: IfIndex) -> None:
        self.change(ifindex, clear_flags=LinkFlags.UP)

    def change(self, ifindex: IfIndex, **fields: Any) -> None:
        link = self.links[ifindex]
        flags = (link.flags | fields.pop("set_flags", LinkFlags(0))) & ~fields.pop(
            "clear_flags", LinkFlags(0)
        )
        self.links[ifindex] = replace(link, flags=flags, **fields)

    def add_address(self, ifindex: IfIndex, given: object) -> None:
        self.given.setdefault(ifindex, []).append(given)

    def addresses(self, ifindex: IfIndex) -> tuple[object, ...]:
        return tuple(self.given.get(ifindex, ()))


class Programs:
    """TcxPrograms, of whichever namespace."""

    def __init__(self) -> None:
        self.on: dict[str, tuple[int, Slot, Framing]] = {}
        self.refuses: Exception | None = None
        self.cells: list[Cell] = []

    def attach(self, name: str, ifindex: int, slot: Slot, framing: Framing = Framing.ETHERNET) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.on[name] = (ifindex, slot, framing)

    def detach(self, name: str) -> None:
        self.on.pop(name, None)

    def is_on(self, name: str, ifindex: int) -> bool:
        return name in self.on and self.on[name][0] == ifindex

    def state(self, name: str) -> LinkPair | None:
        if name not in self.on:
            return None
        half = LinkState(LinkId(1), ProgramId(1), self.on[name][0])
        return LinkPair(half, half)

    def gone(self, ifindex: int) -> None:
        self.on = {
            name: (0 if on == ifindex else on, slot, framing) for name, (on, slot, framing) in self.on.items()
        }

    def links_of(self, name: str) -> frozenset[LinkId]:
        return frozenset()


class World:
    """A VF on InfiniBand that is prepared: at home, down, counted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("actions", "ipoib"):
            monkeypatch.setattr(f"driver.execute.{module}.run_in", self._run_in)
        monkeypatch.setattr("driver.execute.actions.foreign_programs", lambda ifindex, own: ())
        monkeypatch.setattr("driver.execute.actions.detach_foreign", lambda ifindex, own: None)
        self.card = Mlx5(folder)
        self.programs = Programs()
        self.home, self.pod, self.hidden = Netns(self), Netns(self), Netns(self)
        self.made: list[tuple[int, IpoibMode]] = []
        self.folded = 0
        self.counters: defaultdict[IfIndex, Counter[str]] = defaultdict(
            lambda: Counter(dict.fromkeys(("tx_packets", "tx_bytes", "rx_packets", "rx_bytes"), 0))
        )
        self.meters: Any = SimpleNamespace(
            **dict.fromkeys(("begin", "leave", "leave_child"), lambda target: None)
        )
        self.connected = False
        self.largest = 4092
        assert self.card.vf is not None
        self.vf = replace(self.card.vf, kind="ipoib", altnames=(), mac=address(7, None))
        self.home.links[self.vf.ifindex] = self.vf

    def preparation(self, wish: IpoibConfig | None = WISH) -> Preparation:
        config = NicConfig(rdma=RdmaConfig(partition=PARTITION, ipoib=wish))
        made = prepared(self.card, config=config)
        made = replace(made, rdma=None, baseline=replace(made.baseline, altnames=(), mac=self.vf.mac))
        self.programs.attach(made.key.device, self.vf.ifindex, made.slot, made.framing)
        return made

    def target(self, made: Preparation, *, pod: bool = True) -> Target:
        home, inside = _any(self.home), _any(self.pod)
        return Target(
            preparation=made,
            attachment=attachment(0),
            home=home,
            home_netns=home,
            pod=inside if pod else None,
            pod_netns=inside if pod else None,
        )

    def engine(self) -> Engine[Target]:
        def fold(*args: object) -> None:
            self.folded += 1

        nothing = SimpleNamespace(**dict.fromkeys(("shape", "unshape", "zero", "forget"), lambda *a: None))
        acts = NodeActs(
            hook=Hook.TCX,
            accounting=_any(nothing),
            programs=_any(self.programs),
            fold=fold,
            meters=self.meters,
            host=self.card.host,
            shaper=_any(nothing),
            foreign=NO_FOREIGN,
        )
        journal, observer = (
            SimpleNamespace(step=lambda *a: None),
            SimpleNamespace(at=lambda *a: None, step_done=lambda *a: None),
        )
        return Engine(journal=_any(journal), acts=acts.table(), clock=SystemClock(), observer=_any(observer))

    def children(self) -> list[LinkInfo]:
        return [link for netns in (self.home, self.pod) for link in netns.dump() if is_child(link)]

    def passes(self, ifindex: IfIndex, way: Direction, packets: int, size: int, *, seen: bool = True) -> None:
        """As mlx5 counts: each interface what passes it alone, and of what comes the global route header too.
        size is with IPoIB's own. seen False: it passed the hooks by, as with a packet socket."""
        name, header = ("tx", 0) if way is Direction.EGRESS else ("rx", 40)
        self.counters[ifindex][f"{name}_packets"] += packets
        self.counters[ifindex][f"{name}_bytes"] += packets * (size + header)
        if seen and any(on == ifindex for on, _, _ in self.programs.on.values()):
            self.programs.cells.append(Cell(way, 0, TrafficKind.IP, packets * size, packets))

    def known(self) -> set[IfIndex]:
        return {index for netns in (self.home, self.pod, self.hidden) for index in netns.links}

    def netns_ends(self, *, refund: bool) -> None:
        """The port's own interface comes home; what was made on it as well, or it is destroyed."""
        for index, link in list(self.pod.links.items()):
            if refund or not is_child(link):
                self.home.links[index] = replace(link, flags=link.flags & ~LinkFlags.UP)
            else:
                self.programs.gone(index)
        self.pod.links.clear()

    def _run_in(self, netns: Netns, function: Callable[[], T]) -> T:
        return function()


def _any(value: object) -> Any:
    return value
