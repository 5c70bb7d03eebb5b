"""The queue behind status, events and slices: newest wins, nothing is lost, nothing goes on for ever."""

from __future__ import annotations

import threading
import time

from driver.kube.failures import Forbidden, NotFound, Throttled, Unavailable
from driver.kube.work import Worker
from tests.conftest import WaitUntil
from tests.unit.kube_support import FAST, rate, running


def test_each_key_is_worked_on_once_and_forgotten(wait_until: WaitUntil) -> None:
    done: list[tuple[str, int]] = []
    worker: Worker[str, int] = Worker("t", lambda k, v: done.append((k, v)), capacity=10)
    with running(worker):
        worker.put("a", 1)
        worker.put("b", 2)
        wait_until(lambda: len(worker) == 0)
    assert sorted(done) == [("a", 1), ("b", 2)]


def test_a_newer_value_replaces_a_waiting_one(wait_until: WaitUntil) -> None:
    done: list[int] = []
    worker: Worker[str, int] = Worker("t", lambda _, v: done.append(v), capacity=10)
    worker.put("a", 1)
    worker.put("a", 2)
    with running(worker):
        wait_until(lambda: len(worker) == 0)
    assert done == [2]


def test_what_comes_while_the_key_is_worked_on_is_not_lost(wait_until: WaitUntil) -> None:
    entered, go = threading.Event(), threading.Event()
    done: list[int] = []

    def do(_: str, value: int) -> None:
        entered.set()
        assert go.wait(5)
        done.append(value)

    for again in ("put", "nudge"):
        entered.clear()
        go.clear()
        done.clear()
        worker: Worker[str, int] = Worker("t", do, capacity=10)
        with running(worker):
            worker.put("a", 1)
            assert entered.wait(5)
            if again == "put":
                worker.put("a", 2)
            else:
                worker.nudge("a", 2, 0.0)
            go.set()
            wait_until(lambda: len(done) == 2)


def test_a_failing_key_does_not_hold_up_the_others(wait_until: WaitUntil) -> None:
    done: list[str] = []

    def do(key: str, _: int) -> None:
        if key == "bad":
            raise Forbidden("x", 403, "never")
        done.append(key)

    worker: Worker[str, int] = Worker("t", do, capacity=10, back_off=FAST)
    with running(worker):
        worker.put("bad", 1)
        worker.put("good", 1)
        wait_until(lambda: done == ["good"])
        worker.put("bad", 1)
        wait_until(lambda: "never" in worker.error)


def test_failures_are_retried_until_they_end(wait_until: WaitUntil) -> None:
    tries: list[float] = []

    def do(_: str, __: int) -> None:
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise Unavailable("x", 0, "away")

    worker: Worker[str, int] = Worker("t", do, capacity=10, back_off=FAST)
    with running(worker):
        worker.put("a", 1)
        wait_until(lambda: len(worker) == 0)
    assert len(tries) == 4
    assert worker.error == ""


def test_throttling_holds_every_key_even_new_ones(wait_until: WaitUntil) -> None:
    tries: list[float] = []

    def do(key: str, _: int) -> None:
        tries.append(time.monotonic())
        if len(tries) == 1:
            raise Throttled("x", 429, "slow", 0.4)

    worker: Worker[str, int] = Worker("t", do, capacity=10, back_off=FAST)
    with running(worker):
        worker.put("a", 1)
        wait_until(lambda: len(tries) == 1)
        worker.put("b", 1)
        worker.put("a", 2)
        wait_until(lambda: len(worker) == 0)
    assert tries[1] - tries[0] >= 0.4


def test_an_unexpected_exception_is_retried_slowly_and_costs_nobody_else(wait_until: WaitUntil) -> None:
    tries: list[float] = []
    done: list[str] = []

    def do(key: str, _: int) -> None:
        if key == "odd":
            tries.append(time.monotonic())
            raise KeyError("surprise")
        done.append(key)

    worker: Worker[str, int] = Worker("t", do, capacity=10, back_off=FAST)
    with running(worker):
        worker.put("odd", 1)
        wait_until(lambda: len(tries) == 3)
        assert rate(tries) < 30
        worker.put("fine", 1)
        wait_until(lambda: done == ["fine"])


def test_what_is_gone_ends(wait_until: WaitUntil) -> None:
    tries: list[int] = []

    def do(_: str, __: int) -> None:
        tries.append(1)
        raise NotFound("x", 404, "gone")

    worker: Worker[str, int] = Worker("t", do, capacity=10, back_off=FAST)
    with running(worker):
        worker.put("a", 1)
        wait_until(lambda: len(worker) == 0)
    assert tries == [1]


def test_a_full_queue_refuses_new_keys_and_still_takes_news_of_old_ones() -> None:
    worker: Worker[int, str] = Worker("t", lambda *_: None, capacity=2)
    assert worker.put(1, "a")
    assert worker.put(2, "a")
    assert not worker.put(3, "a")
    assert worker.put(1, "b")
    assert worker.dropped == 1


def test_stopping_does_not_wait_for_what_is_due_later() -> None:
    worker: Worker[str, int] = Worker("t", lambda *_: None, capacity=2)
    start = time.monotonic()
    with running(worker):
        worker.put("later", 1, delay=3600)
    assert time.monotonic() - start < 1
