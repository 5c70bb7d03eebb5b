"""The codecs give the bytes that real runtimes read, and take whatever bytes they are given.

Invariant: golden bytes are compared whole; nothing here opens a socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.model import AS_IT_IS, Adjustment
from driver.nri import mux, ttrpc
from driver.nri.api import answer_with
from driver.nri.mux import Connection, FrameTooLong, ProtocolError, WireError
from driver.nri.ttrpc import Code, Frame, MessageType, Request, Response
from driver.pb.nri.v1 import api_pb2 as pb
from tests.unit import nri_vectors as vectors

PLUGIN = "nri.pkg.api.v1alpha1.Plugin"
RUNTIME = "nri.pkg.api.v1alpha1.Runtime"
TWO_SECONDS = 2_000_000_000

ALL_VECTORS = {
    name: value
    for name, value in vars(vectors).items()
    if isinstance(value, bytes) and name != "NEGATIVE_EVENTS"
}

POD = pb.PodSandbox(
    id="sb1",
    name="p",
    uid="u1",
    namespace="ns",
    linux=pb.LinuxPodSandbox(namespaces=[pb.LinuxNamespace(type="network", path="/var/run/netns/cni-1")]),
    pid=42,
    ips=["10.0.0.5"],
)


def frames_of(pieces: Iterable[bytes]) -> list[tuple[int, Frame]]:
    """Every ttrpc frame in the trunk bytes, with its connection."""
    demux = mux.Demux()
    decoders: dict[int, ttrpc.FrameDecoder] = {}
    found = []
    for piece in pieces:
        for chunk in demux.feed(piece):
            decoder = decoders.setdefault(chunk.connection, ttrpc.FrameDecoder())
            found += [(chunk.connection, frame) for frame in decoder.feed(chunk.data)]
    return found


def only_frame(data: bytes) -> Frame:
    ((_, frame),) = frames_of([data])
    return frame


def request_bytes(connection: int, stream: int, request: Request) -> bytes:
    return b"".join(mux.encode(connection, ttrpc.encode_request(stream, request)))


def response_bytes(connection: int, stream: int, response: Response) -> bytes:
    return b"".join(mux.encode(connection, ttrpc.encode_response(stream, response)))


# --- golden bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeout_nano", "golden"), [(0, vectors.REGISTER), (5_000_000_000, vectors.REGISTER_TIMED)]
)
def test_a_request_is_encoded_as_go_encodes_it(timeout_nano: int, golden: bytes) -> None:
    message = pb.RegisterPluginRequest(plugin_name="pyplug", plugin_idx="10")
    request = Request(
        service=RUNTIME,
        method="RegisterPlugin",
        payload=message.SerializeToString(),
        timeout_nano=timeout_nano,
    )
    assert request_bytes(Connection.RUNTIME, 1, request) == golden


@pytest.mark.parametrize(
    ("events", "golden"),
    [
        (0x7, vectors.CONFIGURED_7),
        (0xF, vectors.CONFIGURED_F),
        (0x7FF, vectors.CONFIGURED_7FF),
        (0x3FFF, vectors.CONFIGURED_3FFF),
    ],
)
def test_an_event_mask_is_encoded_in_field_two(events: int, golden: bytes) -> None:
    payload = pb.ConfigureResponse(events=events).SerializeToString()
    assert response_bytes(Connection.PLUGIN, 1, Response(payload)) == golden


@pytest.mark.parametrize(
    ("stream", "response", "golden"),
    [
        (3, Response(pb.SynchronizeResponse(more=True).SerializeToString()), vectors.SYNCHRONIZED_MORE),
        (3, Response(), vectors.SYNCHRONIZED),
        (5, Response(), vectors.OK),
        (5, Response(b"", Code.UNKNOWN, "no netdev"), vectors.ERROR),
        (7, Response(b"", Code.UNIMPLEMENTED, "method Foo"), vectors.UNIMPLEMENTED),
        (
            11,
            Response(pb.ValidateContainerAdjustmentResponse(reject=True, reason="nope").SerializeToString()),
            vectors.REJECTED,
        ),
    ],
)
def test_a_response_is_encoded_as_go_encodes_it(stream: int, response: Response, golden: bytes) -> None:
    assert response_bytes(Connection.PLUGIN, stream, response) == golden


def test_a_container_adjustment_keeps_its_field_numbers() -> None:
    adjust = pb.ContainerAdjustment(
        mounts=[pb.Mount(destination="/etc/x", type="bind", source="/run/x", options=["rbind", "ro"])],
        env=[pb.KeyValue(key="A", value="b")],
        rlimits=[pb.POSIXRlimit(type="RLIMIT_MEMLOCK", hard=2**64 - 1, soft=2**64 - 1)],
        CDI_devices=[pb.CDIDevice(name="example.com/net=nic0")],
        linux=pb.LinuxContainerAdjustment(
            devices=[
                pb.LinuxDevice(
                    path="/dev/infiniband/uverbs0",
                    type="c",
                    major=231,
                    minor=192,
                    file_mode=pb.OptionalUInt32(value=0o666),
                    uid=pb.OptionalUInt32(),
                    gid=pb.OptionalUInt32(value=100),
                )
            ],
            net_devices={"eth1": pb.LinuxNetDevice(name="net1")},
        ),
    )
    payload = pb.CreateContainerResponse(adjust=adjust).SerializeToString()
    assert response_bytes(Connection.PLUGIN, 9, Response(payload)) == vectors.CREATED


def test_files_of_a_cgroup_are_set_by_the_fields_that_runtimes_read() -> None:
    """CreateContainerResponse.adjust 1, linux 6, resources 2, unified 6, an entry's key 1 and value 2."""
    line = "mlx5_2 hca_handle=4 hca_object=2048"
    entry = b"\x0a\x08rdma.max" + b"\x12" + bytes([len(line)]) + line.encode()
    for tag in (0x32, 0x12, 0x32, 0x0A):
        entry = bytes([tag, len(entry)]) + entry
    assert answer_with(Adjustment(cgroup={"rdma.max": line})) == entry
    assert answer_with(AS_IT_IS) == b""


