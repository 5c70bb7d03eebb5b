"""Single acts on real links: what a device that cannot go where it should is taken for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bpf.layout import Hook
from driver.errors import NotNow, Refusal
from driver.execute.actions import NodeActs, link_up, move_home, move_in
from driver.execute.probe import Host
from driver.execute.target import Target, Vanished
from driver.model import InterfaceConfig, NicConfig, Preparation
from hw.model import IfIndex, IfName, LinkSettings, SoftwareIdentity
from hw.netlink import LinkSocket
from hw.netns import NetnsHandle, host_netns, open_netns
from hw.sysfs import Sysfs
from hw.udev import Udev
from kndsim.links import SimNetns, netns, private_host, soft_link, veth_pair
from tests.unit.journal_values import preparation
from tests.unit.no_foreign import NO_FOREIGN


@pytest.fixture
def pod() -> Iterator[SimNetns]:
    """A pod's namespace; the caller plays the host in a namespace of its own."""
    with private_host(), netns() as made:
        yield made


@contextmanager
def device(pod: SimNetns) -> Iterator[tuple[Target, NodeActs]]:
    """A veth at home, on its way to the pod as net1."""
    with veth_pair("vh0", "vp0") as (index, _), ExitStack() as stack:
        home = stack.enter_context(LinkSocket(None))
        link = home.by_index(IfIndex(index))
        assert link is not None
        made: Preparation = replace(
            preparation(0),
            identity=SoftwareIdentity("veth", link.ifindex, link.peer, link.peer_nsid),
            dies_with_netns=True,
            config=NicConfig(interface=InterfaceConfig(name=IfName("net1"), mtu=1400)),
            baseline=LinkSettings.of(link),
        )
        handle: NetnsHandle = stack.enter_context(open_netns(pod.path))
        target = Target(
            preparation=made,
            attachment=None,
            home=home,
            home_netns=stack.enter_context(host_netns()),
            pod=stack.enter_context(LinkSocket(handle)),
            pod_netns=handle,
            hint=link.ifindex,
        )
        acts = NodeActs(
            hook=Hook.CLSACT,
            accounting=None,
            programs=None,
            fold=lambda *a: None,
            meters=None,
            host=Host(Sysfs(Path("/sys")), Udev(Path("/none"))),
            shaper=SimpleNamespace(shape=None, unshape=None),
            foreign=NO_FOREIGN,
        )  # type: ignore[arg-type]
        yield target, acts


def test_a_software_device_is_found_again_wherever_it_was_put(pod: SimNetns) -> None:
    with device(pod) as (target, acts):
        acts.verify(target)
        move_in(target)
        found = target.find_in_pod()
        assert found is not None
        assert (found.ifindex, found.name, found.mtu) == (target.hint, "net1", 1400)
        link_up(target)
        move_home(target)
        acts.restore(target)
        acts.verify(target)


def test_where_its_index_is_taken_it_is_refused_with_a_reason_and_stays_at_home(pod: SimNetns) -> None:
    """The kernel would give it another index there, by which nobody would know it again."""
    with device(pod) as (target, acts):
        assert target.hint is not None
        with soft_link("br0", "bridge", where=pod, index=target.hint):
            with pytest.raises(
                Refusal, match=f"keeps interface index {target.hint} .*'br0' has it"
            ) as raised:
                move_in(target)
            assert raised.value.reason == "IndexTaken"
            acts.verify(target)
            assert target.find_in_pod() is None


def test_a_device_that_is_still_in_its_pod_has_not_vanished(pod: SimNetns) -> None:
    with device(pod) as (target, acts):
        move_in(target)
        with pytest.raises(NotNow, match="still in the pod's network namespace"):
            acts.verify(target)
        with pytest.raises(Vanished, match="did not come home"):
            acts.verify(replace(target, pod=None, pod_netns=None))
        move_home(target)
        acts.restore(target)
        acts.verify(target)


def test_a_name_that_is_taken_at_home_does_not_keep_a_device_in_the_pod(pod: SimNetns) -> None:
    with device(pod) as (target, acts):
        move_in(target)
        with soft_link("vh0", "bridge"):
            move_home(target)
            assert target.find_in_pod() is None
            found = target.find_at_home()
            assert found is not None
            assert found.name == f"knd{target.hint}"
        acts.restore(target)
        acts.verify(target)


def test_a_link_that_takes_its_place_is_not_taken_for_it(pod: SimNetns) -> None:
    with device(pod) as (target, _):
        other = replace(target.preparation, identity=SoftwareIdentity("veth", IfIndex(9999), None, None))
        stranger = replace(target, preparation=other)
        assert stranger.find_at_home() is None
        with pytest.raises(NotNow, match="is not in the host's network namespace"):
            move_in(stranger)
