"""No two devices of a node have one MAC address, whoever asks for it and however it came to be there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from driver.claimconfig import ClaimLimits, FieldPath
from driver.lifecycle.one_address import asked_for
from driver.plan import Act
from driver.policy import NodePolicy
from hw.model import MacAddress
from kndsim.waiting import wait_until_async
from tests.unit.claims_world import FAR, A, B, World, interface, play_claims

MAC = "02:00:5e:00:00:01"
GIVEN = interface(hardwareAddress=MAC)


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return partial(play_claims, tmp_path, monkeypatch)


def claims(world: World) -> NodePolicy:
    world.policy = NodePolicy(claim_limits=ClaimLimits(allow=(FieldPath("interface.hardwareAddress"),)))
    return world.policy


def test_an_address_of_one_claim_is_refused_to_another_until_it_is_free(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        claims(world)
        first = world.claim("one", A, pods=("p",), parameters=GIVEN)
        second = world.claim("two", B, pods=("q",), parameters=GIVEN)
        assert await world.prepare(first) == [A]
        assert asked_for(world.book.preparations()) == {MAC}
        answer = await world.prepare(second)
        assert f"{B} cannot have the address {MAC}: {A} of claim ns/one has it" in answer
        assert await world.prepare(first) == [A]
        assert await world.unprepare(first) == ""
        assert await world.prepare(second) == [B]

    play(story)


def test_a_device_that_is_not_clean_yet_keeps_its_address_from_others(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        claims(world)
        first = world.claim("one", A, pods=("p",), parameters=GIVEN)
        assert await world.prepare(first) == [A]
        world.hidden.add(A)
        assert await world.unprepare(first) == ""
        assert "cannot have the address" in await world.prepare(
            world.claim("two", B, pods=("q",), parameters=GIVEN)
        )

    play(story)


def test_of_two_claims_at_once_one_gets_the_address(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        claims(world)
        world.node.stall[Act.ARM, A] = threading.Event()
        first = world.claim("one", A, pods=("p",), parameters=GIVEN)
        second = world.claim("two", B, pods=("q",), parameters=GIVEN)
        under_way = asyncio.create_task(world.prepare(first, FAR))
        await wait_until_async(lambda: (Act.TIDY, A) in world.node.acts, FAR, "the first is in hand")
        assert "cannot have the address" in await world.prepare(second)
        world.node.stall[Act.ARM, A].set()
        assert await under_way == [A]

    play(story)


def test_what_a_device_in_use_calls_its_own_is_nobody_elses(play) -> None:  # type: ignore[no-untyped-def]
    """It is not to be seen at home, and comes home with it."""

    async def story(world: World) -> None:
        claims(world)
        settings = world.node.present[A].settings
        assert settings is not None
        own = settings.mac
        assert await world.prepare(world.claim("one", A, pods=("p",))) == [A]
        second = world.claim("two", B, pods=("q",), parameters=interface(hardwareAddress=own))
        assert "it is dev-a of claim ns/one's own" in await world.prepare(second)

    play(story)


def test_an_address_that_something_at_home_has_is_refused_but_a_devices_own_is_not(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        claims(world)
        own = {name: found.settings.mac for name, found in world.node.present.items() if found.settings}
        other = world.claim("one", A, pods=("p",), parameters=interface(hardwareAddress=own[B]))
        assert "dev-b has it" in await world.prepare(other)
        assert world.states() == {}
        same = world.claim("two", A, pods=("p",), parameters=interface(hardwareAddress=own[A]))
        assert await world.prepare(same) == [A]

    play(story)


@pytest.mark.parametrize("pods", [("p",), ("p", "q")])
def test_two_devices_of_one_claim_cannot_share_an_address(play, pods: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        claims(world)
        assert MacAddress(MAC) in await world.prepare(world.claim("one", A, B, pods=pods, parameters=GIVEN))
        assert world.states() == {}

    play(story)