def test_a_configure_request_from_go_is_read() -> None:
    request = ttrpc.decode_request(only_frame(vectors.CONFIGURE_FROM_GO).body)
    message = pb.ConfigureRequest.FromString(request.payload)
    assert (request.service, request.method, request.timeout_nano) == (PLUGIN, "Configure", 1_999_941_433)
    assert (message.runtime_name, message.runtime_version) == ("testrt", "v9.9.9")
    assert (message.registration_timeout, message.request_timeout) == (5000, 2000)
    assert message.NRI_version == "0.0.0-unknown"


def test_a_configure_request_without_nri_version_is_read() -> None:
    request = ttrpc.decode_request(only_frame(vectors.CONFIGURE).body)
    message = pb.ConfigureRequest.FromString(request.payload)
    assert (message.runtime_name, message.runtime_version, message.NRI_version) == (
        "containerd",
        "v2.1.0",
        "",
    )
    assert (request.timeout_nano, message.request_timeout) == (TWO_SECONDS, 2000)


@pytest.mark.parametrize(
    ("golden", "method", "message"),
    [
        (vectors.SYNCHRONIZE, "Synchronize", pb.SynchronizeRequest(pods=[POD])),
        (vectors.SYNCHRONIZE_MORE, "Synchronize", pb.SynchronizeRequest(more=True)),
        (vectors.RUN, "RunPodSandbox", pb.RunPodSandboxRequest(pod=POD)),
        (vectors.RUN_STATE_CHANGE, "StateChange", pb.StateChangeEvent(event=pb.RUN_POD_SANDBOX, pod=POD)),
    ],
)
def test_pods_are_read_from_every_way_they_travel(
    golden: bytes,
    method: str,
    message: pb.SynchronizeRequest | pb.RunPodSandboxRequest | pb.StateChangeEvent,
) -> None:
    request = ttrpc.decode_request(only_frame(golden).body)
    assert (request.service, request.method, request.timeout_nano) == (PLUGIN, method, TWO_SECONDS)
    assert type(message).FromString(request.payload) == message


