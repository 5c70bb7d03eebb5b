"""No two VFs of a node are given one GUID, and each VF gets the same one each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.errors import ConfigError, Refusal
from driver.journal.codec import decode, encode
from driver.lifecycle import devices as devices_module
from driver.lifecycle.devices import Devices
from driver.lifecycle.guids import choose
from driver.model import DeviceName, NicConfig, Preparation
from driver.policy import NodePolicy, load_policy
from driver.policy.infiniband import GuidRange, InfinibandRules
from driver.policy.rdma import RdmaRules
from driver.rdma import Infiniband
from hw.model import (
    DeviceKind,
    Guid,
    IfIndex,
    MacAddress,
    PciAddress,
    PciIdentity,
    RdmaFacts,
    RdmaName,
    VfSettings,
)
from hw.rdma.infiniband import guid_number
from hw.sysfs import Sysfs
from tests.unit.claims_world import A, B, C, World, device, play_claims
from tests.unit.igb_world import PF_LINK
from tests.unit.infiniband_world import GIVEN, address
from tests.unit.journal_values import preparation

HEADER = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"
START = Guid("0211:22ff:fe00:0000")
OWN = Guid("0211:22ff:fe99:0001")


def pool(last: int) -> GuidRange:
    return GuidRange(start=START, end=Guid(f"0211:22ff:fe00:{last:04x}"))


def identity(index: int) -> PciIdentity:
    return PciIdentity(PciAddress(f"0000:18:01.{index}"), PciAddress("0000:18:00.0"), index)


# --- choosing -----------------------------------------------------------------------------------------


def test_a_vf_gets_the_same_guid_each_time_and_no_two_share_one() -> None:
    taken: set[Guid] = set()
    for index in range(8):
        guid = choose(pool(7), identity(index), taken)
        assert guid_number(START) <= guid_number(guid) <= guid_number(START) + 7
        assert guid not in taken
        assert choose(pool(7), identity(index), set(taken)) == guid
        taken.add(guid)
    assert len(taken) == 8
    with pytest.raises(Refusal, match="all 8 GUIDs"):
        choose(pool(7), identity(8), taken)


def test_a_large_range_spreads_cards_apart_and_is_not_walked_through() -> None:
    whole = GuidRange(start=Guid("0200:0000:0000:0001"), end=Guid("02ff:ffff:ffff:ffff"))
    others = replace(identity(0), pf=PciAddress("0000:19:00.0"))
    assert choose(whole, identity(0), ()) != choose(whole, others, ())


# --- the policy ---------------------------------------------------------------------------------------


def test_the_section_is_read_in_either_spelling() -> None:
    body = "rdma: {infiniband: {guids: {start: '02:11:22:FF:FE:00:00:00', end: 0211:22ff:fe00:00ff}}}\n"
    rules = load_policy(HEADER + body, "policy.yaml").rdma.infiniband
    assert rules == InfinibandRules(guids=pool(0xFF), active_seconds=20)
    assert rules.guids.size == 256


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{guids: {start: 0211:22ff:fe00:0001, end: 0211:22ff:fe00:0000}}", "is above end"),
        ("{guids: {start: 0311:22ff:fe00:0001, end: 0311:22ff:fe00:0002}}", "is a group address"),
        ("{guids: {start: 0211:22ff:fe00:0001, end: 0411:22ff:fe00:0001}}", "differ in their first byte"),
        ("{guids: {start: '0000:0000:0000:0000', end: 0011:22ff:fe00:0001}}", "stands for no GUID"),
        ("{guids: {start: 0211:22ff:fe00, end: 0211:22ff:fe00:0001}}", "is not a GUID"),
        ("{guids: {start: 0211:22ff:fe00:0001}}", "end"),
        ("{activeSeconds: 5}", "guids"),
        ("{activeSeconds: 36, guids: {start: 0211:22ff:fe00:0001, end: 0211:22ff:fe00:0002}}", "0 to 35"),
    ],
)
def test_a_range_that_is_none_is_refused_with_its_line(section: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_policy(HEADER + f"rdma:\n  infiniband: {section}\n", "policy.yaml")
    assert said in str(caught.value)
    assert "policy.yaml:4" in str(caught.value)


# --- a claim ------------------------------------------------------------------------------------------


def vf(world: World, name: DeviceName, index: int, **fields: Any) -> None:
    made = device(
        name,
        20 + index,
        kind=DeviceKind.VF,
        identity=identity(index),
        driver="mlx5_core",
        vf=VfSettings(),
        rdma=RdmaFacts(name=RdmaName(f"mlx5_{index}"), link_layer="InfiniBand", node_guid=str(OWN)),
    )
    world.node.present[name] = replace(made, **fields)


def rules(last: int) -> NodePolicy:
    return NodePolicy(rdma=RdmaRules(infiniband=InfinibandRules(guids=pool(last))))


def given(world: World) -> dict[DeviceName, Guid]:
    return {p.key.device: p.infiniband.guid for p in world.book.preparations() if p.infiniband is not None}


def test_vfs_of_one_claim_and_of_several_have_guids_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        world.policy = rules(3)
        for index, name in enumerate((A, B, C)):
            vf(world, name, index)
        both, one = world.claim("both", A, B), world.claim("one", C)
        assert await world.prepare(both) == [A, B]
        assert await world.prepare(one) == [C]
        assert len(set(given(world).values())) == 3
        assert await world.unprepare(one) == ""
        assert C not in given(world)

    play_claims(tmp_path, monkeypatch, story)


def test_a_claim_for_which_no_guid_is_left_is_refused_and_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        world.policy = rules(1)
        world.node.guids = frozenset({Guid("0211:22ff:fe00:0001")})
        vf(world, A, 0)
        vf(world, B, 1)
        assert await world.prepare(world.claim("first", A)) == [A]
        assert given(world) == {A: START}
        assert "all 2 GUIDs" in await world.prepare(world.claim("second", B))
        assert set(world.states()) == {A}

    play_claims(tmp_path, monkeypatch, story)


def test_only_vfs_on_infiniband_are_given_guids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        world.policy = rules(7)
        roce = RdmaFacts(name=RdmaName("mlx5_0"), link_layer="Ethernet")
        vf(world, A, 0, rdma=roce)
        vf(world, B, 1, vf=None)
        vf(world, C, 2, kind=DeviceKind.PF)
        for name in (A, B, C):
            assert await world.prepare(world.claim(f"claim-{name}", name)) == [name]
        assert given(world) == {}

    play_claims(tmp_path, monkeypatch, story)


def test_what_a_vf_came_up_with_is_what_it_goes_back_to_where_its_pf_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        world.policy = rules(7)
        vf(world, A, 0, settings=replace(preparation(0).baseline, mac=address(7, OWN)))
        vf(world, B, 1, vf=VfSettings(node_guid=GIVEN, port_guid=GIVEN))
        await world.prepare(world.claim("both", A, B))
        baselines = {p.key.device: p.vf_baseline for p in world.book.preparations()}
        assert baselines == {
            A: VfSettings(node_guid=OWN, port_guid=OWN),
            B: VfSettings(node_guid=GIVEN, port_guid=GIVEN),
        }

    play_claims(tmp_path, monkeypatch, story)


def test_a_record_keeps_what_was_given_and_one_of_an_earlier_release_has_nothing() -> None:
    made = replace(preparation(0), infiniband=Infiniband(guid=GIVEN, active_seconds=20), config=NicConfig())
    assert decode(Preparation, encode(made)) == made
    assert preparation(0).infiniband is None


# --- what others have ---------------------------------------------------------------------------------


def test_guids_of_other_vfs_and_of_rdma_devices_are_taken_and_its_own_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pf = replace(PF_LINK, link_type=32, parent_device=PciAddress("0000:18:00.0"))
    other = replace(pf, ifindex=IfIndex(9), parent_device=PciAddress("0000:19:00.0"))
    ethernet = replace(pf, ifindex=IfIndex(11), link_type=1, mac=MacAddress("02:00:00:00:00:01"))

    def guid(number: int) -> Guid:
        return Guid(f"0211:22ff:fe00:{number:04x}")

    told = {
        pf.ifindex: {0: VfSettings(node_guid=guid(1)), 1: VfSettings(node_guid=guid(2), port_guid=guid(3))},
        other.ifindex: {0: VfSettings(port_guid=guid(4)), 1: VfSettings()},
    }
    links = SimpleNamespace(dump=lambda: (pf, other, ethernet), all_vf_settings=told.__getitem__)
    known = [("mlx5_0", guid(1)), ("mlx5_7", guid(5)), ("rxe0", None)]
    rdma = SimpleNamespace(devices=lambda: [SimpleNamespace(name=n, node_guid=g) for n, g in known])

    @contextmanager
    def opened(value: object) -> Iterator[object]:
        yield value

    monkeypatch.setattr(devices_module, "LinkSocket", lambda netns: opened(links))
    monkeypatch.setattr(devices_module, "rdma_if_any", lambda: opened(rdma))
    facts = RdmaFacts(name=RdmaName("mlx5_0"), link_layer="InfiniBand")
    mine = device(A, 20, kind=DeviceKind.VF, identity=identity(0), rdma=facts)
    found = Devices(Sysfs(tmp_path), NodePolicy).guids_of_others(mine)
    assert found == {guid(2), guid(3), guid(4), guid(5)}
