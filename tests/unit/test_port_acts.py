"""A PF that was in a pod goes back to its VFs: what it holds of each is as it was before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.execute import port, probe, vf
from driver.execute.target import NotClean
from hw.errors import Refused
from hw.model import MacAddress, VfSettings, VfVlan
from hw.sysfs import Sysfs
from hw.udev import Udev
from hw.vf import VfRates, VfValue
from tests.unit.journal_values import preparation
from tests.unit.test_sharing import PF

WAS = VfSettings(mac=MacAddress("02:00:00:00:00:01"), vlan=VfVlan(), trust=False, min_rate=0, max_rate=0)
TENANTS = replace(WAS, vlan=VfVlan(id=66), trust=True, max_rate=5)


class Home:
    """A PF with index 4 and what it holds of its VFs."""

    def __init__(self, holds: dict[int, VfSettings], *, up: bool = False, deaf: str = "") -> None:
        self.holds, self.up, self.deaf = holds, up, deaf
        self.refuses = ""
        self.done: list[str] = []

    def all_vf_settings(self, ifindex: int) -> dict[int, VfSettings]:
        assert ifindex == 4
        return dict(self.holds)

    def set_vf(self, ifindex: int, index: int, setting: str, value: VfValue) -> None:
        self.done.append(f"{setting} of {index}")
        if setting == self.refuses:
            raise Refused(f"set {setting}", 22)
        if setting == self.deaf:
            return
        if isinstance(value, VfRates):
            changed = replace(self.holds[index], min_rate=value.minimum, max_rate=value.maximum)
        else:
            changed = replace(self.holds[index], **{setting: value})  # type: ignore[arg-type]
        self.holds[index] = changed

    def set_up(self, ifindex: int) -> None:
        assert ifindex == 4
        self.up = True


def target(home: Home) -> Any:
    known = replace(preparation(0), identity=PF)
    return SimpleNamespace(
        device="pf",
        home=home,
        preparation=known,
        find_at_home=lambda: SimpleNamespace(ifindex=4, up=home.up),
    )


@pytest.fixture
def host(tmp_path: Path) -> probe.Host:
    return probe.Host(Sysfs(tmp_path), Udev(tmp_path))


def baseline(*indices: int, up: bool = True) -> Any:
    return SimpleNamespace(up=up, vfs=tuple(SimpleNamespace(index=n, settings=WAS) for n in indices))


def test_what_a_tenant_did_to_each_vf_is_undone_and_the_rest_is_not_touched(host: probe.Host) -> None:
    home = Home({0: TENANTS, 1: WAS})
    port.restore_vfs(target(home), host, baseline(0, 1))
    assert home.holds == {0: WAS, 1: WAS}
    assert home.done == ["vlan of 0", "rates of 0", "trust of 0"]
    home.done.clear()
    port.restore_vfs(target(home), host, baseline(0, 1))
    assert home.done == [], "safe to repeat"


def test_a_vf_that_is_no_more_has_nothing_to_restore(host: probe.Host) -> None:
    home = Home({1: TENANTS})
    port.restore_vfs(target(home), host, baseline(0, 1))
    assert home.holds == {1: WAS}


@pytest.mark.parametrize("how", ["refuses", "deaf"])
def test_what_does_not_go_back_is_named(host: probe.Host, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vf, "SETTLE_SECONDS", 0.05)
    home = Home({0: TENANTS})
    setattr(home, how, "trust")
    with pytest.raises(NotClean, match="trust"):
        port.restore_vfs(target(home), host, baseline(0))
    assert home.holds[0] == replace(WAS, trust=True), "the others went back all the same"


@pytest.mark.parametrize("was_up", [True, False])
def test_it_is_up_again_where_it_was(was_up: bool) -> None:
    home = Home({})
    port.set_up_again(target(home), baseline(up=was_up))
    assert home.up is was_up
