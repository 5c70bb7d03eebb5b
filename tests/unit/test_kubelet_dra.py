"""Prepare and unprepare over real gRPC: every claim gets its own answer and no call costs another."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

import driver.kubelet.dra as dra
import driver.kubelet.plugin as plugin_module
from driver.errors import NotNow
from driver.lifecycle.ports import ClaimFailed
from driver.paths import Paths
from driver.pb.dra.v1 import api_pb2 as v1
from driver.pb.dra.v1beta1 import api_pb2 as v1beta1
from tests.conftest import WaitUntilAsync
from tests.unit.kubelet_fakes import (
    ScriptedHandler,
    Seen,
    channel_to,
    claim,
    kubelet_ends,
    plugin_at,
    prepared,
)

V1 = "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin"
V1BETA1 = "k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin"


def beta_claim(uid: str) -> v1beta1.Claim:
    return v1beta1.Claim(namespace="ns", uid=uid, name=f"claim-{uid}")


async def raw_call(root: Path, service: str, method: str, request: bytes) -> bytes:
    async with channel_to(Paths(root=root).dra_socket) as channel:
        return await channel.unary_unary(f"/{service}/{method}")(request, timeout=10)


def test_both_versions_give_the_same_answer_and_only_v1_a_share_id(short_tmp: Path) -> None:
    handler = ScriptedHandler(
        script={
            "u1": (prepared("u1", share_id="share-1", request="nic/fast"), prepared("u1b")),
            "u2": ClaimFailed("no such device"),
        }
    )

    async def run() -> None:
        request = v1.NodePrepareResourcesRequest(claims=[claim("u1"), claim("u2")]).SerializeToString()
        async with plugin_at(short_tmp, handler):
            raw = await raw_call(short_tmp, V1, "NodePrepareResources", request)
            raw_beta = await raw_call(short_tmp, V1BETA1, "NodePrepareResources", request)
        full = v1.NodePrepareResourcesResponse.FromString(raw)
        device = full.claims["u1"].devices[0]
        assert device == v1.Device(
            request_names=["nic"],
            pool_name="node-a",
            device_name="pci-0000-3b-00-2",
            cdi_device_ids=["knd.internal/nic=u1-pci-0000-3b-00-2"],
            share_id="share-1",
        )
        assert not full.claims["u1"].devices[1].HasField("share_id")
        assert full.claims["u2"].error == "no such device"
        # Read with v1's messages, a share id in the beta answer would show.
        beta = v1.NodePrepareResourcesResponse.FromString(raw_beta)
        assert not beta.claims["u1"].devices[0].HasField("share_id")
        device.ClearField("share_id")
        assert beta == full

    asyncio.run(run())


def test_no_claims_are_answered_with_none_and_ask_nothing_of_the_handler(short_tmp: Path) -> None:
    handler = ScriptedHandler()

    async def run() -> None:
        async with plugin_at(short_tmp, handler), kubelet_ends(short_tmp) as ends:
            one = await ends.v1.NodePrepareResources(v1.NodePrepareResourcesRequest(), timeout=10)
            two = await ends.v1beta1.NodeUnprepareResources(
                v1beta1.NodeUnprepareResourcesRequest(), timeout=10
            )
        assert not one.claims
        assert not two.claims

    asyncio.run(run())
    assert handler.calls == []


def test_one_bad_claim_of_three_fails_alone(short_tmp: Path) -> None:
    handler = ScriptedHandler(script={"u2": ClaimFailed("first line\nsecond line")})
    seen = Seen()

    async def run() -> None:
        async with plugin_at(short_tmp, handler, seen), kubelet_ends(short_tmp) as ends:
            request = v1.NodePrepareResourcesRequest(claims=[claim("u1"), claim("u2"), claim("u3")])
            response = await ends.v1.NodePrepareResources(request, timeout=10)
        assert set(response.claims) == {"u1", "u2", "u3"}
        assert response.claims["u2"].error == "first line second line"
        assert not response.claims["u2"].devices
        for uid in ("u1", "u3"):
            assert not response.claims[uid].error
            assert len(response.claims[uid].devices) == 1

    asyncio.run(run())
    assert seen.calls == [("NodePrepareResources", "failed")]


def test_a_claim_repeated_or_malformed_in_a_request_is_answered_once(short_tmp: Path) -> None:
    handler = ScriptedHandler()

    async def run() -> None:
        nameless = v1.Claim(namespace="ns", uid="u2")
        anonymous = v1.Claim(namespace="ns", name="c3")
        claims = [claim("u1"), nameless, claim("u1"), anonymous]
        async with plugin_at(short_tmp, handler), kubelet_ends(short_tmp) as ends:
            response = await ends.v1.NodePrepareResources(
                v1.NodePrepareResourcesRequest(claims=claims), timeout=10
            )
        assert set(response.claims) == {"u1", "u2", ""}
        assert len(response.claims["u1"].devices) == 1
        assert response.claims["u2"].error == "kubelet sent a claim without name"
        assert response.claims[""].error == "kubelet sent a claim without UID"

    asyncio.run(run())
    assert [[ref.uid for ref in claims] for _, claims, _ in handler.calls] == [["u1"]]


def test_a_repeated_prepare_gets_the_identical_reply(short_tmp: Path) -> None:
    async def run() -> None:
        request = v1.NodePrepareResourcesRequest(claims=[claim("u1"), claim("u2")]).SerializeToString()
        async with plugin_at(short_tmp, ScriptedHandler()):
            first = await raw_call(short_tmp, V1, "NodePrepareResources", request)
            again = await raw_call(short_tmp, V1, "NodePrepareResources", request)
        parse = v1.NodePrepareResourcesResponse.FromString
        assert parse(first) == parse(again)

    asyncio.run(run())


def test_unprepare_answers_success_with_the_claims_key_and_failure_with_its_text(short_tmp: Path) -> None:
    handler = ScriptedHandler(script={"u2": ClaimFailed("the device is not home yet")})
    seen = Seen()

    async def run() -> None:
        async with plugin_at(short_tmp, handler, seen), kubelet_ends(short_tmp) as ends:
            request = v1beta1.NodeUnprepareResourcesRequest(claims=[beta_claim("u1"), beta_claim("u2")])
            response = await ends.v1beta1.NodeUnprepareResources(request, timeout=10)
        assert {uid: entry.error for uid, entry in response.claims.items()} == {
            "u1": "",
            "u2": "the device is not home yet",
        }

    asyncio.run(run())
    assert handler.calls[0][0] == "unprepare"
    assert seen.calls == [("NodeUnprepareResources", "failed")]


def test_a_handler_that_forgets_a_claim_or_invents_one_does_not_reach_kubelet(short_tmp: Path) -> None:
    handler = ScriptedHandler(drops=frozenset({"u1"}), adds={"invented": ()})

    async def run() -> None:
        async with plugin_at(short_tmp, handler), kubelet_ends(short_tmp) as ends:
            response = await ends.v1.NodePrepareResources(
                v1.NodePrepareResourcesRequest(claims=[claim("u1"), claim("u2")]), timeout=10
            )
        assert set(response.claims) == {"u1", "u2"}
        assert response.claims["u1"].error == "the driver gave no answer for this claim"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "text", "level"),
    [
        (NotNow("the runtime is not connected"), "the runtime is not connected", logging.WARNING),
        (ClaimFailed, "internal error in the driver (TypeError), see its log", logging.ERROR),
        (KeyError("secret\ndetail"), "internal error in the driver (KeyError), see its log", logging.ERROR),
    ],
)
def test_an_exception_of_the_handler_is_every_claims_error_and_the_server_lives(
    short_tmp: Path, error: BaseException, text: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    handler = ScriptedHandler(raises=error)

    async def run() -> None:
        async with plugin_at(short_tmp, handler), kubelet_ends(short_tmp) as ends:
            request = v1.NodePrepareResourcesRequest(claims=[claim("u1"), claim("u2")])
            response = await ends.v1.NodePrepareResources(request, timeout=10)
            assert [response.claims[uid].error for uid in ("u1", "u2")] == [text, text]
            handler.raises = None
            response = await ends.v1.NodePrepareResources(request, timeout=10)
            assert not response.claims["u1"].error

    asyncio.run(run())
    mine = [record for record in caplog.records if record.name == dra.__name__]
    assert [record.levelno for record in mine] == [level]


@pytest.mark.parametrize("service", [V1, V1BETA1])
@pytest.mark.parametrize("method", ["NodePrepareResources", "NodeUnprepareResources"])
@pytest.mark.parametrize(
    "raw", [b"\xff\xff\xff\xff", b"\x0a\x7f", b"\x0a\x02\x12\x05", b"\x0a\x04\x12\x02\xff\xfe"]
)
def test_a_request_that_is_not_protobuf_is_refused_and_the_server_lives(
    short_tmp: Path, service: str, method: str, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()

    async def run() -> None:
        async with plugin_at(short_tmp, ScriptedHandler(), seen), kubelet_ends(short_tmp) as ends:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await raw_call(short_tmp, service, method, raw)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert refused.value.details() == f"not a {method} request"
            response = await ends.v1.NodePrepareResources(
                v1.NodePrepareResourcesRequest(claims=[claim("u1")]), timeout=10
            )
            assert len(response.claims["u1"].devices) == 1

    asyncio.run(run())
    assert seen.calls == [(method, "failed"), ("NodePrepareResources", "ok")]
    assert not caplog.records


def test_the_handlers_deadline_leaves_time_for_the_answer(short_tmp: Path) -> None:
    handler = ScriptedHandler()

    async def run() -> None:
        async with plugin_at(short_tmp, handler), kubelet_ends(short_tmp) as ends:
            request = v1.NodePrepareResourcesRequest(claims=[claim("u1")])
            before = time.monotonic()
            await ends.v1.NodePrepareResources(request, timeout=20)
            await ends.v1.NodePrepareResources(request)
            after = time.monotonic()
        short, unlimited = (deadline for _, _, deadline in handler.calls)
        # grpc rounds a deadline up when it sends it.
        assert before + 18.5 <= short <= after + 19.5
        assert before + 44 <= unlimited <= after + 44

    asyncio.run(run())


def test_a_late_handler_is_answered_for_in_time_and_goes_on(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    seen = Seen()

    async def run() -> None:
        handler = ScriptedHandler(gate=asyncio.Event())
        plugin = plugin_at(short_tmp, handler, seen)
        async with plugin, kubelet_ends(short_tmp) as ends:
            request = v1.NodePrepareResourcesRequest(claims=[claim("u1")])
            response = await ends.v1.NodePrepareResources(request, timeout=1.5)
            assert "the work goes on and kubelet will ask again" in response.claims["u1"].error
            assert (handler.running, plugin.busy) == (1, 1)
            assert handler.gate is not None
            handler.gate.set()
            await wait_until_async(lambda: plugin.busy == 0)
            assert (handler.finished, handler.cancelled) == (1, 0)

    asyncio.run(run())
    assert seen.calls == [("NodePrepareResources", "late")]


def test_a_call_that_kubelet_gave_up_is_not_undone_and_its_retry_is_served(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    seen = Seen()

    async def run() -> None:
        handler = ScriptedHandler(gate=asyncio.Event())
        plugin = plugin_at(short_tmp, handler, seen)
        async with plugin, kubelet_ends(short_tmp) as ends:
            request = v1.NodePrepareResourcesRequest(claims=[claim("u1")])
            call = ends.v1.NodePrepareResources(request, timeout=30)
            await wait_until_async(lambda: handler.running == 1)
            call.cancel()
            await wait_until_async(lambda: ("NodePrepareResources", "cancelled") in seen.calls)
            assert (handler.running, handler.cancelled) == (1, 0)
            retry = asyncio.ensure_future(ends.v1.NodePrepareResources(request, timeout=30))
            await wait_until_async(lambda: handler.running == 2)
            assert handler.gate is not None
            handler.gate.set()
            response = await retry
            assert len(response.claims["u1"].devices) == 1
            await wait_until_async(lambda: plugin.busy == 0)
            assert (handler.finished, handler.cancelled) == (2, 0)

    asyncio.run(run())


def test_calls_in_flight_finish_when_the_agent_stops(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    async def run() -> None:
        handler = ScriptedHandler(gate=asyncio.Event())
        async with kubelet_ends(short_tmp) as ends:
            plugin = plugin_at(short_tmp, handler)
            await plugin.__aenter__()
            request = v1.NodePrepareResourcesRequest(claims=[claim("u1")])
            call = asyncio.ensure_future(ends.v1.NodePrepareResources(request, timeout=30))
            await wait_until_async(lambda: handler.running == 1)
            leaving = asyncio.create_task(plugin.__aexit__(None, None, None))
            await wait_until_async(lambda: not Paths(root=short_tmp).registration_socket.exists())
            assert handler.gate is not None
            handler.gate.set()
            response = await call
            assert len(response.claims["u1"].devices) == 1
            await leaving

    asyncio.run(run())


def test_work_that_does_not_end_is_cancelled_when_the_agent_stops(
    short_tmp: Path, wait_until_async: WaitUntilAsync, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_module, "CALL_GRACE", 0.05)
    monkeypatch.setattr(plugin_module, "WORK_GRACE", 0.05)

    async def run() -> None:
        handler = ScriptedHandler(gate=asyncio.Event())
        async with kubelet_ends(short_tmp) as ends:
            async with plugin_at(short_tmp, handler) as plugin:
                request = v1.NodePrepareResourcesRequest(claims=[claim("u1")])
                call = asyncio.ensure_future(ends.v1.NodePrepareResources(request, timeout=30))
                await wait_until_async(lambda: handler.running == 1)
            assert (handler.running, handler.cancelled, plugin.busy) == (0, 1, 0)
            with pytest.raises(grpc.aio.AioRpcError):
                await call
        left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert "NodePrepareResources" not in left

    asyncio.run(run())
