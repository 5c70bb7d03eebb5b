"""What devices rule out by being given away, of this node as it is now.

Invariant: reads only; each call is of the moment it is made in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from driver import shares
from driver.errors import NotNow, Refusal
from driver.lifecycle.context import Context
from driver.model import ClaimUid, Device, DeviceName, Preparation
from driver.sharing import Node, Sharing


def sharing(context: Context, *, without: ClaimUid | None = None) -> Sharing:
    """without: a claim whose own devices are not in its way."""
    book = context.book
    return Sharing(
        Node(
            devices=context.devices.current(),
            held={p.key.unit: p for p in book.preparations() if p.key.claim_uid != without},
            quarantined={name: each.reason for name, each in book.quarantines().items()},
        )
    )


def check_rivals(context: Context, names: Collection[DeviceName], uid: ClaimUid) -> None:
    """The last guard of what shares hardware, whatever the scheduler says. To be called with to_lock(names)
    locked. Refusal or NotNow."""
    relations = sharing(context, without=uid)
    for name in names:
        both = next((other for other in relations.rivals(name) if other in names), None)
        if both is not None:
            raise Refusal("SharedInUse", f"{name} and {both} share hardware and cannot both be given away")
        against = relations.against(name)
        if against is None:
            continue
        if against.passing:
            raise NotNow(f"{name} cannot be given away now: {against.sentence}")
        raise Refusal("SharedInUse", f"{name} is not given away: {against.sentence}")


def check_budgets(context: Context, sizes: Mapping[DeviceName, int | None], uid: ClaimUid) -> None:
    """Refusal if more of a PF's bandwidth would be given out than there is. sizes are in Mb/s, by device.

    VFs of one PF do not wait for each other: no other claim may come on record between this and the claim's.
    """
    if over := sharing(context, without=uid).over_budget(sizes):
        raise Refusal(
            "OverBudget", f"{over}: delete a pod that has one of its VFs, or ask for a smaller size"
        )


def check_room(
    context: Context, made: Sequence[Preparation], devices: Sequence[Device], uid: ClaimUid
) -> None:
    """Refusal or NotNow if more of a device would be given out in parts than there is. made: a claim's
    records, devices those that they are of. As check_budgets, no other claim may come on record meanwhile."""
    held = [p for p in context.book.preparations() if p.key.claim_uid != uid]
    for device in {device.name: device for device in devices}.values():
        mine = [each for each in made if each.key.device == device.name and each.share is not None]
        shares.check_room(device, held, mine)


def to_lock(context: Context, names: Collection[DeviceName]) -> frozenset[DeviceName]:
    """So that of two claims that want what rules each other out one sees the other's record."""
    relations = sharing(context)
    return frozenset().union(*(relations.to_lock(name) for name in names))
