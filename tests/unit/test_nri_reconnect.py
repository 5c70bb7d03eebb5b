"""The plugin loses its runtime and finds it again, and keeps nothing of what is over.

Invariant: each way a connection can end is followed by a whole new handshake or by the plugin's own end.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from pathlib import Path

import pytest

from driver.model import Sandbox
from driver.nri import api
from driver.nri.plugin import Backoff
from driver.nri.ttrpc import Request, Response
from driver.pb.nri.v1 import api_pb2 as pb
from kndsim.runtime import HookOutcome, Runtime, RuntimeMode
from tests.unit.nri_support import (
    RecordingHandler,
    open_files,
    run,
    running,
    until,
)
from tests.unit.nri_world import (
    MODES,
    by_hand,
    call,
    plugin_for,
    shake_hands,
    sim_sandbox,
    world,
)


def absent(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [entry for entry in caplog.records if "no container runtime with NRI" in entry.getMessage()]


def test_the_runtime_may_come_after_the_plugin(short_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def test() -> None:
        runtime = Runtime(short_tmp, RuntimeMode.POD_RPC)
        handler = RecordingHandler()
        async with running(plugin_for(runtime.socket, handler)):
            await until(lambda: len(absent(caplog)) >= 3)
            assert handler.calls == []
            async with runtime:
                await runtime.wait_plugin()

    run(test())
    assert [record.levelno for record in absent(caplog)].count(logging.WARNING) == 1
    assert {record.levelno for record in absent(caplog)} == {logging.WARNING, logging.DEBUG}


@pytest.mark.parametrize("mode", MODES)
def test_a_restarted_runtime_gets_the_whole_handshake_again(short_tmp: Path, mode: RuntimeMode) -> None:
    async def test() -> None:
        async with world(short_tmp, mode) as w:
            await w.runtime.restart()
            await until(lambda: len(w.handler.of("synchronize")) == 2)
            assert w.plugin.connected
            record = await w.runtime.send_event(pb.RUN_POD_SANDBOX, sim_sandbox())
            assert record.outcome is HookOutcome.OK
        kinds = [entry[0] for entry in w.handler.calls]
        assert kinds == ["connected", "synchronize", "lost", "connected", "synchronize", "run", "lost"]

    run(test())


def test_a_hook_outlives_the_connection_that_asked_for_it(short_tmp: Path) -> None:
    async def test() -> None:
        go, ended = asyncio.Event(), []

        async def slow(sandbox: Sandbox, deadline: float) -> None:
            await go.wait()
            ended.append(sandbox.id)

        async with world(short_tmp) as w:
            w.handler.behaviours["slow"] = slow
            sending = asyncio.create_task(w.runtime.send_event(pb.RUN_POD_SANDBOX, sim_sandbox("slow")))
            await until(lambda: w.handler.of("run"))
            await w.runtime.drop_plugins()
            assert (await sending).outcome is HookOutcome.ABSENT
            await until(lambda: len(w.handler.of("connected")) == 2)
            assert ended == []
            go.set()
            await until(lambda: ended)

    run(test())


def test_being_cancelled_answers_the_event_in_hand_first(short_tmp: Path) -> None:
    async def test() -> None:
        go = asyncio.Event()

        async def slow(sandbox: Sandbox, deadline: float) -> None:
            await go.wait()

        handler = RecordingHandler(behaviours={"slow": slow})
        async with Runtime(short_tmp, RuntimeMode.POD_RPC) as runtime:
            plugin = plugin_for(runtime.socket, handler)
            async with running(plugin) as task:
                await runtime.wait_plugin()
                sending = asyncio.create_task(runtime.send_event(pb.RUN_POD_SANDBOX, sim_sandbox("slow")))
                await until(lambda: handler.of("run"))
                task.cancel()
                await until(lambda: handler.of("lost"))
                assert not plugin.connected
                go.set()
                assert (await sending).outcome is HookOutcome.OK

    run(test())


def test_being_cancelled_waits_for_hooks_of_connections_that_are_gone(short_tmp: Path) -> None:
    async def test() -> None:
        go, ended = asyncio.Event(), []

        async def slow(sandbox: Sandbox, deadline: float) -> None:
            await go.wait()
            ended.append(sandbox.id)

        async with by_hand(short_tmp) as hand:
            hand.handler.behaviours["slow"] = slow
            end = await hand.arrivals.get()
            await shake_hands(end)
            message = pb.RunPodSandboxRequest(pod=pb.PodSandbox(id="sb1", name="slow"))
            end.call(5, call("RunPodSandbox", message))
            await until(lambda: hand.handler.of("run"))
            await end.close()
            await until(lambda: hand.handler.of("lost"))
            asyncio.get_running_loop().call_later(0.05, go.set)
        assert ended == ["sb1"]

    run(test())


def test_a_shutdown_call_is_answered_and_the_connection_closed(short_tmp: Path) -> None:
    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            end = await hand.arrivals.get()
            await shake_hands(end)
            end.call(5, Request(service=api.PLUGIN_SERVICE, method="Shutdown", payload=b""))
            assert await end.response() == (5, Response())
            with pytest.raises(EOFError):
                await end.next()
            await shake_hands(await hand.arrivals.get())

    run(test())


def test_a_runtime_that_speaks_nonsense_is_left_and_tried_again(short_tmp: Path) -> None:
    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            end = await hand.arrivals.get()
            end.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await end.request()
            with pytest.raises(EOFError):
                await end.next()
            await shake_hands(await hand.arrivals.get())
            await until(lambda: hand.plugin.connected)

    run(test())


@pytest.mark.parametrize(("failures", "most"), [(1, 0.1), (2, 0.2), (3, 0.4), (7, 5.0), (10**6, 5.0)])
def test_waits_double_up_to_their_limit_and_are_never_in_step(failures: int, most: float) -> None:
    waits = [Backoff().wait(failures) for _ in range(50)]
    assert all(most / 2 <= wait <= most for wait in waits)
    assert len(set(waits)) > 1


def test_10_000_events_with_drops_leave_tasks_and_descriptors_as_they_were(short_tmp: Path) -> None:
    rng = random.Random(3)

    async def some_time(sandbox: Sandbox, deadline: float) -> None:
        await asyncio.sleep(rng.choice([0, 0, 0, 0.0005]))

    async def test() -> None:
        async with world(short_tmp, RuntimeMode.POD_RPC) as w:
            w.handler.behaviours["p"] = some_time
            # What earlier tests left to the collector is not this test's to count.
            gc.collect()
            tasks, files = len(asyncio.all_tasks()), open_files()
            for round_ in range(10):
                await asyncio.gather(
                    *(
                        w.runtime.send_event(rng.choice([1, 2, 3, 4]), sim_sandbox(id_=f"{round_}-{n}"))
                        for n in range(1000)
                    )
                )
                w.handler.calls.clear()
                w.handler.deadlines.clear()
                await w.runtime.drop_plugins()
                await w.runtime.wait_plugin()
            await until(lambda: w.plugin.connected and len(asyncio.all_tasks()) <= tasks)
            assert open_files() <= files
            assert all(record.outcome is HookOutcome.OK for record in w.runtime.log)
            assert len(w.runtime.log) == 10_000

    run(test(), seconds=50)
