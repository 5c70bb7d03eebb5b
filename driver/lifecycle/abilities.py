"""Finding out what the drivers of PFs can set of their VFs, once for each PF and boot.

Invariant: only a VF that nobody has is asked about, with its device locked; a VF that others made is written
nothing but what it has. An answer that cannot be had now is had another time, and nobody waits for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from driver.execute.engine import EXPECTED
from driver.lifecycle.context import Context
from driver.model import Device, DeviceName
from driver.provision.plan import Maker
from driver.provision.survey import held_devices
from driver.whole_file import replace_whole
from hw.model import DeviceKind, PciAddress, PciIdentity
from hw.sriov.abilities import Abilities, Ability, Asked

log = logging.getLogger(__name__)


class VfAbilities:
    """Knows what was answered in this boot, also to an earlier agent."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._path = context.paths.run / "abilities.json"
        self._running = False
        context.devices.abilities = _read(self._path)

    async def run(self) -> bool:
        """Ask what is not known yet and can be asked now; whether there was an answer."""
        if self._running:
            return False
        self._running = True
        try:
            found = False
            for name in self._due():
                found = await self._context.workers.run([name], partial(self._ask, name)) or found
            if found:
                await self._context.workers.run([], self._keep)
                await self._context.workers.run([], self._context.devices.rescan)
            return found
        except EXPECTED as error:
            log.warning("what VFs can be set to is not known yet: %s", error)
            return False
        finally:
            self._running = False

    def _due(self) -> list[DeviceName]:
        """A VF of each PF that may have more to say."""
        known = self._context.devices.abilities
        due: dict[PciAddress, DeviceName] = {}
        for device in self._context.devices.current().values():
            pf = _pf_of(device)
            if pf is None or pf in due or not self._is_free(device):
                continue
            if pf not in known or not (known[pf].own and known[pf].carrier):
                due[pf] = device.name
        return list(due.values())

    def _is_free(self, device: Device) -> bool:
        book = self._context.book
        return (
            not device.withheld
            and device.settings is not None
            and not book.of_device(device.name)
            and device.name not in book.quarantines()
        )

    def _ask(self, name: DeviceName) -> bool:
        """In a worker, holding the VF."""
        context = self._context
        device = context.devices.get(name)
        if device is None or not self._is_free(device):
            return False
        book = context.book
        held = held_devices(
            book.preparations(), {name: each.reason for name, each in book.quarantines().items()}
        )
        plan = context.provision.survey(context.policy(), held).plans.get(_pf_of(device) or PciAddress(""))
        own = plan is not None and plan.maker is Maker.KND and plan.making is not None and plan.making.done
        return context.devices.ask_abilities(device, own=own)

    def _keep(self) -> None:
        tree = {
            pf: {
                "driver": asked.driver,
                "own": asked.own,
                "carrier": asked.carrier,
                "can": sorted(asked.abilities.can),
                "cannot": sorted(asked.abilities.cannot),
            }
            for pf, asked in self._context.devices.abilities.items()
        }
        try:
            replace_whole(self._path, json.dumps(tree), 0o600)
        except OSError as error:
            log.warning("%s cannot be written: the next agent asks again: %s", self._path, error)


def _pf_of(device: Device) -> PciAddress | None:
    identity = device.identity
    if device.kind is not DeviceKind.VF or not isinstance(identity, PciIdentity):
        return None
    return identity.pf if identity.vf_index is not None else None


def _read(path: Path) -> Mapping[PciAddress, Asked]:
    """What cannot be read was not asked."""
    try:
        return {
            PciAddress(pf): Asked(
                driver=str(told["driver"]),
                own=told["own"] is True,
                carrier=told["carrier"] is True,
                abilities=Abilities(
                    frozenset(map(Ability, told["can"])), frozenset(map(Ability, told["cannot"]))
                ),
            )
            for pf, told in json.loads(path.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
