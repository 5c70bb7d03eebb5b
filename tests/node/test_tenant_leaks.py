"""Promise 2: what a tenant with NET_ADMIN does to its device, the host and the next tenant do not see."""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from pyroute2 import IPRoute

from bpf import sys as bpf
from kndsim.demo.devices import Devices
from kndsim.links import SimNetns, netns
from kndsim.netns import in_netns, in_thread
from kndsim.node import SimNode, SimPod
from kndsim.runtime import RuntimeMode
from tests.node import seen_outside as seen
from tests.node.node_stage import claim, play, running

pytestmark = pytest.mark.timeout(120)

CLAIMED = {"name": "net1", "mtu": 1400, "addresses": ["198.18.0.2/24"]}
ESCAPES = "\x1b[31mevil\x07"
VOLATILE = {
    "IFLA_STATS",
    "IFLA_STATS64",
    "IFLA_CARRIER",
    "IFLA_CARRIER_CHANGES",
    "IFLA_CARRIER_UP_COUNT",
    "IFLA_CARRIER_DOWN_COUNT",
    "IFLA_OPERSTATE",
}
PASSING = ("STATS", "STATS2", "CACHEINFO")
CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")
PASS_XDP = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)
NEXT = struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)


# --- what is seen -----------------------------------------------------------------------------------


def everything() -> dict[str, dict[str, Any]]:
    """All that rtnetlink says of the links of the calling thread's netns, by index, but what changes by
    itself; with addresses, routes, neighbours and qdiscs."""
    with IPRoute() as ipr:
        found: dict[str, dict[str, Any]] = {}
        for link in ipr.get_links():
            attributes = {name: plain(value) for name, value in link["attrs"] if name not in VOLATILE}
            found[str(link["index"])] = {**attributes, "flags": link["flags"] & ~0x10040}
        for what, messages, key in (
            ("address", ipr.get_addr(), "index"),
            ("neighbour", ipr.get_neighbours(), "ifindex"),
            ("qdisc", ipr.get_qdiscs(), "index"),
        ):
            for message in messages:
                entry = {
                    n: plain(v) for n, v in message["attrs"] if "STATS" not in n and "CACHEINFO" not in n
                }
                found[str(message[key])].setdefault(what, []).append(entry)
        found["routes"] = {str(sorted(plain(r["attrs"]))): 1 for r in ipr.get_routes()}
        return found


def plain(value: Any) -> Any:
    if hasattr(value, "get") and "attrs" in value:
        return {name: plain(each) for name, each in value["attrs"] if "CACHEINFO" not in name}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return repr(value) if not isinstance(value, int | str) else value


def at_home() -> dict[str, dict[str, Any]]:
    return in_thread(everything)


def device_of(pod: SimPod) -> dict[str, Any]:
    """The pod's device as it is in its sandbox."""
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    (index,) = seen.indexes(pod)
    return in_netns(pod.sandbox.netns_path, everything)[str(index)]


def compare(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "") -> list[str]:
    lines = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += compare(old, new, f"{where}{key}: ")
        elif old != new:
            lines.append(f"{where}{key} was {old!r}, is {new!r}")
    return lines


def offered(sim: SimNode) -> dict[str, dict[str, Any]]:
    return {
        device["name"]: device
        for each in sim.api.slices(sim.driver, sim.name)
        for device in each["spec"].get("devices") or []
    }


def no_raw_bytes(sim: SimNode) -> None:
    """Neither the log nor any command gives a tenant's control bytes to a terminal."""
    texts = {"log": sim.agent.log.read_bytes()}
    for command in ("pods", "devices", "usage"):
        for form in ("table", "json"):
            done = sim.knd(command, "-o", form)
            assert done.returncode == 0, done.stderr
            texts[f"{command} -o {form}"] = (done.stdout + done.stderr).encode()
    assert {name: CONTROL.findall(text) for name, text in texts.items() if CONTROL.search(text)} == {}


# --- what a tenant does -----------------------------------------------------------------------------


@dataclass(slots=True)
class Tenant:
    """Root with NET_ADMIN in the netns of its pod; what it opens outlives the pod."""

    ipr: IPRoute
    index: int
    kept: ExitStack

    def set(self, **fields: Any) -> None:
        self.ipr.link("set", index=self.index, **fields)

    def add(self, name: str, kind: str, **fields: Any) -> int:
        self.ipr.link("add", ifname=name, kind=kind, **fields)
        (index,) = self.ipr.link_lookup(ifname=name)
        self.ipr.link("set", index=index, state="up")
        return int(index)


