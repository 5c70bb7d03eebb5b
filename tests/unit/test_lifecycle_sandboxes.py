"""Sandboxes, over a real book, engine and workers; netns and devices are made up.

A sandbox is attached as a whole or not at all, what is attached in it stays while it lives, and a hook fails
only for what a retry can mend.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from driver.cdi import RDMA_DEVICE, env_name
from driver.errors import DriverError, NotNow, Refusal
from driver.lifecycle.containers import rdma_max
from driver.lifecycle.patience import FAILURES_MAX
from driver.model import (
    AS_IT_IS,
    AttachmentState,
    ClaimRef,
    DeviceName,
    NicConfig,
    PreparationState,
)
from driver.plan import Act
from driver.rdma import RdmaBinding, RdmaConfig, RdmaLimits, RdmaMode
from hw.errors import Busy, HwError, Refused
from hw.model import DeviceKind, RdmaIndex, RdmaName
from tests.conftest import WaitUntilAsync
from tests.unit.journal_values import attachment, preparation
from tests.unit.sandboxes_world import FAR, GIVEN, OTHER, POD, World, play_sandboxes, sandbox

ATTACHED, DETACHING = AttachmentState.ATTACHED, AttachmentState.DETACHING
ONE = sandbox("one")


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return partial(play_sandboxes, tmp_path, monkeypatch)


A, B, C = (DeviceName(f"dev-{number}") for number in range(3))


def test_a_sandbox_is_attached_as_a_whole(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0, 1)
        await world.run(ONE)
        assert world.states() == {(ONE.id, A): ATTACHED, (ONE.id, B): ATTACHED}
        await world.container(ONE)
        done = list(world.acts)
        await world.run(ONE)
        assert world.acts == done

    play(story)


@pytest.mark.parametrize("error", [HwError("no"), OSError("no"), NotNow("no")])
def test_when_one_device_fails_all_come_out_again_and_the_hook_fails_for_a_retry(
    play, error: Exception
) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0, 1, 2)
        world.fail[Act.UP, C] = error
        with pytest.raises(NotNow, match="no"):
            await world.run(ONE)
        assert world.states() == {}
        assert [device for how, device in world.home.log if how == "undo"] == [B, A]
        assert world.published == []
        with pytest.raises(NotNow, match="has not been given"):
            await world.container(ONE)

    play(story)


LASTING = [errno.EEXIST, errno.EINVAL, errno.EPERM, errno.EADDRNOTAVAIL]


@pytest.mark.parametrize(
    "error",
    [*(Refused("move", number) for number in LASTING), Refusal("IndexTaken", "no")],
    ids=lambda error: getattr(error, "reason", None) or errno.errorcode[error.errno],
)
def test_what_a_retry_cannot_mend_does_not_fail_the_hook_but_refuses_the_containers(play, error) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        world.fail[Act.MOVE_IN, A] = error
        await world.run(ONE)
        with pytest.raises(Refusal) as raised:
            await world.container(ONE)
        assert str(raised.value) == str(error)
        assert [pod for pod, _ in world.told] == [POD]
        assert world.states() == {}

    play(story)


def test_a_busy_device_fails_the_hook(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        world.fail[Act.MOVE_IN, A] = Busy("move", errno.EBUSY)
        with pytest.raises(NotNow, match="EBUSY"):
            await world.run(ONE)

    play(story)


def test_a_pod_whose_hook_fails_on_and_on_is_let_through_and_its_containers_wait_until_it_is_attached(
    play, wait_until_async: WaitUntilAsync
) -> None:  # type: ignore[no-untyped-def]
    """A runtime that keeps a record of each failure would not start again over too many."""

    async def story(world: World) -> None:
        world.prepare(0)
        world.fail[Act.MOVE_IN, A] = NotNow("no")
        for number in range(FAILURES_MAX):
            with pytest.raises(NotNow):
                await world.run(sandbox(f"try-{number}"))
        last = sandbox("last")
        await world.run(last)
        with pytest.raises(NotNow):
            await world.container(last)
        del world.fail[Act.MOVE_IN, A]
        with pytest.raises(NotNow):
            await world.container(last)
        await wait_until_async(lambda: world.states() == {(last.id, A): ATTACHED})
        await world.container(last)

    play(story)


def test_a_hook_that_went_well_gives_a_pod_all_its_failures_back(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        for round in range(2):
            world.fail[Act.MOVE_IN, A] = NotNow("no")
            for number in range(FAILURES_MAX):
                with pytest.raises(NotNow):
                    await world.run(sandbox(f"try-{round}-{number}"))
            del world.fail[Act.MOVE_IN, A]
            good = sandbox(f"good-{round}")
            await world.run(good)
            await world.stop(good)

    play(story)


def test_an_undo_that_failed_and_then_ended_well_is_told_as_what_failed_first(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        world.fail[Act.MOVE_IN, A] = Refused("move", errno.EEXIST)
        world.fail[Act.RESTORE, A] = HwError("not now")
        await world.run(ONE)
        with pytest.raises(Refusal, match="EEXIST"):
            await world.container(ONE)
        assert world.home.log == [("home", A)]

    play(story)


def test_what_is_in_the_sandbox_already_stays_there(play) -> None:  # type: ignore[no-untyped-def]
    """A second claim of the pod comes later: the first one's device is in use by its containers."""

    async def story(world: World) -> None:
        world.prepare(0)
        await world.run(ONE)
        (first,) = world.book.attachments()
        world.prepare(1)
        world.acts.clear()
        await world.run(ONE)
        assert world.book.attachment(first.id) == first
        assert {device for _, device in world.acts} == {B}
        assert world.home.log == []
        await world.container(ONE)

    play(story)


