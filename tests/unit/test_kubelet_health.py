"""Kubelet learns of health at once and again in time, in both versions; and no stream holds up a stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from driver.kubelet import health as served
from driver.kubelet.health import write_health
from driver.lifecycle.health import HealthFeed
from driver.model import DeviceName, PoolName
from driver.troubles import DeviceHealth, Finding, Trouble
from kndsim.kubelet import KubeletTiming, SimKubelet
from kndsim.kubelet_health import SERVICES, Health, read_list
from kndsim.kubelet_model import KubeletEvent
from kndsim.waiting import wait_until_async as until
from tests.unit.kubelet_fakes import ScriptedHandler, plugin_at

DRIVER = "knd.internal"
POOL = PoolName("node-a")
A, B = DeviceName("pci-0000-21-10-0"), DeviceName("pci-0000-21-10-2")
FAST = KubeletTiming(scale=0.02)


def well(name: DeviceName) -> DeviceHealth:
    return DeviceHealth(device=name, since=100.0)


def ill(name: DeviceName, text: str = "port 'ens1' has no carrier") -> DeviceHealth:
    return DeviceHealth(device=name, findings=(Finding(trouble=Trouble.NO_CARRIER, text=text),), since=200.0)


def play(
    root: Path,
    story: Callable[[SimKubelet, HealthFeed], Awaitable[None]],
    services: tuple[str, ...] = SERVICES,
) -> None:
    async def whole() -> None:
        feed = HealthFeed(POOL)
        feed.put([well(A), well(B)])
        async with (
            SimKubelet(root, node="node-a", timing=FAST, health=services) as kubelet,
            plugin_at(root, ScriptedHandler(), health=feed),
        ):
            await kubelet.wait_registered(DRIVER)
            await story(kubelet, feed)

    asyncio.run(whole())


@pytest.mark.parametrize("service", SERVICES)
def test_the_whole_list_is_told_at_once_and_when_it_changes(short_tmp: Path, service: str) -> None:
    async def story(kubelet: SimKubelet, feed: HealthFeed) -> None:
        fine = Health(status="Healthy")
        await until(lambda: kubelet.health(DRIVER) == {(POOL, A): fine, (POOL, B): fine}, 5.0, "the first")
        feed.put([ill(A), well(B)])
        sick = Health(status="Unhealthy", message="port 'ens1' has no carrier")
        await until(lambda: kubelet.health(DRIVER) == {(POOL, A): sick, (POOL, B): fine}, 5.0, "a change")
        feed.put([well(B)])
        await until(lambda: kubelet.health(DRIVER) == {(POOL, B): fine}, 5.0, "one that is gone")

    play(short_tmp, story, (service,))


def test_it_is_told_again_before_kubelet_would_take_it_for_old(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.REPEAT_SECONDS * 2 < served.TIMEOUT_SECONDS
    monkeypatch.setattr(served, "REPEAT_SECONDS", 0.05)

    async def story(kubelet: SimKubelet, feed: HealthFeed) -> None:
        await until(lambda: kubelet.health_messages(DRIVER) >= 4, 5.0, "the same again")
        assert kubelet.health(DRIVER).keys() == {(POOL, A), (POOL, B)}

    play(short_tmp, story)


def test_a_stream_that_kubelet_lost_is_opened_again_and_told_the_whole(short_tmp: Path) -> None:
    async def story(kubelet: SimKubelet, feed: HealthFeed) -> None:
        await until(lambda: len(kubelet.health(DRIVER)) == 2, 5.0, "the first list")
        await kubelet.restart()
        await kubelet.wait_registered(DRIVER)
        await until(lambda: len(kubelet.health(DRIVER)) == 2, 5.0, "the list after a restart")

    play(short_tmp, story)


def test_a_kubelet_without_the_service_is_not_bothered(short_tmp: Path) -> None:
    async def story(kubelet: SimKubelet, feed: HealthFeed) -> None:
        feed.put([ill(A)])
        assert kubelet.health(DRIVER) == {}

    play(short_tmp, story, ())


def test_a_stop_ends_the_streams_and_does_not_wait_for_them(short_tmp: Path) -> None:
    async def whole() -> None:
        feed = HealthFeed(POOL)
        feed.put([well(A)])
        async with SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet:
            async with plugin_at(short_tmp, ScriptedHandler(), health=feed):
                await kubelet.wait_registered(DRIVER)
                await until(lambda: len(kubelet.health(DRIVER)) == 1, 5.0, "the list")
            # What a server cancels when its grace is over is not ended well.
            await until(lambda: kubelet.health(DRIVER) == {}, 5.0, "nothing is known any more")
            assert not [each for each in kubelet.log if each.event is KubeletEvent.HEALTH_ENDED]

    asyncio.run(whole())


def test_what_people_read_of_it_is_one_line_and_short() -> None:
    told = read_list(write_health(POOL, [ill(A, "a\nb" + "é" * 2000)]), 0.0)
    message = told[POOL, A].health.message
    assert message.startswith("a b")
    assert message.endswith("...")
    assert len(message.encode()) <= 1024
