"""The policy's section about RDMA is strict, and without it a node stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from driver import inventory
from driver.cli.devices import _reasons
from driver.errors import ConfigError
from driver.policy import NodePolicy, load_policy
from driver.rdma import RdmaMode, SoftRdma
from driver.sharing import Node
from hw.model import (
    DeviceKind,
    HwDevice,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    PciAddress,
    PciIdentity,
    RdmaFacts,
    RdmaName,
)

HEADER = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"


def load(body: str) -> NodePolicy:
    return load_policy(HEADER + body, "policy.yaml")


def test_without_the_section_nothing_is_changed_made_or_loaded() -> None:
    for body in ("reset: none\n", "rdma: {}\n", "rdma: {mode: asIs, software: none}\n"):
        rules = load(body).rdma
        assert (rules.mode.mode, rules.software.kind, rules.load_modules) == (None, None, False)


def test_a_whole_section_is_read() -> None:
    rules = load("rdma: {mode: exclusive, software: rxe, loadModules: true}\n").rdma
    assert (rules.mode.mode, rules.software.kind, rules.load_modules) == (
        RdmaMode.EXCLUSIVE,
        SoftRdma.RXE,
        True,
    )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{mode: private}", "must be one of shared, exclusive, asIs"),
        ("{software: roce}", "must be one of rxe, siw, none"),
        ("{loadModules: rdma_rxe}", "must be true or false"),
        ("{load_modules: true}", "did you mean loadModules"),
    ],
)
def test_a_wrong_section_is_refused_with_its_line(section: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"rdma: {section}\n")
    assert said in str(caught.value)
    assert "policy.yaml:3" in str(caught.value)


# --- RDMA in software, and an admin's own -------------------------------------------------------------

LINK = LinkInfo(
    ifindex=IfIndex(7), name=IfName("ens1f0"), flags=LinkFlags(0), link_type=1, mtu=1500, mac=None
)
PLAIN = HwDevice(kind=DeviceKind.PF, identity=PciIdentity(PciAddress("0000:3b:00.0")), link=LINK)
ADMINS = RdmaFacts(name=RdmaName("rxe0"), link_layer="Ethernet", software=True)


def why_not(device: HwDevice, policy: NodePolicy) -> str:
    """As `knd devices` says it."""
    found = inventory.build([device], policy).by_name
    (reason,) = _reasons(Node(devices=found, held={}, quarantined={}), None).values()
    return reason


@pytest.mark.parametrize("software", ["rxe", "siw"])
def test_a_device_on_which_an_admin_made_software_rdma_is_offered_once_that_is_gone(software: str) -> None:
    policy, taken = load(f"rdma: {{software: {software}}}\n"), replace(PLAIN, rdma=ADMINS)
    reason = why_not(taken, policy)
    assert "'rxe0' is on it already" in reason
    assert f"rdma.software: {software}" in reason
    assert why_not(PLAIN, policy) == ""
    # Which is news, so that the slice is written anew.
    assert inventory.diff(inventory.build([taken], policy), inventory.build([PLAIN], policy)).changed


def test_an_admins_software_rdma_is_in_nobodys_way_where_none_would_be_made() -> None:
    assert why_not(replace(PLAIN, rdma=ADMINS), load("rdma: {software: none}\n")) == ""
    hardware = replace(ADMINS, name=RdmaName("mlx5_0"), software=False)
    assert why_not(replace(PLAIN, rdma=hardware), load("rdma: {software: rxe}\n")) == ""


def test_a_device_that_the_policy_keeps_anyway_says_that() -> None:
    policy = load("rdma: {software: rxe}\ndevices: [{offer: false}]\n")
    assert "offer: false" in why_not(replace(PLAIN, rdma=ADMINS), policy)
