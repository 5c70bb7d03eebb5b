"""What devlink tells of devices and does to them: eswitch mode, ports, rates, health, parameters, versions.

Invariant: one plain socket in the namespace of this process, where the host's devices are; the encoding is
our own (hw.devlink_codec). Every error carries the device, errno and what the kernel said. A kernel without
devlink is Unsupported when a Devlink is made.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from hw import devlink_codec as codec
from hw.devlink_codec import (
    Command,
    DevlinkHandle,
    DevlinkInfo,
    DevlinkParam,
    DevlinkPort,
    DevlinkRate,
    GenlFamily,
    HealthReporter,
)
from hw.errors import HwError, NotFound, Refused, Unsupported
from hw.limited import in_time
from hw.model import EswitchMode, MacAddress
from hw.transport import DEFAULT_TIMEOUT, Encode, Transport, open_netlink
from hw.wire import messages

T = TypeVar("T")

ESWITCH_SECONDS = 180.0
"""For a change of mode: firmware may make a representor for each of a hundred VFs."""
_GENERIC = 16
_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_GROUP = "config"
_DATAGRAM_BYTES = 64 * 1024


class Devlink:
    """A context manager; threads that share it take turns."""

    def __init__(self, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """timeout is how long the kernel may take to answer one request, in seconds."""
        self._transport = Transport(open_netlink(None, _GENERIC), timeout=timeout)
        try:
            self._family = _family(self._transport)
        except BaseException:
            self._transport.close()
            raise

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Devlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- devices ------------------------------------------------------------------------------------

    def devices(self) -> tuple[DevlinkHandle, ...]:
        return self._dump("read devlink's devices", Command.GET, codec.handle)

    def eswitch_mode(self, handle: DevlinkHandle) -> EswitchMode | None:
        """None where the device has no switch of that kind, or is in a mode that is not known here."""
        what = f"read the eswitch mode of {handle}"
        try:
            answer = self._get(what, Command.ESWITCH_GET, codec.handle_attrs(handle))
        except (Unsupported, NotFound):
            return None
        return codec.eswitch_mode(answer)

    def set_eswitch_mode(self, handle: DevlinkHandle, mode: EswitchMode) -> None:
        """Blocks as long as the driver takes: see switch()."""
        attrs = codec.handle_attrs(handle) + codec.mode_attr(mode)
        self._change(f"set the eswitch mode of {handle} to {mode}", Command.ESWITCH_SET, attrs)

    def info(self, handle: DevlinkHandle) -> DevlinkInfo:
        attrs = codec.handle_attrs(handle)
        return codec.info(self._get(f"read the versions of {handle}", Command.INFO_GET, attrs))

    def params(self) -> tuple[DevlinkParam, ...]:
        """Of all devices."""
        return self._dump("read devlink's parameters", Command.PARAM_GET, codec.param)

    def param(self, handle: DevlinkHandle, name: str) -> DevlinkParam | None:
        """None where the device has none of that name."""
        attrs = codec.handle_attrs(handle) + codec.param_attr(name)
        try:
            return codec.param(self._get(f"read {name} of {handle}", Command.PARAM_GET, attrs))
        except (Unsupported, NotFound):
            return None
        except Refused as error:
            # What the kernel says of a parameter that it does not find.
            if error.errno != errno.EINVAL:
                raise
            return None

    # --- ports --------------------------------------------------------------------------------------

    def ports(self) -> tuple[DevlinkPort, ...]:
        """Of all devices. With functions behind them that is a firmware query for each: not for where time
        matters."""
        return self._dump("read devlink's ports", Command.PORT_GET, codec.port)

    def set_function(
        self, port: DevlinkPort, *, hw_addr: MacAddress | None = None, active: bool | None = None
    ) -> None:
        """Of the function behind a port. Unsupported where its driver leaves that to others."""
        attrs = codec.port_attrs(port.handle, port.index) + codec.function_attr(hw_addr, active)
        what = f"set the function of port {port.handle}/{port.index}"
        self._change(what, Command.PORT_SET, attrs)

    # --- rates --------------------------------------------------------------------------------------

    def rates(self) -> tuple[DevlinkRate, ...]:
        """Leaves and nodes of all devices."""
        return self._dump("read devlink's rates", Command.RATE_GET, codec.rate)

    def leaf(self, handle: DevlinkHandle, port: int) -> DevlinkRate | None:
        """The limits of one port; None where its driver has none for it."""
        what = f"read the rate of port {handle}/{port}"
        try:
            return codec.rate(self._get(what, Command.RATE_GET, codec.port_attrs(handle, port)))
        except (Unsupported, NotFound):
            return None
        except Refused as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
            return None

    def set_leaf(
        self,
        handle: DevlinkHandle,
        port: int,
        *,
        share: int | None = None,
        top: int | None = None,
        parent: str | None = None,
    ) -> None:
        """share and top in bytes per second, 0 for none; parent "" for none; None is left."""
        attrs = codec.port_attrs(handle, port) + codec.rate_attrs(share=share, top=top, parent=parent)
        self._change(f"set the rate of port {handle}/{port}", Command.RATE_SET, attrs)

    def set_node(
        self,
        handle: DevlinkHandle,
        node: str,
        *,
        share: int | None = None,
        top: int | None = None,
        parent: str | None = None,
    ) -> None:
        attrs = codec.handle_attrs(handle) + codec.rate_attrs(node=node, share=share, top=top, parent=parent)
        self._change(f"set the rate of node {node!a} of {handle}", Command.RATE_SET, attrs)

    def new_node(
        self, handle: DevlinkHandle, node: str, *, share: int | None = None, top: int | None = None
    ) -> None:
        attrs = codec.handle_attrs(handle) + codec.rate_attrs(node=node, share=share, top=top)
        self._change(f"make rate node {node!a} of {handle}", Command.RATE_NEW, attrs)

    def delete_node(self, handle: DevlinkHandle, node: str) -> None:
        """Busy while something has it as its parent."""
        attrs = codec.handle_attrs(handle) + codec.rate_attrs(node=node)
        self._change(f"delete rate node {node!a} of {handle}", Command.RATE_DEL, attrs)

    # --- health -------------------------------------------------------------------------------------

    def reporters(self) -> tuple[HealthReporter, ...]:
        """Of all devices."""
        what = "read devlink's health reporters"
        found = self._dump(what, Command.HEALTH_REPORTER_GET, codec.reporter)
        return tuple(each for each in found if each is not None)

    # --- parts --------------------------------------------------------------------------------------

    def _encode(self, command: Command, attrs: bytes) -> Encode:
        return lambda flags, sequence: codec.request(self._family, command, attrs, flags, sequence)

    def _get(self, what: str, command: Command, attrs: bytes) -> bytes:
        answer = self._transport.get(what, self._encode(command, attrs))
        if not answer:
            raise HwError(f"{what}: the kernel answered nothing")
        return answer[0]

    def _change(self, what: str, command: Command, attrs: bytes) -> None:
        self._transport.change(what, self._encode(command, attrs))

    def _dump(self, what: str, command: Command, read: Callable[[bytes], T]) -> tuple[T, ...]:
        try:
            answer = self._transport.dump(what, self._encode(command, b""), self._family.id)
        except Unsupported:
            # The command is younger than the kernel: there is none of it.
            return ()
        return tuple(map(read, answer))


def switch(handle: DevlinkHandle, mode: EswitchMode, *, seconds: float = ESWITCH_SECONDS) -> None:
    """Set a device's eswitch mode. Busy with ETIMEDOUT where its driver is at it for longer: a hung firmware
    must not hang who asked."""

    def body() -> None:
        with Devlink(timeout=seconds) as devlink:
            devlink.set_eswitch_mode(handle, mode)

    in_time(f"set the eswitch mode of {handle} to {mode}", body, seconds)


class HealthEvents:
    """Health reporters whose state or count changed, as they do. A context manager, for one thread; its
    fileno() becomes readable. Listens from the moment it is made, so dump the reporters after that."""

    def __init__(self) -> None:
        """Unsupported on a kernel without devlink or without its notifications."""
        with Transport(open_netlink(None, _GENERIC)) as transport:
            self._family = _family(transport)
        group = self._family.groups.get(_GROUP)
        if group is None:
            raise Unsupported("hear of devlink's devices", errno.EOPNOTSUPP, "it has no group for that")
        self._socket = open_netlink(None, _GENERIC)
        try:
            self._socket.setblocking(False)
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> HealthEvents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self) -> tuple[HealthReporter, ...] | None:
        """What was heard since the last read, without waiting; None if something was lost: dump them."""
        found: list[HealthReporter] = []
        whole = True
        while True:
            try:
                data, _, flags, sender = self._socket.recvmsg(_DATAGRAM_BYTES)
            except BlockingIOError:
                return tuple(found) if whole else None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                whole = False
                continue
            if sender[0] != 0:
                continue
            whole = whole and not flags & socket.MSG_TRUNC
            try:
                found += reporters_in(data, self._family)
            except HwError:
                whole = False


def reporters_in(data: bytes, family: GenlFamily) -> tuple[HealthReporter, ...]:
    """Those that one datagram of notifications tells of. HwError if it is broken."""
    told = (codec.reporter(message.payload) for message in messages(data) if message.type == family.id)
    return tuple(each for each in told if each is not None)


def _family(transport: Transport) -> GenlFamily:
    what = "look for devlink in this kernel"

    def encode(flags: int, sequence: int) -> bytes:
        return codec.family_request("devlink", flags, sequence)

    with contextlib.suppress(NotFound):
        try:
            answer = transport.get(what, encode)
        except Refused as error:
            if error.errno != errno.ENOENT:
                raise
        else:
            if answer:
                return codec.family(answer[0])
    raise Unsupported(what, errno.EOPNOTSUPP, "it has none: CONFIG_NET_DEVLINK")
