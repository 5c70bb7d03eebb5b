"""The policy's section about making VFs is strict, and its first matching rule is the one in force."""

from __future__ import annotations

from typing import Any

import pytest

from driver.errors import ConfigError
from driver.policy import NodePolicy, load_policy
from driver.policy.sriov import LinkType, MacChoice, PfSelector
from hw.model import EswitchMode

HEADER = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"


def load(body: str) -> NodePolicy:
    return load_policy(HEADER + body, "policy.yaml")


def test_a_whole_rule_is_read() -> None:
    (rule,) = load(
        """
sriov:
  - match: {pfNames: ["ens*"], addresses: ["0000:21:*"], vendors: [8086], products: ["10c9"],
            linkTypes: [ethernet], numaNodes: [0, 1]}
    vfs: 4
    mtu: 9000
    mode: switchdev
    allowHostUplink: true
    vf: {trust: true, spoofCheck: false, vlan: 100, mac: keep, driver: igbvf}
""".replace("vendors: [8086]", 'vendors: ["8086"]')
    ).sriov
    assert (rule.vfs, rule.mtu, rule.allow_host_uplink, rule.external) == (4, 9000, True, False)
    assert (rule.vf.trust, rule.vf.spoof_check, rule.vf.vlan, rule.vf.driver) == (True, False, 100, "igbvf")
    assert rule.vf.mac is MacChoice.KEEP
    assert rule.mode is EswitchMode.SWITCHDEV
    assert rule.match is not None
    assert rule.match.link_types == (LinkType.ETHERNET,)


def test_without_the_section_no_vfs_are_made_and_addresses_are_generated_by_default() -> None:
    assert load("reset: none\n").sriov == ()
    assert load("sriov: [{vfs: 2}]\n").sriov[0].vf.mac is MacChoice.GENERATED


@pytest.mark.parametrize(
    ("entry", "line", "said"),
    [
        ("{match: {pfNames: [a]}}", 4, "needs vfs"),
        ("{vfs: -1}", 4, "must be 0 to 4096"),
        ("{vfs: 5000}", 4, "must be 0 to 4096"),
        ("{vfs: 1, mode: bridge}", 4, "must be one of legacy, switchdev"),
        ("{vfs: 0, mode: switchdev}", 4, "gives mode and no VFs"),
        ("{vfs: 1, external: true, mode: switchdev}", 4, "is external, so nothing is set"),
        ("{vfs: 1, match: {}}", 4, "needs a criterion"),
        ("{vfs: 1, match: {address: [a]}}", 4, "did you mean addresses"),
        ("{vfs: 1, match: {linkTypes: [fibre]}}", 4, "must be one of ethernet, infiniband"),
        ("{vfs: 1, external: true, mtu: 9000}", 4, "is external, so nothing is set"),
        ("{vfs: 1, external: true, vf: {trust: true}}", 4, "is external, so nothing is set"),
        ("{vfs: 1, vf: {vlan: 4095}}", 4, "must be 0 to 4094"),
        ("{vfs: 1, vf: {mac: random}}", 4, "must be one of keep, generated"),
        ("{vfs: 1, vf: {driver: vfio-pci}}", 4, "let claims ask for vf.driver"),
        ("{vfs: 1, vf: {driver: ../x}}", 4, "is not a driver's name"),
        ("{vfs: 1, mtu: 60}", 4, "must be 68 to 65535"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(entry: str, line: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"sriov:\n  - {entry}\n")
    (problem,) = caught.value.problems
    assert said in str(problem)
    assert problem.path.startswith(f"policy.yaml:{line}: sriov[0]")


PF: dict[str, Any] = {
    "name": "ens1f0",
    "address": "0000:21:00.0",
    "vendor": "8086",
    "product": "10c9",
    "link_type": LinkType.ETHERNET,
    "numa_node": 0,
}


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        (PfSelector(pf_names=("ens*",)), True),
        (PfSelector(pf_names=("eno*", "ens1f0")), True),
        (PfSelector(pf_names=("eno*",)), False),
        (PfSelector(addresses=("0000:21:00.?",)), True),
        (PfSelector(addresses=("0000:22:*",)), False),
        (PfSelector(vendors=("8086",), products=("10c9",)), True),
        (PfSelector(vendors=("8086",), products=("1572",)), False),
        (PfSelector(link_types=(LinkType.INFINIBAND,)), False),
        (PfSelector(numa_nodes=(0, 1)), True),
        (PfSelector(numa_nodes=(1,)), False),
    ],
)
def test_every_criterion_must_fit(selector: PfSelector, fits: bool) -> None:
    assert selector.selects(**PF) is fits


def test_a_pf_without_a_netdev_or_numa_node_fits_no_rule_about_those() -> None:
    bare = {**PF, "name": None, "link_type": None, "numa_node": None}
    for selector in (
        PfSelector(pf_names=("*",)),
        PfSelector(link_types=(LinkType.ETHERNET,)),
        PfSelector(numa_nodes=(0,)),
    ):
        assert not selector.selects(**bare)
    assert PfSelector(vendors=("8086",)).selects(**bare)
