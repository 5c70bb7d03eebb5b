"""`knd devices` of what is given out in shares: what there is, what claims have, and why there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from driver.cli import devices as cli_devices
from driver.cli import shared_devices
from driver.inventory import build
from driver.model import Device, DeviceName, Preparation, Share, ShareId
from driver.policy import DeviceSelector, NodePolicy
from driver.policy.shared import RequestRule, SharedRule
from driver.running import Running
from driver.sharing import Node
from driver.traffic import VlanRange
from hw.model import IfName
from hw.subinterface import Subinterface, SubinterfaceKind
from tests.unit.bandwidth_world import PF_NAME, port
from tests.unit.journal_values import preparation

RULE = SharedRule(
    match=DeviceSelector(interfaces=("ens1",)),
    kind=SubinterfaceKind.MACVLAN,
    request=RequestRule(minimum=100, maximum=4_000, step=100),
    shares=16,
)
VLANS = replace(
    RULE,
    kind=SubinterfaceKind.VLAN,
    vlans=(VlanRange(first=100, last=100), VlanRange(first=200, last=299)),
    request=RequestRule(),
)


def found(rule: SharedRule = RULE) -> dict[DeviceName, Device]:
    return dict(build(port(0), NodePolicy(shared=(rule,))).by_name)


def had(number: int, size: int | None = 500) -> Preparation:
    made = preparation(number)
    return replace(
        made,
        key=replace(made.key, device=PF_NAME, share_id=ShareId(f"share-{number}")),
        share=Share(interface=Subinterface(kind=SubinterfaceKind.VLAN, vlan=5), ifname=IfName("ens1")),
        size=size,
    )


def test_a_shared_device_is_shown_with_what_it_gives_out_and_what_of_it_claims_have() -> None:
    mine = shared_devices.shares_had([had(1, 700), preparation(2), had(0)])
    (row,) = shared_devices.rows(found(), mine)
    assert row == {
        "shared": PF_NAME,
        "subinterface": "macvlan bridge",
        "bandwidth": "25G",
        "given": "1200M",
        "shares": 16,
        "had": 2,
        "default": "1500M",
        "minimum": "100M",
        "maximum": "4G",
        "step": "100M",
        "vlans": None,
    }
    assert list(row) == shared_devices.COLUMNS
    assert [row["held_by"] for row in shared_devices.share_rows(mine)] == ["ml/nic-0", "ml/nic-1"]
    assert list(shared_devices.share_rows(mine)[0]) == shared_devices.SHARE_COLUMNS


def test_vlans_are_shown_as_the_policy_has_them_and_nothing_given_as_nothing() -> None:
    (row,) = shared_devices.rows(found(VLANS), {})
    shown = {key: row[key] for key in ("subinterface", "vlans", "given", "had", "step")}
    assert shown == {"subinterface": "vlan", "vlans": "100, 200-299", "given": "0", "had": 0, "step": None}


def test_a_device_says_how_much_it_gives_out_and_how_many_have_it() -> None:
    devices = found()
    node = Node(devices=devices, held={}, quarantined={})
    assert cli_devices._size(PF_NAME, node) == "25G"
    mine = shared_devices.shares_had([had(0), had(1)])
    assert cli_devices._holders(PF_NAME, node, mine) == "2 of 16 shares"
    gone = Node(devices={}, held={}, quarantined={})
    assert cli_devices._holders(PF_NAME, gone, mine) == "2 shares"


@pytest.mark.parametrize("has_shares", [True, False, None])
def test_a_device_that_the_server_cannot_have_shared_is_shown_with_that_reason(
    has_shares: bool | None,
) -> None:
    agent = Running(pid=1, node="n", hook="tcx", has_shares=has_shares)
    why = cli_devices._reasons(Node(devices=found(), held={}, quarantined={}), agent)
    assert ("DRAConsumableCapacity is off" in why[PF_NAME]) is (has_shares is False)
    assert bool(why[PF_NAME]) is (has_shares is False)
