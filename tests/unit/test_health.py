"""Health over time: a flap changes nothing, what lasts counts, a look is due when something would change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.health import (
    Subject,
    Troubles,
    View,
    Watch,
    advance,
    device_troubles,
    findings,
    healths,
    next_look,
    port_troubles,
    seen_now,
)
from driver.model import Device, DeviceName, NicConfig, Preparation, TaintEffect, VfConfig, VfDriver
from driver.policy.health import DEFAULTS, Rule
from driver.troubles import Trouble
from hw.model import DeviceKind, IfIndex, IfName, PciAddress, PciIdentity, PortState
from tests.unit.journal_values import preparation

PF = PciAddress("0000:21:00.0")
VF = PciIdentity(PciAddress("0000:21:10.0"), PF, 0)
NAME = DeviceName("pci-0000-21-10-0")
PORT = PortState(key=PF, name=IfName("ens1"), up=True, carrier=True, speed_mbps=100_000)
PORT_SUBJECT = Subject(PF)
DOWN: Troubles = {Trouble.NO_CARRIER: "no carrier"}
FINE: Troubles = {}
RULE = Rule(effect=TaintEffect.NO_SCHEDULE, after=5.0, until=30.0)


def rules(trouble: Trouble) -> Rule:
    return RULE


def vf(**fields: Any) -> Device:
    made = Device(
        name=NAME,
        kind=DeviceKind.VF,
        identity=VF,
        ifindex=IfIndex(7),
        settings=None,
        attributes={"linkSpeed": 100_000},
        driver="igbvf",
        physical_port=PORT,
    )
    return replace(made, **fields)


def held(**fields: Any) -> Preparation:
    made = replace(preparation(0), identity=VF, home_driver="igbvf", attributes={"linkSpeed": 100_000})
    return replace(made, **fields)


BY_FILE = NicConfig(vf=VfConfig(driver=VfDriver.VFIO))


def view(**fields: Any) -> View:
    return replace(View(name=NAME, device=vf()), **fields)


class Clock:
    """Advances a watch over one port, as its carrier comes and goes."""

    def __init__(self, first: Troubles = FINE) -> None:
        self.now = 100.0
        self.watch = Watch()
        self.look(first)

    def look(self, seen: Troubles, after: float = 0.0) -> bool:
        self.now += after
        self.watch = advance(self.watch, {PORT_SUBJECT: seen}, rules, self.now)
        return bool(self.watch.counted(PORT_SUBJECT))


# --- over time ----------------------------------------------------------------------------------------


def test_a_port_is_down_when_it_was_for_five_seconds_and_up_when_it_was_for_thirty() -> None:
    clock = Clock()
    assert not clock.look(DOWN)
    assert not clock.look(DOWN, 4.9)
    assert clock.look(DOWN, 0.2)
    assert clock.look(FINE)
    assert clock.look(FINE, 29.9)
    assert not clock.look(FINE, 0.2)


def test_what_is_seen_for_the_first_time_counts_as_it_is() -> None:
    assert Clock(DOWN).look(DOWN)
    assert not Clock(FINE).look(FINE)


def test_what_is_not_looked_at_any_more_is_forgotten() -> None:
    clock = Clock(DOWN)
    clock.watch = advance(clock.watch, {}, rules, clock.now)
    assert clock.watch == Watch()


steps = st.lists(st.tuples(st.booleans(), st.floats(0.0, 60.0)), max_size=40)


@given(st.booleans(), steps)
def test_it_counts_only_after_it_lasted_and_is_over_only_after_it_was_over_as_long(
    first: bool, moves: list[tuple[bool, float]]
) -> None:
    clock = Clock(DOWN if first else FINE)
    counted, last, stable_since = first, first, clock.now
    for present, pause in moves:
        now = clock.look(DOWN if present else FINE, pause)
        if present != last:
            last, stable_since = present, clock.now
        over = clock.now >= stable_since + (RULE.after if present else RULE.until)
        if now != counted:
            assert now == present
            assert over
        elif present != counted:
            assert not over
        counted = now


@given(st.booleans(), steps)
def test_a_flap_that_is_shorter_than_its_hold_changes_nothing(
    first: bool, moves: list[tuple[bool, float]]
) -> None:
    clock = Clock(DOWN if first else FINE)
    for present, pause in moves:
        # Back to what counts before either hold is over, however often.
        assert clock.look(DOWN if present else FINE, min(pause, 2.0)) is first
        assert clock.look(DOWN if first else FINE, 2.0) is first


@given(st.booleans(), steps)
def test_a_look_is_due_exactly_when_time_alone_changes_what_counts(
    first: bool, moves: list[tuple[bool, float]]
) -> None:
    clock = Clock(DOWN if first else FINE)
    for present, pause in moves:
        seen = DOWN if present else FINE
        before = clock.look(seen, pause)
        due = next_look(clock.watch, rules)
        if due is None:
            later = advance(clock.watch, {PORT_SUBJECT: seen}, rules, clock.now + 1e6)
            assert bool(later.counted(PORT_SUBJECT)) is before
            continue
        assert due > clock.now
        early = advance(clock.watch, {PORT_SUBJECT: seen}, rules, (due + clock.now) / 2)
        then = advance(clock.watch, {PORT_SUBJECT: seen}, rules, due)
        assert bool(early.counted(PORT_SUBJECT)) is before
        assert bool(then.counted(PORT_SUBJECT)) is not before


# --- now ----------------------------------------------------------------------------------------------


def kinds(troubles: Mapping[Trouble, str]) -> list[Trouble]:
    return sorted(troubles)


@pytest.mark.parametrize(
    ("port", "said"),
    [
        (replace(PORT, carrier=False), "has no carrier"),
        (replace(PORT, up=False, carrier=False), "is down: set it up"),
    ],
)
def test_a_port_without_carrier_is_the_trouble_of_all_that_is_behind_it(port: PortState, said: str) -> None:
    other = view(name=DeviceName("other"), device=vf(name=DeviceName("other"), physical_port=port))
    views = [view(device=vf(physical_port=port)), other]
    watch = advance(Watch(), seen_now(views), rules, 1.0)
    for each in views:
        (finding,) = findings(watch, each)
        assert finding.trouble is Trouble.NO_CARRIER
        assert said in finding.text
        assert "ens1" in finding.text


def test_a_carrier_that_nobody_can_tell_is_no_trouble() -> None:
    assert port_troubles(replace(PORT, up=False, carrier=None)) == {}


def test_a_health_reporter_that_says_error_is_named() -> None:
    assert "fw_fatal" in port_troubles(PORT, ["fw_fatal"])[Trouble.FIRMWARE]


@pytest.mark.parametrize(
    ("fields", "trouble", "said"),
    [
        ({"held": held(), "device": None}, Trouble.GONE, "VF 0 of PF 0000:21:00.0 was removed"),
        ({"held": held(), "device": vf(driver=None)}, Trouble.NO_DRIVER, "bind it to 'igbvf' again"),
        ({"held": held(), "device": vf(driver="vfio-pci")}, Trouble.NO_DRIVER, "is bound to 'vfio-pci'"),
        ({"held": held(), "device": vf(has_netdev=False)}, Trouble.NO_DRIVER, "made none"),
        ({"held": held(config=BY_FILE)}, Trouble.NO_DRIVER, "bind it to 'vfio-pci' again"),
        ({"device": vf(driver=None)}, Trouble.NO_DRIVER, "bind one to it"),
        ({"held": held(), "attached": True, "dead": True}, Trouble.RESET, "is no more"),
        ({"held": held(), "lost": "it was moved out"}, Trouble.RESET, "it was moved out"),
        ({"reporters": frozenset({"fw_fatal"})}, Trouble.FIRMWARE, "fw_fatal says error"),
        ({"quarantine": "dirty"}, Trouble.QUARANTINED, "dirty"),
        (
            {"held": held(), "device": vf(physical_port=replace(PORT, speed_mbps=10_000))},
            Trouble.SLOW_LINK,
            "10000 Mb/s, and had 100000",
        ),
    ],
)
def test_each_trouble_is_seen_and_told(fields: dict[str, Any], trouble: Trouble, said: str) -> None:
    found = device_troubles(view(**fields))
    assert kinds(found) == [trouble]
    assert said in found[trouble]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"held": held()},
        {"held": held(config=BY_FILE), "device": vf(driver="vfio-pci", has_netdev=False)},
        {"device": None},
        {"device": vf(driver="vfio-pci", has_netdev=False)},
        {"held": held(), "device": vf(driver=None), "in_hand": True},
        {"held": held(), "device": vf(physical_port=replace(PORT, speed_mbps=400_000))},
        {"held": held(), "device": vf(physical_port=replace(PORT, carrier=False, speed_mbps=10))},
        {"held": held(), "device": vf(physical_port=replace(PORT, speed_mbps=None))},
        {"held": held(attributes={}), "device": vf(physical_port=replace(PORT, speed_mbps=10))},
        {"dead": True},
        {"device": vf(kind=DeviceKind.RDMA, driver="mlx5_core", has_netdev=False)},
        {
            "held": held(kind=DeviceKind.RDMA, home_driver="mlx5_core"),
            "device": vf(kind=DeviceKind.RDMA, driver="mlx5_core", has_netdev=False),
        },
    ],
)
def test_what_is_as_it_should_be_or_in_this_drivers_own_hands_is_no_trouble(fields: dict[str, Any]) -> None:
    assert device_troubles(view(**fields)) == {}


def test_a_device_keeps_its_time_while_it_has_the_same_troubles() -> None:
    sick = [view(quarantine="dirty")]
    watch = advance(Watch(), seen_now(sick), rules, 1.0)
    first = healths(watch, sick, {}, 50.0)
    again = healths(watch, sick, first, 60.0)
    assert again[NAME].since == first[NAME].since == 50.0
    assert not again[NAME].healthy
    well = [view()]
    watch = advance(watch, seen_now(well), lambda trouble: replace(RULE, until=0.0), 70.0)
    after = healths(watch, well, again, 70.0)
    assert (after[NAME].healthy, after[NAME].since, after[NAME].message) == (True, 70.0, "")


def test_every_trouble_has_a_rule() -> None:
    assert DEFAULTS.keys() == set(Trouble)