@pytest.mark.parametrize(
    ("golden", "stream", "response"),
    [
        (vectors.REGISTER_OK, 1, Response()),
        (
            vectors.EVEN_STREAM,
            2,
            Response(b"", 3, "StreamID must be odd for client initiated streams"),
        ),
        (
            vectors.REFUSED,
            1,
            Response(b"", 2, 'invalid plugin index: invalid plugin index "1", must be 2 digits'),
        ),
    ],
)
def test_the_runtimes_answers_are_read(golden: bytes, stream: int, response: Response) -> None:
    frame = only_frame(golden)
    assert (frame.stream, frame.type) == (stream, MessageType.RESPONSE)
    assert ttrpc.decode_response(frame.body) == response


def test_a_negative_number_is_read_from_its_ten_byte_form() -> None:
    assert pb.ConfigureResponse.FromString(vectors.NEGATIVE_EVENTS).events == -1


# --- boundaries in and out --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALL_VECTORS))
def test_single_bytes_give_the_same_frames_as_one_piece(name: str) -> None:
    data = ALL_VECTORS[name]
    assert frames_of(data[i : i + 1] for i in range(len(data))) == frames_of([data])


@given(st.lists(st.integers(1, 200)))
def test_any_cutting_gives_the_same_frames(cuts: list[int]) -> None:
    data = b"".join(ALL_VECTORS.values())
    pieces, start = [], 0
    for cut in cuts:
        pieces.append(data[start : start + cut])
        start += cut
    pieces.append(data[start:])
    assert frames_of(pieces) == frames_of([data])


def test_three_requests_in_one_read_come_out_as_three() -> None:
    found = frames_of([vectors.CONFIGURE + vectors.SYNCHRONIZE + vectors.RUN])
    methods = [ttrpc.decode_request(frame.body).method for _, frame in found]
    assert methods == ["Configure", "Synchronize", "RunPodSandbox"]


def mux_frame(connection: int, payload: bytes) -> bytes:
    return struct.pack(">II", connection, len(payload)) + payload


@pytest.mark.parametrize("size", [1, 3, 10, 11, 200])
def test_a_message_in_many_mux_frames_is_one_message(size: int) -> None:
    message = vectors.RUN[8:]
    pieces = [mux_frame(1, message[i : i + size]) for i in range(0, len(message), size)]
    assert frames_of(pieces) == frames_of([vectors.RUN])


def test_two_messages_in_one_mux_frame_are_two_messages() -> None:
    both = mux_frame(1, vectors.CONFIGURE[8:] + vectors.SYNCHRONIZE[8:])
    assert frames_of([both]) == frames_of([vectors.CONFIGURE + vectors.SYNCHRONIZE])


def test_connections_are_kept_apart_even_inside_messages() -> None:
    message, answer = vectors.RUN[8:], vectors.REGISTER_OK[8:]
    mixed = [mux_frame(1, message[:20]), mux_frame(2, answer[:5]), mux_frame(1, message[20:])]
    found = frames_of([*mixed, mux_frame(2, answer[5:])])
    assert [connection for connection, _ in found] == [1, 2]
    assert found[0][1] == only_frame(vectors.RUN)


def test_an_empty_mux_frame_is_nothing() -> None:
    assert frames_of([mux_frame(1, b""), mux_frame(0, b""), vectors.OK]) == frames_of([vectors.OK])


