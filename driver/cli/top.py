"""`knd top`: live rates of pods, devices and classes, from the agent's own metrics.

Invariant: only reads; what a tenant named is escaped before a terminal sees it. The screen needs a terminal,
anything else gets one table.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from driver.cli.output import Row, add_output_argument, show
from driver.cli.rates import Order, Rate, Rates, Reading, View, columns, parse, spark, with_unit
from driver.errors import DriverError

_PATIENCE = 5.0
"""Seconds for one scrape; an agent with 256 pods needs hundredths of one."""
_SCRAPE_MAX = 64 << 20
"""More bytes than 4,096 pods with every series there is."""


class AgentSilent(DriverError):
    """The agent's metrics cannot be read; the text says why and what to do."""


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


def scrape(port: int) -> Reading:
    """One reading of the agent on this node. AgentSilent if there is none."""
    url = f"http://127.0.0.1:{port}/metrics"
    try:
        # No proxy: the environment's has no business with loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=_PATIENCE) as answer:
            text = answer.read(_SCRAPE_MAX + 1)
        if len(text) > _SCRAPE_MAX:
            raise ValueError(f"more than {_SCRAPE_MAX >> 20} MiB of metrics")
        return parse(text.decode(), time.monotonic())
    except urllib.error.HTTPError as error:
        raise AgentSilent(f"{url} answers {error.code} {error.reason}: see the agent's log") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise AgentSilent(
            f"no agent tells its metrics at {url} ({reason}): run this on the node, in the agent's pod or in "
            "the host's network, and give the agent's --metrics-port"
        ) from error


def cells(rate: Rate) -> list[str]:
    """A row's figures as people read them, the sparkline last."""
    return [
        rate.source,
        with_unit(rate.egress, "b/s"),
        with_unit(rate.ingress, "b/s"),
        with_unit(rate.packets, "pkt/s"),
        spark(rate.history),
    ]


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
