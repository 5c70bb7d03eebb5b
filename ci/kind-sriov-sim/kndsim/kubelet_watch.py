"""Kubelet's view of plugins_registry: which sockets are there, and the life of each one's registration.

Invariant: a socket made anew is registered anew, one that is gone is deregistered, and at any time one
task at most works on a path. Registration follows kubelet's sequence, deadlines and back-off.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kndsim.kubelet_model import KubeletEvent, KubeletTiming, PluginInfo, RegistrationFailed, Version
from kndsim.kubelet_wire import Connection, get_info, notify

Log = Callable[[KubeletEvent, str, str], None]


@dataclass(frozen=True, slots=True)
class Registry:
    """What a registration needs of the rest of kubelet.

    add raises RegistrationFailed for a plugin that cannot be taken; remove is for one that was added.
    """

    known: tuple[Version, ...]
    add: Callable[[PluginInfo], None]
    remove: Callable[[PluginInfo], Awaitable[None]]
    log: Log


class PluginWatcher:
    """`run` watches folder until cancelled; `stop` ends every registration, leaving nothing behind."""

    def __init__(self, folder: Path, registry: Registry, timing: KubeletTiming) -> None:
        self._folder = folder
        self._registry = registry
        self._timing = timing
        self._seen: dict[Path, tuple[int, ...]] = {}
        self._tasks: dict[Path, asyncio.Task[None]] = {}
        self._added: dict[Path, PluginInfo] = {}

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._timing.poll)

    async def look(self) -> None:
        """Compare the folder with what was seen last, once."""
        now = dict(_sockets(self._folder))
        before, self._seen = self._seen, now
        # Deregistrations first, as kubelet does in each round.
        for path, identity in before.items():
            if now.get(path) != identity:
                self._registry.log(KubeletEvent.SOCKET_GONE, str(path), "")
                await self._end(path)
        for path, identity in now.items():
            if before.get(path) != identity:
                self._registry.log(KubeletEvent.SOCKET_SEEN, str(path), "")
                self._tasks[path] = asyncio.create_task(self._keep(path), name=f"register {path.name}")

    async def stop(self) -> None:
        self._seen = {}
        for path in list(self._tasks):
            await self._end(path)

    async def _end(self, path: Path) -> None:
        task = self._tasks[path]
        # Once: a second cancellation would interrupt the deregistration that the first set going.
        if not task.cancelling():
            task.cancel()
        await asyncio.wait({task})
        del self._tasks[path]

    async def _keep(self, path: Path) -> None:
        """Register the plugin, however often it takes, and deregister it when cancelled."""
        failures = 0
        try:
            while True:
                try:
                    await self._register(path)
                    break
                except RegistrationFailed as error:
                    failures += 1
                    self._registry.log(KubeletEvent.REGISTRATION_FAILED, str(path), str(error))
                    await self._forget(path)
                await asyncio.sleep(self._timing.back_off(failures))
            await asyncio.Event().wait()
        finally:
            await self._forget(path)

    async def _register(self, path: Path) -> None:
        timing = self._timing
        async with Connection(path) as connection:
            try:
                await connection.dial(timing.dial)
            except TimeoutError as error:
                raise RegistrationFailed("nothing answers at the socket", tell=False) from error
            try:
                plugin = await get_info(connection, path, self._registry.known, timing.get_info)
                self._registry.add(plugin)
            except RegistrationFailed as error:
                if error.tell:
                    await notify(connection, str(error), timing.notify)
                raise
            self._added[path] = plugin
            await notify(connection, "", timing.notify)

    async def _forget(self, path: Path) -> None:
        plugin = self._added.pop(path, None)
        if plugin is not None:
            await self._registry.remove(plugin)


def _sockets(folder: Path) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """Visible sockets below folder, each with what changes when it is made anew (but not by chmod)."""
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        return
    for path in entries:
        if path.name.startswith("."):
            continue
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _sockets(path)
        elif stat.S_ISSOCK(status.st_mode):
            yield path, (status.st_dev, status.st_ino, status.st_mtime_ns)