@pytest.mark.parametrize(
    ("body", "sizes"),
    [
        (0, [10]),
        (4085, [4095]),
        (4086, [4096]),
        (4087, [4096, 1]),
        (5000, [4096, 914]),
        (65536, [4096, 61450]),
        (4194304, [4096, 4190218]),
    ],
)
def test_a_message_is_cut_as_go_can_read_it(body: int, sizes: list[int]) -> None:
    message = ttrpc.encode_frame(Frame(5, MessageType.RESPONSE, bytes(body)))
    frames = mux.encode(1, message)
    assert [len(frame) - 8 for frame in frames] == sizes
    assert frames_of(frames) == [(1, Frame(5, MessageType.RESPONSE, bytes(body)))]


def test_the_cut_message_is_byte_for_byte_what_was_recorded() -> None:
    body = bytes(i % 251 for i in range(5000))
    data = b"".join(mux.encode(1, ttrpc.encode_frame(Frame(5, MessageType.RESPONSE, body))))
    assert len(data) == 5026
    assert hashlib.sha256(data).hexdigest() == (
        "4c74fceafe7728f3aba4747f69b7f92a532cd8c1cb33cb3fb3941f88ccdc261e"
    )


def test_a_message_over_the_limit_is_refused_before_anything_is_encoded() -> None:
    with pytest.raises(ttrpc.MessageTooLong):
        ttrpc.encode_frame(Frame(1, MessageType.REQUEST, bytes(4194305)))


@pytest.mark.parametrize("length", [4194315, 0xFFFFFFFF])
def test_an_announced_mux_frame_over_the_limit_ends_the_connection(length: int) -> None:
    with pytest.raises(FrameTooLong):
        frames_of([struct.pack(">II", 1, length)])


@pytest.mark.parametrize("length", [4194305, 0xFFFFFFFF])
def test_an_announced_body_over_the_limit_ends_the_connection(length: int) -> None:
    with pytest.raises(FrameTooLong):
        frames_of([mux_frame(1, struct.pack(">IIBB", length, 1, 1, 0))])


def test_a_body_of_exactly_the_limit_is_taken() -> None:
    body = bytes(4194304)
    data = b"".join(mux.encode(1, ttrpc.encode_frame(Frame(1, MessageType.REQUEST, body))))
    assert len(only_frame(data).body) == 4194304


@given(st.binary(max_size=400))
def test_garbage_gives_frames_or_a_wire_error(data: bytes) -> None:
    try:
        for _, frame in frames_of([data]):
            ttrpc.ServerStreams().receive(frame)
            ttrpc.ClientStreams().receive(frame)
    except WireError:
        pass


@given(st.binary(max_size=200))
def test_garbage_bodies_give_messages_or_bad_message(body: bytes) -> None:
    for decode in (ttrpc.decode_request, ttrpc.decode_response):
        with contextlib.suppress(ttrpc.BadMessage):
            decode(body)


# --- bodies -----------------------------------------------------------------------------------------


@given(st.text(), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=100))
def test_a_request_survives_the_wire(method: str, timeout_nano: int, payload: bytes) -> None:
    request = Request(service=PLUGIN, method=method, payload=payload, timeout_nano=timeout_nano)
    assert ttrpc.decode_request(only_frame(request_bytes(1, 1, request)).body) == request


def test_metadata_and_unknown_fields_are_skipped() -> None:
    metadata = b"\x2a\x0d\x0a\x0btraceparent"
    unknown = b"\xf2\x01\x03abc" + b"\xf8\x01\x05" + b"\xfd\x01abcd" + b"\xf9\x01abcdefgh"
    body = only_frame(vectors.RUN).body
    assert ttrpc.decode_request(metadata + body + unknown) == ttrpc.decode_request(body)


def test_an_empty_response_is_success_and_so_is_code_zero() -> None:
    assert ttrpc.decode_response(b"") == Response()
    assert ttrpc.decode_response(b"\x0a\x02\x08\x00\x12\x01x") == Response(b"x")


