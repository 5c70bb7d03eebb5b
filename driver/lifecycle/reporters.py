"""Devlink's health reporters: which say error now, and when to ask again.

Invariant: reads only. A kernel without devlink and a device without reporters have nothing to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping

from hw.devlink import Devlink, HealthEvents
from hw.errors import HwError, Unsupported

log = logging.getLogger(__name__)

Sick = Mapping[str, frozenset[str]]
"""Names of the reporters that say error, by devlink's name of their device: a PCI address, `netdevsim7`."""


def sick_reporters() -> Sick:
    try:
        with Devlink() as devlink:
            reporters = devlink.reporters()
    except Unsupported:
        return {}
    except (HwError, OSError) as error:
        log.warning("devlink's health reporters cannot be read: %s", error)
        return {}
    found: defaultdict[str, set[str]] = defaultdict(set)
    for reporter in reporters:
        if not reporter.healthy:
            found[reporter.handle.device].add(reporter.name)
    return {device: frozenset(names) for device, names in found.items()}


async def watch_reporters(changed: Callable[[], Awaitable[None]]) -> None:
    """Call changed at first, and whenever a reporter has something to say. Never returns, but where there is
    nothing to be heard."""
    try:
        events = HealthEvents()
    except (HwError, OSError) as error:
        log.info("devlink's health reporters are not heard: %s", error)
        await changed()
        return
    with events:
        # Made before the first look, so nothing is missed in between.
        await changed()
        while True:
            await _readable(events.fileno())
            heard = events.read()
            if heard is None or heard:
                await changed()


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
