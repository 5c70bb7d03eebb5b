"""What a PF holds of one of its VFs, read and set the way that the PF's eswitch mode has it.

Invariant: rates are the VF's in legacy mode and its port's in switchdev mode, where the kernel refuses the
VF's; everything else is the VF's in both. What is read can be put back: a port's limit that is no whole
number of Mb/s is not told, and not changed either.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from hw.devlink import Devlink
from hw.devlink_codec import DevlinkHandle, DevlinkRate, PortFlavour
from hw.errors import Refused, Unsupported
from hw.model import EswitchMode, IfIndex, LinkInfo, RatesBy, VfSettings
from hw.vf import VfRates, VfValue

BYTES_PER_MBIT = 125_000
"""Of a second, in devlink's unit and in ours."""


class VfLinks(Protocol):
    """What is needed of hw.netlink.LinkSocket."""

    def vf_settings(self, pf: IfIndex, vf: int) -> VfSettings | None: ...

    def set_vf(self, pf: IfIndex, vf: int, setting: str, value: VfValue) -> None: ...


def read_vf(links: VfLinks, pf: LinkInfo, vf: int) -> VfSettings | None:
    """None if the PF does not tell of the VF. Asks the hardware: not for where time matters."""
    found = links.vf_settings(pf.ifindex, vf)
    if found is None:
        return None
    with _leaf(pf, vf) as leaf:
        if leaf is None:
            return found
        rates = leaf.rates
        return replace(
            found,
            min_rate=rates.minimum if rates else None,
            max_rate=rates.maximum if rates else None,
            rates_by=RatesBy.DEVLINK,
        )


def write_vf(links: VfLinks, pf: LinkInfo, vf: int, setting: str, value: VfValue) -> None:
    """One setting, as hw.vf.vf_request names it. Unsupported where the driver cannot; to be read back."""
    if not isinstance(value, VfRates):
        links.set_vf(pf.ifindex, vf, setting, value)
        return
    with _leaf(pf, vf) as leaf:
        if leaf is None:
            links.set_vf(pf.ifindex, vf, setting, value)
        else:
            leaf.set(value)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """The limits of a VF's port in the switch of its PF."""

    devlink: Devlink
    told: DevlinkRate

    @property
    def rates(self) -> VfRates | None:
        """None where they cannot be said in Mb/s."""
        share, top = self.told.tx_share, self.told.tx_max
        if share % BYTES_PER_MBIT or top % BYTES_PER_MBIT:
            return None
        return VfRates(share // BYTES_PER_MBIT, top // BYTES_PER_MBIT)

    def set(self, value: VfRates) -> None:
        handle, port = self.told.handle, self.told.port
        assert port is not None, "a leaf is of a port"
        if self.rates is None:
            raise Refused(
                f"set the rate of port {handle}/{port}",
                errno.EINVAL,
                f"it has limits of {self.told.tx_share} and {self.told.tx_max} bytes per second, which are "
                "no whole Mb/s and could not be put back",
            )
        share, top = value.minimum * BYTES_PER_MBIT, value.maximum * BYTES_PER_MBIT
        self.devlink.set_leaf(handle, port, share=share, top=top)


@contextmanager
def _leaf(pf: LinkInfo, vf: int) -> Iterator[_Leaf | None]:
    """None where the VF's own rate counts: in legacy mode, and where the driver has no rates for ports."""
    if pf.phys_switch_id is None or pf.parent_bus is None or pf.parent_device is None:
        # It is no port of a switch, so nobody needs to be asked.
        yield None
        return
    handle = DevlinkHandle(pf.parent_bus, pf.parent_device)
    try:
        opened = Devlink()
    except Unsupported:
        yield None
        return
    with opened as devlink:
        told = _rate(devlink, handle, vf)
        yield _Leaf(devlink, told) if told is not None else None


def _rate(devlink: Devlink, handle: DevlinkHandle, vf: int) -> DevlinkRate | None:
    if devlink.eswitch_mode(handle) is not EswitchMode.SWITCHDEV:
        return None
    for port in devlink.ports():
        if (port.handle, port.flavour, port.vf) == (handle, PortFlavour.PCI_VF, vf) and not port.external:
            return devlink.leaf(handle, port.index)
    return None
