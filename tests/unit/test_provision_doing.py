"""VFs are made whole, with the right address from the first frame on, or not at all; a crash changes nothing
of that."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from driver.errors import NotNow
from driver.model import BootId, DeviceName
from driver.paths import Paths
from driver.policy import NodePolicy
from driver.policy.sriov import MacChoice, PfRule, VfDefaults
from driver.provision import carry_out, hands_off
from driver.provision.carry_out import Provision, addresses
from driver.provision.plan import Maker, Verdict
from hw.errors import Busy, HwError, Refused, Unsupported
from hw.model import LinkFlags, NsimName, PciAddress, VfVlan
from hw.sriov import provision as doing
from tests.unit.sriov_core import PF, PF_INDEX, SECOND, UNSUPPORTED, Kernel, Killed, vf_address

BOOT = BootId("boot-1")
FOUR = PfRule(vfs=4, vf=VfDefaults(vlan=100, spoof_check=False, trust=True), mtu=9000)
TWO = PfRule(vfs=2)
NONE = PfRule(vfs=0)


class Node:
    """A node without an agent: what the agent would do, called by hand."""

    def __init__(self, root: Path) -> None:
        self.kernel = Kernel(root / "sys")
        self.paths = Paths(root=root / "root")
        self.provision = Provision(self.kernel, self.paths, BOOT)

    def reboot(self) -> None:
        for pf in PF_INDEX:
            self.kernel.write(f"bus/pci/devices/{pf}/sriov_numvfs", "0")
            self.kernel.set_down(PF_INDEX[pf])
        self.provision = Provision(self.kernel, self.paths, BootId("boot-2"))

    def settle(self, *rules: PfRule, held: dict[str, str] | None = None) -> dict[PciAddress, Verdict]:
        """One run; what was to be done."""
        policy = NodePolicy(sriov=rules)
        names = {DeviceName(name): why for name, why in (held or {}).items()}
        found = self.provision.survey(policy, names)
        macs = addresses(found)
        for plan in found.plans.values():
            if plan.changes:
                self.provision.carry_out([plan], macs)
        return {pf: plan.verdict for pf, plan in found.plans.items()}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(tmp_path)
    monkeypatch.setattr(carry_out, "LinkSocket", lambda netns: made.kernel)
    monkeypatch.setattr(doing, "VF_SECONDS", 0.2)
    return made


def test_vfs_are_made_with_everything_set_before_a_driver_sees_them(node: Node) -> None:
    assert node.settle(FOUR) == {PF: Verdict.MAKE, SECOND: Verdict.MAKE}
    picture = node.kernel.picture()
    assert [len(vfs) for vfs in picture["vfs"].values()] == [4, 4]
    for (pf, index), given in node.kernel.given.items():
        assert (given.vlan, given.spoof_check, given.trust) == (VfVlan(id=100), False, True)
        address = vf_address(next(each for each, number in PF_INDEX.items() if number == pf), index)
        assert node.kernel.first_macs[address] == given.mac
    macs = [given.mac for given in node.kernel.given.values()]
    assert None not in macs
    assert len(set(macs)) == 8
    assert set(picture["autoprobe"].values()) == {1}
    names = {link.name: link.mtu for link in node.kernel.dump()}
    assert names == {f"pf{pf}{vf}": 9000 for pf in (0, 1) for vf in ("", "v0", "v1", "v2", "v3")}
    done = [
        change for change in node.kernel.changes if "vf 3" in change or change.startswith("drivers_probe")
    ]
    assert done.index("vf 3 trust True") < done.index(f"drivers_probe {vf_address(PF, 0)}")


def test_what_is_made_is_left_and_outlives_a_restart(node: Node) -> None:
    node.settle(FOUR)
    changes = len(node.kernel.changes)
    node.provision = Provision(node.kernel, node.paths, BOOT)
    assert node.settle(FOUR) == {PF: Verdict.FINE, SECOND: Verdict.FINE}
    assert len(node.kernel.changes) == changes


def test_after_a_reboot_the_same_vfs_have_the_same_addresses(node: Node) -> None:
    node.settle(FOUR)
    before = node.kernel.picture()
    node.reboot()
    assert node.settle(FOUR) == {PF: Verdict.MAKE, SECOND: Verdict.MAKE}
    assert node.kernel.picture() == before


def test_a_number_changes_through_none_and_only_when_free(node: Node) -> None:
    node.settle(FOUR)
    held = {"pci-0000-21-10-2": "is held by claim a/b"}
    assert node.settle(TWO, held=held) == {PF: Verdict.REFUSED, SECOND: Verdict.MAKE}
    assert [len(vfs) for vfs in node.kernel.picture()["vfs"].values()] == [4, 2]
    assert node.settle(TWO) == {PF: Verdict.MAKE, SECOND: Verdict.FINE}
    assert [len(vfs) for vfs in node.kernel.picture()["vfs"].values()] == [2, 2]


def test_what_was_made_goes_and_the_pf_is_as_it_was(node: Node) -> None:
    before = node.kernel.picture()
    node.settle(FOUR)
    node.settle(NONE)
    assert node.kernel.picture() == before
    assert node.settle(NONE) == {PF: Verdict.FINE, SECOND: Verdict.FINE}
    assert not node.provision.has_records


def test_a_pf_that_was_up_stays_up(node: Node) -> None:
    node.kernel.set_up(PF_INDEX[PF])
    node.settle(FOUR)
    node.settle(NONE)
    assert node.kernel.links[PF_INDEX[PF]].flags == LinkFlags.UP
    assert node.kernel.links[PF_INDEX[SECOND]].flags == LinkFlags(0)


def test_vfs_that_keep_their_addresses_are_given_none(node: Node) -> None:
    node.settle(PfRule(vfs=1, vf=VfDefaults(mac=MacChoice.KEEP)))
    assert node.kernel.given[PF_INDEX[PF], 0].mac is None


def test_a_named_driver_is_bound_where_drivers_do_not_probe(node: Node) -> None:
    path = f"bus/pci/devices/{PF}/sriov_drivers_autoprobe"
    node.kernel.write(path, "0")
    node.settle(PfRule(vfs=2, vf=VfDefaults(driver="igbvf")))
    assert set(node.kernel.picture()["drivers"].values()) == {"igbvf"}
    assert node.kernel.integer(path) == 0
    node.settle(PfRule(vfs=1))
    assert set(node.kernel.picture()["drivers"].values()) == {"igbvf"}
    assert node.kernel.integer(path) == 0


def test_firmware_that_takes_its_time_is_waited_for(node: Node) -> None:
    node.kernel.deaf = 3
    node.settle(FOUR)
    assert node.kernel.given[PF_INDEX[PF], 0].vlan == VfVlan(id=100)


@pytest.mark.parametrize(
    ("beginning", "error", "kind"),
    [
        ("sriov_numvfs 4", Refused("numvfs", 12), Refused),
        ("vf 2 trust", UNSUPPORTED, Unsupported),
        ("vf 0 mac", Busy("mac", 16), Busy),
        ("up", Refused("up", 5), Refused),
        ("change {'mtu'", Refused("mtu", 22), Refused),
        ("drivers_probe", Refused("probe", 19), Busy),
        ("sriov_drivers_autoprobe 0", Refused("autoprobe", 13), Refused),
    ],
)
def test_what_cannot_be_made_whole_is_not_there_at_all(
    node: Node, beginning: str, error: HwError, kind: type[HwError]
) -> None:
    before = node.kernel.picture()
    node.kernel.refuse = {beginning: error}
    with pytest.raises(kind):
        node.settle(FOUR)
    assert node.kernel.picture() == before
    assert not node.provision.has_records
    node.kernel.refuse = {}
    node.settle(FOUR)
    assert [len(vfs) for vfs in node.kernel.picture()["vfs"].values()] == [4, 4]


def test_without_a_driver_the_error_says_what_to_load(node: Node) -> None:
    (node.kernel.root / "bus/pci/drivers/igbvf").rmdir()
    with pytest.raises(Busy, match="load its module"):
        node.settle(FOUR)
    with pytest.raises(Busy, match="driver igbvf: load its module"):
        node.settle(PfRule(vfs=2, vf=VfDefaults(driver="igbvf")))
    assert node.kernel.picture()["vfs"][PF] == []


def test_a_kernel_that_does_not_answer_is_left_alone_and_the_record_stays(node: Node) -> None:
    node.kernel.refuse = {"sriov_numvfs 4": Busy("numvfs", 110)}
    with pytest.raises(Busy):
        node.settle(FOUR)
    assert node.kernel.changes[-1] == "sriov_numvfs 4"


def test_nothing_is_begun_that_cannot_be_recorded(node: Node) -> None:
    node.paths.makings.parent.mkdir(parents=True)
    node.paths.makings.write_text("in the way")
    with pytest.raises(NotNow):
        node.settle(FOUR)
    assert node.kernel.changes == []


def test_a_bond_whose_second_port_fails_has_none(node: Node) -> None:
    found = node.provision.survey(NodePolicy(sriov=(TWO,)), {})
    node.kernel.refuse = {f"up {PF_INDEX[SECOND]}": Refused("up", 5)}
    before = node.kernel.picture()
    with pytest.raises(Refused):
        node.provision.carry_out(list(found.plans.values()), addresses(found))
    assert node.kernel.picture() == before
    assert not node.provision.has_records


def wanted_picture(root: Path, monkeypatch: pytest.MonkeyPatch, *steps: PfRule) -> tuple[Any, int]:
    """What it should come to, and in how many changes the last step does it."""
    calm = Node(root)
    monkeypatch.setattr(carry_out, "LinkSocket", lambda netns: calm.kernel)
    for rule in steps[:-1]:
        calm.settle(rule)
    before = len(calm.kernel.changes)
    calm.settle(steps[-1])
    return calm.kernel.picture(), len(calm.kernel.changes) - before


@pytest.mark.parametrize("steps", [(FOUR,), (FOUR, TWO), (FOUR, NONE)], ids=["make", "change", "remove"])
def test_killed_before_any_change_the_next_start_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[PfRule, ...]
) -> None:
    monkeypatch.setattr(doing, "VF_SECONDS", 0.2)
    wanted, changes = wanted_picture(tmp_path / "calm", monkeypatch, *steps)
    assert changes > 3
    for at in range(changes):
        node = Node(tmp_path / f"killed-{at}")
        with monkeypatch.context() as patch:
            patch.setattr(carry_out, "LinkSocket", lambda netns, node=node: node.kernel)
            for rule in steps[:-1]:
                node.settle(rule)
            node.kernel.die_at = len(node.kernel.changes) + at
            with pytest.raises(Killed):
                node.settle(steps[-1])
            node.kernel.revive()
            node.provision = Provision(node.kernel, node.paths, BOOT)
            half = node.provision.survey(NodePolicy(sriov=(steps[-1],)), {})
            for plan in half.plans.values():
                ready = plan.verdict is Verdict.FINE or plan.changes or plan.unfinished
                assert ready, f"killed before change {at}: {plan}"
                assert plan.maker is not Maker.OTHERS
            node.settle(steps[-1])
            assert node.kernel.picture() == wanted, f"killed before change {at}"
            assert set(node.settle(steps[-1]).values()) == {Verdict.FINE}
            with contextlib.suppress(HwError):
                node.settle(NONE)
            assert not node.provision.has_records


def test_rules_for_network_managers_are_written_once_and_go(node: Node) -> None:
    found = node.provision.survey(NodePolicy(sriov=(FOUR,)), {})
    assert node.provision.keep_hands_off(found.plans.values()) == 0.0
    rules = (node.paths.udev_rules / "10-knd-vf.rules").read_text()
    assert f"PCI_SLOT_NAME={PF}*" in rules
    assert f"PCI_SLOT_NAME={SECOND}*" in rules
    assert rules.count('ENV{NM_UNMANAGED}="1", ENV{ID_NET_MANAGED_BY}="internal.knd"') == 2
    assert "Unmanaged=yes" in (node.paths.networkd / "10-knd-vf.network").read_text()
    node.paths.udev_control.touch()
    assert node.provision.keep_hands_off(found.plans.values()) == 0.0
    (node.paths.udev_rules / "10-knd-vf.rules").unlink()
    assert node.provision.keep_hands_off(found.plans.values()) > 3.0
    node.provision.remove_rules()
    assert not list(node.paths.networkd.iterdir())
    assert not list(node.paths.udev_rules.iterdir())


def test_no_vfs_are_made_where_the_rules_cannot_be_written(node: Node) -> None:
    node.paths.networkd.parent.mkdir(parents=True)
    node.paths.networkd.write_text("in the way")
    found = node.provision.survey(NodePolicy(sriov=(FOUR,)), {})
    with pytest.raises(NotNow, match="network managers"):
        node.provision.keep_hands_off(found.plans.values())


def test_the_rules_know_a_simulated_cards_vfs_by_their_ports(node: Node) -> None:
    hands_off.write(node.paths, [NsimName("netdevsim10")])
    rules = (node.paths.udev_rules / "10-knd-vf.rules").read_text()
    assert 'KERNELS=="netdevsim10", ATTR{phys_port_name}=="pf*vf*", ENV{KND_VF}="1"' in rules
