"""What kubelet asks of a container runtime, as far as the cases need it: a small part of runtime.v1's CRI.

Invariant: field numbers are the published ones; fields that are not here are not sent and not read. The
messages are described here in full, so nothing is generated and nothing else depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_SERVICE = "runtime.v1.RuntimeService"

_MESSAGES: Mapping[str, str] = {
    "VersionRequest": "version:1",
    "VersionResponse": "runtime_name:2 runtime_version:3",
    "PodMetadata": "name:1 uid:2 namespace:3 attempt:4=uint32",
    "NamespaceOption": "network:1=int32",
    "SecurityContext": "namespace_options:1=NamespaceOption",
    "LinuxConfig": "cgroup_parent:1 security_context:2=SecurityContext",
    "PodConfig": "metadata:1=PodMetadata hostname:2 log_directory:3 linux:8=LinuxConfig",
    "RunPodSandboxRequest": "config:1=PodConfig",
    "RunPodSandboxResponse": "pod_sandbox_id:1",
    "StopPodSandboxRequest": "pod_sandbox_id:1",
    "StopPodSandboxResponse": "",
    "RemovePodSandboxRequest": "pod_sandbox_id:1",
    "RemovePodSandboxResponse": "",
    "ListPodSandboxRequest": "",
    "PodSandbox": "id:1 metadata:2=PodMetadata state:3=int32",
    "ListPodSandboxResponse": "items:1*PodSandbox",
    "ContainerMetadata": "name:1 attempt:2=uint32",
    "ImageSpec": "image:1",
    "CdiDevice": "name:1",
    "ContainerConfig": "metadata:1=ContainerMetadata image:2=ImageSpec log_path:11 CDI_devices:17*CdiDevice",
    "CreateContainerRequest": "pod_sandbox_id:1 config:2=ContainerConfig sandbox_config:3=PodConfig",
    "CreateContainerResponse": "container_id:1",
    "StartContainerRequest": "container_id:1",
    "StartContainerResponse": "",
    "RemoveContainerRequest": "container_id:1",
    "RemoveContainerResponse": "",
}
_SCALARS = {
    "": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "uint32": descriptor_pb2.FieldDescriptorProto.TYPE_UINT32,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
}


def _describe() -> Mapping[str, Any]:
    """Message classes by name. `name:number` is a string, `=type` another type, `*type` a list of it."""
    file = descriptor_pb2.FileDescriptorProto(name="contract/cri.proto", package="cri", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields.split():
            label, _, rest = field.partition(":")
            number, mark, kind = rest, "", ""
            for sign in "=*":
                if sign in rest:
                    number, mark, kind = rest.partition(sign)
            made = message.field.add(name=label, number=int(number))
            made.label = made.LABEL_REPEATED if mark == "*" else made.LABEL_OPTIONAL
            if kind in _SCALARS:
                made.type = _SCALARS[kind]
            else:
                made.type, made.type_name = made.TYPE_MESSAGE, f".cri.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"cri.{name}")) for name in _MESSAGES
    }


MESSAGE = _describe()


class CriError(Exception):
    """The runtime said no; the text is what kubelet would show."""


class Cri:
    """`async with Cri(socket) as cri: await cri.call("RunPodSandbox", config={...})`."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.aio.insecure_channel(
            f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]
        )

    async def __aenter__(self) -> Cri:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close(None)

    async def call(self, method: str, timeout: float = 60.0, **fields: Any) -> Any:
        request = MESSAGE[f"{method}Request"](**fields)
        invoke = self._channel.unary_unary(
            f"/{_SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=MESSAGE[f"{method}Response"].FromString,
        )
        try:
            return await invoke(request, timeout=timeout, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise CriError(str(error.details())) from error