def settings(tenant: Tenant) -> None:
    tenant.set(state="down")
    tenant.set(address="02:66:66:66:66:66", broadcast="02:66:66:66:66:67", mtu=1280, txqlen=7)
    tenant.set(ifalias=ESCAPES, group=9)
    tenant.set(gso_max_size=20000, gro_max_size=30000, gso_max_segs=17)
    tenant.set(IFLA_LINKMODE=1)
    noarp, promisc, allmulti, multicast = 0x80, 0x100, 0x200, 0x1000
    tenant.set(flags=noarp | promisc | allmulti, change=noarp | promisc | allmulti | multicast)
    tenant.set(ifname="eth0", state="up")


def names_with_escapes(tenant: Tenant) -> None:
    tenant.set(state="down")
    tenant.set(ifname=ESCAPES, state="up")
    tenant.ipr.link("property_add", index=tenant.index, altname=["alt\x1b[2J", "other"])


def names_of_the_host(tenant: Tenant) -> None:
    tenant.set(state="down")
    tenant.set(ifname="hostlink", state="up")
    tenant.ipr.link("property_add", index=tenant.index, altname=["port0", "port1", "port2", "hostalt"])


def addresses_and_routes(tenant: Tenant) -> None:
    tenant.ipr.addr("add", index=tenant.index, address="10.66.0.1", prefixlen=16)
    tenant.ipr.neigh(
        "add", dst="10.66.0.9", lladdr="02:66:00:00:00:09", ifindex=tenant.index, state="permanent"
    )
    tenant.ipr.route("add", dst="10.77.0.0/16", gateway="10.66.0.9")
    tenant.ipr.route("add", dst="default", gateway="10.66.0.9")


def qdiscs_and_filters(tenant: Tenant) -> None:
    tenant.ipr.tc("add", "htb", tenant.index, 0x10000, default=0x200000)
    if not any(q.get_attr("TCA_KIND") == "clsact" for q in tenant.ipr.get_qdiscs(index=tenant.index)):
        tenant.ipr.tc("add", "clsact", tenant.index)
    program = tenant.kept.enter_context(bpf.prog_load(bpf.ProgramType.SCHED_CLS, NEXT, name="tenant"))
    tenant.ipr.tc(
        "add-filter",
        "bpf",
        tenant.index,
        ":1",
        fd=program.fd,
        name="evil",
        parent="ffff:fff2",
        direct_action=True,
    )


def xdp_by_netlink(tenant: Tenant) -> None:
    program = tenant.kept.enter_context(bpf.prog_load(bpf.ProgramType.XDP, PASS_XDP, name="tenant"))
    tenant.set(xdp={"attrs": [("IFLA_XDP_FD", program.fd), ("IFLA_XDP_FLAGS", 2)]})


def links_that_are_kept(tenant: Tenant) -> None:
    """As if pinned in a bpffs of the tenant's: they live on when the pod is gone."""
    keep = tenant.kept.enter_context
    classifier = keep(bpf.prog_load(bpf.ProgramType.SCHED_CLS, NEXT, name="tenant"))
    for where in (bpf.AttachType.TCX_INGRESS, bpf.AttachType.TCX_EGRESS):
        keep(bpf.link_create(classifier, tenant.index, where))
    program = keep(bpf.prog_load(bpf.ProgramType.XDP, PASS_XDP, name="tenant"))
    keep(bpf.link_create(program, tenant.index, bpf.AttachType.XDP, flags=bpf.XDP_FLAGS_SKB_MODE))


def children(tenant: Tenant) -> None:
    tenant.add("child", "macvlan", link=tenant.index, macvlan_mode="bridge")
    tenant.add("passthru", "macvlan", link=tenant.index, macvlan_mode="vepa")


def bridge(tenant: Tenant) -> None:
    tenant.ipr.flush_addr(index=tenant.index)
    tenant.set(master=tenant.add("br0", "bridge"))


DEEDS: Mapping[str, Sequence[Callable[[Tenant], None]]] = {
    "settings": [settings],
    "escapes": [names_with_escapes, children],
    "clashes": [names_of_the_host, addresses_and_routes, qdiscs_and_filters, xdp_by_netlink],
    "links": [links_that_are_kept],
    "bridge": [bridge],
}


def commit(pod: SimPod, deeds: Sequence[Callable[[Tenant], None]], kept: ExitStack) -> None:
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    (index,) = seen.indexes(pod)

    def act() -> None:
        with IPRoute() as ipr:
            for deed in deeds:
                deed(Tenant(ipr, index, kept))

    in_netns(pod.sandbox.netns_path, act)


