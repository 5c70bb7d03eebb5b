"""Live rates are what the counters gained over the time between two readings, of each source by itself; the
screen shows them whatever names tenants chose and however the agent comes and goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from textual.widgets import DataTable, Static

from driver.cli.main import main
from driver.cli.rates import HISTORY, Order, Rates, Reading, View, parse, spark, with_unit
from driver.cli.scrape import AgentSilent, scrape
from driver.cli.top_screen import TopScreen
from driver.metrics import Metrics, MetricsServer
from driver.model import PodSample


def sample(
    pod: str, total: int, *, direction: str = "egress", traffic_class: str = "bulk", source: str = "tcx"
) -> PodSample:
    return PodSample(
        namespace="ml",
        pod=pod,
        claim="nic",
        device="dev-0",
        interface="net1",
        direction=direction,
        traffic_class=traffic_class,
        kind="tcp",
        source=source,
        bytes=total * 100,
        packets=total,
    )


def reading(at: float, *samples: PodSample) -> Reading:
    metrics = Metrics()
    metrics.watch_pods(lambda: samples)
    return parse(metrics.scrape().decode(), at)


def test_a_rate_is_the_gain_over_the_time() -> None:
    rates = Rates()
    rates.feed(reading(10.0, sample("a", 10), sample("a", 5, direction="ingress")))
    assert rates.rows(View.POD, Order.TOTAL) == []
    rates.feed(reading(12.0, sample("a", 30), sample("a", 6, direction="ingress")))
    (row,) = rates.rows(View.POD, Order.TOTAL)
    assert (row.names, row.source) == (("ml", "a"), "tcx")
    assert (row.egress, row.ingress, row.packets) == (8 * 1000.0, 8 * 50.0, 10.5)


def test_a_new_series_and_a_counter_that_began_anew_have_no_rate_yet() -> None:
    rates = Rates()
    rates.feed(reading(0.0, sample("a", 10)))
    rates.feed(reading(1.0, sample("a", 3), sample("b", 1000)))
    assert rates.rows(View.POD, Order.TOTAL) == []
    rates.feed(reading(2.0, sample("a", 4), sample("b", 1000)))
    assert [(row.names[1], row.egress) for row in rates.rows(View.POD, Order.TOTAL)] == [
        ("a", 800.0),
        ("b", 0.0),
    ]


def test_sources_stay_apart() -> None:
    rates = Rates()
    for at in (0, 1):
        rates.feed(reading(float(at), sample("a", at), sample("a", 2 * at, source="interface")))
    assert [(row.source, row.egress) for row in rates.rows(View.POD, Order.NAME)] == [
        ("interface", 1600.0),
        ("tcx", 800.0),
    ]


def test_views_add_up_what_they_do_not_name_and_orders_sort() -> None:
    rates = Rates()
    for at in (0, 1):
        rates.feed(
            reading(
                float(at),
                sample("a", 1 * at),
                sample("b", 2 * at),
                sample("b", 4 * at, traffic_class="control"),
            )
        )
    assert [row.names[1] for row in rates.rows(View.POD, Order.EGRESS)] == ["b", "a"]
    assert [row.names[1] for row in rates.rows(View.POD, Order.NAME)] == ["a", "b"]
    assert {row.names: row.packets for row in rates.rows(View.CLASS, Order.TOTAL)} == {
        ("bulk", "tcp"): 3.0,
        ("control", "tcp"): 4.0,
    }


def test_history_is_bounded_and_ends_with_its_series() -> None:
    rates = Rates()
    for at in range(3 * HISTORY):
        rates.feed(reading(float(at), sample("a", at)))
    (row,) = rates.rows(View.POD, Order.TOTAL)
    assert len(row.history) == HISTORY
    rates.feed(reading(1000.0, sample("b", 1)))
    rates.feed(reading(1001.0, sample("a", 1)))
    rates.feed(reading(1002.0, sample("a", 2)))
    (row,) = rates.rows(View.POD, Order.TOTAL)
    assert row.history == (800.0,)


def test_an_equal_or_older_reading_changes_nothing() -> None:
    rates = Rates()
    rates.feed(reading(1.0, sample("a", 1)))
    rates.feed(reading(1.0, sample("a", 9)))
    rates.feed(reading(2.0, sample("a", 2)))
    assert rates.rows(View.POD, Order.TOTAL)[0].packets == 1.0


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (0.0, "0 b/s"),
        (7.0, "7 b/s"),
        (0.5, "0.50 b/s"),
        (999.0, "999 b/s"),
        (1234.0, "1.23 kb/s"),
        (99_960.0, "100 kb/s"),
        (12_300_000.0, "12.3 Mb/s"),
        (400e9, "400 Gb/s"),
        (9e15, "9000 Tb/s"),
    ],
)
def test_amounts_have_three_digits(amount: float, shown: str) -> None:
    assert with_unit(amount, "b/s") == shown


def test_a_sparkline_has_a_bar_for_each_value() -> None:
    assert spark([0, 7, 14]) == "▁▅█"
    assert spark([0, 0]) == "▁▁"
    assert spark([]) == ""


# --- the command ------------------------------------------------------------------------------------


@contextmanager
def agent(read: Mapping[str, int]) -> Iterator[int]:
    """A metrics server whose pods' counters go up with each scrape."""
    scrapes = [0]

    def samples() -> tuple[PodSample, ...]:
        scrapes[0] += 1
        return tuple(sample(pod, step * scrapes[0]) for pod, step in read.items())

    metrics = Metrics()
    metrics.watch_pods(samples)
    with MetricsServer(metrics, port=0) as server:
        yield server.port


