"""The simulated kubelet registers plugins, and loses them, as a real one does."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from kndsim.kubelet import (
    KubeletEvent,
    KubeletTiming,
    SimKubelet,
)
from tests.conftest import WaitUntilAsync
from tests.unit.sim_kubelet_fakes import (
    C1,
    C2,
    DRIVER,
    FAST,
    FakePlugin,
    events,
    kubelet_with,
    serving,
)


@pytest.mark.parametrize(
    ("offered", "prefer", "expected"),
    [
        (["v1.DRAPlugin", "v1beta1.DRAPlugin"], None, "v1"),
        (["v1beta1.DRAPlugin", "v1.DRAPlugin"], None, "v1beta1"),
        (["v9.DRAPlugin", "v1.DRAPlugin"], None, "v1"),
        (["v1.DRAPlugin", "v1beta1.DRAPlugin"], "v1beta1", "v1beta1"),
    ],
)
def test_the_first_known_version_of_the_plugins_list_is_spoken(
    short_tmp: Path, offered: list[str], prefer: Literal["v1", "v1beta1"] | None, expected: str
) -> None:
    plugin = FakePlugin(info={"supported_versions": offered})

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin, prefer=prefer) as kubelet:
            await kubelet.prepare(DRIVER, [C1])

    asyncio.run(run())
    assert plugin.prepares == [(expected, ["u1"])]
    assert plugin.told == [(True, "")]


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"supported_versions": ["1.0.0"]}, "none of the plugin's versions"),
        ({"supported_versions": []}, "none of the plugin's versions"),
        ({"type": "CSIPlugin"}, "no handler for plugin type"),
        ({"name": "Not A Driver"}, "is not a driver name"),
        ({"endpoint": "dra.sock"}, "is not an absolute path"),
    ],
)
def test_a_plugin_that_kubelet_refuses_is_told_why_and_tried_again_ever_later(
    short_tmp: Path, info: dict[str, Any], words: str, wait_until_async: WaitUntilAsync
) -> None:
    plugin = FakePlugin(info=info)

    async def run() -> None:
        async with SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet, serving(kubelet, plugin):
            await wait_until_async(lambda: len(plugin.told) >= 4)
            assert kubelet.plugin(DRIVER) is None

    asyncio.run(run())
    assert all(not registered and words in error for registered, error in plugin.told)
    gaps = [after - before for before, after in zip(plugin.infos, plugin.infos[1:4], strict=False)]
    assert all(gap >= expected for gap, expected in zip(gaps, (0.01, 0.02, 0.04), strict=True))


def test_back_off_doubles_from_half_a_second_up_to_its_cap() -> None:
    timing = KubeletTiming()
    assert [timing.back_off(n) for n in (1, 2, 3, 8, 9, 1000)] == [0.5, 1.0, 2.0, 64.0, 122.0, 122.0]


def test_a_plugin_slow_to_say_who_it_is_is_told_nothing_and_tried_again(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    hasty = KubeletTiming(scale=0.02, get_info=0.2)

    async def run() -> None:
        plugin = FakePlugin(info_gate=asyncio.Event())
        async with SimKubelet(short_tmp, node="node-a", timing=hasty) as kubelet, serving(kubelet, plugin):
            await wait_until_async(lambda: KubeletEvent.REGISTRATION_FAILED in events(kubelet), within=10)
            assert plugin.told == []
            assert plugin.info_gate is not None
            plugin.info_gate.set()
            await kubelet.wait_registered(DRIVER)

    asyncio.run(run())


def test_a_registration_that_cannot_be_confirmed_is_taken_back_and_repeated(short_tmp: Path) -> None:
    plugin = FakePlugin(notify_fails=1)

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            seen = [e for e in events(kubelet) if "registered" in e or "registration" in e]
            assert seen == [
                KubeletEvent.REGISTERED,
                KubeletEvent.REGISTRATION_FAILED,
                KubeletEvent.DEREGISTERED,
                KubeletEvent.REGISTERED,
            ]

    asyncio.run(run())
    assert plugin.told == [(True, ""), (True, "")]


def test_a_second_plugin_with_the_same_endpoint_is_refused(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    first, second = FakePlugin(), FakePlugin()

    async def run() -> None:
        async with kubelet_with(short_tmp, first) as kubelet:
            second.endpoint = first.endpoint
            async with serving(kubelet, second, "again"):
                await wait_until_async(lambda: second.told)

    asyncio.run(run())
    assert second.told[0][0] is False
    assert "already registered" in second.told[0][1]


def test_calls_go_to_the_newest_instance_and_back_when_it_is_gone(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    old, new = FakePlugin(), FakePlugin()

    async def run() -> None:
        async with kubelet_with(short_tmp, old) as kubelet:
            async with serving(kubelet, new, "newer"):
                await wait_until_async(lambda: events(kubelet).count(KubeletEvent.CONNECTED) == 2)
                await kubelet.prepare(DRIVER, [C1])
            await wait_until_async(lambda: KubeletEvent.DEREGISTERED in events(kubelet))
            await kubelet.prepare(DRIVER, [C2])

    asyncio.run(run())
    assert ([uids for _, uids in new.prepares], [uids for _, uids in old.prepares]) == ([["u1"]], [["u2"]])


def test_hidden_names_and_other_files_are_not_plugins_but_subfolders_are_searched(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    async def run() -> None:
        async with SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet:
            (kubelet.registry / "a-file").touch()
            (kubelet.registry / "sub").mkdir()
            with socket.socket(socket.AF_UNIX) as hidden, socket.socket(socket.AF_UNIX) as visible:
                hidden.bind(str(kubelet.registry / ".hidden"))
                visible.bind(str(kubelet.registry / "sub/visible"))
                await wait_until_async(lambda: KubeletEvent.SOCKET_SEEN in events(kubelet))
            seen = [e.subject for e in kubelet.log if e.event is KubeletEvent.SOCKET_SEEN]
            assert seen == [str(kubelet.registry / "sub/visible")]

    asyncio.run(run())


def test_a_plugin_is_deregistered_when_its_socket_goes_and_registered_anew_when_it_returns(
    short_tmp: Path,
) -> None:
    async def run() -> None:
        async with SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet:
            for _ in range(2):
                plugin = FakePlugin()
                async with serving(kubelet, plugin):
                    await kubelet.wait_registered(DRIVER)
                    assert plugin.told == [(True, "")]
                await kubelet.wait_deregistered(DRIVER)

    asyncio.run(run())


def test_waiting_for_a_plugin_that_never_comes_ends_with_the_logs_last_words(short_tmp: Path) -> None:
    async def run() -> None:
        async with SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet:
            with pytest.raises(TimeoutError, match=r"sim\.example is not registered .* log ends: started"):
                await kubelet.wait_registered(DRIVER, time.monotonic() + 0.05)

    asyncio.run(run())


@dataclass
class Slices:
    wiped: list[tuple[str, str | None]] = field(default_factory=list)

    def wipe_slices(self, node: str, driver: str | None) -> None:
        self.wiped.append((node, driver))


def test_slices_are_wiped_at_start_and_once_when_a_driver_stays_away(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    slices = Slices()

    async def run() -> None:
        async with SimKubelet(short_tmp, node="node-a", timing=FAST, slices=slices) as kubelet:
            assert slices.wiped == [("node-a", None)]
            async with serving(kubelet, FakePlugin()):
                await kubelet.wait_registered(DRIVER)
            await wait_until_async(lambda: ("node-a", DRIVER) in slices.wiped)
            await kubelet.restart()

    asyncio.run(run())
    assert slices.wiped == [("node-a", None), ("node-a", DRIVER), ("node-a", None)]


def test_slices_stay_when_the_driver_is_back_within_the_grace(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    slices = Slices()
    timing = KubeletTiming(scale=0.05)
    other = FakePlugin(info={"name": "other.example"})

    async def run() -> None:
        kubelet = SimKubelet(short_tmp, node="node-a", timing=timing, slices=slices)
        async with kubelet, AsyncExitStack() as stack:
            async with serving(kubelet, FakePlugin()):
                await kubelet.wait_registered(DRIVER)
            await kubelet.wait_deregistered(DRIVER)
            async with serving(kubelet, FakePlugin()):
                await kubelet.wait_registered(DRIVER)
                await stack.enter_async_context(serving(kubelet, other, "other"))
                await kubelet.wait_registered("other.example")
                # The other goes later for good: when its grace is over, the first one's would be too.
                await stack.aclose()
                wiped = ("node-a", "other.example")
                await wait_until_async(lambda: wiped in slices.wiped)

    asyncio.run(run())
    assert slices.wiped == [("node-a", None), ("node-a", "other.example")]
