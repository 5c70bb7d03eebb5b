"""The cluster's slices say what this node offers: written when they do not, and only then."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from driver.kube.client import Resource
from driver.kube.slices import Pace
from driver.model import Taint
from kndsim.api import SimApi
from tests.conftest import WaitUntil
from tests.unit.kube_support import (
    DRIVER,
    NODE,
    client_of,
    offered,
    offered_many,
    rate,
)
from tests.unit.slices_world import Setting, offer_and_wait, slices_setting, start

SLICES = "resourceslices"
TAINT = Taint(key="knd.internal/link-down")


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    with slices_setting(tmp_path) as made:
        yield made


def test_the_first_publication_has_owner_prefix_and_generation_one(
    setting: Setting, wait_until: WaitUntil
) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(2), wait_until)
    (slice_,) = setting.published()
    assert slice_["metadata"]["name"].startswith(f"00000-{DRIVER}-{NODE}-")
    assert slice_["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Node", "name": NODE, "uid": setting.node_uid, "controller": True}
    ]
    assert slice_["spec"]["pool"] == {"name": NODE, "generation": 1, "resourceSliceCount": 1}
    assert slice_["spec"]["nodeName"] == NODE


def test_300_devices_are_published_in_legal_slices(setting: Setting, wait_until: WaitUntil) -> None:
    agent = setting.agent()
    devices = offered_many(300)
    with start(agent):
        offer_and_wait(agent, devices, wait_until)
        assert setting.names() == [device.name for device in devices]
        assert [len(each["spec"]["devices"]) for each in setting.published()] == [128, 128, 44]
        offer_and_wait(agent, [*devices[:299], offered("vf-299", taints=[TAINT])], wait_until)
        assert [len(each["spec"]["devices"]) for each in setting.published()] == [64, 64, 64, 64, 44]
    assert len({each["spec"]["pool"]["generation"] for each in setting.published()}) == 1


def test_a_device_with_a_200_byte_product_name_does_not_cost_the_others(
    setting: Setting, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    agent = setting.agent()
    devices = [*offered_many(5), offered("long", {"product": "x" * 200}), offered("Bad_Name")]
    with start(agent), caplog.at_level(logging.WARNING):
        offer_and_wait(agent, devices, wait_until)
        offer_and_wait(agent, [*devices, offered("one-more")], wait_until)
    assert len(setting.names()) == 7
    assert setting.published()[0]["spec"]["devices"][5]["attributes"]["product"] == {"string": "x" * 64}
    assert len(agent.publisher.problems) == 2
    assert len([record for record in caplog.records if "Bad_Name" in record.getMessage()]) == 1


def test_nothing_is_written_before_the_first_offer_nor_at_stop(
    setting: Setting, wait_until: WaitUntil
) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(3), wait_until)
    before = setting.published()
    setting.api.clear_log()
    restarted = setting.agent()
    with start(restarted):
        wait_until(lambda: setting.api.requests("watch"))
        assert not restarted.publisher.published
    assert setting.published() == before
    assert setting.api.writes() == []


def test_a_restart_with_the_same_devices_writes_nothing(setting: Setting, wait_until: WaitUntil) -> None:
    devices = offered_many(100, taints=[TAINT], capacities={"bandwidth": "1000M"})
    for _ in range(2):
        setting.api.clear_log()
        agent = setting.agent()
        with start(agent):
            offer_and_wait(agent, devices, wait_until)
    assert [request.verb for request in setting.api.requests()] in (["list"], ["list", "watch"])


def test_no_devices_are_published_as_one_empty_slice(setting: Setting, wait_until: WaitUntil) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(3), wait_until)
        offer_and_wait(agent, [], wait_until)
    assert [each["spec"].get("devices", []) for each in setting.published()] == [[]]


def test_one_changed_device_is_one_write(setting: Setting, wait_until: WaitUntil) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(300), wait_until)
        setting.api.clear_log()
        changed = [*offered_many(299), offered("vf-299", {"kind": "pf"})]
        offer_and_wait(agent, changed, wait_until)
        assert [request.verb for request in setting.api.writes()] == ["update"]
        assert setting.generations() == {1}
        offer_and_wait(agent, list(changed), wait_until)
        assert len(setting.api.writes()) == 1


def test_a_quick_series_of_offers_ends_in_the_last(setting: Setting, wait_until: WaitUntil) -> None:
    agent = setting.agent(Pace(heal=(0.01, 0.05), between_offers=0.2))
    with start(agent):
        for count in range(100):
            agent.publisher.offer(offered_many(count))
        wait_until(lambda: agent.publisher.published)
    assert len(setting.names()) == 99
    assert len(setting.api.writes()) <= 3


def test_deletes_and_edits_by_others_are_healed(setting: Setting, wait_until: WaitUntil) -> None:
    agent = setting.agent()
    names = [f"vf-{index}" for index in range(200)]
    with start(agent):
        offer_and_wait(agent, offered_many(200), wait_until)
        setting.api.delete(SLICES, setting.published()[1]["metadata"]["name"])
        wait_until(lambda: setting.names() == names and setting.generations() == {2})

        def spoil(slice_: Any) -> Any:
            return {**slice_, "spec": {**slice_["spec"], "devices": []}}

        setting.api.edit(SLICES, setting.published()[0]["metadata"]["name"], spoil)
        wait_until(lambda: setting.names() == names)
        wait_until(lambda: agent.publisher.published)


def test_kubelets_wipe_is_followed_by_one_publication_with_a_delay(
    setting: Setting, wait_until: WaitUntil
) -> None:
    agent = setting.agent(Pace(heal=(0.3, 0.5), between_offers=0.0))
    with start(agent):
        offer_and_wait(agent, offered_many(300), wait_until)
        wait_until(lambda: setting.api.requests("watch", SLICES))
        setting.api.clear_log()
        for each in setting.published():
            setting.api.delete(SLICES, each["metadata"]["name"])
        wiped = time.monotonic()
        wait_until(lambda: len(setting.names()) == 300)
        assert [request.verb for request in setting.api.writes()] == ["create"] * 3
        assert setting.api.writes()[0].at - wiped >= 0.29


def test_slices_collected_with_their_node_come_back_under_its_successor(
    setting: Setting, wait_until: WaitUntil
) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(2), wait_until)
        setting.api.delete("nodes", NODE)
        successor = setting.api.add_node(NODE)
        setting.api.delete(SLICES, setting.published()[0]["metadata"]["name"])
        wait_until(setting.published)
        assert setting.published()[0]["metadata"]["ownerReferences"][0]["uid"] == successor


def test_somebody_who_keeps_editing_is_answered_ever_more_slowly(
    setting: Setting, wait_until: WaitUntil
) -> None:
    agent = setting.agent(Pace(heal=(0.02, 0.03), heal_doublings=3, between_offers=0.0))
    with start(agent):
        offer_and_wait(agent, offered_many(1), wait_until)
        setting.api.clear_log()
        for _ in range(8):
            name = setting.published()[0]["metadata"]["name"]
            setting.api.edit(SLICES, name, lambda old: {**old, "spec": {**old["spec"], "devices": []}})
            wait_until(lambda: setting.names() == ["vf-0"])
        times = [request.at for request in setting.api.writes()]
    assert times[7] - times[6] >= 0.15
    assert times[1] - times[0] < 0.15


def test_a_conflict_is_answered_by_reading_again(setting: Setting, wait_until: WaitUntil) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(1), wait_until)
        wait_until(lambda: setting.api.requests("watch"))
        setting.api.hang_watches()  # the agent does not hear of the edit
        name = setting.published()[0]["metadata"]["name"]
        setting.api.edit(SLICES, name, lambda old: {**old, "spec": {**old["spec"], "devices": []}})
        offer_and_wait(agent, offered_many(2), wait_until)
    assert setting.names() == ["vf-0", "vf-1"]


@pytest.mark.parametrize("verb", ["update", "delete", "create"])
def test_a_slice_that_vanishes_under_a_write_is_made_again(
    setting: Setting, wait_until: WaitUntil, verb: str
) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(200), wait_until)
        wait_until(lambda: setting.api.requests("watch"))
        setting.api.hang_watches()
        for each in setting.published():
            setting.api.delete(SLICES, each["metadata"]["name"])
        count = {"update": 201, "delete": 1, "create": 400}[verb]
        offer_and_wait(agent, offered_many(count), wait_until)
        wait_until(lambda: len(setting.names()) == count)


def test_leftovers_of_an_older_agent_are_removed(setting: Setting, wait_until: WaitUntil) -> None:
    for pool, name in (("old-pool", "leftover"), (NODE, "random")):
        body = {
            "metadata": {"name": name},
            "spec": {
                "driver": DRIVER,
                "nodeName": NODE,
                "pool": {"name": pool, "generation": 4, "resourceSliceCount": 1},
                "devices": [{"name": "stale"}],
            },
        }
        setting.client.create(Resource.RESOURCE_SLICES, body)
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(1), wait_until)
    assert setting.names() == ["vf-0"]
    assert setting.generations() == {5}


def test_other_nodes_and_drivers_slices_are_left_alone(setting: Setting, wait_until: WaitUntil) -> None:
    for driver, node in ((DRIVER, "node-b"), ("gpu.example.com", NODE)):
        pool = {"name": node, "generation": 1, "resourceSliceCount": 1}
        spec = {"driver": driver, "nodeName": node, "pool": pool, "devices": []}
        setting.client.create(Resource.RESOURCE_SLICES, {"metadata": {"name": f"x-{driver}"}, "spec": spec})
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(1), wait_until)
    assert setting.api.slices(DRIVER, "node-b")
    assert setting.api.slices("gpu.example.com", NODE)
    assert setting.api.requests("delete") == []


def test_fields_the_server_drops_are_reported_once_and_not_fought_over(
    tmp_path: Path, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    with SimApi(dropped_fields=["taints"]) as api, client_of(api, tmp_path) as client:
        setting = Setting(api, client, api.add_node(NODE))
        agent = setting.agent()
        with start(agent), caplog.at_level(logging.ERROR):
            offer_and_wait(agent, offered_many(100, taints=[TAINT]), wait_until)
            assert len(api.writes()) == 2
            changed = [*offered_many(99, taints=[TAINT]), offered("new", taints=[TAINT])]
            offer_and_wait(agent, changed, wait_until)
            assert len(api.writes()) == 3
            name = setting.published()[0]["metadata"]["name"]
            api.edit(SLICES, name, lambda old: {**old, "spec": {**old["spec"], "devices": []}})
            wait_until(lambda: len(setting.names()) == 100)
            wait_until(lambda: agent.publisher.published)
        assert agent.publisher.dropped == ("taints",)
        assert len([record for record in caplog.records if "drops taints" in record.getMessage()]) == 1


def test_what_the_server_adds_or_writes_otherwise_is_no_difference(
    setting: Setting, wait_until: WaitUntil
) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, [offered("a", capacities={"bandwidth": "1000M"}, taints=[TAINT])], wait_until)
        (device,) = setting.published()[0]["spec"]["devices"]
        assert device["capacity"] == {"bandwidth": {"value": "1G"}}
        assert "timeAdded" in device["taints"][0]
        offer_and_wait(agent, [offered("a", capacities={"bandwidth": "1G"}, taints=[TAINT])], wait_until)
    assert len(setting.api.writes()) == 1
    assert agent.publisher.dropped == ()


def test_a_device_the_server_refuses_for_its_own_reasons_costs_only_itself(
    setting: Setting, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    setting.api.fail(
        422, times=1, verb="create", message="no vf-1 today", causes=(("spec.devices[1].name", "no"),)
    )
    agent = setting.agent()
    with start(agent), caplog.at_level(logging.ERROR):
        offer_and_wait(agent, offered_many(3), wait_until)
        assert setting.names() == ["vf-0", "vf-2"]
        assert "no vf-1 today" in caplog.text
        changed = [offered("vf-0"), offered("vf-1", {"kind": "pf"}), offered("vf-2")]
        offer_and_wait(agent, changed, wait_until)
        assert setting.names() == ["vf-0", "vf-1", "vf-2"], "what has changed is tried again"


@pytest.mark.parametrize(("code", "least"), [(422, 0.1), (403, 0.1), (500, 0.01)])
def test_a_server_that_refuses_all_is_asked_at_a_bounded_rate_until_it_takes_them(
    setting: Setting, wait_until: WaitUntil, code: int, least: float
) -> None:
    setting.api.fail(code, times=6, verb="create", message="not now")
    agent = setting.agent()
    with start(agent):
        agent.publisher.offer(offered_many(1))
        wait_until(lambda: "not now" in agent.publisher.worker.error)
        assert not agent.publisher.published
        wait_until(lambda: agent.publisher.published)
    times = [request.at for request in setting.api.requests("create")]
    assert len(times) == 7
    assert rate(times) < 1 / least
    assert agent.publisher.worker.error == ""


def test_retry_after_is_kept_even_when_there_are_newer_offers(
    setting: Setting, wait_until: WaitUntil
) -> None:
    setting.api.fail(429, times=1, verb="create", retry_after=1)
    agent = setting.agent()
    with start(agent):
        agent.publisher.offer(offered_many(1))
        wait_until(lambda: setting.api.requests("create"))
        agent.publisher.offer(offered_many(2))
        wait_until(lambda: agent.publisher.published)
    first, second = setting.api.requests("create")
    assert second.at - first.at >= 1.0


def test_without_its_node_object_it_says_so_and_goes_on_when_there_is_one(
    setting: Setting, wait_until: WaitUntil
) -> None:
    setting.api.delete("nodes", NODE)
    agent = setting.agent()
    with start(agent):
        agent.publisher.offer(offered_many(1))
        wait_until(lambda: f"no Node {NODE}" in agent.publisher.worker.error)
        setting.api.add_node(NODE)
        wait_until(lambda: agent.publisher.published)


def test_when_all_is_said_nothing_is_asked(setting: Setting, wait_until: WaitUntil) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, offered_many(200), wait_until)
        wait_until(lambda: len(agent.publisher.worker) == 0)
        version = str(setting.api.store.version)
        wait_until(lambda: agent.watch._version == version, what="the watch has echoed our own writes")
        wait_until(lambda: len(agent.publisher.worker) == 0)
    asked = Counter((request.verb, request.resource) for request in setting.api.requests())
    assert asked == {
        ("list", SLICES): 1,
        ("watch", SLICES): 1,
        ("get", "nodes"): 1,
        ("create", SLICES): 2,
    }
