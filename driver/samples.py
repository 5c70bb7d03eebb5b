"""What a scrape shows of devices' own counters, as plain tuples: thousands are made for each.

Invariant: a sample's fields before its numbers are what tells its series apart.
"""

from __future__ import annotations

from typing import NamedTuple


class MeterSample(NamedTuple):
    """One counter that a device keeps itself, for one attachment. namespace to interface are "" for what
    several attachments had together."""

    namespace: str
    pod: str
    claim: str
    device: str
    interface: str
    subject: str
    """The RDMA device's name, or the device's."""
    port: int
    source: str
    counter: str
    total: int


class UnaccountedSample(NamedTuple):
    """What an interface or a PF counted for an attachment and BPF did not, in one direction."""

    namespace: str
    pod: str
    claim: str
    device: str
    interface: str
    direction: str
    source: str
    bytes: int
    packets: int
