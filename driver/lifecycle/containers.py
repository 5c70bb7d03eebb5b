"""What a container of an attached pod is given beyond what its claim's CDI spec says, or refused for.

Invariant: reads only; in a worker, so that a hook that runs out of time is answered all the same. A container
that does not name the claim is given nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from driver.cdi import RDMA_DEVICE, env_name
from driver.lifecycle.context import Context
from driver.model import AS_IT_IS, Adjustment, Attachment, Container, Preparation
from driver.rdma import CGROUP_FILE, RdmaLimits

Given = tuple[Attachment, Preparation]


@dataclass(frozen=True, slots=True)
class Look:
    """disproved: why the container must not start, a sentence, or ""."""

    disproved: str
    adjustment: Adjustment = AS_IT_IS


def look(context: Context, attachments: Sequence[Attachment], container: Container) -> Look:
    """A driver that began anew while the pod ran may have had its numbers given to another device."""
    found = [(each, context.book.preparation(each.preparation)) for each in attachments]
    known = [(attachment, preparation) for attachment, preparation in found if preparation is not None]
    disproved = context.rdma.disproved(
        proof for attachment, preparation in known for proof in context.rdma.proofs(attachment, preparation)
    )
    if disproved:
        return Look(disproved)
    limited = [each for each in known if _names(container, each[1]) and each[1].config.rdma.limits]
    if not limited:
        return Look("")
    names = context.rdma.names_now(attachment for attachment, _ in limited)
    return Look("", Adjustment(cgroup={CGROUP_FILE: rdma_max(names, limited)}))


def _names(container: Container, preparation: Preparation) -> bool:
    """Whether it has what the claim's CDI spec gives, which runtimes inject before they ask plugins. One that
    has it of itself is limited too, in what it was not given."""
    return env_name(RDMA_DEVICE, preparation.key) in container.env


def rdma_max(names: Sequence[str], limited: Sequence[Given]) -> str:
    """A line for each device, as the kernel takes them; of two limits of one device the lower counts."""
    lines: dict[str, RdmaLimits] = {}
    for name, (_, preparation) in zip(names, limited, strict=True):
        limits = preparation.config.rdma.limits
        lines[name] = _lower(lines[name], limits) if name in lines else limits
    return "\n".join(limits.line(name) for name, limits in sorted(lines.items()))


def _lower(one: RdmaLimits, other: RdmaLimits) -> RdmaLimits:
    return RdmaLimits(handles=_least(one.handles, other.handles), objects=_least(one.objects, other.objects))


def _least(one: int | None, other: int | None) -> int | None:
    given = [value for value in (one, other) if value is not None]
    return min(given, default=None)
