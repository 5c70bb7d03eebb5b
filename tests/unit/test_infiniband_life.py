"""A VF on InfiniBand has the GUID it was given before its driver begins and before its port is up, and gives
it up whole, whatever happened in between."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from bpf.layout import Hook
from driver import plan
from driver.clock import SystemClock
from driver.errors import DriverError, NotNow, Refusal
from driver.execute import infiniband, vf
from driver.execute.engine import Token
from driver.execute.infiniband import index_of_partition
from driver.execute.target import NotClean
from driver.model import NicConfig, Preparation, VfConfig, VfDriver
from driver.plan import Act
from driver.rdma import Infiniband, RdmaConfig
from hw.errors import Refused, Unsupported
from hw.model import Guid, VfLinkState
from hw.rdma import infiniband as hw_infiniband
from tests.unit.igb_world import VF_LINK
from tests.unit.infiniband_world import DOWN, GIVEN, HCA, Mlx5, prepared, target
from tests.unit.journal_values import preparation
from tests.unit.test_vf_acts import engine

ADMINS = Guid("0211:22ff:fe99:0001")
HELD = replace(DOWN, node_guid=ADMINS, port_guid=ADMINS, link_state=VfLinkState.AUTO)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vf, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(infiniband, "DEVICE_SECONDS", 0.1)
    monkeypatch.setattr(hw_infiniband, "_PAUSE", 0.01)
    monkeypatch.setattr("driver.execute.rdma.HOME_SECONDS", 0.1)
    monkeypatch.setattr("driver.execute.actions.foreign_programs", lambda ifindex, own: ())
    monkeypatch.setattr("driver.execute.actions.detach_foreign", lambda ifindex, own: None)


@pytest.fixture(params=[True, False], ids=["told", "untold"])
def card(request: pytest.FixtureRequest, tmp_path: Path, quick: None) -> Mlx5:
    """Of a PF that tells GUIDs, and of one that does not."""
    return Mlx5(tmp_path / "sys", told=request.param)


def prepare(card: Mlx5, made: Preparation) -> None:
    engine(card).run(plan.prepare(made, Hook.TCX), target(card, made), Token(SystemClock()))


def home(card: Mlx5, made: Preparation) -> list[str]:
    """As the claims do it where no pod can have had it: without a reset for that."""
    way = plan.unprepare(made, reset=False)
    return [str(problem.error) for problem in engine(card).bring_home(way, target(card, made))]


def test_the_guid_is_told_before_the_driver_begins_and_the_link_after_it(card: Mlx5) -> None:
    prepare(card, prepared(card))
    assert card.sent == [("node_guid", GIVEN), ("port_guid", GIVEN), ("link_state", VfLinkState.AUTO)]
    assert (card.probes, card.live) == (1, GIVEN)


def test_netdev_and_rdma_device_have_their_names_again(card: Mlx5) -> None:
    prepare(card, prepared(card))
    assert card.vf is not None
    assert card.vf.name == VF_LINK.name
    assert card.kernel.named(HCA).guid == GIVEN


def test_a_vf_that_has_its_guid_is_left_with_its_driver(card: Mlx5) -> None:
    made = prepared(card)
    prepare(card, made)
    assert tuple(engine(card).bring_home(plan.tidy(made), target(card, made))) == ()
    assert card.probes == 1


def test_everything_is_given_up_again_though_nobody_asked_for_a_reset(card: Mlx5) -> None:
    before = card.held
    made = prepared(card)
    prepare(card, made)
    assert home(card, made) == []
    assert card.held == before
    assert card.live is None
    assert home(card, made) == []


def test_what_an_admin_had_given_it_is_put_back(tmp_path: Path, quick: None) -> None:
    card = Mlx5(tmp_path / "sys", held=HELD)
    made = prepared(card)
    prepare(card, made)
    assert card.live == GIVEN
    assert home(card, made) == []
    assert (card.held, card.live) == (HELD, ADMINS)


@pytest.mark.parametrize("last", range(5))
def test_a_crash_anywhere_on_the_way_is_undone_whole(tmp_path: Path, quick: None, last: int) -> None:
    """Cut off after so many acts, and in the middle of the PF's settings."""
    for cut_in in (None, "port_guid", "link_state"):
        card = Mlx5(tmp_path / f"sys-{cut_in}", held=HELD)
        made = prepared(card)
        steps = plan.prepare(made, Hook.TCX).steps[:last]
        if cut_in is not None:
            card.refused[cut_in] = Refused("set", errno.EINVAL)
        acts = engine(card)._acts
        for step in steps:
            try:
                acts[step.act](target(card, made))
            except DriverError:
                break
        card.refused.clear()
        assert home(card, made) == []
        assert (card.held, card.live) == (HELD, ADMINS)


