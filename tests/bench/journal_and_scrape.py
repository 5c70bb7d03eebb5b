"""What journalling and a scrape cost, beside the least that they could.

A journal commit is shown beside the same row written by bare sqlite3 in the same mode on the same disk; a
scrape of 256 pods beside prometheus_client writing the same series. Needs no root and a few seconds.

    python tests/bench/journal_and_scrape.py [FOLDER]

FOLDER is where the files go: a disk like the one of /var/lib.
"""

from __future__ import annotations

import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily

from bpf.layout import Cell, TrafficKind
from driver.journal import Journal, StepPhase
from driver.journal.ledger import Ledger, UsageOwner
from driver.metrics import Metrics, PodSample
from tests.unit.journal_values import BOOT, attachment, preparation

PODS, CELLS = 256, 6
SCRAPE_BUDGET_MS = 20.0
LABELS = ("namespace", "pod", "claim", "device", "interface", "direction", "class", "kind", "source")


def times(work: Callable[[int], object], rounds: int) -> list[float]:
    """Milliseconds of each round."""
    found = []
    for number in range(rounds):
        begun = time.perf_counter()
        work(number)
        found.append((time.perf_counter() - begun) * 1e3)
    return sorted(found)


def show(what: str, found: list[float], floor: list[float] | None = None) -> None:
    median, high = statistics.median(found), found[int(len(found) * 0.99)]
    ratio = "" if floor is None else f"  {median / statistics.median(floor):5.2f} x the floor"
    print(f"{what:48} median {median:7.3f} ms  p99 {high:7.3f} ms{ratio}")


def bare(folder: Path, synchronous: str) -> list[float]:
    connection = sqlite3.connect(folder / f"bare-{synchronous}.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute("CREATE TABLE t (key TEXT PRIMARY KEY, body TEXT) WITHOUT ROWID")
    found = times(
        lambda n: connection.execute("INSERT OR REPLACE INTO t VALUES (?, ?)", (str(n % PODS), "x" * 700)),
        300,
    )
    connection.close()
    return found


def journal(folder: Path, mirror: Path) -> None:
    normal, full = bare(folder, "NORMAL"), bare(folder, "FULL")
    show("bare sqlite, one row, not flushed", normal)
    show("bare sqlite, one row, flushed", full)
    path = folder / "journal.sqlite"
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as held:
        for number in range(PODS):
            held.put_preparation(preparation(number))
            held.put_attachment(attachment(number))
        show("journal: step", times(lambda n: held.step("o", n, "move", StepPhase.DONE), 300), normal)
        show(
            "journal: put_attachment", times(lambda n: held.put_attachment(attachment(n % PODS)), 300), normal
        )
        durably = times(lambda n: held.put_preparation(preparation(n % PODS), durable=True), 300)
        show("journal: put_preparation, durable", durably, full)
    reopened = times(lambda _: Journal.open(path, mirror=mirror, boot_id=BOOT).close(), 10)
    show(f"journal: open with {2 * PODS} records", reopened)


def ledger(folder: Path) -> None:
    cells = [(index % 2, index // 2) for index in range(CELLS)]
    with Ledger.open(folder / "ledger.sqlite") as held:
        for number in range(PODS):
            at, made = attachment(number), preparation(number)
            held.begin(
                UsageOwner(
                    attachment=at.id,
                    pod=at.pod,
                    claim=made.claim,
                    device=made.key.device,
                    interface=made.ifname,
                    sandbox=at.sandbox,
                    started=0.0,
                )
            )

        def totals(total: int) -> tuple[Cell, ...]:
            return tuple(Cell(way, index, TrafficKind.TCP, total * 100, total) for way, index in cells)

        def checkpoint(number: int) -> None:
            held.checkpoint(
                {attachment(pod).id: totals(number + 1) for pod in range(PODS)},
                source="tcx",
                class_names=(),
                wall=float(number),
            )

        show(f"ledger: checkpoint of {PODS} pods", times(checkpoint, 10))
        folds = times(
            lambda n: held.fold(attachment(n).id, totals(99), source="tcx", class_names=(), ended=1.0), PODS
        )
        show("ledger: fold", folds)


def samples() -> tuple[PodSample, ...]:
    return tuple(
        PodSample(
            namespace="training",
            pod=f"job-{pod}-worker",
            claim=f"nic-{pod}",
            device="pci-0000-3b-00-2",
            interface="net0",
            direction="egress" if index % 2 else "ingress",
            traffic_class=f"class-{index // 2}",
            kind="roce",
            source="tcx",
            bytes=10**12 + pod,
            packets=10**9 + pod,
        )
        for pod in range(PODS)
        for index in range(CELLS)
    )


class Plain:
    """The same series by prometheus_client's own means."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, place in (("bytes", 9), ("packets", 10)):
            family = CounterMetricFamily(f"knd_pod_network_{name}", "As ours.", labels=LABELS)
            for sample in samples():
                family.add_metric([str(value) for value in sample[:9]], float(sample[place]))
            yield family


def scrape() -> None:
    registry = CollectorRegistry()
    registry.register(Plain())
    plain = times(lambda _: generate_latest(registry), 20)
    metrics = Metrics()
    metrics.watch_pods(samples)
    ours = times(lambda _: metrics.scrape(), 20)
    show(f"prometheus_client: {PODS} pods, {CELLS} cells each", plain)
    show(f"scrape: {PODS} pods, {CELLS} cells each", ours, plain)
    print(f"{'budget of a scrape':48} {SCRAPE_BUDGET_MS:14.3f} ms")


def main() -> None:
    where = sys.argv[1] if len(sys.argv) > 1 else None
    with (
        tempfile.TemporaryDirectory(dir=where) as folder,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        journal(Path(folder), Path(memory) / "mirror")
        ledger(Path(folder))
        scrape()


if __name__ == "__main__":
    main()
