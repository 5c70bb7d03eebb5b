"""How near to its limit a pod's traffic comes, and how long a question waits behind it."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bpf.cache import ProgramCache
from kndsim.traffic import UDP_OVERHEAD
from tests.bench.outcome import Outcome, measured, of_medians
from tests.kernel.limit_traffic import TCP_SHARE, UDP_PAYLOAD, Counted, echo, round_trips, tcp, udp_unread
from tests.kernel.limited_pair import HOST_ADDRESS, Pair, limited_pairs

RATES = (100, 1000, 2500, 10_000)
"""Mb/s."""
AT_ONCE = {100: 1, 1000: 40, 2500: 40, 10_000: 40}
"""UDP datagrams of one call: one by one, two CPUs send about 1 Gb/s of them."""
WINDOWS = 5
SECONDS = 1.0
QUESTIONS = 100
TCP_BUDGET, UDP_BUDGET = 5.0, 2.0
"""Percent."""
LATENCY_BUDGET = 10.0
"""ms, at 100 Mb/s."""
_QUEUES = "HTB on a veth; what is missing of the payload that a limit has room for"


def limits() -> list[Outcome]:
    """Limited traffic of a pod: TCP by 1, 4 and 32 connections, UDP, and a question beside them."""
    with tempfile.TemporaryDirectory() as folder:
        programs = ProgramCache(Path(folder)).ensure()
        with limited_pairs(programs, 2) as (pair, other):
            rows = [row for rate in RATES for row in _at(pair, rate)]
            return [*rows, *_beside(pair, other)]


def _at(pair: Pair, rate: int) -> Iterator[Outcome]:
    pair.limit(egress=rate)
    for flows in (1, 4, 32):
        with tcp(pair.pod, pair.host, HOST_ADDRESS, flows) as arriving:
            missing = [_missing(each, rate * TCP_SHARE) for each in _windows(arriving)]
            name = f"limits.tcp_{flows}_at_{rate}M"
            yield measured(name, missing, statistics.median, "%", budget=TCP_BUDGET, note=_QUEUES)
            if flows == 4:
                yield _latency(pair, rate)
    with udp_unread(pair.pod, pair.host, HOST_ADDRESS, datagrams=AT_ONCE[rate]) as end:
        _on_wire(pair, end)
        whole = _headers_too(AT_ONCE[rate])
        off = [abs(_missing(_on_wire(pair, end) * whole, rate)) for _ in range(WINDOWS)]
        note = "off the limit, counted at the far end's interface"
        yield measured(f"limits.udp_at_{rate}M", off, statistics.median, "%", budget=UDP_BUDGET, note=note)


def _beside(busy: Pair, other: Pair) -> Iterator[Outcome]:
    """What a pod at its limit costs another, which has one of its own."""
    busy.limit(egress=RATES[0])
    other.limit(egress=RATES[1])
    with tcp(busy.pod, busy.host, busy.host_address, 32) as at_limit:
        at_limit.rate(SECONDS)
        with tcp(other.pod, other.host, other.host_address, 4) as arriving:
            missing = [_missing(each, RATES[1] * TCP_SHARE) for each in _windows(arriving)]
        with echo(other.host, other.host_address):
            beside = [each * 1000 for each in round_trips(other.pod, other.host_address, QUESTIONS)]
    with echo(other.host, other.host_address):
        alone = [each * 1000 for each in round_trips(other.pod, other.host_address, QUESTIONS)]
    note = f"of another pod, beside 32 connections at {RATES[0]}M: {_QUEUES}"
    name = f"limits.other_tcp_4_at_{RATES[1]}M"
    yield measured(name, missing, statistics.median, "%", budget=TCP_BUDGET, note=note)
    note = "median there and back of another pod that sends nothing else, over that of one alone"
    pairs = list(zip(beside, alone, strict=True))
    yield measured("limits.other_question", pairs, of_medians, "x", note=note)


def _windows(arriving: Counted) -> list[float]:
    """Mb/s of several seconds, after one to get going."""
    arriving.rate(SECONDS)
    return [arriving.rate(SECONDS) / 1e6 for _ in range(WINDOWS)]


def _missing(got: float, wanted: float) -> float:
    return (wanted - got) / wanted * 100


def _latency(pair: Pair, rate: int) -> Outcome:
    with echo(pair.host, HOST_ADDRESS):
        waited = [each * 1000 for each in round_trips(pair.pod, HOST_ADDRESS, QUESTIONS)]
    budget = LATENCY_BUDGET if rate == RATES[0] else None
    note = "median there and back, in the class of four busy connections"
    return measured(f"limits.question_at_{rate}M", waited, statistics.median, "ms", budget=budget, note=note)


def _headers_too(datagrams: int) -> float:
    """What counts on a wire, over what a veth counts: datagrams of one call pass it under one header."""
    headers = UDP_OVERHEAD[4]
    return datagrams * (UDP_PAYLOAD + headers) / (datagrams * UDP_PAYLOAD + headers)


def _on_wire(pair: Pair, end: threading.Event) -> float:
    """Mb/s that the host's end of the pair takes in, over a second."""
    started, before = time.monotonic(), pair.on_wire()
    end.wait(SECONDS)
    return (pair.on_wire() - before) * 8 / 1e6 / (time.monotonic() - started)
