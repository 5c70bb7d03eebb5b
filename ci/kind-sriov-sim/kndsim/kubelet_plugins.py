"""The plugins that kubelet has registered, their connections, and how long a driver has been away.

Invariant: a registered plugin has one connection, kept up from registration to deregistration. A
driver none of whose plugins is connected gets its slices deleted after the grace, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kndsim.kubelet_health import RETRY_SECONDS, SERVICES, HealthWatch, choose_health
from kndsim.kubelet_model import KubeletEvent, KubeletTiming, PluginInfo, RegistrationFailed
from kndsim.kubelet_watch import Log
from kndsim.kubelet_wire import Connection, DraClient


@dataclass(slots=True)
class RegisteredPlugin:
    info: PluginInfo
    connection: Connection
    client: DraClient
    watching: asyncio.Task[None] | None = None
    connected: bool = False
    health: HealthWatch | None = None
    listening: asyncio.Task[None] | None = None


class PluginStore:
    """away is called with a driver's name when it was unreachable for the whole grace."""

    def __init__(
        self,
        timing: KubeletTiming,
        log: Log,
        away: Callable[[str], None],
        health_known: Sequence[str] = SERVICES,
    ) -> None:
        self._grace = timing.slice_grace * timing.scale
        self._retry = RETRY_SECONDS * timing.scale
        self._health_known = health_known
        self._log = log
        self._away = away
        self._plugins: dict[str, list[RegisteredPlugin]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def pick(self, driver: str) -> RegisteredPlugin | None:
        """The newest connected one, else the newest."""
        plugins = self._plugins.get(driver, [])
        connected = [plugin for plugin in plugins if plugin.connected]
        newest = connected or plugins
        return newest[-1] if newest else None

    def add(self, info: PluginInfo) -> None:
        """RegistrationFailed if this endpoint of the driver is registered already."""
        plugins = self._plugins.setdefault(info.driver, [])
        if any(plugin.info.endpoint == info.endpoint for plugin in plugins):
            raise RegistrationFailed(f"endpoint {info.endpoint} is already registered", tell=True)
        connection = Connection(info.endpoint)
        plugin = RegisteredPlugin(info, connection, DraClient(connection, info.version))
        plugins.append(plugin)
        self._log(KubeletEvent.REGISTERED, info.driver, f"{info.version} at {info.endpoint}")

        def changed(connected: bool) -> None:
            plugin.connected = connected
            self._log(
                KubeletEvent.CONNECTED if connected else KubeletEvent.DISCONNECTED,
                info.driver,
                str(info.endpoint),
            )
            self._mind(info.driver)

        plugin.watching = asyncio.create_task(connection.watch(changed), name=f"watch {info.driver}")
        self._listen(plugin)
        self._mind(info.driver)

    def _listen(self, plugin: RegisteredPlugin) -> None:
        """To the health of its devices, where it offers that."""
        service = choose_health(plugin.info.offered, self._health_known)
        if not service:
            return

        def told(why: str) -> None:
            self._log(KubeletEvent.HEALTH_ENDED, plugin.info.driver, why)

        plugin.health = HealthWatch(plugin.connection, service, retry=self._retry, told=told)
        plugin.listening = asyncio.create_task(plugin.health.run(), name=f"health {plugin.info.driver}")

    async def remove(self, info: PluginInfo) -> None:
        for plugin in self._plugins.get(info.driver, []):
            if plugin.info == info:
                self._plugins[info.driver].remove(plugin)
                self._log(KubeletEvent.DEREGISTERED, info.driver, str(info.endpoint))
                self._mind(info.driver)
                await _close(plugin)
                return

    async def close(self) -> None:
        """Forget everything without a word: kubelet itself is going away."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers = {}
        left, self._plugins = self._plugins, {}
        for plugins in left.values():
            for plugin in plugins:
                await _close(plugin)

    def _mind(self, driver: str) -> None:
        """Start or stop the driver's timer, by whether it can be reached."""
        reachable = any(plugin.connected for plugin in self._plugins.get(driver, []))
        if reachable:
            timer = self._timers.pop(driver, None)
            if timer is not None:
                timer.cancel()
        elif driver not in self._timers:
            loop = asyncio.get_running_loop()
            self._timers[driver] = loop.call_later(self._grace, self._away, driver)


async def _close(plugin: RegisteredPlugin) -> None:
    tasks = {task for task in (plugin.watching, plugin.listening) if task is not None}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    await plugin.connection.close()
