"""Devices with limits in pods' namespaces, wired to a host's: what an agent makes, without an agent."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bpf.accounting import Accounting
from bpf.attach import TcxPrograms
from bpf.layout import Slot
from bpf.program import CompiledPrograms
from driver.execute.actions import link_up, move_in
from driver.execute.shape import Shaper
from driver.execute.target import Target
from driver.model import InterfaceConfig, NicConfig
from driver.qos import DEFAULT_CLASSES, PodLimits, QosPolicy
from driver.traffic import Enforcement, QosConfig
from hw.model import IfIndex, IfName, LinkSettings, SoftwareIdentity
from hw.netlink import LinkSocket
from hw.netns import host_netns, open_netns
from kndsim.links import SimNetns, netns, private_host, veth_pair
from tests.bpf.bpffs import mounted_bpffs
from tests.unit.journal_values import preparation

SLOT = Slot(3)
_POLICY = QosPolicy(classes=DEFAULT_CLASSES)
POD_ADDRESS, HOST_ADDRESS = "198.18.0.2", "198.18.0.1"


@dataclass(slots=True)
class Pair:
    """The device is net1 in the pod; wire is its other end, in the host. Rates in Mb/s."""

    host: SimNetns
    pod: SimNetns
    target: Target
    accounting: Accounting
    wire: IfIndex
    shaper: Shaper
    slot: Slot = SLOT
    pod_address: str = POD_ADDRESS
    host_address: str = HOST_ADDRESS
    policy: QosPolicy = _POLICY

    @property
    def ifindex(self) -> IfIndex:
        assert self.target.hint is not None
        return self.target.hint

    def limit(self, *, egress: int = 0, ingress: int = 0) -> None:
        """From now on, at most this."""
        self.policy = replace(self.policy, limits=PodLimits(egress=egress, ingress=ingress))
        self.shaper.shape(self.target)

    def on_wire(self) -> int:
        """Bytes that have reached the host's end, whether or not anybody has read them."""
        (link,) = self.host.netlink(lambda ipr: ipr.get_links(self.wire))
        return int(link.get_attr("IFLA_STATS64")["rx_bytes"])

    def egress_bytes(self) -> int:
        """As counted."""
        return sum(cell.bytes for cell in self.accounting.read(self.slot) if cell.direction == 0)


@contextlib.contextmanager
def limited_pair(programs: CompiledPrograms) -> Iterator[Pair]:
    """Needs tcx: the programs are attached before the move."""
    with limited_pairs(programs, 1) as (pair,):
        yield pair


@contextlib.contextmanager
def limited_pairs(programs: CompiledPrograms, count: int) -> Iterator[tuple[Pair, ...]]:
    """Pods of one host, each with a wire of its own."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(private_host())
        pins = stack.enter_context(mounted_bpffs()) / "knd/v1"
        accounting = stack.enter_context(Accounting.open(pins, programs, slots=8))
        tcx = TcxPrograms(pins, accounting)
        yield tuple(_pair(stack, number, host, accounting, tcx) for number in range(count))


def _pair(
    stack: contextlib.ExitStack, number: int, host: SimNetns, accounting: Accounting, tcx: TcxPrograms
) -> Pair:
    pod = stack.enter_context(netns())
    index, peer = (IfIndex(each) for each in stack.enter_context(veth_pair(f"vh{number}", f"vp{number}")))
    home = stack.enter_context(LinkSocket(None))
    link = home.by_index(index)
    assert link is not None
    handle = stack.enter_context(open_netns(pod.path))
    slot = Slot(SLOT + number)
    known = replace(
        preparation(number),
        slot=slot,
        identity=SoftwareIdentity("veth", link.ifindex, link.peer, link.peer_nsid),
        config=NicConfig(
            interface=InterfaceConfig(name=IfName("net1")),
            qos=QosConfig(enforcement=Enforcement.SOFTWARE),
        ),
        baseline=LinkSettings.of(link),
    )
    target = Target(
        preparation=known,
        attachment=None,
        home=home,
        home_netns=stack.enter_context(host_netns()),
        pod=stack.enter_context(LinkSocket(handle)),
        pod_netns=handle,
        hint=index,
    )
    made: list[Pair] = []
    shaper = Shaper(accounting, lambda: made[0].policy)
    addresses = (address.replace("18.0", f"18.{number}") for address in (POD_ADDRESS, HOST_ADDRESS))
    made.append(Pair(host, pod, target, accounting, peer, shaper, slot, *addresses))
    tcx.attach(f"limited{number}", index, slot)
    _into_pod(made[0])
    return made[0]


def _into_pod(pair: Pair) -> None:
    target = pair.target
    pair.accounting.zero(pair.slot)
    move_in(target)
    pair.shaper.shape(target)
    link_up(target)
    assert target.pod is not None
    target.pod.add_address(pair.ifindex, ipaddress.ip_interface(f"{pair.pod_address}/24"))
    target.home.add_address(pair.wire, ipaddress.ip_interface(f"{pair.host_address}/24"))
    target.home.set_up(pair.wire)
