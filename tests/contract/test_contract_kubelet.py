"""How kubelet treats a DRA plugin: registration, prepare and unprepare, errors, restarts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from kndsim.waiting import wait_until_async as until
from tests.contract.kubelet_forms import KubeletPeer, Pod
from tests.unit.sim_kubelet_fakes import DRIVER, FakePlugin, bad, good, serving, told

pytestmark = pytest.mark.timeout(120)

Opened = Callable[[], AbstractAsyncContextManager[KubeletPeer]]
Case = Callable[[KubeletPeer], Coroutine[Any, Any, None]]
LATE = 40.0
"""Seconds. A real kubelet tries again every 10 to 15, as the cluster is configured."""


def play(kubelet: Opened, case: Case) -> None:
    async def whole() -> None:
        async with asyncio.timeout(100.0), kubelet() as peer:
            await case(peer)

    asyncio.run(whole())


_numbers = itertools.count()


@asynccontextmanager
async def offered(
    peer: KubeletPeer, plugin: FakePlugin, *, taken: bool = True, name: str = ""
) -> AsyncIterator[FakePlugin]:
    """On a socket of its own unless named: kubelet waits ever longer for one that has failed it, minutes at
    last, whoever makes it next."""
    name = name or f"contract-{next(_numbers)}"
    plugin.endpoint = peer.seen(peer.registry / f"{name}-reg.sock")
    async with serving(peer, plugin, name):  # type: ignore[arg-type] # only its registry is used
        if taken:
            await until(lambda: (True, "") in plugin.told, 20.0, "kubelet took the plugin")
        yield plugin


async def holds(condition: Callable[[], Coroutine[Any, Any, object]], what: str) -> None:
    """Ask the API until it says so."""
    for _ in range(int(LATE / 0.05)):
        if await condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {LATE:g} s: {what}")


async def started(peer: KubeletPeer, *claims: Any, named: bool = False) -> Pod:
    pod = await peer.start(*claims, named=named)
    await holds(lambda: peer.running(pod), "the pod runs")
    return pod


async def unprepared(plugin: FakePlugin, *uids: str) -> None:
    await until(lambda: [*uids] in plugin.unprepares, LATE, "kubelet asked to unprepare")


def test_a_plugin_is_asked_who_it_is_and_told_that_it_is_taken(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        async with offered(peer, FakePlugin()) as plugin:
            assert plugin.told == [(True, "")]
            assert len(plugin.infos) == 1

    play(kubelet, case)


@pytest.mark.since("9.0", "by itself asked again in a second; not in 20 s after another plugin of its name")
@pytest.mark.parametrize(
    "info",
    [
        {"supported_versions": ["1.0.0"]},
        {"supported_versions": []},
        {"type": "NoSuchPlugin"},
    ],
)
def test_a_plugin_that_cannot_be_taken_is_told_why_and_asked_again(
    kubelet: Opened, info: dict[str, Any]
) -> None:
    async def case(peer: KubeletPeer) -> None:
        async with offered(peer, FakePlugin(info=info), taken=False) as plugin:
            await until(lambda: len(plugin.told) >= 2, 20.0, "told twice")
            assert not any(taken for taken, _ in plugin.told)
            assert all(why for _, why in plugin.told)
            plugin.info.clear()
            await until(lambda: plugin.told[-1] == (True, ""), 30.0, "taken once it is right")

    play(kubelet, case)


def test_a_plugin_that_does_not_answer_in_a_second_is_told_nothing_and_asked_again(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        plugin = FakePlugin(info_gate=asyncio.Event())
        async with offered(peer, plugin, taken=False):
            await until(lambda: len(plugin.infos) >= 2, 20.0, "asked twice")
            assert plugin.told == []
            assert plugin.info_gate is not None
            plugin.info_gate.set()
            await until(lambda: (True, "") in plugin.told, 30.0)

    play(kubelet, case)


def test_a_socket_that_is_made_anew_is_registered_anew(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        async with offered(peer, FakePlugin(), name="anew"):
            pass
        async with offered(peer, FakePlugin(), name="anew") as again:
            claim = await peer.claim()
            pod = await started(peer, claim)
            assert [uids for _, uids in again.prepares] == [[claim.uid]]
            await peer.delete(pod)
            await unprepared(again, claim.uid)

    play(kubelet, case)


@pytest.mark.parametrize("first", ["v1", "v1beta1"])
def test_the_first_version_of_the_plugins_list_is_spoken(kubelet: Opened, first: str) -> None:
    async def case(peer: KubeletPeer) -> None:
        versions = sorted(["v1.DRAPlugin", "v1beta1.DRAPlugin"], reverse=first == "v1beta1")
        async with offered(peer, FakePlugin(info={"supported_versions": versions})) as plugin:
            claim = await peer.claim()
            pod = await started(peer, claim)
            assert plugin.prepares == [(first, [claim.uid])]
            await peer.delete(pod)
            await unprepared(plugin, claim.uid)

    play(kubelet, case)


def test_all_claims_of_a_pod_come_in_one_call_each_way(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        def respond(uids: list[str]) -> dict[str, Any]:
            return {uid: good(uid) for uid in uids}

        async with offered(peer, FakePlugin(respond=respond)) as plugin:
            claims = [await peer.claim(), await peer.claim()]
            pod = await started(peer, *claims)
            ((_, asked),) = plugin.prepares
            assert sorted(asked) == sorted(claim.uid for claim in claims)
            await peer.delete(pod)
            await until(lambda: plugin.unprepares, LATE, "kubelet asked to unprepare")
            assert sorted(plugin.unprepares[0]) == sorted(asked)

    play(kubelet, case)


def test_a_claims_error_reaches_the_pods_events_and_the_claim_is_asked_for_again(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        from driver.pb.dra.v1 import api_pb2 as v1

        broken = True

        def respond(uids: list[str]) -> dict[str, Any]:
            refused = v1.NodePrepareResourceResponse(error="the link is down")
            return {uid: refused if broken else good(uid) for uid in uids}

        async with offered(peer, FakePlugin(respond=respond)) as plugin:
            claim = await peer.claim()
            pod = await peer.start(claim)

            async def said() -> bool:
                return any("the link is down" in text for text in await peer.complaints(pod))

            await holds(said, "the error is an event")
            assert not await peer.running(pod)
            broken = False
            await holds(lambda: peer.running(pod), "the pod runs")
            assert len(plugin.prepares) >= 2
            await peer.delete(pod)
            await unprepared(plugin, claim.uid)

    play(kubelet, case)


@pytest.mark.parametrize("answer", ["nothing", "another claim"])
def test_an_answer_that_is_not_about_the_claim_is_an_error(kubelet: Opened, answer: str) -> None:
    async def case(peer: KubeletPeer) -> None:
        def respond(uids: list[str]) -> dict[str, Any]:
            return {} if answer == "nothing" else {**{uid: good(uid) for uid in uids}, "who": good("who")}

        async with offered(peer, FakePlugin(respond=respond)):
            pod = await peer.start(await peer.claim())
            words = "skipped 1 ResourceClaims" if answer == "nothing" else "unknown claim UID"

            async def said() -> bool:
                return any(words in text for text in await peer.complaints(pod))

            await holds(said, "the error is an event")
            assert not await peer.running(pod)
            await peer.delete(pod, force=True)

    play(kubelet, case)


def test_without_a_plugin_the_pod_waits_and_says_for_whom(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        claim = await peer.claim()
        pod = await peer.start(claim)

        async def said() -> bool:
            return any(
                f"DRA driver {DRIVER} is not registered" in text for text in await peer.complaints(pod)
            )

        await holds(said, "the absence is an event")
        async with offered(peer, FakePlugin()) as plugin:
            await holds(lambda: peer.running(pod), "the pod runs")
            await peer.delete(pod)
            await unprepared(plugin, claim.uid)

    play(kubelet, case)


def test_a_pod_that_is_deleted_by_force_lets_go_of_its_claims_too(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        async with offered(peer, FakePlugin()) as plugin:
            claim = await peer.claim()
            pod = await started(peer, claim)
            await peer.delete(pod, force=True)
            await unprepared(plugin, claim.uid)

    play(kubelet, case)


def test_a_claim_of_two_pods_is_prepared_once_and_unprepared_after_the_last(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        async with offered(peer, FakePlugin()) as plugin:
            claim = await peer.claim()
            first, second = await started(peer, claim), await started(peer, claim)
            assert len(plugin.prepares) == 1
            await peer.delete(first)
            await peer.delete(second)
            await unprepared(plugin, claim.uid)
            assert plugin.unprepares == [[claim.uid]]

    play(kubelet, case)


def test_a_restarted_kubelet_registers_again_and_still_knows_what_to_unprepare(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        async with offered(peer, FakePlugin()) as plugin:
            claim = await peer.claim()
            pod = await started(peer, claim)
            await peer.restart()
            await until(lambda: plugin.told.count((True, "")) >= 2, 30.0, "registered again")
            assert len(plugin.prepares) == 1
            await peer.delete(pod)
            await unprepared(plugin, claim.uid)

    play(kubelet, case)


HEALTH = ("v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth")


@pytest.mark.since("1.37", "before 1.36 a gate is off; before 1.37 there is no v1, and all are asked")
@pytest.mark.parametrize("services", [HEALTH, HEALTH[::-1], HEALTH[1:]])
def test_a_devices_health_is_asked_for_in_the_best_version_and_shown_while_it_is_told_in_time(
    kubelet: Opened, services: tuple[str, ...]
) -> None:
    async def case(peer: KubeletPeer) -> None:
        versions = ["v1.DRAPlugin", *services]
        given = FakePlugin(
            info={"supported_versions": versions},
            respond=lambda uids: {uid: bad(uid, cdi_device_ids=[]) for uid in uids},
        )
        async with offered(peer, given) as plugin:
            pod = await started(peer, await peer.claim(), named=True)
            await until(lambda: bool(plugin.watched), LATE, "kubelet asks for the devices' health")
            assert plugin.watched[0] == ("v1" if HEALTH[0] in services else "v1alpha1")

            async def shown(status: str) -> None:
                async def says() -> bool:
                    return await peer.health(pod) == status

                await holds(says, f"the pod's status says {status}")

            plugin.lists.put_nowait(told("UNHEALTHY", message="no carrier"))
            await shown("Unhealthy")
            plugin.lists.put_nowait(told("HEALTHY"))
            await shown("Healthy")
            plugin.lists.put_nowait(told("HEALTHY", seconds=1))
            await shown("Unknown")
            await peer.delete(pod)

    play(kubelet, case)


def test_a_plugin_that_serves_no_health_is_taken_all_the_same(kubelet: Opened) -> None:
    async def case(peer: KubeletPeer) -> None:
        async with offered(peer, FakePlugin()) as plugin:
            pod = await started(peer, await peer.claim())
            assert plugin.told == [(True, "")]
            await peer.delete(pod)

    play(kubelet, case)
