"""MAC addresses for VFs.

Invariant: the same VF of the same card gets the same address on every boot, and no two of one node share one.
They are locally administered, and come from the card's own address, so that nodes of one model do not share
them either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from hw.model import MacAddress, PfAddress

_LOCAL = 0x02
_GROUP = 0x01


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A PF, by its place and by what its maker called it, and how many addresses it needs."""

    address: PfAddress
    mac: MacAddress
    count: int


def generate(
    sources: Iterable[Source], taken: Collection[MacAddress] = ()
) -> Mapping[PfAddress, tuple[MacAddress, ...]]:
    """Addresses by PF, in the order of the VFs' indexes; none of them is among taken."""
    used = set(taken)
    found: dict[PfAddress, tuple[MacAddress, ...]] = {}
    for source in sorted(sources, key=lambda source: source.address):
        macs = []
        for index in range(source.count):
            mac = _first_free(source, index, used)
            used.add(mac)
            macs.append(mac)
        found[source.address] = tuple(macs)
    return found


def _first_free(source: Source, index: int, used: Collection[MacAddress]) -> MacAddress:
    attempt = 0
    while (mac := _derive(source, index, attempt)) in used:
        attempt += 1
    return mac


def _derive(source: Source, index: int, attempt: int) -> MacAddress:
    return derived(f"{source.mac} {source.address} {index} {attempt}")


def derived(text: str) -> MacAddress:
    """Locally administered, unicast, and the same for the same text."""
    digest = bytearray(hashlib.sha256(text.encode("ascii")).digest()[:6])
    digest[0] = digest[0] & ~_GROUP & 0xFF | _LOCAL
    return MacAddress(digest.hex(":"))
