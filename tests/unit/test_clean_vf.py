"""A VF's clean MAC address is the one it had before a tenant came, whatever its driver calls permanent."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpf.layout import Hook
from driver.errors import Refusal
from driver.execute.actions import NodeActs, differences, move_in
from driver.execute.probe import Host
from driver.execute.target import NotClean, Target
from driver.model import InterfaceConfig, NicConfig
from hw.errors import Refused
from hw.model import (
    DeviceKind,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    LinkSettings,
    MacAddress,
    PciAddress,
    PciIdentity,
    VfSettings,
)
from hw.sysfs import Sysfs
from hw.udev import Udev
from tests.unit.journal_values import preparation
from tests.unit.no_foreign import NO_FOREIGN

OWN = MacAddress("2a:4d:2c:38:b0:56")
TENANTS = MacAddress("02:00:5e:00:00:01")
HOME = LinkInfo(
    ifindex=IfIndex(7), name=IfName("ens1f0v0"), flags=LinkFlags.MULTICAST, link_type=1, mtu=1500, mac=OWN
)
AFTER_TENANT = replace(HOME, permanent_mac=TENANTS)
"""As igbvf shows it: back at home with its address, but "permanent" is what the PF was told last."""


def test_a_vf_that_is_as_before_is_clean_whatever_its_driver_calls_permanent() -> None:
    baseline = LinkSettings.of(HOME, kind=DeviceKind.VF)
    assert differences(AFTER_TENANT, baseline, DeviceKind.VF) == ()


def test_the_next_tenants_baseline_never_has_the_last_ones_address() -> None:
    assert LinkSettings.of(AFTER_TENANT, kind=DeviceKind.VF).mac == OWN


def test_a_vf_that_kept_a_tenants_address_is_not_clean() -> None:
    baseline = LinkSettings.of(HOME, kind=DeviceKind.VF)
    left = replace(HOME, mac=TENANTS, permanent_mac=TENANTS)
    assert [text for text in differences(left, baseline, DeviceKind.VF) if TENANTS in text]


@pytest.mark.parametrize("kind", [DeviceKind.PF, DeviceKind.NETDEV])
def test_other_hardware_is_withheld_when_its_permanent_address_changes(kind: DeviceKind) -> None:
    found = replace(HOME, permanent_mac=OWN, mac=TENANTS)
    baseline = LinkSettings.of(found, kind=kind)
    assert baseline.mac == OWN
    assert differences(AFTER_TENANT, baseline, kind)


# --- a VF that was given an address on its PF ---------------------------------------------------------

GIVEN = MacAddress("02:aa:00:00:00:02")
PF_LINK = replace(
    HOME,
    ifindex=IfIndex(4),
    name=IfName("ens1f0"),
    mac=MacAddress("52:54:00:00:00:10"),
    parent_bus="pci",
    parent_device="0000:21:00.0",
)
VF = PciIdentity(PciAddress("0000:21:10.0"), PciAddress("0000:21:00.0"), 0)


class Home:
    """The host's links: a PF and a VF whose driver takes no other address than it was given."""

    def __init__(self, *, mac: MacAddress, given: MacAddress | None, name: str = "ens1f0v0") -> None:
        self.vf = replace(
            HOME, mac=mac, name=IfName(name), parent_bus="pci", parent_device="0000:21:10.0", mtu=1400
        )
        self.given = given

    def by_index(self, ifindex: IfIndex) -> LinkInfo | None:
        return self.vf if ifindex == self.vf.ifindex else None

    def dump(self) -> tuple[LinkInfo, ...]:
        return (PF_LINK, self.vf)

    def addresses(self, ifindex: IfIndex) -> tuple[()]:
        return ()

    def vf_settings(self, pf: IfIndex, vf: int) -> VfSettings:
        assert (pf, vf) == (PF_LINK.ifindex, 0)
        return VfSettings(mac=self.given)

    def change(self, ifindex: IfIndex, **fields: Any) -> None:
        """As the kernel: address first, then the rest; nothing after a refusal."""
        fields = {key: value for key, value in fields.items() if not key.endswith("_flags")}
        if fields.get("mac") not in (None, self.given, self.vf.mac):
            raise Refused("change link 7 of the host", errno.EADDRNOTAVAIL)
        self.vf = replace(self.vf, **fields)

    def move(self, ifindex: IfIndex, target: object, *, mac: MacAddress | None, **fields: Any) -> None:
        if mac is not None:
            raise Refused("move link 7", errno.EADDRNOTAVAIL)
        self.vf = replace(self.vf, name=fields["name"])


def target(home: Home, *, asked: MacAddress | None = None) -> Target:
    config = NicConfig(interface=InterfaceConfig(name=IfName("net1"), hardware_address=asked))
    baseline = LinkSettings.of(HOME, kind=DeviceKind.VF)
    known = replace(preparation(0), identity=VF, kind=DeviceKind.VF, config=config, baseline=baseline)
    return Target(
        preparation=known,
        attachment=None,
        home=home,  # type: ignore[arg-type]
        home_netns=object(),  # type: ignore[arg-type]
        pod_netns=object(),  # type: ignore[arg-type]
    )


def acts(monkeypatch: pytest.MonkeyPatch) -> NodeActs:
    monkeypatch.setattr("driver.execute.actions.foreign_programs", lambda ifindex, own: ())
    monkeypatch.setattr("driver.execute.actions.detach_foreign", lambda ifindex, own: None)
    return NodeActs(
        hook=Hook.TCX,
        accounting=None,  # type: ignore[arg-type]
        programs=None,
        fold=lambda attachment, preparation: None,
        meters=None,  # type: ignore[arg-type]
        host=Host(Sysfs(Path("/sys")), Udev(Path("/none"))),
        shaper=SimpleNamespace(shape=None, unshape=None),  # type: ignore[arg-type]
        foreign=NO_FOREIGN,  # type: ignore[arg-type]
    )


def test_a_vf_that_took_up_the_address_it_was_given_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(mac=GIVEN, given=GIVEN, name="net1")
    table = acts(monkeypatch)
    table.restore(target(home))
    table.verify(target(home))
    assert (home.vf.name, home.vf.mtu, home.vf.mac) == ("ens1f0v0", 1500, GIVEN)


@pytest.mark.parametrize("given", [None, GIVEN])
def test_an_address_that_nobody_gave_withholds_the_vf_and_the_rest_is_restored(
    monkeypatch: pytest.MonkeyPatch, given: MacAddress | None
) -> None:
    home = Home(mac=TENANTS, given=given, name="net1")
    table = acts(monkeypatch)
    with pytest.raises(Refused):
        table.restore(target(home))
    assert (home.vf.name, home.vf.mtu) == ("ens1f0v0", 1500)
    with pytest.raises(NotClean, match=TENANTS):
        table.verify(target(home))


def test_an_address_the_driver_refuses_is_a_lasting_refusal_that_says_what_to_do() -> None:
    with pytest.raises(Refusal, match=rf"cannot have the address {TENANTS}.*leave hardwareAddress out"):
        move_in(target(Home(mac=OWN, given=GIVEN), asked=TENANTS))


def test_a_claim_without_an_address_takes_the_vf_with_the_one_it_has() -> None:
    home = Home(mac=GIVEN, given=GIVEN)
    move_in(target(home))
    assert (home.vf.name, home.vf.mac) == ("net1", GIVEN)
