"""The trunk loses no call, hangs on none and leaves nothing behind, whatever its peer does.

Invariant: each test talks over a real socket pair, and `run` fails a test that leaves tasks or descriptors.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time

import pytest

from driver.nri import mux, transport, ttrpc
from driver.nri.mux import FrameTooLong, ProtocolError
from driver.nri.transport import Reply
from driver.nri.ttrpc import (
    BadMessage,
    CallFailed,
    CallTimedOut,
    Code,
    ConnectionClosed,
    Frame,
    MessageType,
    Request,
    Response,
)
from tests.unit import nri_vectors as vectors
from tests.unit.nri_support import Pair, connected_pair, run, until


def ask(method: str = "Method", payload: bytes = b"") -> Request:
    return Request(service="Service", method=method, payload=payload)


# --- the answering side -----------------------------------------------------------------------------


def test_300_concurrent_calls_are_all_answered_whole() -> None:
    async def serve(request: Request, received: float) -> Reply:
        # Answers of up to 20 KB, in an order of their own.
        number = int(request.method)
        await asyncio.sleep(random.Random(number).random() / 100)
        return Reply(Response(bytes([number % 251]) * (number * 67)))

    async def test() -> None:
        async with connected_pair(serve) as pair:
            for number in range(300):
                pair.peer.call(2 * number + 1, ask(str(number)))
            got = dict([await pair.peer.response() for _ in range(300)])
        for number in range(300):
            assert got[2 * number + 1] == Response(bytes([number % 251]) * (number * 67))

    run(test())


@pytest.mark.parametrize("stream", [0, 2, 6, 5, 3])
def test_a_bad_stream_id_costs_one_answer_and_no_connection(stream: int) -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            pair.peer.call(5, ask())
            assert await pair.peer.response() == (5, Response())
            pair.peer.call(stream, ask())
            answered, response = await pair.peer.response()
            assert (answered, response.code) == (stream, Code.INVALID_ARGUMENT)
            pair.peer.call(7, ask())
            assert await pair.peer.response() == (7, Response())

    run(test())


def test_a_request_that_is_no_protobuf_costs_one_answer() -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            pair.peer.frame(1, ttrpc.encode_frame(Frame(1, MessageType.REQUEST, b"\xff\xff")))
            stream, response = await pair.peer.response()
            assert (stream, response.code) == (1, Code.INVALID_ARGUMENT)
            pair.peer.call(3, ask())
            assert await pair.peer.response() == (3, Response())

    run(test())


@pytest.mark.parametrize("text", ["plain", "bad \udcff path", "x" * 10_240])
def test_a_handler_that_raises_is_an_error_answer_with_clean_text(text: str) -> None:
    async def serve(request: Request, received: float) -> Reply:
        raise ValueError(text)

    async def test() -> None:
        async with connected_pair(serve) as pair:
            pair.peer.call(1, ask())
            stream, response = await pair.peer.response()
            assert (stream, response.code) == (1, Code.UNKNOWN)
            assert response.text.startswith("ValueError: " + text[:3])
            assert len(response.text.encode()) <= 1024

    run(test())


def test_frames_of_no_meaning_are_skipped() -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            for connection in (0, 7):
                pair.peer.send(struct.pack(">II", connection, 5) + b"abcde")
            pair.peer.send(struct.pack(">II", 1, 0))
            for kind in (2, 3, 77):
                pair.peer.frame(1, ttrpc.encode_frame(Frame(9, kind, b"abc")))
            pair.peer.frame(2, ttrpc.encode_frame(Frame(99, MessageType.RESPONSE, b"")))
            pair.peer.call(1, ask())
            assert await pair.peer.response() == (1, Response())

    run(test())


def test_an_answer_over_the_limit_becomes_an_error_answer() -> None:
    async def serve(request: Request, received: float) -> Reply:
        return Reply(Response(bytes(4 << 20)))

    async def test() -> None:
        async with connected_pair(serve) as pair:
            pair.peer.call(1, ask())
            stream, response = await pair.peer.response()
            assert (stream, response.code) == (1, Code.RESOURCE_EXHAUSTED)

    run(test())


def test_what_follows_an_answer_happens_before_the_next_call_is_served() -> None:
    order: list[str] = []

    async def serve(request: Request, received: float) -> Reply:
        order.append(request.method)
        return Reply(Response(), lambda: order.append(f"after {request.method}"))

    async def test() -> None:
        async with connected_pair(serve) as pair:
            for number, method in enumerate("abc"):
                pair.peer.call(2 * number + 1, ask(method))
                await pair.peer.response()
        assert order == ["a", "after a", "b", "after b", "c", "after c"]

    run(test())


def test_more_calls_than_the_limit_are_refused_not_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "IN_FLIGHT_MAX", 2)
    go = asyncio.Event()

    async def serve(request: Request, received: float) -> Reply:
        await go.wait()
        return Reply(Response())

    async def test() -> None:
        async with connected_pair(serve) as pair:
            for stream in (1, 3, 5):
                pair.peer.call(stream, ask())
            stream, response = await pair.peer.response()
            assert (stream, response.code) == (5, Code.RESOURCE_EXHAUSTED)
            go.set()
            assert {(await pair.peer.response())[0] for _ in range(2)} == {1, 3}

    run(test())


def test_a_peer_that_does_not_read_is_still_heard_and_costs_bounded_memory() -> None:
    served = 0

    async def serve(request: Request, received: float) -> Reply:
        nonlocal served
        served += 1
        return Reply(Response(bytes(1 << 20)))

    async def test() -> None:
        async with connected_pair(serve) as pair:
            for number in range(8):
                pair.peer.call(2 * number + 1, ask())
            # All are served, and answers to our own calls get through, with 8 MiB unread.
            await until(lambda: served == 8)
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            pair.peer.answer(1)
            assert await calling == b""
            for number in range(8, 40):
                pair.peer.call(2 * number + 1, ask())
            with pytest.raises(ProtocolError, match="unread"):
                await pair.reading
            assert served <= 40

    run(test())


# --- the calling side -------------------------------------------------------------------------------


def test_an_empty_answer_is_success() -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"payload", 5))
            stream, request = await pair.peer.request()
            assert (stream, request.service, request.method, request.payload) == (1, "S", "M", b"payload")
            assert request.timeout_nano == 5_000_000_000
            pair.peer.send(vectors.REGISTER_OK)
            assert await calling == b""

    run(test())


def test_an_error_answer_is_an_error_with_code_and_text() -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            pair.peer.send(vectors.REFUSED)
            with pytest.raises(CallFailed, match="must be 2 digits") as caught:
                await calling
            assert caught.value.code == Code.UNKNOWN

    run(test())


@pytest.mark.parametrize(
    ("kind", "body", "error"),
    [(MessageType.RESPONSE, b"\xff\xff", BadMessage), (MessageType.DATA, b"", ProtocolError)],
)
def test_an_answer_that_is_none_fails_its_call_alone(
    kind: MessageType, body: bytes, error: type[Exception]
) -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            await pair.peer.request()
            pair.peer.frame(2, ttrpc.encode_frame(Frame(1, kind, body)))
            with pytest.raises(error):
                await calling
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            pair.peer.answer(3)
            assert await calling == b""

    run(test())


def test_100_concurrent_calls_have_increasing_odd_ids_on_the_wire() -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            calls = [asyncio.create_task(pair.trunk.call("S", str(n), b"", 5)) for n in range(100)]
            seen = [(await pair.peer.request())[0] for _ in calls]
            assert seen == list(range(1, 201, 2))
            for stream in reversed(seen):
                pair.peer.answer(stream, Response(str(stream).encode()))
            assert await asyncio.gather(*calls) == [str(stream).encode() for stream in seen]

    run(test())


def test_a_call_without_answer_times_out_and_its_late_answer_is_dropped() -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            with pytest.raises(CallTimedOut, match="M got no answer"):
                await pair.trunk.call("S", "M", b"", 0.02)
            assert pair.trunk._answers == {}
            pair.peer.answer(1)
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            pair.peer.answer(3, Response(b"mine"))
            assert await calling == b"mine"

    run(test())


def test_a_cancelled_calls_late_answer_is_dropped() -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            await pair.peer.request()
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            assert pair.trunk._answers == {}
            pair.peer.answer(1)
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            pair.peer.answer(3)
            assert await calling == b""

    run(test())


def test_a_call_over_the_limit_writes_nothing_and_the_connection_stays() -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            with pytest.raises(ttrpc.MessageTooLong):
                await pair.trunk.call("S", "M", bytes(4 << 20), 5)
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            stream, _ = await pair.peer.request()
            pair.peer.answer(stream)
            assert await calling == b""

    run(test())


# --- the end ----------------------------------------------------------------------------------------


def test_a_clean_end_between_messages_ends_the_reader() -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            await pair.peer.close()
            await pair.reading
            with pytest.raises(ConnectionClosed):
                await pair.trunk.call("S", "M", b"", 5)

    run(test())


@pytest.mark.parametrize("length", [3, 8, 12, 18, 40])
def test_an_end_anywhere_inside_a_message_fails_what_waits(length: int) -> None:
    """In the mux header, after it, in the ttrpc header, after it, in the body."""
    cancelled = False

    async def serve(request: Request, received: float) -> Reply:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        finally:
            cancelled = True
        raise AssertionError("not reached")

    async def test() -> None:
        async with connected_pair(serve) as pair:
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            pair.peer.call(1, ask())
            await pair.peer.request()
            pair.peer.send(vectors.RUN[:length])
            await pair.peer.close()
            with pytest.raises(ConnectionClosed, match="in the middle"):
                await pair.reading
            with pytest.raises(ConnectionClosed):
                await calling
        assert cancelled

    run(test())


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">II", 1, 0xFFFFFFFF),
        struct.pack(">II", 1, 10) + struct.pack(">IIBB", 4194305, 1, 1, 0),
    ],
)
def test_a_length_over_the_limit_ends_the_connection_at_once(data: bytes) -> None:
    async def test() -> None:
        async with connected_pair() as pair:
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            pair.peer.send(data)
            with pytest.raises(FrameTooLong):
                await pair.reading
            with pytest.raises(ConnectionClosed):
                await calling

    run(test())


def test_closing_with_calls_in_both_directions_leaves_nothing() -> None:
    async def serve(request: Request, received: float) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError("not reached")

    async def test() -> None:
        async with connected_pair(serve) as pair:
            calling = asyncio.create_task(pair.trunk.call("S", "M", b"", 5))
            pair.peer.call(1, ask())
            await pair.peer.request()
            await pair.trunk.close()
            with pytest.raises(ConnectionClosed):
                await calling

    run(test())


def test_closing_does_not_wait_for_a_peer_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CLOSE_SECONDS", 0.05)

    async def serve(request: Request, received: float) -> Reply:
        return Reply(Response(bytes(2 << 20)))

    async def test(pair: Pair) -> None:
        pair.peer.call(1, ask())
        await until(lambda: pair.trunk._writer.transport.get_write_buffer_size() > 0)
        began = time.monotonic()
        await pair.trunk.close()
        assert time.monotonic() - began < 2

    async def whole() -> None:
        async with connected_pair(serve) as pair:
            await test(pair)

    run(whole())


def test_the_reader_survives_any_cut_of_a_long_stream() -> None:
    async def serve(request: Request, received: float) -> Reply:
        return Reply(Response(request.payload))

    async def test() -> None:
        rng = random.Random(7)
        payloads = [rng.randbytes(rng.choice([0, 1, 4080, 4090, 9000])) for _ in range(40)]
        data = b"".join(
            b"".join(mux.encode(1, ttrpc.encode_request(2 * i + 1, ask("M", payload))))
            for i, payload in enumerate(payloads)
        )
        async with connected_pair(serve) as pair:
            start = 0
            while start < len(data):
                size = rng.randrange(1, 5000)
                pair.peer.send(data[start : start + size])
                start += size
                await asyncio.sleep(0)
            got = dict([await pair.peer.response() for _ in payloads])
        assert [got[2 * i + 1].payload for i in range(40)] == payloads

    run(test())
