"""RDMA as a kernel keeps it: devices in namespaces, files by number, software devices on netdevs, which end
when those move. Seen in a guest with kernel 7.3."""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from driver.execute.probe import Host
from driver.execute.target import Target
from driver.model import Attachment, Preparation
from driver.rdma import RdmaBinding, RdmaMode, SoftRdma
from hw.errors import Busy, NotFound, Unsupported
from hw.model import IfIndex, IfName, LinkInfo, NetnsCookie, RdmaIndex, RdmaName
from hw.netns import NetnsHandle
from hw.rdma.netlink import RdmaSocket
from hw.rdma.nldev import (
    CharacterDevice,
    CharacterDeviceKind,
    NldevDevice,
    NldevPort,
    PhysState,
    PortState,
)
from hw.rdma.tracking import Resource, ResourceKind
from hw.sysfs import Sysfs
from hw.udev import Udev
from tests.unit.journal_values import attachment, preparation

T = TypeVar("T")

HOME, POD = NetnsCookie(1), NetnsCookie(77)
GUID = "0c42:a103:0065:1234"
HCA = RdmaName("mlx5_2")


@dataclass
class Registered:
    name: RdmaName
    guid: str
    netns: NetnsCookie
    number: int
    on: IfName | None = None
    """The netdev it was made on."""


@dataclass
class Kernel:
    exclusive: bool = True
    has_rdma: bool = True
    moves: bool = True
    """Whether its drivers let a device change its namespace."""
    other_namespaces: bool = False
    known: dict[RdmaIndex, Registered] = field(default_factory=dict)
    netdevs: dict[IfName, NetnsCookie] = field(default_factory=dict)
    here: NetnsCookie = HOME
    """Where the calling thread is."""
    missing: set[CharacterDeviceKind] = field(default_factory=set)
    ports: int = 1
    lingering: int = 0
    """Looks until what was taken away is gone."""
    changes: list[str] = field(default_factory=list)
    protocol: str = "roce"
    port_state: PortState = PortState.ACTIVE
    made: dict[RdmaName, list[Resource]] = field(default_factory=dict)
    """What applications have made, and the kernel itself."""
    unlisted: set[ResourceKind] = field(default_factory=set)
    """Counted, and not listed by this kernel."""
    listed: list[ResourceKind] = field(default_factory=list)
    _indexes: Any = field(default_factory=itertools.count)

    def register(
        self, name: str, guid: str, netns: NetnsCookie = HOME, on: IfName | None = None
    ) -> RdmaIndex:
        index = RdmaIndex(next(self._indexes))
        self.known[index] = Registered(RdmaName(name), guid, netns, self._free_number(), on)
        return index

    def _free_number(self) -> int:
        taken = {each.number for each in self.known.values()}
        return next(number for number in itertools.count() if number not in taken)

    def open(self, netns: NetnsHandle | None) -> RdmaSocket:
        if not self.has_rdma:
            raise Unsupported("this kernel has no RDMA netlink", errno.EPROTONOSUPPORT)
        return cast(RdmaSocket, Socket(self, netns.cookie if netns is not None else self.here))

    def run_in(self, netns: NetnsHandle, work: Callable[[], T]) -> T:
        """In place of a thread that enters the namespace."""
        self.here = netns.cookie
        try:
            return work()
        finally:
            self.here = HOME

    def named(self, name: str) -> Registered:
        (found,) = [each for each in self.known.values() if each.name == name]
        return found

    def netdev_leaves(self, ifname: IfName, netns: NetnsCookie) -> None:
        """What is made on it goes with it."""
        self.netdevs[ifname] = netns
        self.known = {index: each for index, each in self.known.items() if each.on != ifname}


