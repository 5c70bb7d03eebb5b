"""Events tell the user once, and never become a storm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.kube.events import BURST, FOLDED_MAX, PER_SECOND, KubeEventSink, TokenBucket
from driver.model import ClaimRef, ClaimUid, DriverEvent, EventKind, NodeRef, PodRef, PodUid
from kndsim.api import SimApi
from tests.conftest import WaitUntil
from tests.unit.kube_support import DRIVER, FAST, NODE, ManualClock, client_of, running

CLAIM = ClaimRef("d", "c", ClaimUid("uid-c"))
POD = PodRef("d", "p", PodUid("uid-p"))
NODE_REF = NodeRef("node-a")


@dataclass
class Setting:
    api: SimApi
    sink: KubeEventSink
    clock: ManualClock


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    clock = ManualClock()
    with SimApi() as api, client_of(api, tmp_path) as client:
        sink = KubeEventSink(DRIVER, NODE, lambda: client, clock, fold_seconds=0.2, back_off=FAST)
        with running(sink.worker):
            yield Setting(api, sink, clock)


def event(message: str = "m", subject: ClaimRef | PodRef | NodeRef = CLAIM) -> DriverEvent:
    return DriverEvent(subject=subject, kind=EventKind.WARNING, reason="Refused", message=message)


@pytest.mark.parametrize(
    ("subject", "version", "kind"),
    [(CLAIM, "resource.k8s.io/v1", "ResourceClaim"), (POD, "v1", "Pod"), (NODE_REF, "v1", "Node")],
)
def test_an_event_is_found_at_what_it_is_about(
    setting: Setting, wait_until: WaitUntil, subject: ClaimRef | PodRef | NodeRef, version: str, kind: str
) -> None:
    setting.sink.emit(event("device vf-1 is held by another pod", subject))
    (written,) = wait_until(setting.api.events)
    # A node has no namespace; its events are in `default`, and the API takes them nowhere else.
    placed = {} if kind == "Node" else {"namespace": "d"}
    assert written["involvedObject"] == {
        "apiVersion": version,
        "kind": kind,
        "name": subject.name,
        "uid": subject.uid,
        **placed,
    }
    assert written["metadata"]["namespace"] == ("default" if kind == "Node" else "d")
    assert (written["type"], written["reason"]) == ("Warning", "Refused")
    assert written["message"] == "device vf-1 is held by another pod"
    assert written["source"] == {"component": DRIVER, "host": NODE}
    assert written["count"] == 1


def test_equal_events_are_one_with_a_count_written_seldom(setting: Setting, wait_until: WaitUntil) -> None:
    for _ in range(500):
        setting.sink.emit(event())
    wait_until(lambda: [each["count"] for each in setting.api.events()] == [500])
    assert len(setting.api.writes()) <= 2
    setting.sink.emit(event())
    wait_until(lambda: setting.api.events()[0]["count"] == 501)
    times = [request.at for request in setting.api.writes()]
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(times))


def test_different_events_have_a_bounded_rate_and_the_rest_is_counted(
    setting: Setting, wait_until: WaitUntil
) -> None:
    for index in range(1000):
        setting.sink.emit(event(f"message {index}"))
    wait_until(lambda: len(setting.api.events()) == int(BURST))
    assert setting.sink.dropped == 1000 - int(BURST)
    setting.clock.now += 10
    for index in range(1000, 2000):
        setting.sink.emit(event(f"message {index}"))
    wait_until(lambda: len(setting.api.events()) == int(BURST + 10 * PER_SECOND))


@given(st.lists(st.floats(0, 100), max_size=300))
def test_the_bucket_never_gives_more_than_its_burst_and_rate(steps: list[float]) -> None:
    bucket = TokenBucket(20.0, 0.5)
    now = start = 5.0
    taken = 0
    for step in steps:
        now += step
        taken += bucket.take(now)
        assert taken <= 20 + (now - start) * 0.5 + 1e-6


def test_memory_is_bounded(setting: Setting, wait_until: WaitUntil) -> None:
    for index in range(FOLDED_MAX + 100):
        setting.clock.now += 10
        setting.sink.emit(event(f"message {index}"))
    wait_until(lambda: len(setting.sink.worker) == 0)
    assert len(setting.sink._folded) <= FOLDED_MAX


def test_an_event_the_server_has_forgotten_is_made_anew(setting: Setting, wait_until: WaitUntil) -> None:
    setting.sink.emit(event())
    (first,) = wait_until(setting.api.events)
    setting.api.delete("events", first["metadata"]["name"], "d")
    setting.sink.emit(event())
    wait_until(lambda: setting.api.requests("patch"))
    wait_until(lambda: len(setting.sink.worker) == 0)
    setting.sink.emit(event())
    wait_until(setting.api.events)


@pytest.mark.parametrize("code", [403, 404, 409, 422])
def test_an_event_that_is_not_taken_is_not_insisted_on(
    setting: Setting, wait_until: WaitUntil, code: int
) -> None:
    setting.api.fail(code, times=1, verb="create")
    setting.sink.emit(event("bad"))
    wait_until(lambda: len(setting.sink.worker) == 0)
    setting.sink.emit(event("good"))
    wait_until(setting.api.events)
    assert len(setting.api.requests("create")) == 2


def test_a_server_that_is_away_gets_the_event_later(setting: Setting, wait_until: WaitUntil) -> None:
    setting.api.fail(503, times=3, verb="create")
    setting.sink.emit(event())
    wait_until(setting.api.events)


def test_long_texts_are_cut_to_what_the_api_takes(setting: Setting, wait_until: WaitUntil) -> None:
    setting.sink.emit(event("ü" * 5000, PodRef("d", "x" * 253, PodUid("u"))))
    (written,) = wait_until(setting.api.events)
    assert len(written["message"].encode()) <= 1024
    assert len(written["metadata"]["name"]) <= 63
