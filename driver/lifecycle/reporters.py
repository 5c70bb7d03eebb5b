"""Devlink's health reporters: which say error now, and when to ask again.

Invariant: reads only. A kernel without devlink and a device without reporters have nothing to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping

from driver.model import Device
from hw.devlink import Devlink, HealthEvents
from hw.errors import HwError, Unsupported
from hw.model import PciIdentity

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


def of_port(device: Device | None, sick: Sick) -> frozenset[str]:
    """Those of the port behind a device."""
    port = device.physical_port if device is not None else None
    # A port of netdevsim is a part of what devlink knows by name.
    return sick.get(port.key.partition("/")[0], frozenset()) if port is not None else frozenset()


def of_device(device: Device | None, sick: Sick) -> frozenset[str]:
    """Those of a function that is not itself its port's."""
    if device is None or not isinstance(device.identity, PciIdentity):
        return frozenset()
    port, address = device.physical_port, device.identity.address
    own = port is None or port.key != address
    return sick.get(address, frozenset()) if own else frozenset()


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
