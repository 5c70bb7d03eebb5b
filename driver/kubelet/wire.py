"""The two versions of kubelet's DRA service as bytes to values and values to bytes.

Invariant: protobuf types end here. Both versions say the same, but that v1beta1 has no share id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from driver.kubelet.batch import WireClaim
from driver.lifecycle.ports import ClaimFailed
from driver.model import ClaimUid, PreparedDevice
from driver.pb.dra.v1 import api_pb2 as v1
from driver.pb.dra.v1beta1 import api_pb2 as v1beta1

PREPARE = "NodePrepareResources"
UNPREPARE = "NodeUnprepareResources"

PrepareAnswers = Mapping[ClaimUid, tuple[PreparedDevice, ...] | ClaimFailed]
UnprepareAnswers = Mapping[ClaimUid, ClaimFailed | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One version of the service. service is its full gRPC name, version how it is advertised.

    The read functions give None for what is not a request of theirs.
    """

    service: str
    version: str
    read_prepare: Callable[[bytes], Sequence[WireClaim] | None]
    write_prepare: Callable[[PrepareAnswers], bytes]
    read_unprepare: Callable[[bytes], Sequence[WireClaim] | None]
    write_unprepare: Callable[[UnprepareAnswers], bytes]


_Request = (
    v1.NodePrepareResourcesRequest
    | v1.NodeUnprepareResourcesRequest
    | v1beta1.NodePrepareResourcesRequest
    | v1beta1.NodeUnprepareResourcesRequest
)


def _claims(request: _Request, raw: bytes) -> Sequence[WireClaim] | None:
    try:
        request.ParseFromString(raw)
    except DecodeError:
        return None
    return request.claims


def _write_prepare(
    response: v1.NodePrepareResourcesResponse | v1beta1.NodePrepareResourcesResponse,
    answers: PrepareAnswers,
) -> bytes:
    for uid, answer in answers.items():
        entry = response.claims[uid]
        if isinstance(answer, ClaimFailed):
            entry.error = answer.message
            continue
        for prepared in answer:
            device = entry.devices.add()
            if prepared.request:
                device.request_names.append(prepared.request.partition("/")[0])
            device.pool_name = prepared.pool
            device.device_name = prepared.device
            device.cdi_device_ids.extend(prepared.cdi_ids)
            if isinstance(device, v1.Device) and prepared.share_id is not None:
                device.share_id = prepared.share_id
    return response.SerializeToString()


def _write_unprepare(
    response: v1.NodeUnprepareResourcesResponse | v1beta1.NodeUnprepareResourcesResponse,
    answers: UnprepareAnswers,
) -> bytes:
    for uid, answer in answers.items():
        response.claims[uid].error = "" if answer is None else answer.message
    return response.SerializeToString()


DIALECTS = (
    Dialect(
        service=v1.DESCRIPTOR.services_by_name["DRAPlugin"].full_name,
        version="v1.DRAPlugin",
        read_prepare=lambda raw: _claims(v1.NodePrepareResourcesRequest(), raw),
        write_prepare=lambda answers: _write_prepare(v1.NodePrepareResourcesResponse(), answers),
        read_unprepare=lambda raw: _claims(v1.NodeUnprepareResourcesRequest(), raw),
        write_unprepare=lambda answers: _write_unprepare(v1.NodeUnprepareResourcesResponse(), answers),
    ),
    Dialect(
        service=v1beta1.DESCRIPTOR.services_by_name["DRAPlugin"].full_name,
        version="v1beta1.DRAPlugin",
        read_prepare=lambda raw: _claims(v1beta1.NodePrepareResourcesRequest(), raw),
        write_prepare=lambda answers: _write_prepare(v1beta1.NodePrepareResourcesResponse(), answers),
        read_unprepare=lambda raw: _claims(v1beta1.NodeUnprepareResourcesRequest(), raw),
        write_unprepare=lambda answers: _write_unprepare(v1beta1.NodeUnprepareResourcesResponse(), answers),
    ),
)
"""Best first: kubelet takes the first one that it knows."""