def test_an_error_carries_no_payload_whatever_came_with_it() -> None:
    assert ttrpc.encode_response(5, Response(b"payload", 2, "no netdev")) == vectors.ERROR[8:]
    assert ttrpc.decode_response(b"\x0a\x02\x08\x05\x12\x01x") == Response(b"", 5, "")


@pytest.mark.parametrize("text", ["x" * 10_000, "ü" * 10_000, "bad \udcff path", "\U0001f600" * 2000])
def test_an_error_text_is_valid_and_short_on_the_wire(text: str) -> None:
    frame = ttrpc.encode_response(1, Response(b"", Code.UNKNOWN, text))
    sent = ttrpc.decode_response(frame[10:]).text
    assert 0 < len(sent.encode()) <= 1024
    assert sent[:4] == text[:4]


@given(st.text(st.characters(), max_size=600))
def test_any_text_becomes_valid_utf8_of_bounded_length(text: str) -> None:
    assert len(ttrpc.clean_text(text, 100).encode()) <= 100


# --- stream ids -------------------------------------------------------------------------------------


def request_frame(stream: int) -> Frame:
    return only_frame(request_bytes(1, stream, Request(service=PLUGIN, method="M", payload=b"")))


@pytest.mark.parametrize("stream", [0, 2, 4, 1, 3])
def test_even_reused_and_lower_ids_are_answered_with_code_three(stream: int) -> None:
    streams = ttrpc.ServerStreams()
    assert isinstance(streams.receive(request_frame(3)), ttrpc.IncomingCall)
    event = streams.receive(request_frame(stream))
    assert isinstance(event, ttrpc.Rejected)
    assert (event.stream, event.response.code) == (stream, Code.INVALID_ARGUMENT)
    assert isinstance(streams.receive(request_frame(101)), ttrpc.IncomingCall)


def test_a_request_that_is_no_protobuf_is_answered_with_code_three() -> None:
    event = ttrpc.ServerStreams().receive(Frame(1, MessageType.REQUEST, b"\xff\xff"))
    assert isinstance(event, ttrpc.Rejected)
    assert event.response.code == Code.INVALID_ARGUMENT


def test_streaming_flags_do_not_change_how_a_request_is_served() -> None:
    body = request_frame(1).body
    for stream, flags in ((1, 1), (3, 2), (5, 0xFF)):
        event = ttrpc.ServerStreams().receive(Frame(stream, MessageType.REQUEST, body, flags))
        assert isinstance(event, ttrpc.IncomingCall)


@pytest.mark.parametrize("kind", [0, 2, 3, 77])
def test_a_server_ignores_what_is_no_request(kind: int) -> None:
    assert ttrpc.ServerStreams().receive(Frame(1, kind, b"")) is None


def test_calls_take_odd_increasing_ids() -> None:
    streams = ttrpc.ClientStreams()
    assert [streams.open() for _ in range(4)] == [1, 3, 5, 7]


def test_an_answer_is_given_once_and_only_for_an_open_call() -> None:
    streams = ttrpc.ClientStreams()
    stream, given_up = streams.open(), streams.open()
    streams.forget(given_up)
    answer = Frame(stream, MessageType.RESPONSE, b"", 0xFF)
    assert streams.receive(answer) == ttrpc.Answer(stream, Response())
    assert streams.receive(answer) is None
    assert streams.receive(Frame(given_up, MessageType.RESPONSE, b"")) is None
    assert streams.receive(Frame(99, MessageType.RESPONSE, b"")) is None


@pytest.mark.parametrize(
    ("kind", "body", "error"),
    [(MessageType.DATA, b"", ProtocolError), (MessageType.RESPONSE, b"\xff\xff", ttrpc.BadMessage)],
)
def test_an_answer_of_the_wrong_kind_fails_its_call(
    kind: MessageType, body: bytes, error: type[WireError]
) -> None:
    streams = ttrpc.ClientStreams()
    answer = streams.receive(Frame(streams.open(), kind, body))
    assert answer is not None
    assert isinstance(answer.outcome, error)
