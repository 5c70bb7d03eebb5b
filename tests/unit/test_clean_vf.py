"""A VF's clean MAC address is the one it had before a tenant came, whatever its driver calls permanent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from driver.execute.actions import differences
from hw.model import DeviceKind, IfIndex, IfName, LinkFlags, LinkInfo, LinkSettings, MacAddress

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
