"""An IPoIB interface is refused in prepare where it could not be made or would not be counted."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from pathlib import Path

import pytest

from bpf.layout import Framing, Hook
from driver.errors import ConfigError
from driver.journal.codec import decode, encode
from driver.lifecycle.fitting import check_ipoib
from driver.model import Device, NicConfig, Preparation
from driver.rdma import IpoibConfig, RdmaConfig
from hw.ipoib import IpoibMode
from hw.model import DeviceKind, IfName, LinkSettings, MacAddress
from tests.unit.claims_world import A, device
from tests.unit.infiniband_world import Mlx5, prepared

FULL = IpoibConfig(
    name=IfName("ib1"),
    mode=IpoibMode.CONNECTED,
    mtu=65520,
    addresses=(ipaddress.ip_interface("192.0.2.7/24"),),
)
WISH = NicConfig(rdma=RdmaConfig(partition=1, ipoib=IpoibConfig(name=IfName("ib1"))))


@pytest.fixture
def vf(tmp_path: Path) -> Device:
    card = Mlx5(tmp_path / "sys")
    assert card.vf is not None
    made = replace(device(A, 20), kind=DeviceKind.VF, settings=LinkSettings.of(card.vf, kind=DeviceKind.VF))
    assert prepared(card).framing is Framing.IPOIB
    return made


def test_a_vf_on_infiniband_can_have_one(vf: Device) -> None:
    check_ipoib(vf, WISH, Hook.TCX)
    check_ipoib(replace(vf, settings=None), NicConfig(), Hook.CLSACT)


def test_it_is_on_record_as_it_was_asked_for(tmp_path: Path) -> None:
    wish = replace(WISH.rdma, ipoib=FULL)
    made = prepared(Mlx5(tmp_path / "sys"), config=NicConfig(rdma=wish))
    assert decode(Preparation, encode(made)) == made


def test_where_it_would_not_be_counted_it_is_refused(vf: Device) -> None:
    with pytest.raises(ConfigError, match=r"rdma.ipoib: .*has no tcx"):
        check_ipoib(vf, WISH, Hook.CLSACT)


def test_what_is_on_ethernet_or_has_no_ports_own_interface_is_told_apart(vf: Device) -> None:
    assert vf.settings is not None
    on_ethernet = replace(vf.settings, mac=MacAddress("02:00:5e:00:00:01"))
    with pytest.raises(ConfigError, match="is not on InfiniBand"):
        check_ipoib(replace(vf, settings=on_ethernet), WISH, Hook.TCX)
    for other in (replace(vf, kind=DeviceKind.NETDEV), replace(vf, settings=None)):
        with pytest.raises(ConfigError, match="no port's own interface"):
            check_ipoib(other, WISH, Hook.TCX)
