"""A gRPC server on a unix socket that appears only when it answers and goes only if it is ours.

Invariant: the socket is bound under a hidden name (which kubelet's watcher skips), 0600 from its first
moment, and renamed into place once the server runs. grpc itself would show the socket before it
answers, and on stop would unlink whatever then has the name, another instance's socket included.
"""

from __future__ import annotations

import asyncio
import os
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from driver.errors import DriverError

_PRIVATE_UMASK = 0o177


class SocketServer:
    """`async with SocketServer(path, handlers, grace=...)`: serving inside, gone after.

    grace is how many seconds calls in flight get at exit before they are cancelled. DriverError if the
    path cannot be served.
    """

    def __init__(
        self, path: Path, handlers: Sequence[grpc.GenericRpcHandler[Any, Any]], *, grace: float
    ) -> None:
        self._path = path
        self._staging = path.with_name(_staging_name(path.name))
        self._handlers = tuple(handlers)
        self._grace = grace
        self._server: grpc.aio.Server | None = None
        self._inode: tuple[int, int] | None = None

    @property
    def in_place(self) -> bool:
        """Whether the path still leads here: neither removed nor taken over by another process."""
        return self._inode is not None and _inode(self._path) == self._inode

    async def __aenter__(self) -> SocketServer:
        _refuse_other_files(self._path)
        self._server = grpc.aio.server()
        try:
            self._server.add_generic_rpc_handlers(self._handlers)
            self._bind(self._server)
            await self._server.start()
            # The listener pins its inode, so the number cannot come back while the server runs.
            self._inode = _inode(self._staging)
            self._staging.rename(self._path)
        except OSError as error:
            await self._stop()
            raise DriverError(
                f"the socket {self._path} cannot be put in place ({error.strerror}): "
                "check that its directory is writable"
            ) from error
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    def _bind(self, server: grpc.aio.Server) -> None:
        # umask is the process's: a file made by another thread meanwhile is only ever stricter.
        before = os.umask(_PRIVATE_UMASK)
        try:
            server.add_insecure_port(f"unix:{self._staging}")
        except RuntimeError as error:
            raise DriverError(
                f"the socket {self._path} cannot be bound: check that its directory exists, "
                "is writable and can hold unix sockets"
            ) from error
        finally:
            os.umask(before)

    async def _stop(self) -> None:
        # Unlinked before it stops: no new connections while calls in flight finish.
        if self.in_place:
            self._path.unlink(missing_ok=True)
        self._inode = None
        server, self._server = self._server, None
        if server is not None:
            await asyncio.shield(server.stop(self._grace))
        self._staging.unlink(missing_ok=True)


def _staging_name(name: str) -> str:
    """As short as the shortest name in use, `dra.sock`: it must not be what exceeds the path limit."""
    return f".{zlib.crc32(name.encode()) >> 4:07x}"


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refuse_other_files(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise DriverError(f"{path} is in the way of the driver's socket and is not a socket: remove it")
