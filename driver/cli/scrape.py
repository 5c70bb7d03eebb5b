"""The metrics of the agent on this node, read over loopback.

Invariant: nothing but loopback is asked, and an answer is bounded in time and size.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request

from driver.cli.rates import Reading, parse
from driver.errors import DriverError

_PATIENCE = 5.0
"""Seconds for one scrape; an agent with 256 pods needs hundredths of one."""
_SCRAPE_MAX = 64 << 20
"""More bytes than 4,096 pods with every series there is."""


class AgentSilent(DriverError):
    """The agent's metrics cannot be read; the text says why and what to do."""


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
