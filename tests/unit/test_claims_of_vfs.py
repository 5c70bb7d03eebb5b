"""Claims of VFs: driven by their holder or set on their PF, as policy and hardware allow; and home again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from driver.claimconfig import ClaimLimits, FieldPath
from driver.errors import Refusal
from driver.execute.target import NotClean, Vanished
from driver.model import PreparationState
from driver.plan import Act
from driver.policy import NodePolicy, ResetPolicy
from driver.traffic import Enforcement
from hw.errors import Busy, Refused
from hw.model import DeviceKind, MacAddress, PciAddress, PciIdentity, VfSettings, VfVlan
from tests.unit.claims_world import FAR, VFIO, A, World, device, play_claims

VF = PciIdentity(PciAddress("0000:21:10.0"), PciAddress("0000:21:00.0"), 0)
HELD = VfSettings(vlan=VfVlan(), trust=False, mac=MacAddress("02:aa:00:00:00:02"))
GUARDED = ("vf.driver", "vf.vlan", "vf.trust", "vf.spoofCheck", "vf.minRate", "interface.hardwareAddress")


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return partial(play_claims, tmp_path, monkeypatch)


def config(**sections: object) -> str:
    return json.dumps({"apiVersion": "knd.internal/v1alpha1", "kind": "NetworkDeviceConfig", **sections})


def one_vf(world: World, *, reset: ResetPolicy = ResetPolicy.REPROBE, **fields: object) -> None:
    """A VF on an igb PF, and a policy that lets claims ask for everything."""
    found = device(A, 20, kind=DeviceKind.VF, identity=VF, driver="igbvf", vf=HELD, pf_mtu=1500)
    world.node.present[A] = replace(found, **fields)  # type: ignore[arg-type]
    allow = tuple(map(FieldPath, GUARDED))
    world.policy = NodePolicy(claim_limits=ClaimLimits(allow=allow), reset=reset)


def done(world: World) -> list[Act]:
    return [act for act, _ in world.node.acts]


# --- driven by its holder ---------------------------------------------------------------------------


def _allowing_vfio() -> NodePolicy:
    return NodePolicy(claim_limits=ClaimLimits(allow=(FieldPath("vf.driver"),)))


def test_a_vf_given_by_its_files_is_prepared_without_programs_and_goes_home_to_its_driver(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.policy = _allowing_vfio()
        world.node.present[A] = device(A, 20, kind=DeviceKind.VF, identity=VF, driver="igbvf")
        ref = world.claim("one", A, parameters=VFIO)
        assert await world.prepare(ref) == [A]
        (made,) = world.book.preparations()
        assert (made.by_file, made.home_driver, made.pod_ifname) == (True, "igbvf", None)
        assert Act.ARM not in [act for act, _ in world.node.acts]
        world.node.acts.clear()
        assert await world.unprepare(ref) == ""
        assert [act for act, _ in world.node.acts] == [*(Act.UNBIND, Act.TO_KERNEL, Act.RESTORE, Act.VERIFY)]

    play(story)


@pytest.mark.parametrize(
    ("allowed", "fields", "words"),
    [
        (False, {"kind": DeviceKind.VF, "driver": "igbvf"}, "cannot be set by a claim"),
        (True, {"kind": DeviceKind.NETDEV}, "no VF with a driver"),
        (True, {"kind": DeviceKind.VF, "driver": None}, "no VF with a driver"),
        (True, {"kind": DeviceKind.PF, "driver": "igb"}, "no VF with a driver"),
    ],
)
def test_only_a_vf_is_given_by_its_files_and_only_where_policy_lets_claims_ask(  # type: ignore[no-untyped-def]
    play, allowed: bool, fields: dict[str, object], words: str
) -> None:
    async def story(world: World) -> None:
        if allowed:
            world.policy = _allowing_vfio()
        world.node.present[A] = device(A, 20, **fields)
        answer = await world.prepare(world.claim("one", A, parameters=VFIO))
        assert "vf.driver" in answer
        assert words in answer
        assert not world.node.acts

    play(story)


def test_an_interface_cannot_be_set_up_where_there_will_be_none(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.policy = _allowing_vfio()
        world.node.present[A] = device(A, 20, kind=DeviceKind.VF, identity=VF, driver="igbvf")
        both = VFIO[:-1] + ', "interface": {"name": "net1", "mtu": 1400}}'
        answer = await world.prepare(world.claim("one", A, parameters=both))
        assert "interface.name" in answer
        assert "interface.mtu" in answer

    play(story)


# --- set on its PF ----------------------------------------------------------------------------------


def test_what_is_asked_of_a_pf_is_recorded_with_what_it_held_before(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world)
        ref = world.claim("one", A, parameters=config(vf={"vlan": {"id": 7}, "trust": True}))
        assert await world.prepare(ref) == [A]
        (made,) = world.book.preparations()
        assert made.vf_baseline == HELD
        assert made.vf_wanted == replace(HELD, vlan=VfVlan(id=7), trust=True)
        assert done(world) == [Act.NOTE_FOREIGN, Act.TIDY, Act.SET_VF, Act.ARM]

    play(story)


def test_a_refused_setting_takes_the_prepare_back_without_a_reset_of_what_no_pod_had(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world)
        world.node.fail[Act.SET_VF, A] = Refusal("VfSettingRefused", "dev-a cannot have vf.minRate 1M")
        ref = world.claim("one", A, parameters=config(vf={"minRate": "1M", "maxRate": "1M"}))
        assert "dev-a cannot have vf.minRate 1M" in await world.prepare(ref)
        assert world.states() == {}
        assert Act.UNBIND not in done(world)
        assert done(world).count(Act.RESTORE_VF) == 2

    play(story)


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"vf": {"vlan": {"id": 7}}}, "vf.vlan"),
        ({"vf": {"trust": False}}, "vf.trust"),
        ({"vf": {"linkState": "auto"}}, "vf.linkState"),
        (
            {"vf": {"driver": "vfio-pci"}, "interface": {"hardwareAddress": "02:00:00:00:00:01"}},
            "interface.hardwareAddress",
        ),
    ],
)
def test_a_vf_whose_pf_is_not_to_be_seen_is_refused_with_the_field(  # type: ignore[no-untyped-def]
    play, sections: dict[str, object], path: str
) -> None:
    async def story(world: World) -> None:
        one_vf(world, vf=None, pf_mtu=None)
        answer = await world.prepare(world.claim("one", A, parameters=config(**sections)))
        assert f"{path}: dev-a is a VF whose PF is not to be seen" in answer
        assert world.states() == {}

    play(story)


def test_a_vf_without_a_pf_in_sight_can_have_an_address_on_its_netdev(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world, vf=None, pf_mtu=None)
        given = config(interface={"hardwareAddress": "02:00:00:00:00:01"})
        assert await world.prepare(world.claim("one", A, parameters=given)) == [A]

    play(story)


def test_what_is_no_vf_has_no_settings_of_one(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world, kind=DeviceKind.PF)
        answer = await world.prepare(world.claim("one", A, parameters=config(vf={"maxRate": "1G"})))
        assert "vf.maxRate: dev-a is no VF" in answer

    play(story)


@pytest.mark.parametrize(("mtu", "taken"), [(1500, True), (1501, False)])
def test_a_vfs_mtu_is_at_most_its_pfs(play, mtu: int, taken: bool) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world)
        answer = await world.prepare(world.claim("one", A, parameters=config(interface={"mtu": mtu})))
        assert answer == [A] if taken else "dev-a takes up to 1500, the MTU of its PF, not 1501" in answer

    play(story)


def test_two_devices_given_by_their_files_may_be_told_their_addresses(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world)
        given = config(vf={"driver": "vfio-pci"}, interface={"hardwareAddress": "02:00:00:00:00:01"})
        assert await world.prepare(world.claim("one", A, parameters=given)) == [A]
        assert done(world) == [Act.TIDY, Act.SET_VF, Act.TO_VFIO]

    play(story)


# --- home -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ResetPolicy)
def test_a_vf_is_probed_anew_between_tenants_unless_policy_says_otherwise(play, reset: ResetPolicy) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world, reset=reset)
        ref = world.claim("one", A)
        await world.prepare(ref)
        world.node.acts.clear()
        assert await world.unprepare(ref) == ""
        again = reset is ResetPolicy.REPROBE
        assert ({Act.UNBIND, Act.TO_KERNEL} <= set(done(world))) == again
        assert world.states() == {}

    play(story)


def test_a_vf_that_stays_dirty_is_probed_once_and_not_each_time_it_is_looked_at(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world)
        ref = world.claim("one", A)
        await world.prepare(ref)
        world.node.fail[Act.VERIFY_VF, A] = NotClean(A, ("vlan on its PF is 7, should be none",))
        world.node.fail[Act.VERIFY, A] = NotClean(A, ("mtu is 9000, should be 1500",))
        for _ in range(3):
            await world.unprepare(ref)
        assert done(world).count(Act.UNBIND) == 1
        assert done(world).count(Act.RESTORE_VF) == 3
        reason = world.book.quarantines()[A].reason
        assert "vlan on its PF is 7" in reason
        assert "mtu is 9000" in reason
        world.node.fail.clear()
        assert await world.unprepare(ref) == ""
        assert world.states() == {}

    play(story)


@pytest.mark.parametrize("act", [Act.UNBIND, Act.TO_KERNEL])
@pytest.mark.parametrize("by_file", [True, False])
def test_a_driver_that_does_not_let_go_or_take_withholds_the_vf_and_keeps_its_record(  # type: ignore[no-untyped-def]
    play, act: Act, by_file: bool
) -> None:
    """Without a netdev it looks as if it were gone; its record alone says what is to be put back."""

    async def story(world: World) -> None:
        one_vf(world)
        ref = world.claim("one", A, parameters=VFIO if by_file else "")
        await world.prepare(ref)
        error = Busy("take dev-a from its driver", 110) if act is Act.UNBIND else Refused("bind dev-a", 5)
        world.node.fail[act, A] = error
        world.node.fail[Act.RESTORE, A] = world.node.fail[Act.VERIFY, A] = Vanished("dev-a did not come home")
        await world.unprepare(ref)
        assert world.states() == {A: PreparationState.UNPREPARING}
        assert str(error) in world.book.quarantines()[A].reason
        world.node.fail.clear()
        world.node.acts.clear()
        assert await world.unprepare(ref) == ""
        assert {Act.UNBIND, Act.TO_KERNEL} <= set(done(world))
        assert world.states() == {}

    play(story)


def test_a_vf_that_is_no_more_is_not_kept_for_its_driver(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world)
        ref = world.claim("one", A)
        await world.prepare(ref)
        for act in (Act.TO_KERNEL, Act.RESTORE, Act.VERIFY):
            world.node.fail[act, A] = Vanished("there is no PCI function (any more)")
        await world.unprepare(ref)
        assert world.states() == {}
        assert not world.book.quarantines()

    play(story)


def test_a_vf_whose_reset_takes_its_time_is_refused_at_once_until_it_is_clean(play) -> None:  # type: ignore[no-untyped-def]
    """Whoever has it in hand keeps its lock: the next claim is not made to wait for that."""

    async def story(world: World) -> None:
        one_vf(world)
        ref, following = world.claim("one", A), world.claim("two", A)
        await world.prepare(ref)
        world.node.stall[Act.UNBIND, A] = threading.Event()
        assert await world.unprepare(ref, seconds=0.2) == ""
        answer = await world.prepare(following)
        assert "is withheld until it is clean: it did not come home in time" in answer
        world.node.stall.pop((Act.UNBIND, A)).set()
        assert await world.workers.idle(world.clock.monotonic() + FAR)
        world.book.release(A)
        assert await world.prepare(following) == [A]

    play(story)


# --- limits -------------------------------------------------------------------------------------------


REFUSED = Refusal("VfSettingRefused", "dev-a cannot have qos.egress.rate 100M: igb refuses it")


def test_where_the_device_refuses_a_limit_the_nodes_kernel_keeps_it_if_it_may(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world)
        world.node.fail[Act.SET_VF, A] = REFUSED
        ref = world.claim("one", A, parameters=config(qos={"egress": {"rate": "100M"}}))
        assert await world.prepare(ref) == [A]
        (made,) = world.book.preparations()
        assert made.config.qos.enforcement is Enforcement.SOFTWARE
        assert made.vf_wanted is None
        # What was set by then is taken back before.
        assert done(world) == [
            *(Act.NOTE_FOREIGN, Act.TIDY, Act.SET_VF),
            *(Act.RESTORE_VF, Act.RESTORE, Act.PUT_FOREIGN_BACK),
            *(Act.NOTE_FOREIGN, Act.TIDY, Act.ARM),
        ]
        assert await world.unprepare(ref) == ""

    play(story)


def test_a_limit_that_only_hardware_may_keep_is_refused_with_the_device(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world)
        world.node.fail[Act.SET_VF, A] = REFUSED
        asked = {"egress": {"rate": "100M"}, "enforcement": "hardware"}
        assert "igb refuses it" in await world.prepare(world.claim("one", A, parameters=config(qos=asked)))
        assert world.book.preparations() == ()

    play(story)


def test_a_limit_that_the_device_takes_is_the_devices(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        one_vf(world)
        ref = world.claim("one", A, parameters=config(qos={"egress": {"rate": "100M"}}))
        assert await world.prepare(ref) == [A]
        (made,) = world.book.preparations()
        assert made.vf_wanted is not None
        assert made.vf_wanted.max_rate == 100

    play(story)
