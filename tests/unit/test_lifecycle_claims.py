"""Prepare and unprepare, over a real book, engine and workers; devices and the kernel are made up.

Whatever fails, repeats, overlaps or comes late: a claim is prepared as a whole or on its way home.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from driver.errors import NotNow, Refusal
from driver.lifecycle.ports import ClaimFailed
from driver.model import (
    Claim,
    ClaimUid,
    DeviceName,
    PoolName,
    PreparationKey,
    PreparationState,
)
from driver.plan import Act
from driver.rdma import RdmaBinding, RdmaMode
from hw.errors import HwError
from hw.model import DeviceKind, PciAddress, PciIdentity, RdmaName
from tests.conftest import WaitUntilAsync
from tests.unit.claims_world import FAR, POOL, A, B, C, World, device, interface, play_claims

VF = PciIdentity(PciAddress("0000:21:10.0"), PciAddress("0000:21:00.0"), 0)


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return partial(play_claims, tmp_path, monkeypatch)


PREPARED, UNPREPARING = PreparationState.PREPARED, PreparationState.UNPREPARING


def test_a_repeated_prepare_answers_the_same_and_does_nothing(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A, B)
        assert await world.prepare(ref) == [A, B]
        done = list(world.node.acts)
        again = await asyncio.gather(*(world.prepare(ref) for _ in range(5)))
        assert again == [[A, B]] * 5
        assert world.node.acts == done
        assert world.reads == 1

    play(story)


def test_a_claim_is_told_of_programs_of_others_and_its_end_forgets_them(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.foreign[A] = "programs of others on dev-a"
        ref = world.claim("c", A, B)
        assert await world.prepare(ref) == [A, B]
        assert [(event.reason, event.message) for event in world.events] == [
            ("ForeignPrograms", "programs of others on dev-a")
        ]
        assert await world.unprepare(ref) == ""
        assert sorted(world.swept) == [A, B]

    play(story)


def test_programs_of_others_stay_on_record_until_the_device_is_clean(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A)
        assert await world.prepare(ref) == [A]
        world.node.fail[Act.PUT_FOREIGN_BACK, A] = HwError("no memory")
        await world.unprepare(ref, 0.5)
        assert world.swept == []
        assert "no memory" in world.book.quarantines()[A].reason
        world.node.fail.clear()
        assert await world.unprepare(ref) == ""
        assert world.swept == [A]

    play(story)


def test_overlapping_prepares_of_a_claim_are_one(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A)
        assert await asyncio.gather(*(world.prepare(ref) for _ in range(5))) == [[A]] * 5
        assert world.node.acts.count((Act.ARM, A)) == 1

    play(story)


@pytest.mark.parametrize("failing", [B, C])
@pytest.mark.parametrize("error", [HwError("no"), OSError("no"), NotNow("no")])
def test_when_one_device_of_a_claim_fails_none_is_prepared(
    play, failing: DeviceName, error: Exception
) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A, B, C)
        world.node.fail[Act.ARM, failing] = error
        assert await world.prepare(ref) == "no"
        assert world.states() == {}
        assert (Act.VERIFY, A) in world.node.acts
        assert [event.reason for event in world.events] == ["PrepareFailed"]
        world.node.fail.clear()
        assert await world.prepare(ref) == [A, B, C]

    play(story)


def test_a_device_that_cannot_be_taken_back_is_withheld_and_never_answered_for(play) -> None:  # type: ignore[no-untyped-def]
    """The first of three came clean again, the second did not: kubelet's next call must not get the rest."""

    async def story(world: World) -> None:
        ref = world.claim("c", A, B, C)
        world.node.fail[Act.ARM, C] = HwError("no slot")
        world.node.fail[Act.VERIFY, B] = HwError("it has addresses")
        assert await world.prepare(ref) == "no slot"
        assert world.states() == {B: UNPREPARING}
        assert set(world.book.quarantines()) == {B}
        assert [bool(each.taints) for each in world.offers[-1]] == [False, True, False]
        assert "still being taken back" in str(await world.prepare(ref))
        assert "withheld until it is clean" in str(await world.prepare(world.claim("other", B)))
        world.node.fail.clear()
        assert await world.unprepare(ref) == ""
        assert world.states() == {}
        assert world.book.quarantines() == {}
        assert await world.prepare(ref) == [A, B, C]

    play(story)


