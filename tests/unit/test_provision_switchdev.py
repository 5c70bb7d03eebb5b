"""VFs in the eswitch mode that the policy says, in the order that each driver wants it, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from driver.policy import NodePolicy
from driver.policy.sriov import PfRule, PfSelector, VfDefaults
from driver.provision import carry_out
from driver.provision.carry_out import Provision, addresses
from driver.provision.plan import Maker, Verdict, plan
from hw import eswitch
from hw.devlink_codec import DevlinkHandle, DevlinkPort, DevlinkRate
from hw.errors import Busy, HwError, Refused, Unsupported
from hw.model import EswitchMode, LinkFlags, NsimName, PciAddress, PfAddress
from hw.sriov import provision as doing
from hw.sriov import switching
from tests.unit import sriov_core
from tests.unit.provision_world import BOOT, known, making, port
from tests.unit.sriov_core import PF, PF_INDEX, Kernel, Killed

LEGACY, SWITCHDEV = EswitchMode.LEGACY, EswitchMode.SWITCHDEV
ONE_PF = PfSelector(addresses=(PF,))
SWITCHED = PfRule(vfs=2, mode=SWITCHDEV, match=ONE_PF)
PLAIN = PfRule(vfs=2, match=ONE_PF)
NONE = PfRule(vfs=0, match=ONE_PF)
DRIVERS = ["mlx5_core", "ice", "bnxt_en"]


class Switching(Kernel):
    """The PFs' switches as their drivers are known for: ice changes its mode without VFs only, bnxt has no
    switchdev mode without any, and mlx5 none under a VF that a driver has."""

    def __init__(self, root: Path, driver: str) -> None:
        super().__init__(root)
        self.driver = driver
        self.modes: dict[str, EswitchMode] = dict.fromkeys(PF_INDEX, LEGACY)
        self.nodes: list[DevlinkRate] = []

    def __call__(self, **_: object) -> Switching:
        return self

    def devices(self) -> tuple[DevlinkHandle, ...]:
        return tuple(map(DevlinkHandle.of_card, PF_INDEX))

    def eswitch_mode(self, handle: DevlinkHandle) -> EswitchMode | None:
        return self.modes.get(handle.device)

    def ports(self) -> tuple[DevlinkPort, ...]:
        return ()

    def rates(self) -> tuple[DevlinkRate, ...]:
        return tuple(self.nodes)

    def set_leaf(self, handle: DevlinkHandle, port: int, *, parent: str) -> None:
        self._change(f"leaf {port} under {parent!r}")
        self.nodes = [each for each in self.nodes if each.port != port]

    def delete_node(self, handle: DevlinkHandle, node: str) -> None:
        if any(each.parent == node for each in self.nodes):
            raise Busy("delete", 16)
        self._change(f"node {node} deleted")
        self.nodes = [each for each in self.nodes if each.node != node]

    def switch(self, handle: DevlinkHandle, mode: EswitchMode) -> None:
        pf = PciAddress(handle.device)
        vfs = self.vfs(pf)
        self._change(f"mode {mode}")
        bound = [vf for vf in vfs if self.target_name(f"bus/pci/devices/{vf}/driver")]
        if self.driver == "ice" and vfs:
            raise Busy("mode", 16, "VFs are there")
        if self.driver == "bnxt_en" and mode is SWITCHDEV and not vfs:
            raise Refused("mode", 1, "enable VFs first")
        if self.driver == "mlx5_core" and bound:
            raise Busy("mode", 16, "VFs are bound")
        if mode is LEGACY and self.nodes:
            raise Busy("mode", 16, "Rate node(s) exists.")
        self.modes[handle.device] = mode


class Node:
    def __init__(self, root: Path, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tree = sriov_core.TREE.replace("driver=igb ", f"driver={driver} ")
        with monkeypatch.context() as patch:
            patch.setattr(sriov_core, "TREE", tree)
            self.kernel = Switching(root / "sys", driver)
        self.provision = Provision(self.kernel, carry_out.Paths(root=root / "root"), BOOT)
        monkeypatch.setattr(carry_out, "LinkSocket", lambda netns: self.kernel)
        monkeypatch.setattr(eswitch, "Devlink", self.kernel)
        monkeypatch.setattr(switching, "Devlink", self.kernel)
        monkeypatch.setattr(switching, "switch", self.kernel.switch)
        monkeypatch.setattr(doing, "VF_SECONDS", 0.2)

    def settle(self, *rules: PfRule) -> dict[PfAddress, Verdict]:
        found = self.provision.survey(NodePolicy(sriov=rules), {})
        for each in found.plans.values():
            if each.changes:
                self.provision.carry_out([each], addresses(found))
        return {pf: each.verdict for pf, each in found.plans.items()}

    def picture(self) -> tuple[Any, dict[str, EswitchMode]]:
        return self.kernel.picture(), dict(self.kernel.modes)


@pytest.fixture(params=DRIVERS)
def node(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, request.param, monkeypatch)


@pytest.fixture
def mlx5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, "mlx5_core", monkeypatch)


def test_every_driver_gets_its_mode_in_its_order_and_the_pf_is_given_back_as_it_was(node: Node) -> None:
    before = node.picture()
    assert node.settle(SWITCHED)[PF] is Verdict.MAKE
    assert node.kernel.modes[PF] is SWITCHDEV
    assert [len(vfs) for vfs in node.kernel.picture()["vfs"].values()] == [2, 0]
    assert set(node.kernel.picture()["drivers"].values()) == {"igbvf"}
    assert node.settle(SWITCHED)[PF] is Verdict.FINE
    node.settle(NONE)
    assert node.picture() == before
    assert not node.provision.has_records


def test_settings_are_made_in_the_mode_that_the_vfs_will_have(mlx5: Node) -> None:
    mlx5.settle(PfRule(vfs=1, mode=SWITCHDEV, match=ONE_PF, vf=VfDefaults(trust=True)))
    done = mlx5.kernel.changes
    assert done.index("sriov_numvfs 1") < done.index("mode switchdev") < done.index("vf 0 trust True")


def test_a_mode_that_the_rule_does_not_name_any_more_is_as_before(node: Node) -> None:
    node.settle(SWITCHED)
    assert node.settle(PLAIN)[PF] is Verdict.MAKE
    assert node.kernel.modes[PF] is LEGACY
    assert node.settle(PLAIN)[PF] is Verdict.FINE


def test_a_mode_that_others_chose_is_left_where_the_rule_names_none(mlx5: Node) -> None:
    mlx5.kernel.modes[PF] = SWITCHDEV
    mlx5.settle(PLAIN)
    mlx5.settle(NONE)
    assert mlx5.kernel.modes[PF] is SWITCHDEV
    assert not [change for change in mlx5.kernel.changes if change.startswith("mode")]


def test_a_mode_that_was_changed_by_hand_is_made_again(mlx5: Node) -> None:
    mlx5.settle(SWITCHED)
    mlx5.kernel.modes[PF] = LEGACY
    assert mlx5.settle(SWITCHED)[PF] is Verdict.MAKE
    assert mlx5.kernel.modes[PF] is SWITCHDEV


def test_rate_nodes_are_deleted_from_the_leaves_up_before_legacy_mode(mlx5: Node) -> None:
    before = mlx5.picture()
    mlx5.settle(SWITCHED)
    handle = DevlinkHandle.of_card(PF)
    mlx5.kernel.nodes = [
        DevlinkRate(handle=handle, node="top"),
        DevlinkRate(handle=handle, node="low", parent="top"),
        DevlinkRate(handle=handle, port=1, parent="low"),
    ]
    mlx5.settle(NONE)
    assert mlx5.kernel.nodes == []
    assert mlx5.picture() == before


@pytest.mark.parametrize("beginning", ["mode switchdev", "vf 0 mac", "drivers_probe"])
def test_what_cannot_be_made_whole_leaves_the_mode_as_it_was(node: Node, beginning: str) -> None:
    before = node.picture()
    node.kernel.refuse = {beginning: Refused("no", 22)}
    with pytest.raises(HwError):
        node.settle(SWITCHED)
    assert node.picture() == before
    assert not node.provision.has_records


def test_a_record_stays_as_long_as_the_mode_is_not_back(mlx5: Node) -> None:
    mlx5.kernel.refuse = {"vf 0 mac": Refused("no", 22), "mode legacy": Refused("no", 22)}
    with pytest.raises(Refused):
        mlx5.settle(SWITCHED)
    assert mlx5.provision.has_records
    mlx5.kernel.refuse = {}
    mlx5.settle(NONE)
    assert mlx5.kernel.modes[PF] is LEGACY
    assert not mlx5.provision.has_records


def test_a_driver_that_makes_another_netdev_of_its_pf_is_followed(
    mlx5: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = mlx5.kernel.switch

    def switch(handle: DevlinkHandle, mode: EswitchMode) -> None:
        plain(handle, mode)
        links, old = mlx5.kernel.links, PF_INDEX[PF]
        link = links.pop(old)
        moved = type(old)(77)
        links[moved] = doing.replace(link, ifindex=moved, flags=LinkFlags(0))
        for (pf, vf), given in list(mlx5.kernel.given.items()):
            if pf == old:
                mlx5.kernel.given[moved, vf] = given

    monkeypatch.setattr(switching, "switch", switch)
    mlx5.settle(SWITCHED)
    assert mlx5.kernel.given[type(PF_INDEX[PF])(77), 1].mac is not None


@pytest.mark.parametrize("driver", DRIVERS)
def test_killed_before_any_change_the_next_start_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    calm = Node(tmp_path / "calm", driver, monkeypatch)
    before = calm.picture()
    calm.settle(SWITCHED)
    wanted, changes = calm.picture(), len(calm.kernel.changes)
    for at in range(changes):
        node = Node(tmp_path / f"killed-{at}", driver, monkeypatch)
        node.kernel.die_at = at
        with pytest.raises(Killed):
            node.settle(SWITCHED)
        node.kernel.revive()
        node.settle(SWITCHED)
        assert node.picture() == wanted, f"killed before change {at}"
        node.settle(NONE)
        assert node.picture() == before, f"killed before change {at}"


# --- deciding -----------------------------------------------------------------------------------------


def test_a_driver_without_modes_is_refused_switchdev_and_is_in_legacy_as_it_is() -> None:
    (decided,) = plan([port()], [PfRule(vfs=2, mode=SWITCHDEV)], known()).values()
    assert decided.verdict is Verdict.REFUSED
    assert "its driver igb has no eswitch modes" in decided.why
    legacy = PfRule(vfs=2, mode=LEGACY)
    (decided,) = plan([port(2)], [legacy], known(making(legacy))).values()
    assert decided.verdict is Verdict.FINE


def test_the_mode_of_a_pf_that_the_host_uses_is_changed_only_where_that_is_allowed() -> None:
    uplink = port(2, eswitch=LEGACY, in_use="in use by the host: it has an address")
    rule = PfRule(vfs=2, mode=SWITCHDEV)
    (decided,) = plan([uplink], [rule], known(making(PfRule(vfs=2)))).values()
    assert decided.verdict is Verdict.REFUSED
    assert "allowHostUplink" in decided.why
    allowed = PfRule(vfs=2, mode=SWITCHDEV, allow_host_uplink=True)
    (decided,) = plan([uplink], [allowed], known(making(PfRule(vfs=2)))).values()
    assert decided.verdict is Verdict.MAKE


def test_a_record_from_before_there_were_modes_is_still_as_the_rule_says() -> None:
    rule = PfRule(vfs=2)
    (decided,) = plan([port(2, eswitch=LEGACY)], [rule], known(making(rule))).values()
    assert decided.verdict is Verdict.FINE
    assert '"mode"' not in making(rule).settings


def simulated(num: int = 0, **fields: Any) -> Any:
    return port(num, address=NsimName("netdevsim10"), facts=None, vfs={}, **fields)


@pytest.mark.parametrize(
    ("name", "free"),
    [("nsim-10-vf-0", False), ("nsim-10-port-2", False), ("nsim-1-vf-0", True), ("nsim-100-vf-0", True)],
)
def test_a_simulated_card_is_not_changed_under_who_holds_one_of_its_ports(name: str, free: bool) -> None:
    rule = PfRule(vfs=2)
    found = plan([simulated()], [rule], known(held={name: "is held by claim a/b"}))
    assert (found[NsimName("netdevsim10")].verdict is Verdict.MAKE) is free


def test_a_simulated_vf_has_no_driver_to_be_named() -> None:
    (decided,) = plan([simulated()], [PfRule(vfs=2, vf=VfDefaults(driver="igbvf"))], known()).values()
    assert "have no driver" in decided.why


def test_a_rule_about_a_vendor_is_not_about_a_simulated_card() -> None:
    rule = PfRule(vfs=2, match=PfSelector(vendors=("8086",)))
    (decided,) = plan([simulated()], [rule], known()).values()
    assert (decided.verdict, decided.maker) == (Verdict.NONE, Maker.NOBODY)


def test_a_kernel_without_devlink_has_no_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise Unsupported("look", 95)

    monkeypatch.setattr(switching, "Devlink", absent)
    assert switching.mode_of(PF) is None
    assert not switching.change(PF, LEGACY)
    with pytest.raises(Unsupported, match="its driver has none"):
        switching.change(PF, SWITCHDEV)