def test_a_refused_guid_names_the_policy_and_the_driver_and_leaves_nothing(card: Mlx5) -> None:
    card.refused["port_guid"] = Unsupported("set port_guid", errno.EOPNOTSUPP)
    before, made = card.held, prepared(card)
    with pytest.raises(Refusal, match=rf"{GIVEN} of the node policy \(rdma.infiniband\): igb, which drives"):
        prepare(card, made)
    card.refused.clear()
    assert home(card, made) == []
    assert card.held == before


def test_a_driver_that_takes_up_no_guid_is_found_out(card: Mlx5) -> None:
    card.takes_guids = False
    with pytest.raises(NotClean, match=f"node GUID is none, should be {GIVEN}, as its PF was told"):
        prepare(card, prepared(card))


@pytest.mark.parametrize("wait", [0, 1])
def test_a_port_without_a_subnet_manager_fails_the_claim_unless_the_policy_waits_for_none(
    card: Mlx5, monkeypatch: pytest.MonkeyPatch, wait: int
) -> None:
    card.managed = False
    made = prepared(card, wait=wait)
    if wait == 0:
        prepare(card, made)
        return
    with pytest.raises(NotNow, match=r"is INIT after 1 s: .*subnet manager.*activeSeconds"):
        prepare(card, made)


# --- partitions ---------------------------------------------------------------------------------------


def in_partition(card: Mlx5, **fields: object) -> Preparation:
    return prepared(card, config=NicConfig(rdma=RdmaConfig(partition=0x0001)), **fields)


def test_a_partition_is_looked_for_once_the_port_is_active(tmp_path: Path, quick: None) -> None:
    card = Mlx5(tmp_path / "sys")
    acts = [step.act for step in plan.prepare(in_partition(card), Hook.TCX).steps]
    assert acts.index(Act.PORT_ACTIVE) + 1 == acts.index(Act.PARTITION)
    card.pkeys("0xffff", "0x0001", "0x0000", "0x8001")
    prepare(card, in_partition(card))
    assert index_of_partition(target(card, in_partition(card)), card, HCA, 1) == 3
    assert index_of_partition(target(card, prepared(card)), card, HCA, 1) is None


@pytest.mark.parametrize(
    ("table", "told"), [(("0xffff", "0x0001"), "are 0xffff, 0x0001"), (("0x0000",), "are none")]
)
def test_a_partition_of_which_the_port_is_no_full_member_is_refused_and_nothing_stays(
    tmp_path: Path, quick: None, table: tuple[str, ...], told: str
) -> None:
    card = Mlx5(tmp_path / "sys")
    card.pkeys(*table)
    before, made = card.held, in_partition(card)
    with pytest.raises(Refusal, match=rf"no full member of partition 0x0001 \(rdma.partition\).* {told}"):
        prepare(card, made)
    assert home(card, made) == []
    assert (card.held, card.live) == (before, None)


def test_a_claim_that_wants_the_link_down_keeps_it_down(tmp_path: Path, quick: None) -> None:
    card = Mlx5(tmp_path / "sys")
    config = NicConfig(vf=VfConfig(link_state=VfLinkState.DISABLE))
    with pytest.raises(NotNow, match="is DOWN after 1 s"):
        prepare(card, prepared(card, config=config))
    assert card.held.link_state is VfLinkState.DISABLE


def test_the_address_of_ipoib_is_compared_with_nothing(card: Mlx5) -> None:
    """A queue pair's number is in it."""
    made = prepared(card)
    prepare(card, made)
    assert home(card, made) == []
    assert card.vf is not None
    assert card.vf.mac != made.baseline.mac


def test_without_a_guid_of_ours_nothing_of_it_is_touched(card: Mlx5) -> None:
    made = prepared(card, infiniband=None)
    prepare(card, made)
    assert home(card, made) == []
    assert (card.sent, card.probes) == ([], 0)


def test_a_vf_that_is_given_by_its_files_has_its_guid_and_is_not_waited_for() -> None:
    """Whoever drives it then asks for it."""
    by_file = NicConfig(vf=VfConfig(driver=VfDriver.VFIO))
    wish = Infiniband(guid=GIVEN, active_seconds=1)
    made = replace(preparation(0), config=by_file, vf_baseline=DOWN, infiniband=wish)
    acts = [step.act for step in plan.prepare(made, Hook.TCX).steps]
    assert acts == [Act.TIDY, Act.SET_VF, Act.TO_VFIO]