def test_a_crash_in_the_middle_leaves_no_half_of_a_claim_to_answer_for(play, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A, B)
        seen: list[set[tuple[DeviceName, PreparationState]]] = []
        advance, opens = world.book.advance_preparations, world.book.open_preparations

        def watched(change: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                made = change(*args, **kwargs)
                seen.append(set(world.states().items()))
                return made

            return wrapped

        world.book.advance_preparations = watched(advance)  # type: ignore[method-assign]
        world.book.open_preparations = watched(opens)  # type: ignore[method-assign]
        assert await world.prepare(ref) == [A, B]
        assert await world.unprepare(ref) == ""
        for states in seen:
            prepared = [name for name, state in states if state is PREPARED]
            assert prepared == [] or len(prepared) == 2, states

    play(story)


def test_a_held_device_is_refused_and_its_holder_untouched(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        holder = world.claim("holder", A, pods=("one",))
        assert await world.prepare(holder) == [A]
        before = world.book.preparations()
        done = list(world.node.acts)
        said = await world.prepare(world.claim("late", B, A, pods=("two",)))
        assert said == f"{A} is held by claim ns/holder"
        assert world.book.preparations() == before
        assert world.node.acts == done

    play(story)


def test_one_bad_claim_of_a_call_does_not_fail_the_others(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        good, gone, away = world.claim("good", A), world.claim("gone"), world.claim("away")
        world.claims[gone.uid] = Refusal("Gone", "the claim is gone")
        world.claims[away.uid] = NotNow("the API server does not answer")
        answers = await world.handler.prepare([gone, good, away], world.clock.monotonic() + FAR)
        assert set(answers) == {gone.uid, good.uid, away.uid}
        assert answers[gone.uid] == ClaimFailed("the claim is gone")
        assert not isinstance(answers[good.uid], ClaimFailed)

    play(story)


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ({"name": "net1"}, {"name": "net1"}, "would both"),
        ({"name": "net1", "mtu": 1400}, {"name": "eth0"}, "interface.name"),
    ],
)
def test_claims_of_one_pod_are_checked_together_also_in_one_call(  # type: ignore[no-untyped-def]
    play, first: dict[str, object], second: dict[str, object], sentence: str
) -> None:
    async def story(world: World) -> None:
        one = world.claim("one", A, parameters=interface(**first))
        two = world.claim("two", B, parameters=interface(**second))
        stranger = world.claim("stranger", C, pods=("other",), parameters=interface(name="net1"))
        answers = await world.handler.prepare([one, two, stranger], world.clock.monotonic() + FAR)
        failed = [answer.message for answer in answers.values() if isinstance(answer, ClaimFailed)]
        assert len(failed) == 1
        assert sentence in failed[0]
        assert not isinstance(answers[stranger.uid], ClaimFailed)
        # And the other way, when the first is prepared already.
        assert sentence in str(await world.prepare(two if isinstance(answers[two.uid], ClaimFailed) else one))

    play(story)


def test_a_slow_claim_does_not_hold_up_another(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        go_on = world.node.stall[Act.TIDY, A] = threading.Event()
        slow = asyncio.create_task(world.prepare(world.claim("slow", A)))
        assert await asyncio.wait_for(world.prepare(world.claim("quick", B)), FAR) == [B]
        assert not slow.done()
        go_on.set()
        assert await slow == [A]

    play(story)


def test_a_device_that_a_scan_does_not_know_yet_is_looked_for_once(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        new = DeviceName("dev-new")
        world.node.unseen[new] = device(new, 40)
        assert await world.prepare(world.claim("c", new)) == [new]
        assert world.node.scans == 1
        assert await world.prepare(world.claim("none", DeviceName("nowhere"))) == (
            "this node has no device nowhere now"
        )
        assert world.node.scans == 2

    play(story)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"withheld": "in use by the host: it has an address"}, "is not given away: in use by the host"),
        ({"ifindex": None}, "is not in the host's network namespace now"),
    ],
)
def test_a_device_that_must_not_be_given_is_refused_with_a_sentence(  # type: ignore[no-untyped-def]
    play, change: dict[str, Any], sentence: str
) -> None:
    async def story(world: World) -> None:
        world.node.present[A] = device(A, 20, **change)
        assert sentence in str(await world.prepare(world.claim("c", A)))
        assert world.states() == {}

    play(story)


