"""Which devices the demo takes: the best that this machine may spare, and why not a better one.

Invariant: pure over a sysfs tree and one dump of the links. A physical function is taken only if nothing
is found to use it; what cannot be seen counts as in use.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PEERS = 1
"""Virtual functions beyond those given away: one serves as the far end of all."""
_NETWORK_CLASS = "0x02"
_POLICY_PATTERN = re.compile(r"[A-Za-z0-9_.:-]{1,15}")
_STORAGE = re.compile(r"(host|ctlr_|session)[0-9]+")


class Backend(enum.StrEnum):
    """From best to worst."""

    SRIOV = "sriov"
    NETDEVSIM = "netdevsim"
    VETH = "veth"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenLink:
    """A link of the host's namespace, as far as whether it is in use needs it."""

    index: int
    name: str
    up: bool = False
    master: int | None = None
    lower: int | None = None
    """IFLA_LINK, where that is a link of the same namespace."""
    listeners: int = 0
    """IFLA_PROMISCUITY and IFLA_ALLMULTI: bridges, captures, switches."""
    xdp: bool = False
    addresses: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    """Destinations that are reached through it; "default" among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalFunction:
    """An SR-IOV PF by its place, and its one netdev."""

    address: str
    name: str
    total_vfs: int

    def __str__(self) -> str:
        return f"PF {self.name} ({self.address})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is used, and why that and not something better. pf is set for SR-IOV."""

    backend: Backend
    reason: str
    pf: PhysicalFunction | None = None

    @property
    def key(self) -> str:
        """By which to say that it failed: a PF by its address, else the backend."""
        return self.pf.address if self.pf is not None else self.backend.value


class CannotUse(Exception):
    """A sentence: why these devices cannot be taken, found out by looking or by trying."""


def choose(
    sysfs: Path,
    links: Sequence[SeenLink],
    *,
    needed: int,
    wanted: Backend | None = None,
    failed: Mapping[str, str] | None = None,
) -> Choice:
    """The best that works. wanted: this backend or CannotUse. failed: key of a choice to why it did not
    work when it was tried."""
    failed = failed or {}
    objections: list[str] = []
    pf, sentence = _sriov(sysfs, links, needed, failed)
    if wanted in (None, Backend.SRIOV):
        if pf is not None:
            return Choice(backend=Backend.SRIOV, reason=sentence, pf=pf)
        objections.append(sentence)
    if wanted in (None, Backend.NETDEVSIM):
        objection = failed.get(Backend.NETDEVSIM) or _no_netdevsim(sysfs)
        if not objection:
            reason = "; ".join([*objections, "netdevsim is there: ports linked in pairs carry the traffic"])
            return Choice(backend=Backend.NETDEVSIM, reason=reason)
        objections.append(objection)
    if wanted in (None, Backend.VETH):
        return Choice(backend=Backend.VETH, reason="; ".join(objections) or "asked for")
    raise CannotUse("; ".join(objections))


def _no_netdevsim(sysfs: Path) -> str:
    if not (sysfs / "bus/netdevsim/new_device").exists():
        return "no netdevsim (module not loaded, or not in this kernel)"
    if not (sysfs / "bus/netdevsim/link_device").exists():
        return "this kernel's netdevsim cannot link ports, so they carry no traffic to count"
    return ""


def _sriov(
    sysfs: Path, links: Sequence[SeenLink], needed: int, failed: Mapping[str, str]
) -> tuple[PhysicalFunction | None, str]:
    """An idle PF and why it is one; or None and why there is none."""
    objections = []
    for address in _capable(sysfs):
        pf, objection = judge(sysfs, links, address, needed)
        if pf is None or objection or address in failed:
            name = f"PF {address}" if pf is None else str(pf)
            objections.append(f"{name} {objection or failed[address]}")
            continue
        return pf, (
            f"{pf} is idle: down, no address, master, route, upper device, listener or XDP program, "
            f"0 of its {pf.total_vfs} VFs made"
        )
    if not objections:
        return None, "no SR-IOV PF"
    more = f" and {len(objections) - 4} more" if len(objections) > 4 else ""
    return None, f"no SR-IOV PF is idle ({', '.join(objections[:4])}{more})"


def _capable(sysfs: Path) -> Iterator[str]:
    for path in sorted((sysfs / "bus/pci/devices").glob("*")):
        if _text(path / "class").startswith(_NETWORK_CLASS) and _number(path / "sriov_totalvfs"):
            yield path.name


def judge(
    sysfs: Path, links: Sequence[SeenLink], address: str, needed: int
) -> tuple[PhysicalFunction | None, str]:
    """The PF (None: it has not exactly one netdev here) and what speaks against taking it, or ""."""
    base = sysfs / "bus/pci/devices" / address
    names = sorted(path.name for path in (base / "net").glob("*"))
    by_name = {link.name: link for link in links}
    if len(names) != 1 or names[0] not in by_name:
        there = f"has {len(names)} netdevs" if len(names) > 1 else "has no netdev in this network namespace"
        return None, there
    link = by_name[names[0]]
    pf = PhysicalFunction(address=address, name=link.name, total_vfs=_number(base / "sriov_totalvfs"))
    objections = (*_of_function(base, pf, needed), *_of_link(link, links), *_uppers(base, link))
    return pf, next(iter(objections), "")


def _of_function(base: Path, pf: PhysicalFunction, needed: int) -> Iterator[str]:
    wanted = needed + PEERS
    made = _text(base / "sriov_numvfs")
    if made != "0":
        yield f"has {made} VFs already" if made else "does not say how many VFs it has"
    if pf.total_vfs < wanted:
        yield f"can have {pf.total_vfs} VFs and {wanted} are needed"
    if not _POLICY_PATTERN.fullmatch(pf.name):
        yield "has a name that a node policy cannot select"
    if _text(base / "net" / pf.name / "phys_switch_id"):
        yield "is a switch (switchdev), whose VFs reach each other only by rules of its owner"
    storage = [path.name for place in (base, base / "net" / pf.name) for path in place.glob("*")]
    if any(_STORAGE.fullmatch(name) for name in storage):
        yield "carries storage"


def _of_link(link: SeenLink, links: Sequence[SeenLink]) -> Iterator[str]:
    if "default" in link.routes:
        yield "has the default route"
    if link.addresses:
        yield f"has the address {link.addresses[0]}"
    if link.routes:
        yield f"has a route to {link.routes[0]}"
    if link.master is not None:
        owner = next((other.name for other in links if other.index == link.master), f"link {link.master}")
        yield f"belongs to {owner!a}"
    for other in links:
        if link.index in (other.lower, other.master):
            yield f"is in use by {other.name!a}"
    if link.listeners:
        yield "is listened on by others"
    if link.xdp:
        yield "has an XDP program"
    if link.up:
        # A pod's macvlan on top of it is in another namespace, and nothing here tells of it.
        yield "is up, so others may use it (take it down to have it used)"


def _uppers(base: Path, link: SeenLink) -> Iterator[str]:
    for path in sorted((base / "net" / link.name).glob("upper_*")):
        yield f"is in use by {path.name.removeprefix('upper_')!a}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="backslashreplace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    """0 where it is absent or no number: such a function is not taken."""
    text = _text(path)
    return int(text) if text.isdecimal() else 0
