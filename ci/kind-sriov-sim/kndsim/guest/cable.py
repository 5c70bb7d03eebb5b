"""The far end of a guest's cables: QEMU's monitor, spoken as far as it takes to pull one and plug it in.

Invariant: a call returns when QEMU has done it, or raises.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SECONDS = 10.0


class MonitorRefused(Exception):
    """QEMU did not do it, with its reason."""


def set_link(monitor: Path, netdev: str, *, up: bool) -> None:
    """Give a NIC a carrier, or take it: that of the card at this network backend."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SECONDS)
        connection.connect(str(monitor))
        with connection.makefile("rw", encoding="utf-8") as stream:
            lines = (json.loads(line) for line in iter(stream.readline, ""))
            next(lines)  # its greeting
            for name, arguments in (("qmp_capabilities", {}), ("set_link", {"name": netdev, "up": up})):
                stream.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                stream.flush()
                _answer(lines)


def _answer(lines: Iterator[Mapping[str, Any]]) -> None:
    """Events come in between."""
    for line in lines:
        if "error" in line:
            raise MonitorRefused(line["error"]["desc"])
        if "return" in line:
            return
    raise MonitorRefused("the monitor's connection was closed")