@pytest.mark.parametrize(
    ("mtu", "bounds", "said"),
    [
        (9001, {}, "interface.mtu: dev-a takes 68 to 9000, not 9001"),
        (1200, {"min_mtu": 1280, "max_mtu": None}, "interface.mtu: dev-a takes at least 1280, not 1200"),
        (9000, {}, [A]),
        (9001, {"min_mtu": None, "max_mtu": None}, [A]),
    ],
)
def test_an_mtu_that_the_driver_would_refuse_is_refused_in_prepare(  # type: ignore[no-untyped-def]
    play, mtu: int, bounds: dict[str, Any], said: object
) -> None:
    async def story(world: World) -> None:
        world.node.present[A] = device(A, 20, **bounds)
        assert await world.prepare(world.claim("c", A, parameters=interface(mtu=mtu))) == said

    play(story)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"allocated": False}, "is not allocated"),
        ({"devices": ()}, "has no device of driver knd.internal"),
        ({"admin_access": True}, "adminAccess"),
        ({"pool": PoolName("node-b")}, "of pool node-b"),
        ({"twice": True}, "is allocated twice"),
    ],
)
def test_an_allocation_that_makes_no_sense_here_is_refused(  # type: ignore[no-untyped-def]
    play, change: dict[str, Any], sentence: str
) -> None:
    async def story(world: World) -> None:
        ref = world.claim("c", A, *([A] if change.pop("twice", False) else []))
        claim = world.claims[ref.uid]
        assert isinstance(claim, Claim)
        of_device = {key: change.pop(key) for key in ("admin_access", "pool") if key in change}
        devices = tuple(replace(each, **of_device) for each in claim.devices)
        world.claims[ref.uid] = replace(claim, **{"devices": devices, **change})
        assert sentence in str(await world.prepare(ref))
        assert world.states() == {}

    play(story)


def test_a_late_prepare_is_undone_and_the_next_call_starts_anew(  # type: ignore[no-untyped-def]
    play, wait_until_async: WaitUntilAsync
) -> None:
    async def story(world: World) -> None:
        ref = world.claim("c", A, B)
        go_on = world.node.stall[Act.ARM, A] = threading.Event()
        assert "did not finish in the time allowed" in str(await world.prepare(ref, 0.5))
        assert "still being taken back" in str(await world.prepare(ref))
        go_on.set()
        await wait_until_async(lambda: not world.states())
        assert (Act.ARM, B) not in world.node.acts
        assert await world.prepare(ref) == [A, B]

    play(story)


