"""A PF beside its VFs in slices: by shared counters where the API server has them, else no PF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from driver.model import CounterUse, OfferedDevice
from tests.conftest import WaitUntil
from tests.unit.kube_support import DRIVER, NODE, offered
from tests.unit.slices_world import Setting, offer_and_wait, slices_setting, start


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    with slices_setting(tmp_path) as made:
        yield made


def port_with_vfs(vfs: int, *, whole: str = "pf") -> list[OfferedDevice]:
    of = {"vfs": str(vfs)}
    parts = [
        replace(offered(f"vf-{index:03}"), uses=(CounterUse(set="port", takes={"vfs": "1"}, of=of),))
        for index in range(vfs)
    ]
    return [*parts, replace(offered(whole), uses=(CounterUse(set="port", takes=of, of=of, instead=True),))]


def test_a_pf_is_published_beside_its_vfs_and_the_scheduler_gives_one_or_the_others(
    setting: Setting, wait_until: WaitUntil
) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, port_with_vfs(70), wait_until)
    contents = [
        (len(each["spec"].get("devices", [])), len(each["spec"].get("sharedCounters", [])))
        for each in setting.published()
    ]
    assert contents == [(64, 0), (7, 0), (0, 1)]
    for name in ("whole", "part"):
        setting.api.add_claim("ns", name)

    def give(claim: str, device: str) -> None:
        setting.api.allocate("ns", claim, DRIVER, NODE, {"net": lambda found: found["name"] == device})

    give("part", "vf-003")
    with pytest.raises(LookupError):
        give("whole", "pf")
    setting.api.delete("resourceclaims", "part", "ns")
    setting.api.add_claim("ns", "part")
    give("whole", "pf")
    with pytest.raises(LookupError):
        give("part", "vf-003")


def test_nothing_is_written_again_when_counters_are_as_they_were(
    setting: Setting, wait_until: WaitUntil
) -> None:
    first = setting.agent()
    with start(first):
        offer_and_wait(first, port_with_vfs(3), wait_until)
    setting.api.clear_log()
    again = setting.agent()
    with start(again):
        offer_and_wait(again, port_with_vfs(3), wait_until)
    assert [each.query for each in setting.api.writes()] == [{"dryRun": "All"}] * 2


@pytest.mark.parametrize("fields", [{"sharedCounters", "consumesCounters"}, {"consumesCounters"}])
def test_where_the_server_has_no_counters_the_pf_is_withheld_and_never_published(
    setting: Setting, wait_until: WaitUntil, fields: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    setting.api.dropped_fields |= fields
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, port_with_vfs(3), wait_until)
    assert setting.names() == ["vf-000", "vf-001", "vf-002"]
    assert "PFs that have VFs are not offered" in caplog.text
    bodies = [each.body for each in setting.api.writes() if not each.query.get("dryRun")]
    assert all(device["name"] != "pf" for body in bodies for device in body["spec"]["devices"])


def test_a_server_that_loses_counters_costs_the_pf_and_nothing_else(
    setting: Setting, wait_until: WaitUntil
) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, port_with_vfs(3), wait_until)
        setting.api.dropped_fields |= {"sharedCounters", "consumesCounters"}
        agent.publisher.offer([*port_with_vfs(3), offered("another")])
        wait_until(
            lambda: agent.publisher.published and setting.names() == ["vf-000", "vf-001", "vf-002", "another"]
        )


def test_a_server_that_was_asked_in_vain_is_asked_again_when_its_list_is_read_anew(
    setting: Setting, wait_until: WaitUntil
) -> None:
    setting.api.dropped_fields |= {"sharedCounters", "consumesCounters"}
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, port_with_vfs(2), wait_until)
        assert "pf" not in setting.names()
        setting.api.dropped_fields.clear()
        setting.api.compact()
        wait_until(lambda: "pf" in setting.names())
