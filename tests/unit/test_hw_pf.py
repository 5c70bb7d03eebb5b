"""A VF's rates are read and set where its PF's eswitch mode has them, and nothing is set that cannot be put
back."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from driver.errors import Refusal
from driver.execute import vf as acts
from driver.model import NicConfig, VfConfig
from hw import pf as held
from hw.devlink_codec import DevlinkHandle, DevlinkPort, DevlinkRate, PortFlavour
from hw.errors import Refused, Unsupported
from hw.model import EswitchMode, RatesBy, VfVlan
from hw.vf import VfRates
from tests.unit.igb_world import FRESH, PF, PF_LINK, Igb, prepared, target

HANDLE = DevlinkHandle("pci", PF)
SWITCHED = replace(PF_LINK, phys_switch_id="e8ebd3")
VF_PORT = 128


class Switch:
    """devlink of one PF with the ports of two VFs, and of another host's VF 0, which is not ours."""

    def __init__(self) -> None:
        self.mode = EswitchMode.SWITCHDEV
        self.leaves: dict[int, tuple[int, int]] = {7: (5, 5), VF_PORT: (0, 0), 129: (0, 0)}
        self.absent = False

    def __call__(self) -> Switch:
        if self.absent:
            raise Unsupported("look for devlink in this kernel", errno.EOPNOTSUPP)
        return self

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def eswitch_mode(self, handle: DevlinkHandle) -> EswitchMode:
        assert handle == HANDLE
        return self.mode

    def ports(self) -> tuple[DevlinkPort, ...]:
        vf: Any = {"handle": HANDLE, "flavour": PortFlavour.PCI_VF, "pf": 0}
        return (
            DevlinkPort(handle=HANDLE, index=0, flavour=PortFlavour.PHYSICAL),
            DevlinkPort(index=7, vf=0, external=True, **vf),
            DevlinkPort(index=3, vf=0, **(vf | {"handle": DevlinkHandle("pci", "0000:ff:00.0")})),
            DevlinkPort(index=VF_PORT, vf=0, **vf),
            DevlinkPort(index=129, vf=1, **vf),
        )

    def leaf(self, handle: DevlinkHandle, port: int) -> DevlinkRate | None:
        if port not in self.leaves:
            return None
        share, top = self.leaves[port]
        return DevlinkRate(handle=handle, port=port, tx_share=share, tx_max=top)

    def set_leaf(self, handle: DevlinkHandle, port: int, *, share: int, top: int) -> None:
        self.leaves[port] = (share, top)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    made = Switch()
    monkeypatch.setattr(held, "Devlink", made)
    return made


@pytest.fixture
def igb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Igb:
    monkeypatch.setattr("tests.unit.igb_world.PF_LINK", SWITCHED)
    monkeypatch.setattr(acts, "SETTLE_SECONDS", 0.1)
    return Igb(tmp_path / "sys")


def test_in_switchdev_mode_rates_are_those_of_the_vfs_own_port(igb: Igb, switch: Switch) -> None:
    held.write_vf(igb, SWITCHED, 0, "rates", VfRates(10, 100))
    assert switch.leaves == {7: (5, 5), VF_PORT: (1_250_000, 12_500_000), 129: (0, 0)}
    assert igb.sent == []
    found = held.read_vf(igb, SWITCHED, 0)
    assert found == replace(FRESH, min_rate=10, max_rate=100, rates_by=RatesBy.DEVLINK)


def test_everything_else_is_set_on_the_pf_in_both_modes(igb: Igb, switch: Switch) -> None:
    held.write_vf(igb, SWITCHED, 0, "vlan", VfVlan(id=7))
    assert igb.sent == [("vlan", VfVlan(id=7))]


@pytest.mark.parametrize("why", ["legacy", "no devlink", "no rates"])
def test_without_a_ports_rate_it_is_the_vfs(igb: Igb, switch: Switch, why: str) -> None:
    match why:
        case "legacy":
            switch.mode = EswitchMode.LEGACY
        case "no devlink":
            switch.absent = True
        case _:
            switch.leaves = {}
    held.write_vf(igb, SWITCHED, 0, "rates", VfRates(0, 100))
    assert igb.sent == [("rates", VfRates(0, 100))]
    assert held.read_vf(igb, SWITCHED, 0) == replace(FRESH, max_rate=100)


def test_a_pf_that_is_no_switchs_port_is_not_asked_for_its_mode(
    igb: Igb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "Devlink", None)
    assert held.read_vf(igb, PF_LINK, 0) == FRESH


def test_a_claims_rates_are_set_on_the_port_and_put_back_as_they_were(igb: Igb, switch: Switch) -> None:
    switch.leaves[VF_PORT] = (0, 25_000_000)
    baseline = held.read_vf(igb, SWITCHED, 0)
    made = prepared(igb, vf_baseline=baseline, config=NicConfig(vf=VfConfig(max_rate=100, min_rate=20)))
    acts.set_vf(target(igb, made), igb.host)
    assert switch.leaves[VF_PORT] == (2_500_000, 12_500_000)
    acts.restore_vf(target(igb, made), igb.host)
    acts.verify_vf(target(igb, made))
    assert switch.leaves[VF_PORT] == (0, 25_000_000)
    assert igb.sent == []


def test_a_limit_that_could_not_be_put_back_is_refused_and_otherwise_left_alone(
    igb: Igb, switch: Switch
) -> None:
    switch.leaves[VF_PORT] = (0, 1_000)
    baseline = held.read_vf(igb, SWITCHED, 0)
    assert baseline is not None
    assert (baseline.min_rate, baseline.max_rate) == (None, None)
    made = prepared(igb, vf_baseline=baseline, config=NicConfig(vf=VfConfig(max_rate=100)))
    with pytest.raises(Refusal, match=r"vf\.maxRate 100M: igb.*1000 bytes per second.*no whole Mb/s"):
        acts.set_vf(target(igb, made), igb.host)
    acts.restore_vf(target(igb, made), igb.host)
    acts.verify_vf(target(igb, made))
    assert switch.leaves[VF_PORT] == (0, 1_000)


def test_what_the_kernel_refuses_of_a_port_is_said_in_its_words(
    igb: Igb, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Refused("set the rate of port", errno.EINVAL, "not over the link's speed")

    monkeypatch.setattr(switch, "set_leaf", refuse)
    made = prepared(
        igb, vf_baseline=held.read_vf(igb, SWITCHED, 0), config=NicConfig(vf=VfConfig(max_rate=9))
    )
    with pytest.raises(Refusal, match="not over the link's speed"):
        acts.set_vf(target(igb, made), igb.host)
