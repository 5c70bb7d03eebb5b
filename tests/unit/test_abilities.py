"""What a PF's driver can set of its VFs is asked once, changes nothing, and refuses a claim up front."""

from __future__ import annotations

from dataclasses import replace

import pytest

from driver.errors import ConfigError
from driver.lifecycle.fitting import check_pf
from driver.model import Device, NicConfig, VfConfig
from hw.errors import Busy, HwError, Refused, Unsupported
from hw.model import (
    DeviceKind,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    MacAddress,
    VfLinkState,
    VfSettings,
    VfVlan,
    VlanProtocol,
)
from hw.sriov.abilities import Abilities, Ability, Asked, ability_for, ask
from hw.vf import VfRates, VfValue
from tests.unit.claims_world import A, device

PF = LinkInfo(
    ifindex=IfIndex(4), name=IfName("ens1"), flags=LinkFlags.UP, link_type=1, mtu=1500, carrier=True
)
HELD = VfSettings(
    mac=MacAddress("02:00:00:00:00:01"),
    vlan=VfVlan(id=7),
    min_rate=0,
    max_rate=0,
    spoof_check=True,
    trust=False,
    link_state=VfLinkState.AUTO,
)


class Driver:
    """A PF's driver that can do what it can, and what it holds of VF 3."""

    def __init__(self, *, cannot: dict[str, HwError] | None = None, no_minimum: bool = False) -> None:
        self.cannot, self.no_minimum = cannot or {}, no_minimum
        self.held: VfSettings | None = HELD
        self.written: list[tuple[str, VfValue]] = []

    def vf_settings(self, pf: IfIndex, vf: int) -> VfSettings | None:
        assert (pf, vf) == (PF.ifindex, 3)
        return self.held

    def set_vf(self, pf: IfIndex, vf: int, setting: str, value: VfValue) -> None:
        assert (pf, vf) == (PF.ifindex, 3)
        assert self.held is not None
        self.written.append((setting, value))
        if setting in self.cannot:
            raise self.cannot[setting]
        if isinstance(value, VfVlan) and value.protocol is VlanProtocol.SERVICE and "ad" in self.cannot:
            raise self.cannot["ad"]
        if isinstance(value, VfRates):
            if value.minimum and self.no_minimum:
                raise Refused("set rates", 22)
            self.held = replace(self.held, min_rate=value.minimum, max_rate=value.maximum)
        else:
            self.held = replace(self.held, **{setting: value})  # type: ignore[arg-type]


def test_a_driver_that_can_do_everything_is_found_out_and_left_as_it_was() -> None:
    driver = Driver()
    found = ask(driver, PF, 3, own=True)
    assert found.can == set(Ability)
    assert found.whole
    assert len(str(found).encode()) <= 64
    assert driver.held == HELD


def test_a_vf_that_others_made_is_written_only_what_it_has() -> None:
    driver = Driver()
    found = ask(driver, PF, 3, own=False)
    assert found.can == {*Ability} - {Ability.MIN_RATE, Ability.MAC, Ability.SERVICE_VLAN}
    assert not found.cannot
    for setting, value in driver.written:
        assert value == (VfRates(0, 0) if setting == "rates" else getattr(HELD, setting))


def test_what_igb_says_is_what_igb_can() -> None:
    igb = Driver(cannot={"link_state": Unsupported("set", 95), "ad": Unsupported("set", 93)}, no_minimum=True)
    found = ask(igb, PF, 3, own=True)
    assert str(found) == "mac,maxRate,spoofCheck,trust,vlan"
    assert found.cannot == {Ability.LINK_STATE, Ability.MIN_RATE, Ability.SERVICE_VLAN}
    assert igb.held == HELD


def test_without_a_link_nothing_is_said_of_rates_and_it_is_asked_again_when_there_is_one() -> None:
    down, driver = replace(PF, carrier=False), Driver()
    first = ask(driver, down, 3, own=True)
    assert not (first.can | first.cannot) & {Ability.MAX_RATE, Ability.MIN_RATE}
    asked = Asked(driver="igb", own=True, carrier=False, abilities=first)
    assert asked.is_enough("igb", own=True, carrier=False)
    assert not asked.is_enough("igb", own=True, carrier=True)
    assert not asked.is_enough("ice", own=True, carrier=False)
    driver.written.clear()
    assert ask(driver, PF, 3, own=True, known=first).whole
    assert {setting for setting, _ in driver.written} == {"rates"}, "what is known is not asked again"


def test_busy_and_silent_drivers_leave_it_open() -> None:
    busy = ask(Driver(cannot={"trust": Busy("set", 16)}), PF, 3, own=False)
    assert Ability.TRUST not in busy.can | busy.cannot
    silent = Driver()
    silent.held = VfSettings()
    assert ask(silent, PF, 3, own=False).can == {Ability.MAX_RATE}
    silent.held = None
    assert ask(silent, PF, 3, own=True) == Abilities()


def vf(cannot: set[Ability]) -> Device:
    return device(A, 20, kind=DeviceKind.VF, vf=HELD, pf_driver="igb", vf_cannot=frozenset(map(str, cannot)))


@pytest.mark.parametrize(
    ("wish", "ability", "words"),
    [
        ({"link_state": VfLinkState.DISABLE}, Ability.LINK_STATE, "vf.linkState disable: igb, which drives"),
        ({"min_rate": 10}, Ability.MIN_RATE, "vf.minRate 10M"),
        ({"trust": True}, Ability.TRUST, "vf.trust True"),
        ({"vlan": VfVlan(id=5, protocol=VlanProtocol.SERVICE)}, Ability.SERVICE_VLAN, "802.1ad"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_with_field_and_driver_and_others_are_not(
    wish: dict[str, object], ability: Ability, words: str
) -> None:
    config = NicConfig(vf=VfConfig(**wish))  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check_pf(vf({ability}), config)
    assert words in str(caught.value)
    assert "vfSettings" in str(caught.value)
    check_pf(vf(set(Ability) - {ability}), config)


def test_what_is_so_already_takes_no_ability() -> None:
    check_pf(vf(set(Ability)), NicConfig(vf=VfConfig(vlan=VfVlan(id=7), spoof_check=True, min_rate=0)))
    assert ability_for("never heard of", 1) is None
