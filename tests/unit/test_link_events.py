"""Of what the kernel tells of links, only what may concern the agent is looked at; in doubt it is."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from driver.app import watch_links
from driver.errors import NotNow
from driver.lifecycle.devices import Devices
from driver.policy.load import load_policy
from hw.model import IfIndex, IfName, LinkFlags, LinkInfo
from hw.monitor import RESCAN, LinkMonitor
from hw.sysfs import Sysfs
from hw.transport import header
from hw.wire import RTM_DELLINK, RTM_NEWADDR, RTM_NEWLINK
from tests.unit.claims_world import A, device
from tests.unit.test_hw_monitor import RDMA, Ear

POLICY = """
apiVersion: knd.internal/v1alpha1
kind: NodePolicy
netdevs: [{kinds: [veth], names: ['data*']}]
"""
IsNothing = Callable[[LinkInfo], bool]


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def told(index: int, name: str, *, type: int = RTM_NEWLINK, family: int = socket.AF_UNSPEC) -> bytes:
    about = attribute(3, name.encode() + b"\0") + attribute(18, attribute(1, b"veth\0"))
    return header(type, 0, 0, struct.pack("=BxHiII", family, 1, index, 0, 0) + about)


def address(index: int) -> bytes:
    return header(RTM_NEWADDR, 0, 0, struct.pack("=BBBBi", socket.AF_INET, 24, 0, 0, index))


def is_cni(link: LinkInfo) -> bool:
    return link.kind == "veth" and link.name.startswith("cni")


def hears(*datagrams: bytes, uevent: bytes | None = None) -> frozenset[int] | None:
    with LinkMonitor(uevents=False) as monitor:
        monitor._links.close()
        ear: Any = Ear(*((data, 0, 0) for data in datagrams))
        uevents: Any = Ear((uevent, 0, 0)) if uevent else None
        monitor._links, monitor._uevents, monitor._rdma = ear, uevents, None
        return monitor.read(is_cni)


def test_links_that_are_nothing_by_what_was_told_of_them_are_left_out() -> None:
    assert hears(told(5, "cni0") + told(6, "eth0"), told(7, "cni1")) == {6}


@pytest.mark.parametrize(
    "datagrams",
    [
        [told(5, "cni0"), told(5, "eth0")],
        [told(5, "cni0") + address(5)],
        [told(5, "cni0"), told(5, "cni0", family=socket.AF_BRIDGE)],
        [told(5, "cni0"), told(5, "cni0", type=RTM_DELLINK)],
    ],
    ids=["renamed", "address", "a bridge's part", "gone"],
)
def test_what_came_last_counts_and_what_does_not_tell_all_is_looked_at(datagrams: list[bytes]) -> None:
    assert hears(*datagrams) == {5}


def test_a_link_that_became_nothing_is_left_out() -> None:
    assert hears(told(5, "eth0") + address(5), told(5, "cni0")) == frozenset()


def test_hardware_is_looked_at_whatever_links_are() -> None:
    assert hears(told(5, "cni0"), uevent=RDMA) is RESCAN


def of(name: str, index: int = 5, kind: str | None = "veth") -> LinkInfo:
    return LinkInfo(
        ifindex=IfIndex(index), name=IfName(name), flags=LinkFlags(0), link_type=1, mtu=1500, kind=kind
    )


def test_strange_is_what_is_neither_a_device_nor_hardware_nor_asked_for(tmp_path: Path) -> None:
    policy = load_policy(POLICY, "policy")
    devices = Devices(Sysfs(tmp_path), lambda: policy)
    assert devices.is_strange(of("cni0"))
    assert not devices.is_strange(of("data0"))
    assert not devices.is_strange(of("cni0", kind=None))
    known = device(A, 5)
    devices._by_index = {IfIndex(5): known}
    assert not devices.is_strange(of("cni0"))
    assert devices.is_strange(of("cni0", 6))


def test_after_a_look_that_failed_the_next_event_is_looked_at_whatever_it_is() -> None:
    looked: list[frozenset[int] | None] = []

    class Lifecycle:
        def is_strange(self, link: LinkInfo) -> bool:
            return True

        async def links_changed(self, changed: frozenset[int] | None) -> None:
            looked.append(changed)
            if len(looked) == 1:
                raise NotNow("busy")

    class Monitor:
        async def hear(self, is_nothing: IsNothing) -> AsyncIterator[frozenset[int]]:
            yield frozenset({1})
            for index in (2, 3):
                if not is_nothing(of("cni0", index)):
                    yield frozenset({index})

    asyncio.run(watch_links(Lifecycle(), Monitor()))  # type: ignore[arg-type]
    assert looked == [frozenset({1}), None]