@contextmanager
def host_links() -> Iterator[None]:
    """Links of the host's own, one of whose names a tenant takes."""

    def add() -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname="hostlink", kind="ifb")
            ipr.link("property_add", index=ipr.link_lookup(ifname="hostlink")[0], altname=["hostalt"])

    def remove() -> None:
        with IPRoute() as ipr:
            ipr.link("del", index=ipr.link_lookup(ifname="hostlink")[0])

    in_thread(add)
    try:
        yield
    finally:
        in_thread(remove)


# --- guarantees -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [RuntimeMode.POD_RPC, RuntimeMode.CRIO])
@pytest.mark.parametrize("hook", ["tcx", "clsact"])
def test_the_next_tenant_and_the_host_see_nothing_of_the_last(mode: RuntimeMode, hook: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        seen.raise_peers(made.far)
        with host_links(), ExitStack() as kept:
            home, slices = at_home(), offered(sim)
            first = await running(sim, "first", **CLAIMED)
            claimed = device_of(first)
            await sim.delete_pod(first)
            assert compare(home, at_home()) == []
            for name, deeds in DEEDS.items():
                pod = await running(sim, f"a-{name}", **CLAIMED)
                commit(pod, deeds, kept)
                if name == "escapes":
                    await asyncio.to_thread(no_raw_bytes, sim)
                assert offered(sim) == slices
                await sim.delete_pod(pod)
                assert compare(home, at_home()) == [], name
                pod = await running(sim, f"b-{name}", **CLAIMED)
                assert compare(claimed, device_of(pod)) == [], name
                await sim.delete_pod(pod)
                assert compare(home, at_home()) == [], name
                assert offered(sim) == slices, name
            await asyncio.to_thread(no_raw_bytes, sim)

    play(1, story, mode=mode, hook=hook)


def into(pod: SimPod, index: int, nested: SimNetns) -> None:
    """The pod moves its device into a namespace that it made."""
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None

    def act() -> None:
        with IPRoute() as ipr:
            ipr.link("set", index=index, net_ns_fd=nested.fd)

    in_netns(pod.sandbox.netns_path, act)


def and_home(index: int, nested: SimNetns) -> None:
    """The way a physical device takes by itself when the nested namespace ends: with all that was set."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        nested.netlink(lambda ipr: ipr.link("set", index=index, address="02:66:66:66:66:66", ifname="mine"))
        nested.netlink(lambda ipr: ipr.link("set", index=index, net_ns_fd=home))
    finally:
        os.close(home)


def quarantined(sim: SimNode) -> set[str]:
    """Devices that a scheduler sees as not to be given away."""
    key = f"{sim.driver}/quarantined"
    return {
        name
        for name, device in offered(sim).items()
        if [each["effect"] for each in device.get("taints") or [] if each["key"] == key] == ["NoSchedule"]
    }


@pytest.mark.parametrize(("mode", "restarted"), [(RuntimeMode.POD_RPC, False), (RuntimeMode.CRIO, True)])
def test_a_hidden_device_is_withheld_until_it_is_back_and_clean(mode: RuntimeMode, restarted: bool) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        home, slices = at_home(), offered(sim)
        with netns() as nested:
            pod = await running(sim, "hides", **CLAIMED)
            (index,), ((given,),) = seen.indexes(pod), pod.devices.values()
            into(pod, index, nested)
            await sim.delete_pod(pod)
            await seen.until(lambda: quarantined(sim) == {given.device}, "the taint")
            if restarted:
                await sim.kill_agent()
                await sim.start_agent()
            assert quarantined(sim) == offered(sim).keys()
            (event,) = seen.events(sim, "DeviceQuarantined", pod.spec.uid)
            assert "namespace of its own" in event["message"]
            (row,) = json.loads(sim.knd("pods", "-o", "json").stdout)["rows"]
            assert "namespace of its own" in row["quarantine"]
            with pytest.raises(LookupError):
                sim.schedule("next", [claim("next-nic")])
            assert sim.agent.ready()
            in_thread(lambda: and_home(index, nested))
            await seen.until(lambda: offered(sim) == slices, "offered again")
            assert compare(home, at_home()) == []
            next_pod = await running(sim, "after", **CLAIMED)
            await sim.delete_pod(next_pod)

            # Destroyed where it was hidden, it is no more, and nothing is kept for it.
            pod = await running(sim, "hides-again", **CLAIMED)
            into(pod, index, nested)
            await sim.delete_pod(pod)
            await seen.until(lambda: quarantined(sim) == {given.device}, "the taint")
        # The kernel takes a namespace apart when it gets to it.
        await seen.until(lambda: made.far.link_index("peer0") is None, "destroyed", seconds=60)
        await seen.until(lambda: offered(sim) == {}, "withdrawn")
        assert json.loads(sim.knd("pods", "-o", "json").stdout)["rows"] == []

    play(1, story, mode=mode, hook="tcx")