def test_once_prints_a_table_of_what_a_real_server_tells(capsys: pytest.CaptureFixture[str]) -> None:
    with agent({"slow": 1, "fast": 1000}) as port:
        assert main(["top", "--once", "--interval", "0.1", "--metrics-port", str(port)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["NAMESPACE", "POD", "SOURCE", "EGRESS", "INGRESS", "PACKETS"]
        assert [line.split()[1] for line in lines[1:]] == ["fast", "slow"]
        assert main(["top", "-o", "json", "--interval", "0.1", "--metrics-port", str(port)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["pod"] == "fast"
    assert rows[0]["egress_bits_per_second"] > 0


@pytest.mark.parametrize("options", [["--interval", "0"], ["--metrics-port", "0"], ["--by", "colour"]])
def test_options_that_make_no_sense_are_wrong_usage(options: list[str]) -> None:
    try:
        code = main(["top", "--once", *options])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2


def test_without_an_agent_it_is_said_where_it_was_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with agent({}) as port:
        pass
    assert main(["top", "--once", "--metrics-port", str(port)]) == 1
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in said
    assert "--metrics-port" in said


def test_what_is_no_exposition_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    with MetricsServer(metrics, port=0) as server:
        monkeypatch.setattr(metrics, "scrape", lambda: b"knd_pod_network_bytes_total{ 1\n")
        with pytest.raises(AgentSilent, match="no agent tells its metrics"):
            scrape(server.port)


# --- the screen -------------------------------------------------------------------------------------


def table_of(screen: TopScreen) -> list[list[str]]:
    table = screen.query_one("#rates", DataTable)
    return [[str(cell) for cell in table.get_row_at(at)] for at in range(table.row_count)]


def said_by(screen: TopScreen) -> str:
    return str(screen.query_one("#said", Static).render())


class Readings:
    """Counters that go up with each reading; silent makes the agent go away."""

    def __init__(self, **steps: int) -> None:
        self.steps = steps
        self.silent = False
        self.number = 0

    def __call__(self) -> Reading:
        if self.silent:
            raise AgentSilent("no agent \x1b[31mhere")
        self.number += 1
        return reading(
            float(self.number), *[sample(pod, step * self.number) for pod, step in self.steps.items()]
        )


async def until(pilot, condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(20):
        while not condition():
            await pilot.pause(0.02)


async def _on_the_screen(readings: Readings) -> None:
    screen = TopScreen(readings, 0.05, View.POD, Order.TOTAL)
    async with screen.run_test(size=(120, 20)) as pilot:
        await until(pilot, lambda: len(table_of(screen)) == 2)
        assert [row[1] for row in table_of(screen)] == ["[b]fast", "slow\\x1b"]
        await pilot.press("n", "d")
        await until(pilot, lambda: table_of(screen) and table_of(screen)[0][4] == "net1")
        await pilot.press("c")
        await until(pilot, lambda: [row[0] for row in table_of(screen)] == ["bulk"])
        await pilot.press("space")
        await until(pilot, lambda: said_by(screen).startswith("held"))
        await pilot.press("space")
        readings.silent = True
        await until(pilot, lambda: "no agent" in said_by(screen))
        assert "\x1b" not in said_by(screen)
        readings.silent = False
        await until(pilot, lambda: said_by(screen).startswith("by class"))
        await pilot.press("q")


def test_the_screen_sorts_switches_holds_and_outlives_the_agent() -> None:
    asyncio.run(_on_the_screen(Readings(**{"[b]fast": 1000, "slow\x1b": 1})))
