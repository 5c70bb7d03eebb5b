"""Network namespaces: opening them safely, and doing things inside without going there.

Invariant: this process never changes its netns. Whatever has to happen inside one happens in a thread
made for that one call, which enters the namespace, is checked to be in it, acts, and ends; or in one made
for many such calls, which is at home between them (travelling). If entering fails, nothing is opened and
nothing runs. A namespace is known by its cookie, never by path or inode: the kernel gives a new namespace the
inode of one just deleted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from hw.errors import BadNetns, HwError, NotFound
from hw.model import NetnsCookie

T = TypeVar("T")

PROC = Path("/proc")
_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
_NSFS_MAGIC = 0x6E736673
_SO_NETNS_COOKIE = 71
_ROUTE_SOCKET = (socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""O_NONBLOCK: a path that turns out to be a FIFO must not hold us."""

_libc = ctypes.CDLL(None, use_errno=True)
_traveller = threading.local()
"""home: of a thread that may change its namespace, a descriptor of its own; None while it is away."""


class NetnsHandle:
    """An open network namespace. It keeps the namespace alive: close it as soon as it is not needed.

    Use as a context manager. cookie is unique for this boot; inode only tells two living ones apart.
    """

    __slots__ = ("_fd", "_spare", "cookie", "inode", "path")

    def __init__(self, fd: int, path: Path, *, like: NetnsHandle | None = None, spare: bool = False) -> None:
        """Takes over fd, also when it raises. BadNetns if fd is not a network namespace.

        like: a handle that fd was duplicated from, so that nothing has to be found out again. spare: keep
        the socket that told the cookie, for take_spare().
        """
        self._fd = fd
        self._spare: socket.socket | None = None
        self.path = path
        if like is not None:
            self.inode: int = like.inode
            self.cookie: NetnsCookie = like.cookie
            return
        try:
            _check_kind(fd, path)
            self.inode = os.fstat(fd).st_ino
            with contextlib.ExitStack() as stack:
                sock = stack.enter_context(socket_in(self, *_ROUTE_SOCKET))
                self.cookie = socket_cookie(sock)
                if spare:
                    self._spare = sock
                    stack.pop_all()
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """BadNetns once closed: the number may be another file by now."""
        if self._fd < 0:
            raise BadNetns(f"network namespace {self.path} was closed before this use of it")
        return self._fd

    def duplicate(self) -> NetnsHandle:
        """Another handle of the same namespace, to be closed on its own."""
        return NetnsHandle(fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0), self.path, like=self)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        spare = self.take_spare()
        if spare is not None:
            spare.close()

    def take_spare(self) -> socket.socket | None:
        """A route netlink socket of this namespace, once, if one was kept; whoever takes it closes it."""
        spare, self._spare = self._spare, None
        return spare

    def __enter__(self) -> NetnsHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"NetnsHandle({str(self.path)!r}, cookie={getattr(self, 'cookie', None)})"


def open_netns(path: Path, *, proc: Path = PROC, spare: bool = False) -> NetnsHandle:
    """Open a pod's network namespace. spare: a LinkSocket of it is wanted next, and is spared a thread.

    NotFound if path does not exist (any more); BadNetns if it is no network namespace, or is the
    host's (that of PID 1) or the one this process is in: such a one must never be given a device.
    """
    handle = NetnsHandle(_open(path), path, spare=spare)
    try:
        _refuse_own(handle, proc)
    except BaseException:
        handle.close()
        raise
    return handle


def host_netns(*, proc: Path = PROC) -> NetnsHandle:
    """The namespace this process is in, which is where devices come from and go back to."""
    path = proc / "self/ns/net"
    return NetnsHandle(_open(path), path)


def netns_of_pid(pid: int, *, proc: Path = PROC) -> NetnsHandle:
    """As open_netns, for the namespace a process is in. NotFound if there is no such process."""
    if pid <= 0:
        raise NotFound(f"process {pid} has no network namespace: the pod has no living process")
    return open_netns(proc / str(pid) / "ns/net", proc=proc)


def run_in(handle: NetnsHandle, function: Callable[[], T]) -> T:
    """Call function in a thread that is in the namespace and ends after it, or, where this one is travelling,
    goes back after it; its exceptions come out here.

    Blocks until it is done. What function opens belongs to that namespace for good; it must not leave
    threads behind. BadNetns if the namespace cannot be entered, and then function is not called.
    """
    home: int | None = getattr(_traveller, "home", None)
    if home is not None:
        return _visit(handle, home, function)

    def there() -> T:
        _enter(handle)
        return function()

    return _in_thread(there, f"enter network namespace {handle.path}")


