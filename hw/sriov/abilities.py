"""What a PF's driver can set of a VF, found by asking it: each setting is written as it is.

Invariant: nothing is changed of a VF that others made. A guaranteed rate and a service tag, which only a
trial shows, are tried on a VF of ours that nobody has, and put back. A rate may be refused for want of a
link alone: such an answer is none.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hw.errors import Busy, Refused, Unsupported
from hw.model import LinkInfo, VfSettings, VfVlan, VlanProtocol
from hw.pf import VfLinks, read_vf, write_vf
from hw.vf import VfRates, VfValue


class Ability(enum.StrEnum):
    """As published; `serviceVlan` is a VLAN with an 802.1ad tag."""

    LINK_STATE = "linkState"
    MAC = "mac"
    MAX_RATE = "maxRate"
    MIN_RATE = "minRate"
    SERVICE_VLAN = "serviceVlan"
    SPOOF_CHECK = "spoofCheck"
    TRUST = "trust"
    VLAN = "vlan"


@dataclass(frozen=True, slots=True)
class Abilities:
    """What is in neither is not known."""

    can: frozenset[Ability] = frozenset()
    cannot: frozenset[Ability] = frozenset()

    @property
    def whole(self) -> bool:
        return len(self.can) + len(self.cannot) == len(Ability)

    def __str__(self) -> str:
        """At most 63 bytes: the API's limit for an attribute is 64."""
        return ",".join(sorted(self.can))


def ask(links: VfLinks, pf: LinkInfo, vf: int, *, own: bool, known: Abilities | None = None) -> Abilities:
    """own: the VF is ours, nobody has it, and may be tried out. known: not to be asked again.

    HwError where the PF does not tell of the VF, or a trial could not be put back.
    """
    now = read_vf(links, pf, vf)
    if now is None:
        return known or Abilities()
    before = known or Abilities()
    can, cannot = set(before.can), set(before.cannot)
    for ability, setting, value, undo in _trials(pf, now, own=own):
        if ability in before.can | before.cannot:
            continue
        answer = _answer(links, pf, vf, setting, value, undo)
        if answer is not None:
            (can if answer else cannot).add(ability)
    return Abilities(frozenset(can), frozenset(cannot))


Trial = tuple[Ability, str, VfValue, VfValue]
"""What is found out; setting and value to be written; what is written after it, None for nothing."""


def _trials(pf: LinkInfo, now: VfSettings, *, own: bool) -> Iterator[Trial]:
    """What is not told has no value that could be written as it is."""
    for ability, setting, value in (
        (Ability.LINK_STATE, "link_state", now.link_state),
        (Ability.SPOOF_CHECK, "spoof_check", now.spoof_check),
        (Ability.TRUST, "trust", now.trust),
        (Ability.VLAN, "vlan", now.vlan),
    ):
        if value is not None:
            yield ability, setting, value, None
    rates = VfRates(now.min_rate or 0, now.max_rate or 0)
    if pf.carrier:
        yield Ability.MAX_RATE, "rates", rates, None
        if own:
            yield Ability.MIN_RATE, "rates", VfRates(max(1, rates.minimum), rates.maximum), rates
    if own and now.mac is not None:
        yield Ability.MAC, "mac", now.mac, None
    if own and now.vlan is not None:
        tagged = replace(now.vlan, protocol=VlanProtocol.SERVICE)
        yield Ability.SERVICE_VLAN, "vlan", tagged, now.vlan if now.vlan != VfVlan() else VfVlan()


def _answer(
    links: VfLinks, pf: LinkInfo, vf: int, setting: str, value: VfValue, undo: VfValue
) -> bool | None:
    """Whether the driver took it; None where that does not say what it can."""
    try:
        write_vf(links, pf, vf, setting, value)
    except Unsupported:
        return False
    except Busy:
        return None
    except Refused:
        # EINVAL, above all: drivers say it of a value that they never take. As it is, it is not the value.
        return False
    if undo is not None:
        write_vf(links, pf, vf, setting, undo)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a PF's driver answered, and under which circumstances: better ones are worth asking again."""

    driver: str
    own: bool
    carrier: bool
    abilities: Abilities

    def is_enough(self, driver: str, *, own: bool, carrier: bool) -> bool:
        return self.driver == driver and self.own >= own and self.carrier >= carrier


_FOR = {
    "mac": Ability.MAC,
    "min_rate": Ability.MIN_RATE,
    "max_rate": Ability.MAX_RATE,
    "spoof_check": Ability.SPOOF_CHECK,
    "trust": Ability.TRUST,
    "link_state": Ability.LINK_STATE,
}


def ability_for(setting: str, value: object) -> Ability | None:
    """What it takes to have a setting, as VfSettings names it, be this value; None: nobody was asked."""
    if isinstance(value, VfVlan):
        return Ability.SERVICE_VLAN if value.protocol is VlanProtocol.SERVICE else Ability.VLAN
    return _FOR.get(setting)
