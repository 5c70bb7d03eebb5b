"""What is written, in which order and generation, so that the pool says what the node offers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driver.kube.slice_device import describe, describe_all, same_device
from driver.kube.slice_plan import (
    Existing,
    Pool,
    SlicePlan,
    dropped_fields,
    fingerprint,
    lay_out,
    parse_slice,
    plan_slices,
)
from driver.kube.wire import JsonObject, Malformed
from driver.model import Taint, TaintEffect
from kndsim import api_rules
from tests.unit.kube_support import DRIVER, NODE, offered

POOL = Pool(driver=DRIVER, node=NODE)
LINK_DOWN = Taint(key="knd.internal/link-down", effect=TaintEffect.NO_SCHEDULE)

_serial = itertools.count(1)


def devices(count: int, start: int = 0) -> list[JsonObject]:
    return [{"name": f"vf-{index}"} for index in range(start, start + count)]


def tainted(device: JsonObject) -> JsonObject:
    return {**device, "taints": [{"key": "k", "effect": "NoSchedule"}]}


def carried_out(plan: SlicePlan, existing: Sequence[Existing]) -> list[Existing]:
    """The slices after the plan, as a server would have them."""
    gone = {each.uid for each in plan.deletes}
    updated = {write.existing.uid: write.body for write in plan.updates if write.existing is not None}
    kept = [each for each in existing if each.uid not in gone]
    out = [parse_slice(_stored(updated[each.uid], each)) if each.uid in updated else each for each in kept]
    return out + [parse_slice(_stored(write.body, None)) for write in plan.creates]


def _stored(body: JsonObject, old: Existing | None) -> JsonObject:
    serial = next(_serial)
    name = f"{body['metadata']['generateName']}{serial}" if old is None else old.name
    uid = f"uid-{serial}" if old is None else old.uid
    return {
        **body,
        "metadata": {**body["metadata"], "name": name, "uid": uid, "resourceVersion": str(serial)},
    }


def published(wanted: Sequence[JsonObject], existing: Sequence[Existing] = ()) -> list[Existing]:
    return carried_out(plan_slices(POOL, existing, wanted, {}), existing)


def generations(slices: Sequence[Existing]) -> set[int]:
    return {each.generation for each in slices}


def test_the_first_publication_is_generation_one_of_complete_slices() -> None:
    plan = plan_slices(POOL, [], devices(300), {})
    specs = [write.body["spec"] for write in plan.creates]
    assert [len(spec["devices"]) for spec in specs] == [128, 128, 44]
    assert {spec["pool"]["generation"] for spec in specs} == {1}
    assert {spec["pool"]["resourceSliceCount"] for spec in specs} == {3}
    assert [write.body["metadata"]["generateName"] for write in plan.creates] == [
        f"0000{index}-{DRIVER}-{NODE}-" for index in range(3)
    ]
    assert not plan.deletes
    assert not plan.updates


def test_no_devices_are_one_empty_slice() -> None:
    (write,) = plan_slices(POOL, [], [], {}).creates
    assert write.body["spec"]["devices"] == []
    assert write.body["spec"]["pool"] == {"name": NODE, "generation": 1, "resourceSliceCount": 1}


def test_nothing_is_planned_when_nothing_differs() -> None:
    for count in (0, 1, 64, 128, 129, 300):
        assert not plan_slices(POOL, published(devices(count)), devices(count), {})


def test_one_changed_slice_is_one_update_in_the_same_generation() -> None:
    before = published(devices(300))
    changed = [*devices(299), {"name": "new"}]
    plan = plan_slices(POOL, before, changed, {})
    (write,) = plan.updates
    assert not plan.creates
    assert not plan.deletes
    assert write.body["spec"]["pool"]["generation"] == 1
    assert write.body["metadata"]["resourceVersion"] == before[2].version
    assert write.body["metadata"]["name"] == before[2].name


def test_two_changed_slices_move_all_to_a_new_generation() -> None:
    before = published(devices(300))
    changed = [{"name": "new-0"}, *devices(298, 1), {"name": "new-299"}]
    plan = plan_slices(POOL, before, changed, {})
    assert len(plan.updates) == 3
    assert {write.body["spec"]["pool"]["generation"] for write in plan.updates} == {2}


def test_a_pool_shrinks_and_grows() -> None:
    before = published(devices(300))
    plan = plan_slices(POOL, before, devices(50), {})
    assert len(plan.deletes) == 2
    assert len(plan.updates) == 1
    small = carried_out(plan, before)
    assert [(each.count, each.generation) for each in small] == [(1, 1)]
    large = published(devices(300), small)
    assert [(each.count, each.generation) for each in large] == [(3, 2)] * 3


def test_a_slice_deleted_by_others_is_made_again_in_a_new_generation() -> None:
    before = published(devices(300))
    after = published(devices(300), before[:1] + before[2:])
    assert len(after) == 3
    assert generations(after) == {2}


def test_a_slice_edited_by_others_is_put_back() -> None:
    (slice_,) = published(devices(2))
    raw = {**slice_.raw, "spec": {**slice_.raw["spec"], "devices": devices(1)}}
    plan = plan_slices(POOL, [parse_slice(raw)], devices(2), {})
    assert [write.body["spec"]["devices"] for write in plan.updates] == [devices(2)]


def test_fields_added_to_the_spec_by_others_are_removed() -> None:
    (slice_,) = published(devices(2))
    raw = {**slice_.raw, "spec": {**slice_.raw["spec"], "sharedCounters": [{"name": "x"}]}}
    (write,) = plan_slices(POOL, [parse_slice(raw)], devices(2), {}).updates
    assert "sharedCounters" not in write.body["spec"]


@pytest.mark.parametrize("name", ["random-x", "0000z-x", "00-x", "00000", "00000-second", "00009-beyond"])
def test_slices_of_another_scheme_twice_or_beyond_are_deleted_first(name: str) -> None:
    (slice_,) = published(devices(1))
    odd_raw = {**slice_.raw, "metadata": {**slice_.raw["metadata"], "name": name, "uid": "odd"}}
    plan = plan_slices(POOL, [slice_, parse_slice(odd_raw)], devices(1), {})
    assert len(plan.deletes) == 1
    assert not plan.creates


def test_slices_of_an_older_generation_or_another_pool_are_deleted() -> None:
    (slice_,) = published(devices(1))
    old_raw = {
        **slice_.raw,
        "metadata": {**slice_.raw["metadata"], "name": "00000-old", "uid": "old"},
        "spec": {**slice_.raw["spec"], "pool": {"name": NODE, "generation": 0, "resourceSliceCount": 1}},
    }
    other_raw = {
        **slice_.raw,
        "metadata": {**slice_.raw["metadata"], "name": "00000-other", "uid": "other"},
        "spec": {
            **slice_.raw["spec"],
            "pool": {"name": "old-name", "generation": 9, "resourceSliceCount": 1},
        },
    }
    plan = plan_slices(POOL, [slice_, parse_slice(old_raw), parse_slice(other_raw)], devices(1), {})
    assert {each.uid for each in plan.deletes} == {"old", "other"}
    assert not plan.updates
    assert not plan.creates


def test_with_a_taint_a_slice_holds_64_and_the_layout_stays_when_it_goes() -> None:
    before = published(devices(100))
    assert len(before) == 1
    with_taint = [tainted(devices(1)[0]), *devices(99, 1)]
    during = published(with_taint, before)
    assert [len(each.devices) for each in during] == [64, 36]
    plan = plan_slices(POOL, during, devices(100), {})
    assert len(plan.updates) == 1, "a flap is one write"
    assert not plan.creates
    assert not plan.deletes
    after = carried_out(plan, during)
    assert not plan_slices(POOL, after, devices(100), {})
    assert len(plan_slices(POOL, after, with_taint, {}).updates) == 1


def test_a_taint_that_stays_keeps_the_time_it_was_added() -> None:
    wanted = [tainted({"name": "a"}), tainted({"name": "b"})]
    (slice_,) = published(wanted)
    timed = [
        {**each, "taints": [{**each["taints"][0], "timeAdded": "2026-01-01T00:00:00Z"}]} for each in wanted
    ]
    stored = parse_slice({**slice_.raw, "spec": {**slice_.raw["spec"], "devices": timed}})
    assert not plan_slices(POOL, [stored], wanted, {}), "the server's time is no difference"
    changed = [{**wanted[0], "taints": [{"key": "other", "effect": "NoSchedule"}]}, wanted[1]]
    (write,) = plan_slices(POOL, [stored], changed, {}).updates
    assert "timeAdded" not in write.body["spec"]["devices"][0]["taints"][0]
    assert write.body["spec"]["devices"][1]["taints"][0]["timeAdded"] == "2026-01-01T00:00:00Z"


def test_quantities_written_otherwise_are_no_difference() -> None:
    wanted = [{"name": "a", "capacity": {"bandwidth": {"value": "1000M"}}}]
    (slice_,) = published(wanted)
    stored = [{"name": "a", "capacity": {"bandwidth": {"value": "1G"}}}]
    again = parse_slice({**slice_.raw, "spec": {**slice_.raw["spec"], "devices": stored}})
    assert not plan_slices(POOL, [again], wanted, {})
    more = [{"name": "a", "capacity": {"bandwidth": {"value": "2G"}}}]
    assert plan_slices(POOL, [again], more, {})


def test_what_the_server_made_of_devices_is_adopted_and_edits_of_it_are_still_healed() -> None:
    wanted = [tainted({"name": "a"})]
    (slice_,) = published(wanted)
    stored = parse_slice({**slice_.raw, "spec": {**slice_.raw["spec"], "devices": [{"name": "a"}]}})
    adopted = {fingerprint(wanted): fingerprint([{"name": "a"}])}
    assert plan_slices(POOL, [stored], wanted, {})
    assert not plan_slices(POOL, [stored], wanted, adopted)
    edited = parse_slice({**slice_.raw, "spec": {**slice_.raw["spec"], "devices": [{"name": "b"}]}})
    assert plan_slices(POOL, [edited], wanted, adopted)
    assert dropped_fields(wanted, stored.devices) == ("taints",)


@given(st.lists(st.booleans(), max_size=400), st.integers(0, 7))
def test_every_layout_is_legal_and_keeps_every_device_in_order(taints: list[bool], existing: int) -> None:
    wanted = [tainted(each) if bad else each for each, bad in zip(devices(len(taints)), taints, strict=True)]
    chunks = lay_out(wanted, existing)
    assert [device for chunk in chunks for device in chunk.devices] == wanted
    for chunk in chunks:
        assert len(chunk.devices) <= (64 if any("taints" in device for device in chunk.devices) else 128)


def counters(count: int) -> list[JsonObject]:
    return [{"name": f"pf-{index}", "counters": {"vfs": {"value": "8"}}} for index in range(count)]


def using(count: int) -> list[JsonObject]:
    use = {"counterSet": "pf-0", "counters": {"vfs": {"value": "1"}}}
    return [{**each, "consumesCounters": [use]} for each in devices(count)]


def test_counter_sets_are_in_slices_of_their_own_and_those_who_use_them_64_to_a_slice() -> None:
    chunks = lay_out(using(100), 0, counters(9))
    assert [(len(each.devices), len(each.counters)) for each in chunks] == [(64, 0), (36, 0), (0, 8), (0, 1)]
    for index, each in enumerate(plan_slices(POOL, [], using(100), {}, counters(9)).creates):
        assert not api_rules.slice_causes(each.body["spec"]), index


def test_counters_that_the_server_wrote_otherwise_are_no_difference_and_others_are() -> None:
    def plan(sets: list[JsonObject], existing: Sequence[Existing] = ()) -> SlicePlan:
        return plan_slices(POOL, existing, using(2), {}, sets)

    many: list[JsonObject] = [{"name": "pf-0", "counters": {"vfs": {"value": "1000"}}}]
    there = carried_out(plan(many), [])
    stored = {
        **there[1].raw["spec"],
        "sharedCounters": [{"name": "pf-0", "counters": {"vfs": {"value": "1k"}}}],
    }
    there[1] = parse_slice({**there[1].raw, "spec": stored})
    assert not plan(many, there)
    assert len(plan(counters(1), there).updates) == 1
    gone = plan_slices(POOL, there, devices(2), {})
    assert (len(gone.deletes), len(gone.updates)) == (1, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=6), st.data())
def test_any_history_converges_to_a_complete_pool_and_then_to_nothing(
    counts: list[int], data: st.DataObject
) -> None:
    slices: list[Existing] = []
    for count in counts:
        lost = data.draw(st.sets(st.integers(0, 6)))
        slices = [each for index, each in enumerate(slices) if index not in lost]
        highest = max((each.generation for each in slices), default=0)
        slices = published(devices(count), slices)
        assert {each.count for each in slices} == {len(slices)}
        assert len(generations(slices)) == 1
        assert slices[0].generation >= highest
        assert [d for each in sorted(slices, key=lambda s: s.name) for d in each.devices] == devices(count)
        assert not plan_slices(POOL, slices, devices(count), {})


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"metadata": {"name": "n", "uid": "u"}},
        {"metadata": {"name": "n", "uid": "u", "resourceVersion": "1"}, "spec": {"devices": {}}},
        {
            "metadata": {"name": "n", "uid": "u", "resourceVersion": "1"},
            "spec": {"pool": {"generation": "1"}},
        },
    ],
)
def test_what_is_no_slice_is_malformed(raw: JsonObject) -> None:
    with pytest.raises(Malformed):
        parse_slice(raw)


# --- one device -------------------------------------------------------------------------------------


def server_says(device: JsonObject) -> list[tuple[str, str]]:
    pool = {"name": NODE, "generation": 1, "resourceSliceCount": 1}
    return api_rules.slice_causes({"driver": DRIVER, "nodeName": NODE, "pool": pool, "devices": [device]})


def test_values_are_published_with_their_types() -> None:
    attributes = {
        "kind": "vf",
        "rdma": True,
        "numa": 0,
        "firmwareVersion": "22.31.1014",
        "resource.kubernetes.io/pciBusID": "0000:3b:00.2",
    }
    described = describe(offered("vf", attributes, {"bandwidth": "25G"}, [LINK_DOWN]))
    assert described.problems == []
    assert described.device == {
        "name": "vf",
        "attributes": {
            "resource.kubernetes.io/pciBusID": {"string": "0000:3b:00.2"},
            "kind": {"string": "vf"},
            "rdma": {"bool": True},
            "numa": {"int": 0},
            "firmwareVersion": {"version": "22.31.1014"},
        },
        "capacity": {"bandwidth": {"value": "25G"}},
        "taints": [{"key": "knd.internal/link-down", "effect": "NoSchedule"}],
    }
    assert server_says(described.device) == []


def test_a_long_string_is_cut_between_characters_and_said() -> None:
    described = describe(offered("vf", {"product": "é" * 100}))
    assert described.device is not None
    assert described.device["attributes"]["product"] == {"string": "é" * 32}
    assert "product" in described.problems[0]


def test_surplus_attributes_fall_off_at_the_end_standard_ones_and_capacities_last() -> None:
    attributes = {f"a{index}": index for index in range(40)} | {"resource.kubernetes.io/numaNode": 1}
    described = describe(offered("vf", attributes, {"bandwidth": "1G", "vfs": "1"}))
    assert described.device is not None
    assert list(described.device["attributes"]) == [
        "resource.kubernetes.io/numaNode",
        *(f"a{index}" for index in range(29)),
    ]
    assert len(described.device["capacity"]) == 2
    assert "a39" in described.problems[0]
    assert server_says(described.device) == []


@pytest.mark.parametrize("name", ["UPPER_x", "a" * 64, "", "-a", "a.b", "a\n"])
def test_a_device_with_a_name_the_api_would_not_take_is_left_out(name: str) -> None:
    good, bad = describe_all([offered(name), offered("fine")])
    assert [device["name"] for device in good] == ["fine"]
    assert len(bad) == 1


@pytest.mark.parametrize(
    "taints",
    [[Taint(key="bad key")], [Taint(key="k", value="bad value")], [Taint(key="/k")], [LINK_DOWN] * 17],
)
def test_a_device_whose_taint_cannot_be_said_is_not_offered_without_it(taints: list[Taint]) -> None:
    described = describe(offered("vf", taints=taints))
    assert described.device is None
    assert described.problems


def test_a_name_that_occurs_twice_is_offered_once() -> None:
    good, bad = describe_all([offered("a"), offered("a", {"kind": "pf"})])
    assert len(good) == 1
    assert "a" in bad[0]


NAMES = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\A[a-z]{1,10}(/[a-zA-Z_]{1,40})?\Z"),
    st.sampled_from(["kind", "mtu", "firmwareVersion", "resource.kubernetes.io/pciBusID"]),
)
VALUES = st.one_of(st.booleans(), st.integers(), st.text(max_size=200), st.sampled_from(["1.2.3", "01.2.3"]))
QUANTITIES = st.one_of(st.text(max_size=10), st.sampled_from(["1G", "5Mi", "1e3", "-1", "0.5"]))


@settings(deadline=None)
@given(
    st.text(max_size=70) | st.just("vf"),
    st.dictionaries(NAMES, VALUES, max_size=50),
    st.dictionaries(NAMES, QUANTITIES, max_size=40),
    st.lists(
        st.builds(Taint, key=NAMES, value=st.text(max_size=70), effect=st.sampled_from(TaintEffect)),
        max_size=3,
    ),
)
def test_whatever_is_offered_what_is_published_passes_the_server(
    name: str, attributes: dict[str, bool | int | str], capacities: dict[str, str], taints: list[Taint]
) -> None:
    described = describe(offered(name, attributes, capacities, taints))
    if described.device is None:
        assert described.problems
    else:
        assert server_says(described.device) == []
        assert same_device(described.device, described.device)
