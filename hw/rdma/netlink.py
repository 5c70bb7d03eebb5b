"""RDMA devices of one network namespace, asked and changed by NETLINK_RDMA.

Invariant: an RdmaSocket is one plain socket that was opened in its namespace and stays there; it sees what
that namespace has. Nothing here opens a device: no firmware command, no user context.

The kernel lets a device leave only the namespace of the thread that asks, whatever the socket's is
(ib_device_set_netns_put compares with current's): a move out of a pod is sent by a thread made for it there.

The kernel answers EINVAL for a device that is gone; that is told apart, by looking, and is NotFound here.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from hw.errors import HwError, NotFound, Refused, Unsupported, refusal
from hw.model import IfName, RdmaIndex, RdmaName
from hw.netns import PROC, NetnsHandle, run_in
from hw.rdma import nldev, tracking
from hw.rdma.nldev import CharacterDevice, CharacterDeviceKind, NldevDevice, NldevPort
from hw.rdma.tracking import (
    AutoMask,
    CounterMode,
    CounterStatus,
    QpCounter,
    Resource,
    ResourceKind,
    StatisticMode,
)
from hw.rdma.wire import NETLINK_RDMA, Attr, Command, Value, request
from hw.transport import DEFAULT_TIMEOUT, Transport, open_netlink

SOFTWARE_KINDS = ("rxe", "siw")
"""Software RDMA that the kernel makes on a netdev: RoCE v2 and iWARP."""

SUBSYSTEM = Path("/sys/class/infiniband")
"""There from the moment the kernel's RDMA core is."""

Values = Mapping[Attr, Value]


