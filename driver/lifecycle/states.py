"""The two state machines of a claim's life, as one table each.

Invariant: a record changes its state only along an arrow below. None stands for "no record".

    preparation   None -> PREPARING -> PREPARED -> UNPREPARING -> None
                          PREPARING -> None (undone)     PREPARING -> UNPREPARING (unprepare of a wreck)
    attachment    None -> ATTACHING -> ATTACHED -> DETACHING -> None
                          ATTACHING -> None (undone)     ATTACHING -> DETACHING (undo failed, or crashed)
"""

from __future__ import annotations

from collections.abc import Mapping

from driver.errors import DriverError
from driver.model import AttachmentState, PreparationState

PREPARATION: Mapping[PreparationState | None, frozenset[PreparationState | None]] = {
    None: frozenset({PreparationState.PREPARING}),
    PreparationState.PREPARING: frozenset({PreparationState.PREPARED, PreparationState.UNPREPARING, None}),
    PreparationState.PREPARED: frozenset({PreparationState.UNPREPARING}),
    PreparationState.UNPREPARING: frozenset({None}),
}

ATTACHMENT: Mapping[AttachmentState | None, frozenset[AttachmentState | None]] = {
    None: frozenset({AttachmentState.ATTACHING}),
    AttachmentState.ATTACHING: frozenset({AttachmentState.ATTACHED, AttachmentState.DETACHING, None}),
    AttachmentState.ATTACHED: frozenset({AttachmentState.DETACHING}),
    AttachmentState.DETACHING: frozenset({None}),
}


class ImpossibleTransition(DriverError):
    """A bug in the driver, stopped before it reaches the journal."""


def check_preparation(old: PreparationState | None, new: PreparationState | None, what: str) -> None:
    """ImpossibleTransition unless the arrow exists. Staying is always allowed."""
    if new is not old and new not in PREPARATION[old]:
        raise ImpossibleTransition(f"preparation {what}: {old} cannot become {new}")


def check_attachment(old: AttachmentState | None, new: AttachmentState | None, what: str) -> None:
    """ImpossibleTransition unless the arrow exists. Staying is always allowed."""
    if new is not old and new not in ATTACHMENT[old]:
        raise ImpossibleTransition(f"attachment {what}: {old} cannot become {new}")
