"""`knd top`: live rates of pods, devices and classes, from the agent's own metrics.

Invariant: only reads; what a tenant named is escaped before a terminal sees it. The screen needs a terminal,
anything else gets one table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from driver.cli.output import Row, add_output_argument, show
from driver.cli.rates import Order, Rates, Reading, View, cells, columns
from driver.cli.scrape import scrape


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    top = commands.add_parser("top", help="what every pod sends and receives now")
    top.add_argument("--metrics-port", type=int, default=9467, help="where the agent shows its metrics")
    top.add_argument("--interval", type=float, default=1.0, help="seconds between two readings")
    top.add_argument("--by", type=View, choices=list(View), default=View.POD, help="what a row is about")
    top.add_argument("--sort", type=Order, choices=list(Order), default=Order.TOTAL)
    top.add_argument("--once", action="store_true", help="print one table, also on a terminal")
    add_output_argument(top)
    top.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not 0.1 <= arguments.interval <= 3600:
        raise ValueError(f"--interval {arguments.interval} is not 0.1 to 3600 seconds")
    if not 1 <= arguments.metrics_port <= 65535:
        raise ValueError(f"--metrics-port {arguments.metrics_port} is not a port")

    def read() -> Reading:
        return scrape(arguments.metrics_port)

    if arguments.once or arguments.output == "json" or not sys.stdout.isatty():
        return _once(read, arguments)
    # Half a second of imports and some 20 MB, which nothing else needs.
    from driver.cli.top_screen import TopScreen

    screen = TopScreen(read, arguments.interval, arguments.by, arguments.sort)
    screen.run()
    return screen.return_code or 0


def _once(read: Callable[[], Reading], arguments: argparse.Namespace) -> int:
    rates = Rates()
    rates.feed(read())
    time.sleep(arguments.interval)
    rates.feed(read())
    view: View = arguments.by
    found = rates.rows(view, arguments.sort)
    if arguments.output == "json":
        rows: list[Row] = [
            {
                **dict(zip(columns(view), rate.names, strict=True)),
                "source": rate.source,
                "egress_bits_per_second": rate.egress,
                "ingress_bits_per_second": rate.ingress,
                "packets_per_second": rate.packets,
            }
            for rate in found
        ]
        show(rows, [], "json", nothing="")
        return 0
    heads = [*columns(view), "source", "egress", "ingress", "packets"]
    table: list[Row] = [dict(zip(heads, [*rate.names, *cells(rate)], strict=False)) for rate in found]
    show(table, heads, "table", nothing="no device is attached, or nothing was counted between two readings")
    return 0