class RdmaSocket:
    """A context manager; threads that share it take turns. netns None is the namespace of this process.

    Methods raise Unsupported where the kernel or the device cannot do it, NotFound where the device (in this
    namespace) is gone, else Refused with the kernel's errno and words.
    """

    def __init__(
        self,
        netns: NetnsHandle | None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        proc: Path = PROC,
        subsystem: Path = SUBSYSTEM,
    ) -> None:
        """timeout is how long the kernel may take to answer one request, in seconds. Unsupported if it has no
        RDMA, or its module ib_core is not loaded: opening the socket would have the kernel load it."""
        self._netns = netns
        self._where = "the host" if netns is None else str(netns.path)
        self._proc = proc
        if not subsystem.exists():
            what = "this kernel has no RDMA, or its module ib_core is not loaded"
            raise Unsupported(what, errno.EPROTONOSUPPORT)
        try:
            self._transport = Transport(open_netlink(netns, NETLINK_RDMA), timeout=timeout)
        except OSError as error:
            raise refusal(
                f"open a netlink socket for RDMA in {self._where}", error.errno or errno.EIO
            ) from error

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> RdmaSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- devices ------------------------------------------------------------------------------------

    def devices(self) -> tuple[NldevDevice, ...]:
        """All that this namespace sees: with shared devices those of every namespace."""
        what = f"read the RDMA devices of {self._where}"
        return tuple(map(nldev.device, self._dump(what, Command.GET)))

    def by_name(self, name: RdmaName) -> NldevDevice | None:
        """The device of that name; no two of a machine have the same, whatever their namespaces."""
        return next((device for device in self.devices() if device.name == name), None)

    def ports(self, index: RdmaIndex) -> tuple[NldevPort, ...]:
        """In order of their numbers."""
        answer = self._of_device("read the ports of", index, Command.PORT_GET, {}, self._dump)
        return tuple(sorted(map(nldev.port, answer), key=lambda port: port.number))

    def character_device(
        self, index: RdmaIndex, kind: CharacterDeviceKind, port: int | None = None
    ) -> CharacterDevice:
        """The device's file of that kind, by its numbers. UMAD and ISSM files belong to a port. The same
        for every index with RDMA_CM. The kernel may load the module that makes such files.

        NotFound where the module is not there, Unsupported where the device has none (UMAD on iWARP, ISSM on
        RoCE).
        """
        values: dict[Attr, Value] = {Attr.CHARDEV_TYPE: kind.value}
        if port is not None:
            values[Attr.PORT_INDEX] = port
        try:
            if kind is CharacterDeviceKind.RDMA_CM:
                answer = self._get("look up the file rdma_cm", Command.GET_CHARDEV, values)
            else:
                answer = self._of_device(f"look up the {kind} file of", index, Command.GET_CHARDEV, values)
        except Refused as error:
            if error.errno != errno.ENOENT:
                raise
            module = {"uverbs": "ib_uverbs", "rdma_cm": "rdma_ucm"}.get(kind.value, "ib_umad")
            text = f"{error.what}: there is none; is the kernel's module {module} loaded?"
            raise NotFound(text) from error
        return nldev.character_device(kind, _first(answer, f"the {kind} file"))

    # --- namespaces ---------------------------------------------------------------------------------

    def exclusive(self) -> bool:
        """Whether each device belongs to one network namespace. Otherwise all see all of them."""
        what = "read whether RDMA devices belong to network namespaces"
        mode = nldev.exclusive(_first(self._get(what, Command.SYS_GET, {}), what))
        if mode is None:
            raise Unsupported(f"{what}: this kernel does not tell", errno.EOPNOTSUPP)
        return mode

    def set_exclusive(self, exclusive: bool) -> None:
        """For the whole machine. Busy where other network namespaces exist: the way is back then to set
        ib_core's parameter netns_mode at boot."""
        what = f"make RDMA devices {'exclusive to a network namespace' if exclusive else 'shared by all'}"
        self._change(what, Command.SYS_SET, {Attr.NETNS_MODE: bytes([not exclusive])})

    def move(self, index: RdmaIndex, netns: NetnsHandle) -> None:
        """Give a device of this socket's namespace to another one. Index and name stay; what applications
        have open on it is closed. The handles of both must be open. Unsupported with shared devices, and
        where the driver cannot."""

        def ask() -> None:
            self._of_device(f"move to {netns.path}", index, Command.SET, {Attr.NET_NS_FD: netns.fd})

        try:
            ask() if self._netns is None else run_in(self._netns, ask)
        except Unsupported as error:
            why = "its driver cannot" if self.exclusive() else "devices are shared by all namespaces here"
            raise Unsupported(error.what, error.errno, error.extack or why) from error

    def rename(self, index: RdmaIndex, name: RdmaName) -> None:
        """Refused with EEXIST where any namespace has a device of that name."""
        self._of_device(f"call {name!a}", index, Command.SET, {Attr.DEV_NAME: name})

    # --- software devices ---------------------------------------------------------------------------

    def add_link(self, kind: str, name: RdmaName, ifname: IfName) -> None:
        """Make a software device (SOFTWARE_KINDS) on an interface of this namespace; look it up by name.

        Where the device appears is the kernel's choice: before its drivers knew of namespaces, in the host's
        one. The kernel may load the module. NotFound if the interface is not there.
        """
        what = f"make the {kind} device {name} on {ifname!a} of {self._where}"
        values: Values = {Attr.DEV_NAME: name, Attr.LINK_TYPE: kind, Attr.NDEV_NAME: ifname}
        try:
            self._change(what, Command.NEWLINK, values)
        except Refused as error:
            if error.errno != errno.EINVAL or error.extack:
                raise
            reason = f"the interface cannot carry one, or the kernel's module for {kind} is not loaded"
            raise Refused(what, error.errno, reason) from error

    def delete_link(self, index: RdmaIndex) -> None:
        """Take a software device away. Refused (EINVAL) for hardware."""
        self._of_device("take away", index, Command.DELLINK, {})

    # --- what is made on it -------------------------------------------------------------------------

    def summary(self, index: RdmaIndex) -> Mapping[str, int]:
        """How many resources there are, by the kernel's word for them (`qp`, `mr`, `cm_id`...)."""
        answer = self._of_device("count the resources of", index, Command.RES_GET, {})
        return tracking.summary(_first(answer, "the resources"))

    def resources(self, kind: ResourceKind, index: RdmaIndex) -> tuple[Resource, ...]:
        """With the name of the process, where there still is one."""
        what = f"read the {kind.name} resources of"
        answer = self._of_device(what, index, kind.command, {}, self._dump)
        found = (one for payload in answer for one in tracking.resources(kind, payload))
        return tuple(replace(one, comm=self._comm(one)) for one in found)

    def _comm(self, resource: Resource) -> str:
        if not resource.pid:
            return resource.kernel_name or ""
        try:
            return (self._proc / str(resource.pid) / "comm").read_text(errors="surrogateescape").strip()
        except OSError:
            # Gone since; its resources will be in a moment.
            return ""

    # --- counters -----------------------------------------------------------------------------------

    def statistics(self, index: RdmaIndex, port: int) -> Mapping[str, int]:
        """A port's hardware counters by the driver's names, those of its QPs' own counters included.

        Unsupported where its driver has none. A driver may have more than fit in an answer (EMSGSIZE): sysfs
        tells them one by one.
        """
        answer = self._counted("read the counters of", index, port, Command.STAT_GET)
        return tracking.statistics(_first(answer, "the counters"))

    def counter_status(self, index: RdmaIndex, port: int) -> tuple[CounterStatus, ...]:
        """All counters that a port could have, and whether they are on. Errors as statistics()."""
        answer = self._counted("read which counters are on, of", index, port, Command.STAT_GET_STATUS)
        return tuple(tracking.counter_status(_first(answer, "the counters")))

    def _counted(self, what: str, index: RdmaIndex, port: int, command: Command) -> list[bytes]:
        try:
            return self._of_port(what, index, port, command, {})
        except Refused as error:
            if error.errno != errno.EINVAL:
                raise
            why = error.extack or "its driver counts nothing, or it has no such port"
            raise Unsupported(error.what, error.errno, why) from error

    def set_optional_counters(self, index: RdmaIndex, port: int, names: Sequence[str]) -> None:
        """Have exactly these optional counters on. Unsupported, before any change, if one is not there."""
        known = {one.name: one.index for one in self.counter_status(index, port) if one.optional}
        missing = sorted(set(names) - known.keys())
        if missing:
            what = f"set the optional counters of {self._device(index)}, port {port}"
            raise Unsupported(what, errno.EOPNOTSUPP, f"it has no {', '.join(missing)}")
        values = {Attr.STAT_HWCOUNTERS: tracking.counter_indexes([known[name] for name in names])}
        self._of_port("set the optional counters of", index, port, Command.STAT_SET, values)

    def statistic_mode(self, index: RdmaIndex, port: int) -> StatisticMode:
        """How QPs of a port get counters of their own."""
        values = {Attr.STAT_RES: int(Attr.RES_QP), Attr.STAT_MODE: int(CounterMode.AUTO)}
        answer = self._of_port("read the counter mode of", index, port, Command.STAT_GET, values)
        return tracking.statistic_mode(_first(answer, "the counter mode"))

    def set_auto_mode(self, index: RdmaIndex, port: int, mask: AutoMask) -> None:
        """Have QPs that are made from now on share counters by mask; OFF ends it. Unsupported where the
        driver has no counters per QP."""
        values = {
            Attr.STAT_RES: int(Attr.RES_QP),
            Attr.STAT_MODE: int(CounterMode.AUTO),
            Attr.STAT_AUTO_MODE_MASK: int(mask),
        }
        self._of_port("set the counter mode of", index, port, Command.STAT_SET, values)

    def qp_counters(self, index: RdmaIndex) -> tuple[QpCounter, ...]:
        """The counters that QPs of a device are bound to."""
        values = {Attr.STAT_RES: int(Attr.RES_QP)}
        answer = self._of_device("read the QP counters of", index, Command.STAT_GET, values, self._dump)
        return tuple(one for payload in answer for one in tracking.qp_counters(payload))

    # --- asking -------------------------------------------------------------------------------------

    def _device(self, index: RdmaIndex) -> str:
        return f"RDMA device {index} of {self._where}"

    def _dump(self, what: str, command: Command, values: Values | None = None) -> list[bytes]:
        return self._transport.dump(what, request(command, values), command.message)

    def _get(self, what: str, command: Command, values: Values) -> list[bytes]:
        return self._transport.get(what, request(command, values))

    def _change(self, what: str, command: Command, values: Values) -> None:
        self._transport.change(what, request(command, values))

    def _of_port(
        self, what: str, index: RdmaIndex, port: int, command: Command, values: Values
    ) -> list[bytes]:
        return self._of_device(f"{what} port {port} of", index, command, {Attr.PORT_INDEX: port, **values})

    def _of_device(
        self,
        what: str,
        index: RdmaIndex,
        command: Command,
        values: Values,
        ask: Callable[[str, Command, Values], list[bytes]] | None = None,
    ) -> list[bytes]:
        """ask (one message, if nothing else) about a device; NotFound if it was refused for being gone."""
        sentence = f"{what} {self._device(index)}"
        try:
            return (ask or self._get)(sentence, command, {Attr.DEV_INDEX: int(index), **values})
        except Refused as error:
            if error.errno == errno.EINVAL and all(device.index != index for device in self.devices()):
                raise NotFound(f"{sentence}: the device is not there (any more)") from error
            raise


@contextlib.contextmanager
def rdma_if_any() -> Iterator[RdmaSocket | None]:
    """A socket of this process's namespace; None where the kernel has no RDMA."""
    try:
        opened = RdmaSocket(None)
    except Unsupported:
        yield None
        return
    with opened:
        yield opened


def _first(answer: Sequence[bytes], what: str) -> bytes:
    if not answer:
        raise HwError(f"netlink: the kernel's answer about {what} is empty")
    return answer[0]
