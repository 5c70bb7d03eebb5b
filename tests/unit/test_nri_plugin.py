"""The plugin's conversation with a runtime: handshake, events and errors.

Invariant: the runtime's end is either the strict simulated runtime or bytes written by hand, over a unix
socket; no network namespace is needed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import pytest

from driver.errors import NotNow, Refusal
from driver.model import PodRef, PodUid, Sandbox, SandboxId
from driver.nri import api, session
from driver.nri.plugin import Backoff
from driver.nri.ttrpc import Code, Request, Response
from driver.pb.nri.v1 import api_pb2 as pb
from kndsim.runtime import HookOutcome, Runtime, RuntimeMode
from tests.unit import nri_vectors as vectors
from tests.unit.nri_support import (
    RecordingHandler,
    SystemClock,
    run,
    running,
    until,
)
from tests.unit.nri_world import (
    MODES,
    by_hand,
    call,
    configure,
    plugin_for,
    sandbox,
    shake_hands,
    sim_sandbox,
    synchronize,
    world,
)

# --- handshake --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_handshake_completes_in_either_order(short_tmp: Path, mode: RuntimeMode, eager: bool) -> None:
    async def test() -> None:
        handler = RecordingHandler()
        async with Runtime(short_tmp, mode, eager=eager) as runtime:
            plugin = plugin_for(runtime.socket, handler, name="knd", index="10")
            assert not plugin.connected
            async with running(plugin):
                await runtime.wait_plugin()
                await until(lambda: plugin.connected and handler.of("synchronize"))
                (peer,) = runtime.plugins
                assert (peer.name, peer.index, peer.events) == ("knd", "10", 0xF)
            assert not plugin.connected
            assert runtime.violations == runtime.refused == ()
        name, version = runtime._nri._settings.name
        assert handler.calls == [("connected", name, version), ("synchronize", [], {}), ("lost",)]

    run(test())


def test_golden_bytes_of_a_runtime_lead_to_golden_answers(short_tmp: Path) -> None:
    async def test() -> None:
        async with by_hand(short_tmp, name="pyplug") as hand:
            end = await hand.arrivals.get()
            stream, request = await end.request()
            assert (stream, request.service, request.method) == (1, api.RUNTIME_SERVICE, "RegisterPlugin")
            end.send(vectors.CONFIGURE + vectors.REGISTER_OK)
            assert await end.response() == (1, Response(b"\x10\x0f"))
            end.send(vectors.SYNCHRONIZE)
            assert await end.response() == (3, Response())
            await until(lambda: hand.plugin.connected)
            end.send(vectors.RUN)
            assert await end.response() == (5, Response())
        golden = Sandbox(
            id=SandboxId("sb1"),
            pod=PodRef("ns", "p", PodUid("u1")),
            netns_path=Path("/var/run/netns/cni-1"),
            pid=42,
        )
        assert hand.handler.calls == [
            ("connected", "containerd", "v2.1.0"),
            ("synchronize", [golden], {}),
            ("run", golden),
            ("lost",),
        ]

    run(test())


@pytest.mark.parametrize(
    ("configured", "timeout_nano", "budget"),
    [(0, 0, 1.7), (10_000, 0, 9.7), (1000, 0, 0.8), (10_000, 4_000_000_000, 3.7), (-5, 0, 1.7)],
)
def test_deadlines_come_from_configure_and_from_the_call(
    short_tmp: Path, configured: int, timeout_nano: int, budget: float
) -> None:
    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            end = await hand.arrivals.get()
            await shake_hands(end, request_timeout=configured)
            before = SystemClock().monotonic()
            message = pb.RunPodSandboxRequest(pod=pb.PodSandbox(id="sb1"))
            end.call(5, call("RunPodSandbox", message, timeout_nano))
            await end.response()
            after = SystemClock().monotonic()
        (deadline,) = hand.handler.deadlines
        assert before + budget <= deadline <= after + budget

    run(test())


def test_a_split_synchronize_is_merged_into_one_list(short_tmp: Path) -> None:
    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            end = await hand.arrivals.get()
            await end.request()
            end.answer(1)
            more = Response(pb.SynchronizeResponse(more=True).SerializeToString())
            for stream, name in ((1, "a"), (3, "b")):
                end.call(stream, synchronize(pb.PodSandbox(id=name), more=True))
                assert await end.response() == (stream, more)
                assert not hand.plugin.connected
            end.call(5, synchronize(pb.PodSandbox(id="c")))
            assert await end.response() == (5, Response())
            await until(lambda: hand.handler.of("synchronize"))
        ((_, sandboxes, _),) = hand.handler.of("synchronize")
        assert [sandbox.id for sandbox in sandboxes] == ["a", "b", "c"]

    run(test())


def test_parts_of_a_connection_that_broke_are_forgotten(short_tmp: Path) -> None:
    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            end = await hand.arrivals.get()
            await end.request()
            end.call(1, synchronize(pb.PodSandbox(id="old"), more=True))
            await end.response()
            await end.close()
            await shake_hands(await hand.arrivals.get())
            await until(lambda: hand.handler.of("synchronize"))
        assert hand.handler.of("synchronize") == [("synchronize", [], {})]

    run(test())


def test_a_second_synchronize_is_a_list_of_its_own(short_tmp: Path) -> None:
    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            end = await hand.arrivals.get()
            await shake_hands(end)
            for stream, name in ((5, "a"), (7, "b")):
                end.call(stream, synchronize(pb.PodSandbox(id=name)))
                assert await end.response() == (stream, Response())
            await until(lambda: len(hand.handler.of("synchronize")) == 3)
        lists = [[sandbox.id for sandbox in call[1]] for call in hand.handler.of("synchronize")]
        assert lists == [[], ["a"], ["b"]]
        assert len(hand.handler.of("connected")) == 1

    run(test())


def test_the_list_of_sandboxes_comes_with_their_live_containers(short_tmp: Path) -> None:
    states = [
        pb.CONTAINER_UNKNOWN,
        pb.CONTAINER_CREATED,
        pb.CONTAINER_PAUSED,
        pb.CONTAINER_RUNNING,
        pb.CONTAINER_STOPPED,
    ]
    message = pb.SynchronizeRequest(
        pods=[pb.PodSandbox(id="a"), pb.PodSandbox(name="without id"), pb.PodSandbox(id="b")],
        containers=[
            pb.Container(name=f"c{number}", pod_sandbox_id="a", state=state)
            for number, state in enumerate(states)
        ],
    )
    inventory = api.Inventory()
    inventory.add(message)
    assert [sandbox.id for sandbox in inventory.sandboxes] == ["a", "b"]
    assert inventory.containers == {"a": ["c1", "c2", "c3"]}


def test_a_slow_synchronize_of_the_handler_holds_nothing_up(short_tmp: Path) -> None:
    async def test() -> None:
        go = asyncio.Event()

        class Slow(RecordingHandler):
            async def synchronize(self, sandboxes: object, containers: object) -> None:
                await go.wait()
                raise OSError(5, "and fails at last")

        handler = Slow()
        runtime = Runtime(short_tmp, RuntimeMode.POD_RPC)
        async with runtime, running(plugin_for(runtime.socket, handler)):
            await runtime.wait_plugin()
            record = await runtime.send_event(pb.RUN_POD_SANDBOX, sim_sandbox())
            assert record.outcome is HookOutcome.OK
            go.set()

    run(test())


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("configured", [True, False])
def test_a_runtime_that_never_synchronizes_is_left_and_tried_again(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, registered: bool, configured: bool
) -> None:
    monkeypatch.setattr(session, "REGISTER_SECONDS", 0.05 if not registered and not configured else 30.0)
    monkeypatch.setattr(session, "SYNCHRONIZE_SECONDS", 0.05)

    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            first = await hand.arrivals.get()
            await first.request()
            if registered:
                first.answer(1)
            if configured:
                first.call(1, configure())
                await first.response()
            with pytest.raises(EOFError):
                await first.next()
            await shake_hands(await hand.arrivals.get())
            await until(lambda: hand.plugin.connected)
            # Once synchronized the watchdog is off.
            assert hand.plugin._session is not None
            assert hand.plugin._session._watchdog is not None
            assert hand.plugin._session._watchdog.when() is None
        assert [entry[0] for entry in hand.handler.calls] == ["connected", "synchronize", "lost"]

    run(test())


def test_a_refused_registration_is_said_once_and_not_repeated_hotly(
    short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with by_hand(short_tmp, backoff=Backoff(first=0.001, most=0.001, refused=60)) as hand:
            end = await hand.arrivals.get()
            await end.request()
            end.send(vectors.REFUSED)
            with pytest.raises(EOFError):
                await end.next()
            await until(lambda: "trying again" in caplog.text)

    run(test())
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "must be 2 digits" in record.getMessage()
    waiting = re.search(r"trying again in ([0-9.]+) s", record.getMessage())
    assert waiting is not None
    assert float(waiting[1]) >= 30


@pytest.mark.parametrize("index", ["1", "100", "x1", "", "\u0661\u0662"])
def test_an_index_that_no_runtime_takes_is_refused_at_once(index: str) -> None:
    with pytest.raises(ValueError, match="two digits"):
        plugin_for(Path("/x"), RecordingHandler(), index=index)


@pytest.mark.parametrize("name", ["", "a/b", "a b"])
def test_a_name_that_no_runtime_takes_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        plugin_for(Path("/x"), RecordingHandler(), name=name)


# --- events -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_pod_events_reach_the_handler_alike_however_they_travel(short_tmp: Path, mode: RuntimeMode) -> None:
    async def test() -> None:
        async with world(short_tmp, mode) as w:
            for event in (pb.RUN_POD_SANDBOX, pb.STOP_POD_SANDBOX, pb.REMOVE_POD_SANDBOX):
                record = await w.runtime.send_event(event, sim_sandbox())
                assert record.outcome is HookOutcome.OK
        run_call, stop_call, remove_call = w.handler.calls[2:5]
        assert run_call == ("run", sandbox())
        bare = sandbox(netns=None, pid=0)
        # That netns does not exist: newer containerds leave it out then, the others name it all the same.
        stopped = {
            RuntimeMode.STATE_CHANGE: sandbox(),
            RuntimeMode.POD_RPC: sandbox(netns=None),
            RuntimeMode.CRIO: sandbox(),
        }
        assert stop_call == ("stop", stopped[mode])
        assert remove_call == ("remove", bare)

    run(test())


@pytest.mark.parametrize("event", [0, 5, 6, 7, 9, 11, 13, 15, 99])
def test_other_state_changes_are_answered_and_not_acted_on(short_tmp: Path, event: int) -> None:
    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            end = await hand.arrivals.get()
            await shake_hands(end)
            change = pb.StateChangeEvent(event=event, pod=pb.PodSandbox(id="x"))  # type: ignore[arg-type]
            end.call(5, call("StateChange", change))
            assert await end.response() == (5, Response())
        assert [entry[0] for entry in hand.handler.calls] == ["connected", "synchronize", "lost"]

    run(test())


def test_every_call_of_the_service_has_an_answer(short_tmp: Path) -> None:
    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            end = await hand.arrivals.get()
            await shake_hands(end)
            for number, method in enumerate(sorted(api.EMPTY_METHODS)):
                end.call(5 + 2 * number, Request(service=api.PLUGIN_SERVICE, method=method, payload=b""))
                assert (await end.response())[1] == Response()

    run(test())


@pytest.mark.parametrize(
    ("service", "method", "payload", "code", "text"),
    [
        ("nri.pkg.api.v1alpha1.Plugin", "Foo", b"", Code.UNIMPLEMENTED, "method Foo"),
        ("other.Service", "Configure", b"", Code.UNIMPLEMENTED, "service other.Service"),
        ("nri.pkg.api.v1alpha1.Plugin", "RunPodSandbox", b"\xff", Code.INTERNAL, "error unmarshalling"),
        ("nri.pkg.api.v1alpha1.Plugin", "Synchronize", b"\x0a\xff", Code.INTERNAL, "error unmarshalling"),
        ("nri.pkg.api.v1alpha1.Plugin", "RunPodSandbox", b"", Code.INVALID_ARGUMENT, "RunPodSandbox: the"),
        ("nri.pkg.api.v1alpha1.Plugin", "CreateContainer", b"", Code.INVALID_ARGUMENT, "CreateContainer:"),
        ("nri.pkg.api.v1alpha1.Plugin", "StopPodSandbox", b"", Code.OK, ""),
        ("nri.pkg.api.v1alpha1.Plugin", "RemovePodSandbox", b"", Code.OK, ""),
    ],
)
def test_bad_calls_get_a_clear_answer_and_the_next_one_is_served(
    short_tmp: Path, service: str, method: str, payload: bytes, code: Code, text: str
) -> None:
    async def test() -> None:
        async with by_hand(short_tmp) as hand:
            end = await hand.arrivals.get()
            await shake_hands(end)
            end.call(5, Request(service=service, method=method, payload=payload))
            stream, response = await end.response()
            assert (stream, response.code) == (5, code)
            assert response.text.startswith(text)
            assert len(hand.handler.calls) == 2
            end.call(7, Request(service=api.PLUGIN_SERVICE, method="StopContainer", payload=b""))
            assert await end.response() == (7, Response())

    run(test())


@pytest.mark.parametrize(
    ("namespaces", "path"),
    [
        ([], None),
        ([("network", "")], None),
        ([("network", "relative/path")], None),
        ([("network", "/a\0b")], None),
        ([("net", "/run/netns/x")], None),
        ([("pid", "/p"), ("network", "/run/netns/x")], Path("/run/netns/x")),
    ],
)
def test_the_netns_is_the_network_entry_or_nothing(
    namespaces: list[tuple[str, str]], path: Path | None
) -> None:
    linux = pb.LinuxPodSandbox(namespaces=[pb.LinuxNamespace(type=t, path=p) for t, p in namespaces])
    made = api.sandbox_of(pb.PodSandbox(id="x", linux=linux))
    assert made is not None
    assert made.netns_path == path
    assert made.pod == PodRef("", "", PodUid(""))


@pytest.mark.parametrize("source", ["", "api", "file", "http"])
def test_a_pod_is_static_where_kubelet_says_that_it_is_its_own(source: str) -> None:
    annotations = {"kubernetes.io/config.source": source} if source else {}
    made = api.sandbox_of(pb.PodSandbox(id="x", annotations=annotations))
    assert made is not None
    assert made.static is (source in ("file", "http"))


def test_odd_orders_of_events_are_all_ok(short_tmp: Path) -> None:
    async def test() -> None:
        async with world(short_tmp, RuntimeMode.CRIO) as w:
            first, second = sim_sandbox(id_="one"), sim_sandbox(id_="two", netns=None)
            for event, box in [
                (pb.STOP_POD_SANDBOX, first),
                (pb.RUN_POD_SANDBOX, first),
                (pb.RUN_POD_SANDBOX, second),
                (pb.STOP_POD_SANDBOX, first),
                (pb.STOP_POD_SANDBOX, first),
                (pb.REMOVE_POD_SANDBOX, second),
                (pb.REMOVE_POD_SANDBOX, second),
            ]:
                assert (await w.runtime.send_event(event, box)).outcome is HookOutcome.OK
        assert [(kind, box.id) for kind, box in w.handler.calls[2:-1]] == [
            ("stop", "one"),
            ("run", "one"),
            ("run", "two"),
            ("stop", "one"),
            ("stop", "one"),
            ("remove", "two"),
            ("remove", "two"),
        ]

    run(test())


@pytest.mark.parametrize("error", [NotNow("not yet home"), ValueError("bug"), Refusal("X", "not yet home")])
@pytest.mark.parametrize("mode", MODES)
def test_a_failed_hook_costs_that_event_alone(short_tmp: Path, mode: RuntimeMode, error: Exception) -> None:
    async def fail(sandbox: Sandbox, deadline: float) -> None:
        raise error

    async def test() -> None:
        async with world(short_tmp, mode) as w:
            w.handler.behaviours["bad"] = fail
            record = await w.runtime.send_event(pb.RUN_POD_SANDBOX, sim_sandbox("bad"))
            assert record.outcome is HookOutcome.ERROR
            assert str(error) in record.detail
            for event in (pb.STOP_POD_SANDBOX, pb.REMOVE_POD_SANDBOX):
                record = await w.runtime.send_event(event, sim_sandbox("bad"))
                assert record.outcome is HookOutcome.OK
            record = await w.runtime.send_event(pb.RUN_POD_SANDBOX, sim_sandbox("good"))
            assert record.outcome is HookOutcome.OK
            assert w.plugin.connected
        outcome = "error" if isinstance(error, ValueError) else "refused"
        assert [(event, seen) for event, _, seen in w.observer.done] == [
            ("RunPodSandbox", outcome),
            ("StopPodSandbox", outcome),
            ("RemovePodSandbox", outcome),
            ("RunPodSandbox", "ok"),
        ]

    run(test())


@pytest.mark.parametrize("mode", [RuntimeMode.STATE_CHANGE, RuntimeMode.POD_RPC])
def test_a_stuck_handler_is_an_error_in_time_and_no_loss(short_tmp: Path, mode: RuntimeMode) -> None:
    async def test() -> None:
        go = asyncio.Event()

        async def stuck(sandbox: Sandbox, deadline: float) -> None:
            await go.wait()

        async with world(short_tmp, mode, request_timeout=0.8) as w:
            w.handler.behaviours["stuck"] = stuck
            record = await w.runtime.send_event(pb.RUN_POD_SANDBOX, sim_sandbox("stuck"))
            assert record.outcome is HookOutcome.ERROR
            assert record.seconds < 0.8
            record = await w.runtime.send_event(pb.STOP_POD_SANDBOX, sim_sandbox("stuck"))
            assert record.outcome is HookOutcome.OK
            assert w.plugin.connected
            go.set()
        assert [seen for _, _, seen in w.observer.done] == ["late", "late"]

    run(test())


def test_a_pod_without_claims_costs_next_to_nothing_and_no_log(
    short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with world(short_tmp) as w:
            caplog.clear()
            for number in range(50):
                await w.runtime.send_event(pb.RUN_POD_SANDBOX, sim_sandbox(id_=f"sb{number}"))
        seconds = sorted(seconds for _, seconds, _ in w.observer.done)
        assert seconds[len(seconds) // 2] < 0.01
        assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []

    run(test())
