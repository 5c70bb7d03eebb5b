"""What `ip -o link` says, as values: busybox's and iproute2's words are the same here.

Invariant: pure; a line that is no link's is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LINK = re.compile(r"^[0-9]+: ([^:@\s]+)[^<]*<([^>]*)>.* mtu ([0-9]+)")
_MAC = re.compile(r"link/\S+ ([0-9a-f:]{17})")


@dataclass(frozen=True, slots=True)
class Link:
    name: str
    mac: str
    mtu: int
    up: bool


def parse_links(text: str) -> Mapping[str, Link]:
    found = {}
    for line in text.splitlines():
        if (match := _LINK.match(line.strip())) is not None:
            mac = _MAC.search(line)
            flags = match[2].split(",")
            found[match[1]] = Link(match[1], mac[1] if mac else "", int(match[3]), "UP" in flags)
    return found
