"""One kubelet request as claims, and the answers to it; pure, without protobuf.

Invariant: whatever was asked and whatever the handler gave, `complete` yields exactly one answer for
every claim UID of the request, and a failure's text is never empty (kubelet reads an empty error as
success), one line and at most 1 KiB (it becomes a pod event).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from driver.lifecycle.ports import ClaimFailed
from driver.model import ClaimRef, ClaimUid

ERROR_BYTES = 1024

_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAMESPACE = re.compile(_LABEL)
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")

AnswerT = TypeVar("AnswerT")


class WireClaim(Protocol):
    """A claim as either version of the protocol sends it."""

    namespace: str
    uid: str
    name: str


@dataclass(frozen=True, slots=True)
class Batch:
    """The claims of a request that can be worked on, and why the others cannot, by UID as sent."""

    claims: tuple[ClaimRef, ...]
    failed: Mapping[ClaimUid, ClaimFailed]


def read_batch(wire: Iterable[WireClaim]) -> Batch:
    """Check and fold a request's claims.

    Repeats of one claim are one claim. The parts become file and CDI names, so nothing but what the
    API server can hand out is let through. Two claims that share a UID are both refused: there is only
    one place for their answer.
    """
    claims: dict[ClaimUid, ClaimRef] = {}
    failed: dict[ClaimUid, ClaimFailed] = {}
    for sent in wire:
        uid = ClaimUid(sent.uid)
        ref = ClaimRef(sent.namespace, sent.name, uid)
        problem = _problem(ref)
        if problem is None and claims.get(uid, ref) != ref:
            problem = f"claim UID {uid} was sent for two different claims"
        if problem is None:
            claims[uid] = ref
        else:
            failed[uid] = failure(problem)
    return Batch(tuple(ref for uid, ref in claims.items() if uid not in failed), failed)


def _problem(ref: ClaimRef) -> str | None:
    if not ref.uid:
        return "kubelet sent a claim without UID"
    if not ref.namespace:
        return "kubelet sent a claim without namespace"
    if not ref.name:
        return "kubelet sent a claim without name"
    if not _UID.fullmatch(ref.uid):
        return f"{ref.uid!r} is not a claim UID"
    if not _NAMESPACE.fullmatch(ref.namespace):
        return f"{ref.namespace!r} is not a namespace"
    if not _NAME.fullmatch(ref.name):
        return f"{ref.name!r} is not the name of a ResourceClaim"
    return None


def complete(
    claims: Iterable[ClaimRef], answers: Mapping[ClaimUid, AnswerT | ClaimFailed]
) -> dict[ClaimUid, AnswerT | ClaimFailed]:
    """Exactly one answer per claim: foreign ones are dropped, missing ones are failures."""
    complete: dict[ClaimUid, AnswerT | ClaimFailed] = {}
    for claim in claims:
        if claim.uid in answers:
            answer = answers[claim.uid]
            complete[claim.uid] = failure(answer.message) if isinstance(answer, ClaimFailed) else answer
        else:
            complete[claim.uid] = failure("the driver gave no answer for this claim")
    return complete


def failure(text: str) -> ClaimFailed:
    """A ClaimFailed that kubelet can show: one printable line of 1..1024 bytes of UTF-8."""
    return ClaimFailed(one_line(text) or "the driver gave no reason")


def one_line(text: str) -> str:
    """What kubelet shows to people: one printable line of at most 1024 bytes of UTF-8."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    raw = line.encode(errors="replace")
    if len(raw) > ERROR_BYTES:
        raw = raw[: ERROR_BYTES - 3].decode(errors="ignore").encode() + b"..."
    return raw.decode()
