"""The driver's kubelet side against the simulated kubelet, also when either of them dies."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from driver.lifecycle.ports import ClaimFailed
from driver.paths import Paths
from kndsim.kubelet import KubeletEvent, KubeletTiming, PrepareFailed, SimClaim, SimKubelet, UnprepareFailed
from tests.conftest import WaitUntilAsync
from tests.unit.kubelet_fakes import ScriptedHandler, plugin_at, prepared

ROOT = Path(__file__).parents[2]
DRIVER = "knd.internal"
FAST = KubeletTiming(scale=0.1)
C1 = SimClaim("ns", "one", "u1")
C2 = SimClaim("ns", "two", "u2")

AGENT = """
import asyncio, sys
from pathlib import Path
from tests.unit.kubelet_fakes import ScriptedHandler, plugin_at

async def main():
    async with plugin_at(Path(sys.argv[1]), ScriptedHandler()):
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def agent_process(root: Path) -> Iterator[subprocess.Popen[str]]:
    """An agent of its own, killed without a chance to clean up."""
    command = [sys.executable, "-c", AGENT, str(root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("prefer", [None, "v1", "v1beta1"])
def test_a_claims_life_passes_kubelets_checks_in_every_version(
    short_tmp: Path, prefer: Literal["v1", "v1beta1"] | None
) -> None:
    handler = ScriptedHandler(script={"u1": (prepared("u1", share_id="s1", request="nic/first"),)})

    async def run() -> None:
        async with (
            SimKubelet(short_tmp, node="node-a", timing=FAST, prefer=prefer) as kubelet,
            plugin_at(short_tmp, handler) as plugin,
        ):
            info = await kubelet.wait_registered(DRIVER)
            assert info.version == f"{prefer or 'v1'}.DRAPlugin"
            assert plugin.registered
            given = await kubelet.prepare(DRIVER, [C1, C2])
            assert given["u1"][0].requests == ("nic",)
            assert given["u1"][0].share_id == (None if prefer == "v1beta1" else "s1")
            assert await kubelet.prepare(DRIVER, []) == {}
            assert await kubelet.unprepare(DRIVER, [C1, C2]) == ("u1", "u2")

    asyncio.run(run())


def test_what_the_handler_says_is_what_the_user_reads(short_tmp: Path) -> None:
    handler = ScriptedHandler(script={"u1": ClaimFailed("pci-0000-3b-00-2 is held by claim ns/other")})

    async def run() -> None:
        async with (
            SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet,
            plugin_at(short_tmp, handler),
        ):
            await kubelet.wait_registered(DRIVER)
            with pytest.raises(PrepareFailed, match="is held by claim ns/other"):
                await kubelet.prepare(DRIVER, [C1])
            with pytest.raises(UnprepareFailed, match="is held by claim ns/other"):
                await kubelet.unprepare(DRIVER, [C1])

    asyncio.run(run())


def test_kubelets_restart_finds_the_driver_again(short_tmp: Path) -> None:
    handler = ScriptedHandler()

    async def run() -> None:
        async with (
            SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet,
            plugin_at(short_tmp, handler) as plugin,
        ):
            await kubelet.wait_registered(DRIVER)
            first = await kubelet.prepare(DRIVER, [C1])
            await kubelet.restart()
            await kubelet.wait_registered(DRIVER)
            assert plugin.registered
            assert await kubelet.prepare(DRIVER, [C1]) == first

    asyncio.run(run())
    assert len(handler.calls) == 2


def test_an_agent_stopped_in_order_is_deregistered_and_comes_back(short_tmp: Path) -> None:
    async def run() -> None:
        async with SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet:
            for _ in range(3):
                async with plugin_at(short_tmp, ScriptedHandler()):
                    await kubelet.wait_registered(DRIVER)
                    await kubelet.prepare(DRIVER, [C1], force=True)
                await kubelet.wait_deregistered(DRIVER)
            assert KubeletEvent.REGISTRATION_FAILED not in [entry.event for entry in kubelet.log]

    asyncio.run(run())


def test_a_killed_agents_sockets_are_taken_over_by_the_next_one(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    paths = Paths(root=short_tmp)

    async def run() -> None:
        async with SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet:
            with agent_process(short_tmp):
                await kubelet.wait_registered(DRIVER)
                await kubelet.prepare(DRIVER, [C1])
            events = (KubeletEvent.DISCONNECTED, KubeletEvent.HEALTH_ENDED)
            await wait_until_async(lambda: {entry.event for entry in kubelet.log}.issuperset(events))
            assert paths.registration_socket.exists()
            with pytest.raises(PrepareFailed, match="code = UNAVAILABLE"):
                await kubelet.prepare(DRIVER, [C2])
            handler = ScriptedHandler()
            async with plugin_at(short_tmp, handler) as plugin:
                await wait_until_async(lambda: plugin.registered)
                await kubelet.wait_registered(DRIVER)
                given = await kubelet.prepare(DRIVER, [C1, C2])
                assert set(given) == {"u1", "u2"}
            assert [ref.uid for ref in handler.calls[0][1]] == ["u2"]

    asyncio.run(run())
