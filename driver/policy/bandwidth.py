"""The policy's section `bandwidth`: how much of a PF's port is given out, and in which sizes.

Invariant: pure. The first rule that matches a PF is the one about it, whole. A VF's size follows from the
rule and the VF's index alone, so that it is the same after a restart, a reboot, and whoever came first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from driver.claimconfig import RATE
from driver.errors import FieldProblem
from driver.policy.sriov import MAX_VFS, LinkType, PfSelector
from driver.strict import Key, Kind, integer, listing, record
from hw.model import HwDevice, card_of

_LINK_TYPES = {1: LinkType.ETHERNET, 32: LinkType.INFINIBAND}
_MAX_RULES = 64
_MAX_SIZES = 32
_MAX_PERCENT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeClass:
    """Some VFs of a PF, and what each of them has. rate in Mb/s; vfs None: all that are left."""

    rate: Annotated[int, Key("rate", RATE, "Bits per second that each of these VFs can send, like 5G.")]
    vfs: Annotated[
        int | None,
        Key("vfs", integer(1, MAX_VFS), "How many VFs, in the order of their index; absent: the others."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BandwidthRule:
    """What the policy gives out of some PFs. speed in Mb/s; None: what the port says."""

    sizes: Annotated[
        tuple[SizeClass, ...],
        Key(
            "sizes",
            listing(record(SizeClass), minimum=1, maximum=_MAX_SIZES),
            "What the VFs have, dealt out from VF 0 on. VFs that are left over are not offered.",
        ),
    ]
    match: Annotated[PfSelector | None, Key("match", record(PfSelector), "Which PFs; absent: every one.")] = (
        None
    )
    speed: Annotated[
        int | None,
        Key("speed", RATE, "Bits per second of the port; absent: what the port says when its link is up."),
    ] = None
    percent: Annotated[
        int,
        Key(
            "percent",
            integer(1, _MAX_PERCENT),
            "How much of the port's speed is given out. Less than 100 leaves the host some; more oversells.",
        ),
    ] = 100

    def applies_to(self, pf: HwDevice) -> bool:
        link, pci, address = pf.link, pf.pci, card_of(pf.identity)
        if address is None:
            return False
        return self.match is None or self.match.selects(
            name=link.name if link else None,
            address=address,
            vendor=pci.vendor if pci else None,
            product=pci.product if pci else None,
            link_type=_LINK_TYPES.get(link.link_type) if link else None,
            numa_node=pci.numa_node if pci else None,
        )

    def budget(self, link_speed: int | None) -> int | None:
        """Mb/s that all VFs of a PF have together at most, if its link has this speed. None: not known."""
        speed = self.speed or link_speed
        return speed * self.percent // 100 if speed else None

    def size_of(self, vf: int) -> int | None:
        """Mb/s of the VF of this index; None: it has none."""
        for size in self.sizes:
            if size.vfs is None or vf < size.vfs:
                return size.rate
            vf -= size.vfs
        return None


BANDWIDTH_RULES: Kind[tuple[BandwidthRule, ...]] = listing(record(BandwidthRule), maximum=_MAX_RULES)


def rule_for(pf: HwDevice, rules: Iterable[BandwidthRule]) -> BandwidthRule | None:
    """The first that matches."""
    return next((rule for rule in rules if rule.applies_to(pf)), None)


def bandwidth_problems(rules: Sequence[BandwidthRule]) -> tuple[FieldProblem, ...]:
    """What is wrong with rules whose fields are each right, with paths like `bandwidth[0].sizes[1].rate`."""
    return tuple(
        problem for index, rule in enumerate(rules) for problem in _problems(f"bandwidth[{index}]", rule)
    )


def _problems(path: str, rule: BandwidthRule) -> Iterator[FieldProblem]:
    if rule.speed == 0:
        yield FieldProblem(f"{path}.speed", "must be more than 0; leave it out for what the port says")
    budget = rule.budget(None)
    for index, size in enumerate(rule.sizes):
        here = f"{path}.sizes[{index}]"
        if size.vfs is None and index + 1 < len(rule.sizes):
            yield FieldProblem(here, "needs vfs: only the last size can be that of all other VFs")
        if size.rate == 0:
            yield FieldProblem(f"{here}.rate", "must be more than 0: a VF's size is what it can send")
        elif budget is not None and size.rate > budget:
            given = f"{budget}M, which is {rule.percent} % of {rule.speed}M"
            yield FieldProblem(f"{here}.rate", f"is {size.rate}M, and the PF gives out {given}")
