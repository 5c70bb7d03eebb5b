"""Kubelet's registration service: who we are, and what kubelet made of it.

Invariant: GetInfo never waits for anything, and `registered` is only true after kubelet said so to
this process. Kubelet says nothing when GetInfo is too slow, nor when it deregisters. Calls are observed
with 0 seconds: nothing in them can take time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from driver.kubelet.batch import failure
from driver.kubelet.observer import CallObserver, Outcome
from driver.pb.pluginregistration.v1 import api_pb2 as pb

_log = logging.getLogger(__name__)

PLUGIN_TYPE = "DRAPlugin"
GET_INFO = "GetInfo"
NOTIFY = "NotifyRegistrationStatus"
WAITING = "kubelet has not confirmed the registration yet"

_InfoContext = grpc.aio.ServicerContext[pb.InfoRequest, pb.PluginInfo]
_StatusContext = grpc.aio.ServicerContext[pb.RegistrationStatus, pb.RegistrationStatusResponse]


class Registration:
    """error is why kubelet does not use the driver, one line, or "" when it does."""

    def __init__(
        self, *, driver: str, endpoint: Path, versions: Sequence[str], observer: CallObserver
    ) -> None:
        self._info = pb.PluginInfo(
            type=PLUGIN_TYPE, name=driver, endpoint=str(endpoint), supported_versions=versions
        )
        self._observer = observer
        self.error = WAITING

    def handlers(self) -> tuple[grpc.GenericRpcHandler[Any, Any], ...]:
        methods = {
            GET_INFO: grpc.unary_unary_rpc_method_handler(
                self._get_info,
                request_deserializer=pb.InfoRequest.FromString,
                response_serializer=pb.PluginInfo.SerializeToString,
            ),
            NOTIFY: grpc.unary_unary_rpc_method_handler(
                self._notify,
                request_deserializer=pb.RegistrationStatus.FromString,
                response_serializer=pb.RegistrationStatusResponse.SerializeToString,
            ),
        }
        service = pb.DESCRIPTOR.services_by_name["Registration"].full_name
        return (grpc.method_handlers_generic_handler(service, methods),)

    async def _get_info(self, request: pb.InfoRequest, context: _InfoContext) -> pb.PluginInfo:
        del request, context
        self._observer.call_done(GET_INFO, 0.0, Outcome.OK)
        return self._info

    async def _notify(
        self, status: pb.RegistrationStatus, context: _StatusContext
    ) -> pb.RegistrationStatusResponse:
        del context
        if status.plugin_registered:
            _log.info("kubelet registered %s", self._info.name)
            self.error = ""
        else:
            self.error = failure(status.error or "kubelet gave no reason").message
            _log.error("kubelet refuses to register %s: %s", self._info.name, self.error)
        outcome = Outcome.OK if status.plugin_registered else Outcome.FAILED
        self._observer.call_done(NOTIFY, 0.0, outcome)
        return pb.RegistrationStatusResponse()
