"""The rows of bpf_packet_cost, judged as the others are."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from tests.bench import bpf_packet_cost
from tests.bench.outcome import Outcome, measured, of_differences

BUDGET = 15.0
COUNTERS = "nft, map of DSCP to 8 counters"
"""What does with nftables what accounting does, one direction and protocol of it."""


def per_packet() -> list[Outcome]:
    """CPU time per packet: accounting beside an empty program; what else counts or shapes beside none."""
    found = bpf_packet_cost.run()
    for name, why in found.skipped.items():
        print(f"bpf, {name}: skipped: {why}", file=sys.stderr, flush=True)
    samples = found.samples
    none = samples[bpf_packet_cost.NONE]
    outcomes = []
    for hook in ("tcx", "clsact"):
        ours, empty = samples.get(f"{hook}, accounting"), samples.get(f"{hook}, empty program")
        if ours and empty:
            note = "over an empty program at the same hook"
            outcomes.append(_cost(f"bpf.accounting-{hook}", ours, empty, BUDGET, note))
    for name, own in samples.items():
        if own is not none:
            outcomes.append(_cost(f"bpf.cost-{_slug(name)}", own, none, None, "over no program at all"))
    ours = samples.get("tcx, accounting")
    for name in ("nft, one counter", COUNTERS, "htb, 8 classes by u32"):
        if ours and name in samples:
            together = list(zip(ours, samples[name], none, strict=True))
            budget = 1.0 if name == COUNTERS else None
            note = "cost of accounting on tcx over the cost of this, each over no program"
            outcomes.append(
                measured(f"bpf.of-{_slug(name)}", together, _of_costs, "x", budget=budget, note=note)
            )
    return outcomes


def _slug(name: str) -> str:
    return "-".join(name.replace(",", "").lower().split())


def _cost(name: str, own: Sequence[float], base: Sequence[float], budget: float | None, note: str) -> Outcome:
    pairs = list(zip(own, base, strict=True))
    return measured(name, pairs, of_differences, "ns/packet", budget=budget, note=note)


def _of_costs(together: Sequence[tuple[float, float, float]]) -> float:
    """Of (ours, another's, none's) of each turn."""
    ours = statistics.median(one - none for one, _, none in together)
    others = statistics.median(other - none for _, other, none in together)
    return ours / others
