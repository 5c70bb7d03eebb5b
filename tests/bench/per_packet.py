"""The rows of bpf_packet_cost, judged as the others are."""

from __future__ import annotations

from tests.bench import bpf_packet_cost
from tests.bench.bpf_packet_cost import Row
from tests.bench.outcome import Outcome, measured, of_differences

BUDGET = 15.0
ROUNDS = 9


def per_packet() -> list[Outcome]:
    """CPU time per packet: accounting beside an empty program; what else counts or shapes beside none."""
    rows = {row.name: row for row in bpf_packet_cost.run(ROUNDS)}
    outcomes = []
    for hook in ("tcx", "clsact"):
        ours, empty = rows[f"{hook}, accounting"], rows[f"{hook}, empty program"]
        outcomes += _cost(
            f"bpf.accounting-{hook}", ours, empty, BUDGET, "over an empty program at the same hook"
        )
    none = rows["none"]
    for row in rows.values():
        if row is not none:
            name = "bpf.cost-" + "-".join(row.name.replace(",", "").lower().split())
            outcomes += _cost(name, row, none, None, "over no program at all")
    return outcomes


def _cost(name: str, row: Row, base: Row, budget: float | None, note: str) -> list[Outcome]:
    if row.skipped or base.skipped:
        return []
    pairs = list(zip(row.samples, base.samples, strict=True))
    return [measured(name, pairs, of_differences, "ns/packet", budget=budget, note=note)]