class Socket:
    """As RdmaSocket, of one namespace."""

    def __init__(self, kernel: Kernel, netns: NetnsCookie) -> None:
        self._kernel = kernel
        self._netns = netns

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *error: object) -> None: ...

    def _seen(self) -> dict[RdmaIndex, Registered]:
        known = self._kernel.known
        return {i: d for i, d in known.items() if d.netns == self._netns or not self._kernel.exclusive}

    def _get(self, index: RdmaIndex) -> Registered:
        if index not in self._seen():
            raise NotFound(f"RDMA device {index}: the device is not there (any more)")
        return self._seen()[index]

    def devices(self) -> tuple[NldevDevice, ...]:
        seen = self._seen()
        if self._kernel.lingering:
            self._kernel.lingering -= 1
            if not self._kernel.lingering:
                self._kernel.known = {i: d for i, d in self._kernel.known.items() if d.on is None}
        return tuple(
            NldevDevice(
                index=index,
                name=each.name,
                ports=self._kernel.ports,
                protocol=self._kernel.protocol,
                node_guid=each.guid or None,
            )
            for index, each in seen.items()
        )

    def by_name(self, name: str) -> NldevDevice | None:
        return next((device for device in self.devices() if device.name == name), None)

    def ports(self, index: RdmaIndex) -> tuple[NldevPort, ...]:
        on = self._get(index).on
        here = on is not None and self._kernel.netdevs.get(on) == self._netns
        return tuple(
            NldevPort(
                number=number,
                state=self._kernel.port_state,
                phys_state=PhysState.LINK_UP,
                netdev_index=IfIndex(7) if here and number == self._kernel.ports else None,
            )
            for number in range(1, self._kernel.ports + 1)
        )

    def exclusive(self) -> bool:
        return self._kernel.exclusive

    def set_exclusive(self, exclusive: bool) -> None:
        if self._kernel.other_namespaces:
            raise Busy("make RDMA devices exclusive", errno.EBUSY)
        self._kernel.exclusive = exclusive

    def move(self, index: RdmaIndex, netns: NetnsHandle) -> None:
        device = self._get(index)
        if not self._kernel.moves or not self._kernel.exclusive:
            raise Unsupported("move RDMA device", errno.EOPNOTSUPP, "no disassociate support")
        assert self._kernel.here == self._netns == device.netns, "sent from another namespace than its own"
        self._kernel.changes.append(f"move {device.name}")
        device.netns = netns.cookie

    def rename(self, index: RdmaIndex, name: str) -> None:
        self._get(index).name = RdmaName(name)

    def add_link(self, kind: str, name: str, ifname: IfName) -> None:
        assert self._kernel.netdevs.get(ifname) == self._netns, f"{ifname} is not here"
        self._kernel.changes.append(f"make {kind} {name}")
        self._kernel.register(name, "284c:2cff:feef:0f08", HOME, ifname)

    def delete_link(self, index: RdmaIndex) -> None:
        device = self._get(index)
        assert device.on is not None, "hardware is not taken away"
        self._kernel.changes.append(f"remove {device.name}")
        del self._kernel.known[index]

    def summary(self, index: RdmaIndex) -> dict[str, int]:
        made = self._kernel.made.get(self._get(index).name, [])
        return dict(Counter(each.kind.name.lower() for each in made))

    def resources(self, kind: ResourceKind, index: RdmaIndex) -> tuple[Resource, ...]:
        if kind in self._kernel.unlisted:
            raise Unsupported(f"read the {kind.name} resources", errno.EOPNOTSUPP)
        self._kernel.listed.append(kind)
        return tuple(each for each in self._kernel.made[self._get(index).name] if each.kind is kind)

    def character_device(
        self, index: RdmaIndex, kind: CharacterDeviceKind, port: int | None = None
    ) -> CharacterDevice:
        del port
        if kind in self._kernel.missing:
            raise NotFound(f"look up the {kind} file: there is none; is the kernel's module loaded?")
        if kind is CharacterDeviceKind.RDMA_CM:
            return CharacterDevice(kind=kind, name="rdma_cm", major=10, minor=260)
        number = self._get(index).number
        return CharacterDevice(kind=kind, name=f"{kind}{number}", major=231, minor=192 + number)


def netns(cookie: NetnsCookie) -> NetnsHandle:
    return cast(NetnsHandle, SimpleNamespace(cookie=cookie, path=Path(f"/run/netns/{cookie}")))


def bound(
    kernel: Kernel, *, software: SoftRdma | None = None, mode: RdmaMode = RdmaMode.EXCLUSIVE, **fields: Any
) -> Preparation:
    """A preparation with an RDMA device: one that is registered here, or one that is to be made."""
    if software is not None:
        binding = RdmaBinding(name=RdmaName("rxe_dev_0"), mode=mode, software=software)
    else:
        index = kernel.register(HCA, GUID)
        binding = RdmaBinding(name=HCA, mode=mode, index=index, node_guid=GUID)
    return replace(preparation(0), rdma=binding, **fields)


class Stage:
    """One device during one operation, in a world made up whole."""

    def __init__(self, kernel: Kernel, prepared: Preparation, sysfs: Path, *, pod: bool = True) -> None:
        self.kernel = kernel
        self.attachment: Attachment = attachment(0)
        self.host = Host(Sysfs(sysfs), Udev(sysfs), rdma=kernel.open)
        self.target = Target(
            preparation=prepared,
            attachment=self.attachment,
            home=cast(Any, self._links(HOME)),
            home_netns=netns(HOME),
            pod=cast(Any, self._links(POD)) if pod else None,
            pod_netns=netns(POD) if pod else None,
        )

    def _links(self, where: NetnsCookie) -> object:
        def dump() -> tuple[LinkInfo, ...]:
            return tuple(_link(name) for name, at in self.kernel.netdevs.items() if at == where)

        return SimpleNamespace(dump=dump)


def _link(name: IfName) -> LinkInfo:
    return LinkInfo(
        ifindex=IfIndex(7),
        name=name,
        flags=cast(Any, 0),
        link_type=1,
        mtu=1500,
        parent_bus="pci",
        parent_device="0000:3b:00.2",
    )