def test_a_claim_on_its_way_home_is_given_to_no_sandbox(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        (made,) = world.prepare(0)
        go_on = threading.Event()
        busy = asyncio.create_task(world.workers.run([A], lambda: go_on.wait(FAR)))
        running = asyncio.create_task(world.run(ONE))
        await asyncio.sleep(0)
        world.book.advance_preparations([made], PreparationState.UNPREPARING)
        go_on.set()
        await busy
        with pytest.raises(NotNow, match="taken back meanwhile"):
            await running
        assert world.acts == []

    play(story)


def test_a_living_pod_keeps_its_device_and_the_next_one_is_refused_until_it_ends(  # type: ignore[no-untyped-def]
    play, wait_until_async: WaitUntilAsync
) -> None:
    async def story(world: World) -> None:
        world.prepare(0, pods=(POD.uid, OTHER.uid))
        await world.run(ONE)
        world.home.alive.add(ONE.id)
        before = world.book.attachments()
        two = sandbox("two", OTHER)
        await world.run(two)
        with pytest.raises(Refusal, match="is in pod ml/train"):
            await world.container(two)
        assert world.book.attachments() == before
        await world.stop(ONE)
        await wait_until_async(lambda: world.states() == {(two.id, A): ATTACHED})
        await world.container(two)

    play(story)


def test_a_sandbox_made_anew_takes_its_pods_device_over_and_a_late_stop_changes_nothing(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        await world.run(ONE)
        two = sandbox("two")
        await world.run(two)
        assert world.states() == {(two.id, A): ATTACHED}
        for late in (ONE, sandbox("unknown"), ONE):
            await world.stop(late)
        assert world.states() == {(two.id, A): ATTACHED}
        with pytest.raises(NotNow, match="has been stopped"):
            await world.run(ONE)

    play(story)


def test_a_sandbox_that_is_gone_does_not_take_the_device_from_the_one_that_lives(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        await world.run(ONE)
        with pytest.raises(NotNow, match="it is gone"):
            await world.run(sandbox("late", netns="/run/netns/gone"))
        await world.run(sandbox("host", netns="/run/netns/host"))
        await world.run(sandbox("none", netns=None))
        assert world.states() == {(ONE.id, A): ATTACHED}
        for refused in ("host", "none"):
            with pytest.raises(Refusal):
                await world.container(sandbox(refused, netns=None))

    play(story)


def test_a_stop_during_an_attach_ends_it_and_brings_everything_home(  # type: ignore[no-untyped-def]
    play, wait_until_async: WaitUntilAsync
) -> None:
    async def story(world: World) -> None:
        world.prepare(0, 1)
        go_on = world.stall[Act.MOVE_IN, A] = threading.Event()
        running = asyncio.create_task(world.run(ONE))
        await wait_until_async(lambda: (Act.MOVE_IN, A) in world.acts)
        stopping = asyncio.create_task(world.stop(ONE))
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(NotNow, match="overtaken"):
            await running
        await stopping
        assert world.states() == {}
        assert not any(device == B for _, device in world.acts)

    play(story)


def test_a_hook_is_answered_by_its_deadline_and_the_attach_undone_behind_it(  # type: ignore[no-untyped-def]
    play, wait_until_async: WaitUntilAsync
) -> None:
    async def story(world: World) -> None:
        world.prepare(0)
        go_on = world.stall[Act.METER, A] = threading.Event()
        with pytest.raises(NotNow, match="did not finish"):
            await world.run(ONE, 0.5)
        go_on.set()
        await wait_until_async(lambda: world.states() == {})
        assert world.home.log == [("undo", A)]
        assert world.published == []

    play(story)


def test_a_device_that_is_gone_fails_no_sandbox_and_is_given_when_it_is_back(play, wait_until_async) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        world.home.gone.add(A)
        await world.run(ONE)
        assert world.states() == {}
        with pytest.raises(Refusal, match="is no more, or not there now"):
            await world.container(ONE)
        world.home.gone.clear()
        with pytest.raises((Refusal, NotNow)):
            await world.container(ONE)
        await wait_until_async(lambda: world.states() == {(ONE.id, A): ATTACHED})
        await world.container(ONE)

    play(story)


def test_a_withheld_device_is_looked_at_before_the_next_sandbox_gets_it(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        world.book.quarantine(A, "it has addresses", 1.0)
        world.home.dirty.add(A)
        with pytest.raises(NotNow, match="withheld until it is clean: it has addresses"):
            await world.run(ONE)
        assert world.acts == []
        world.home.dirty.clear()
        await world.run(ONE)
        assert world.book.quarantines() == {}
        assert world.states() == {(ONE.id, A): ATTACHED}

    play(story)


def test_trouble_with_one_device_at_a_stop_does_not_keep_the_others(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0, 1, 2)
        await world.run(ONE)
        world.home.stuck[A] = HwError("too many open files")
        await world.stop(ONE)
        assert world.states() == {(ONE.id, A): DETACHING}

    play(story)


def test_a_refused_sandbox_that_the_runtime_no_longer_lists_is_forgotten(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        world.fail[Act.MOVE_IN, A] = Refusal("IndexTaken", "no")
        two = sandbox("two")
        await world.run(ONE)
        await world.run(two)
        world.sandboxes.forget_unlisted({two.id})
        assert set(world.sandboxes._refused) == {two.id}

    play(story)


def test_a_pod_that_nobody_knows_is_let_through_only_where_no_claim_could_be_its(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        stranger = sandbox("stranger", OTHER)
        elsewhere = sandbox("elsewhere", replace(OTHER, namespace="other"))
        await world.container(stranger)
        assert world.looked_up == []
        world.prepare(0)
        await world.container(elsewhere)
        assert world.looked_up == []
        with pytest.raises(NotNow, match="the API server did not say"):
            await world.container(stranger)
        assert world.looked_up == [OTHER.uid]
        world.names[OTHER.uid] = frozenset()
        await world.container(stranger)

    play(story)


def test_a_static_pod_waits_for_nobody_but_is_held_to_a_claim_that_is_known_to_be_its(play) -> None:  # type: ignore[no-untyped-def]
    """The API server may be such a pod itself: it would wait for itself for ever."""

    async def story(world: World) -> None:
        static = replace(sandbox("static", OTHER), static=True)
        world.prepare(0)
        await world.container(static)
        assert world.looked_up == []
        mine = replace(sandbox("mine", POD), static=True)
        with pytest.raises(NotNow, match="has not been given"):
            await world.container(mine)

    play(story)


def test_in_recovery_nothing_is_attached(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0)
        world.gate.recovery = "the journal is older than its mirror"
        with pytest.raises(DriverError, match="older than its mirror"):
            await world.run(ONE)
        assert world.acts == []
        other = sandbox("other", OTHER)
        world.names[OTHER.uid] = frozenset()
        await world.run(other)

    play(story)


def test_the_claim_of_the_pod_is_known_by_name_too(play) -> None:  # type: ignore[no-untyped-def]
    """A second pod of a claim is not in what the claim was reserved for when it was prepared."""

    async def story(world: World) -> None:
        (made,) = world.prepare(0, pods=())
        world.names[OTHER.uid] = frozenset({made.claim.name})
        assert made.claim == ClaimRef("ml", "nic-0", made.key.claim_uid)
        two = sandbox("two", OTHER)
        await world.run(two)
        assert world.states() == {(two.id, A): ATTACHED}

    play(story)


# --- RDMA -------------------------------------------------------------------------------------------

SHARED = RdmaBinding(name=RdmaName("mlx5_2"), mode=RdmaMode.SHARED, index=RdmaIndex(2))


def test_a_container_is_refused_files_whose_numbers_are_anothers_by_now(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0, rdma=SHARED)
        await world.run(ONE)
        (attached,) = world.book.attachments()
        assert attached.rdma == GIVEN
        await world.container(ONE)
        world.disproved = "a device file was given anew"
        with pytest.raises(Refusal, match="given anew"):
            await world.container(ONE)
        assert world.told == [(POD, "DeviceFileChanged")]
        assert world.states() == {(ONE.id, A): ATTACHED}

    play(story)


def test_only_a_container_that_names_the_claim_is_limited(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        limits = RdmaConfig(limits=RdmaLimits(handles=2, objects=64))
        (one,) = world.prepare(0, rdma=SHARED, config=NicConfig(rdma=limits))
        await world.run(ONE)
        names_it = {env_name(RDMA_DEVICE, one.key): "mlx5_2"}
        given = await world.container(ONE, **names_it)
        assert given.cgroup == {"rdma.max": "mlx5_2 hca_handle=2 hca_object=64"}
        assert (await world.container(ONE, KND_RDMA_DEVICE_OTHER="mlx5_2")).cgroup == {}

    play(story)


def test_a_claim_without_limits_changes_nothing_of_its_containers(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        (one,) = world.prepare(0, rdma=SHARED)
        await world.run(ONE)
        given = await world.container(ONE, **{env_name(RDMA_DEVICE, one.key): "mlx5_2"})
        assert given == AS_IT_IS

    play(story)


def test_of_two_limits_of_one_device_the_lower_of_each_counts() -> None:
    """Two netdevs that share their RDMA device, in one pod."""
    limits = [RdmaLimits(handles=4, objects=100), RdmaLimits(objects=50), RdmaLimits(handles=1)]
    limited = [
        (attachment(0), replace(preparation(0), config=NicConfig(rdma=RdmaConfig(limits=each))))
        for each in limits
    ]
    text = rdma_max(["mlx5_1", "mlx5_1", "mlx5_0"], limited)
    assert text == "mlx5_0 hca_handle=1\nmlx5_1 hca_handle=4 hca_object=50"


def test_several_pods_may_have_an_rdma_device_that_is_shared(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.prepare(0, pods=(POD.uid, OTHER.uid), kind=DeviceKind.RDMA, rdma=SHARED)
        two = sandbox("two", OTHER)
        for each in (ONE, two):
            await world.run(each)
            world.home.alive.add(each.id)
            await world.container(each)
        assert world.states() == {(ONE.id, A): ATTACHED, (two.id, A): ATTACHED}
        await world.stop(ONE)
        assert world.states() == {(two.id, A): ATTACHED}

    play(story)