def test_a_prepare_that_waited_too_long_for_its_device_touches_nothing(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        go_on = threading.Event()
        busy = asyncio.create_task(world.workers.run([A], lambda: go_on.wait(FAR)))
        assert "did not finish" in str(await world.prepare(world.claim("c", A), 0.2))
        go_on.set()
        await busy
        assert await world.workers.idle(world.clock.monotonic() + FAR)
        assert world.node.acts == []
        assert world.states() == {}

    play(story)


def test_a_call_that_finds_another_before_it_says_how_that_one_ended(play) -> None:  # type: ignore[no-untyped-def]
    """The first was late while its intent was being written, so the second saw nothing on record yet."""

    async def story(world: World) -> None:
        ref = world.claim("c", A)
        go_on, opens = threading.Event(), world.book.open_preparations

        def slow(made: Any) -> Any:
            assert go_on.wait(FAR)
            return opens(made)

        world.book.open_preparations = slow  # type: ignore[method-assign]
        world.node.fail[Act.VERIFY, A] = HwError("it has addresses")
        assert "did not finish" in str(await world.prepare(ref, 0.3))
        second = asyncio.create_task(world.prepare(ref))
        await asyncio.sleep(0)
        go_on.set()
        assert "still being taken back" in str(await second)

    play(story)


def test_half_a_claim_is_never_answered_for(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A, B)
        assert await world.prepare(ref) == [A, B]
        world.book.advance_preparations(world.book.of_device(B), UNPREPARING)
        assert "still being taken back" in str(await world.prepare(ref))

    play(story)


def test_an_unprepare_during_a_prepare_wins(play, wait_until_async: WaitUntilAsync) -> None:  # type: ignore[no-untyped-def]
    """Kubelet gave up on the prepare and the pod was deleted while the work went on."""

    async def story(world: World) -> None:
        ref = world.claim("c", A)
        go_on = world.node.stall[Act.ARM, A] = threading.Event()
        await world.prepare(ref, 0.3)
        leaving = asyncio.create_task(world.unprepare(ref))
        await wait_until_async(lambda: world.states() == {A: UNPREPARING})
        go_on.set()
        assert await leaving == ""
        assert world.states() == {}

    play(story)


def test_from_the_moment_of_unprepare_nothing_is_answered_from_the_record(  # type: ignore[no-untyped-def]
    play, wait_until_async: WaitUntilAsync
) -> None:
    async def story(world: World) -> None:
        ref = world.claim("c", A)
        assert await world.prepare(ref) == [A]
        go_on = threading.Event()
        busy = asyncio.create_task(world.workers.run([A], lambda: go_on.wait(FAR)))
        assert await world.unprepare(ref, 0.3) == ""
        assert world.states() == {A: UNPREPARING}
        assert "it did not come home in time" in world.book.quarantines()[A].reason
        assert "still being taken back" in str(await world.prepare(ref))
        go_on.set()
        await busy
        await wait_until_async(lambda: not world.states())
        assert world.book.quarantines() == {}
        assert await world.prepare(ref) == [A]

    play(story)


def test_unprepare_is_done_once_however_often_and_early_it_is_asked(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A, B)
        assert await world.unprepare(ref) == ""
        assert await world.prepare(ref) == [A, B]
        world.node.acts.clear()
        assert await asyncio.gather(*(world.unprepare(ref) for _ in range(4))) == [""] * 4
        assert world.node.acts.count((Act.VERIFY, A)) == 1
        assert world.states() == {}
        assert world.statuses[-1] == (ref, ())

    play(story)


def test_a_prepared_claim_whose_device_is_withheld_is_not_given_to_the_next_pod(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A)
        assert await world.prepare(ref) == [A]
        world.book.quarantine(A, "it is neither here nor there", 1.0)
        assert await world.prepare(ref) == f"{A} is withheld until it is clean: it is neither here nor there"

    play(story)


def test_a_hidden_device_keeps_its_record_which_says_what_clean_is(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A)
        assert await world.prepare(ref) == [A]
        world.hidden.add(A)
        assert await world.unprepare(ref) == ""
        assert world.states() == {A: UNPREPARING}
        world.hidden.clear()
        assert await world.unprepare(ref) == ""
        assert world.states() == {}

    play(story)


def test_an_error_at_one_device_does_not_keep_the_others_from_going_home(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        ref = world.claim("c", A, B, C)
        assert await world.prepare(ref) == [A, B, C]
        world.node.fail[Act.VERIFY, B] = OSError("too many open files")
        assert await world.unprepare(ref) == ""
        assert world.states() == {B: UNPREPARING}

    play(story)


def test_what_was_journalled_is_the_device_as_it_was_found_less_what_a_tenant_can_leave(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        found = device(A, 20)
        assert found.settings is not None
        world.node.present[A] = replace(found, settings=replace(found.settings, promisc=True, allmulti=True))
        await world.prepare(world.claim("c", A))
        made = world.book.preparation(PreparationKey(ClaimUid("uid-c"), POOL, A))
        assert made is not None
        assert made.baseline == found.settings

    play(story)


# --- RDMA -------------------------------------------------------------------------------------------


def test_an_rdma_device_without_a_netdev_is_prepared_and_has_no_interface_to_set_up(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present[A] = device(A, 20, kind=DeviceKind.RDMA, ifindex=None, settings=None)
        world.bindings[A] = RdmaBinding(name=RdmaName("mlx5_2"), mode=RdmaMode.SHARED)
        assert "is an RDMA device and has no interface" in str(
            await world.prepare(world.claim("named", A, parameters=interface(name="net1")))
        )
        answer = await world.prepare(world.claim("c", A))
        assert not isinstance(answer, ClaimFailed)
        (made,) = world.book.preparations()
        assert (made.pod_ifname, made.by_file, made.rdma) == (None, True, world.bindings[A])

    play(story)