def travelling(function: Callable[[], T]) -> T:
    """Call function in a thread made for it that goes into namespaces itself wherever function calls run_in,
    and comes back at once. For many short visits, one after the other: a thread for each would take longer
    than what is done there.

    Blocks until it is done; exceptions come out here. HwError if it did not come back, which ended it.
    """

    def there() -> T:
        home = os.open(PROC / "thread-self/ns/net", _OPEN)
        try:
            _traveller.home = home
            return function()
        finally:
            os.close(home)

    try:
        return _in_thread(there, "start a thread for network namespaces")
    except _Astray as error:
        raise HwError(f"a thread could not leave a network namespace and was ended: {error}") from error


class _Astray(BaseException):
    """The thread is not where it believes to be: nothing may catch this and go on in it."""


def _visit(handle: NetnsHandle, home: int, function: Callable[[], T]) -> T:
    # What function itself does in yet another namespace is not for this thread: that came from home.
    _traveller.home = None
    try:
        _enter(handle)
        return function()
    finally:
        if _libc.setns(home, _CLONE_NEWNET) != 0:
            raise _Astray(os.strerror(ctypes.get_errno()))
        _traveller.home = home


def _in_thread(work: Callable[[], T], what: str) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, who re-raises it
            errors.append(error)

    thread = threading.Thread(target=body, name="knd-in-netns", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise HwError(f"cannot {what}: {error}") from error
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def socket_in(handle: NetnsHandle, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket that belongs to the namespace; the caller may use it from any thread and closes it."""
    return run_in(handle, lambda: socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol))


def socket_cookie(sock: socket.socket) -> NetnsCookie:
    """The cookie of the namespace a socket belongs to (kernel 5.14)."""
    try:
        value = sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError as error:
        raise HwError(
            f"the kernel does not tell a socket's namespace ({error.strerror}): Linux 5.14 or later is needed"
        ) from error
    return NetnsCookie(int.from_bytes(value, sys.byteorder))


def _open(path: Path) -> int:
    try:
        return os.open(path, _OPEN)
    except FileNotFoundError:
        raise NotFound(f"network namespace {path} does not exist: its pod is gone") from None
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOTDIR):
            raise NotFound(f"network namespace {path} does not exist: its pod is gone") from None
        raise BadNetns(f"network namespace {path} cannot be opened: {error.strerror}") from error
    except ValueError as error:
        raise BadNetns(f"network namespace {str(path)!r} is not a path: {error}") from error


def _check_kind(fd: int, path: Path) -> None:
    buffer = (ctypes.c_long * 32)()
    if _libc.fstatfs(fd, ctypes.byref(buffer)) != 0 or buffer[0] != _NSFS_MAGIC:
        raise BadNetns(f"{path} is not a namespace: it is an ordinary file or one whose mount is gone")
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError as error:
        raise BadNetns(f"{path} does not say what namespace it is: {error.strerror}") from error
    if kind != _CLONE_NEWNET:
        raise BadNetns(f"{path} is a namespace, but not a network namespace")


def _refuse_own(handle: NetnsHandle, proc: Path) -> None:
    mine = os.fstat(handle.fd)
    for whose, path in (("this agent's own", proc / "self/ns/net"), ("the host's", proc / "1/ns/net")):
        # Without the right to look at PID 1 (or with a /proc that does not show it) only our own counts;
        # the agent runs in the host's netns, so both are the same one there.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            other = os.stat(path)
            if (other.st_dev, other.st_ino) == (mine.st_dev, mine.st_ino):
                raise BadNetns(f"{handle.path} is {whose} network namespace: no device is moved for it")


def _enter(handle: NetnsHandle) -> None:
    """Move the calling thread. It must be a thread that ends right after, or one that travels."""
    if _libc.setns(handle.fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise BadNetns(f"cannot enter network namespace {handle.path}: {os.strerror(code)}")
    there = os.stat(PROC / "thread-self/ns/net")
    if there.st_ino != os.fstat(handle.fd).st_ino:
        raise BadNetns(f"entering network namespace {handle.path} did not take effect")
