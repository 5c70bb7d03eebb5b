"""A kubelet request becomes claims, and answers become exactly one per claim."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.kubelet.batch import complete, failure, read_batch
from driver.kubelet.dra import Budget
from driver.lifecycle.ports import ClaimFailed
from driver.model import ClaimRef, ClaimUid


@dataclass
class Sent:
    namespace: str
    uid: str
    name: str


def ref(uid: str) -> ClaimRef:
    return ClaimRef("ns", f"claim-{uid}", ClaimUid(uid))


def test_repeats_of_a_claim_are_one_claim() -> None:
    batch = read_batch([Sent("ns", "u1", "c1"), Sent("ns", "u2", "c2"), Sent("ns", "u1", "c1")])
    assert [claim.uid for claim in batch.claims] == ["u1", "u2"]
    assert not batch.failed


def test_two_claims_with_one_uid_are_both_refused() -> None:
    batch = read_batch([Sent("ns", "u1", "c1"), Sent("ns", "u1", "other"), Sent("ns", "u2", "c2")])
    assert [claim.uid for claim in batch.claims] == ["u2"]
    assert batch.failed[ClaimUid("u1")].message == "claim UID u1 was sent for two different claims"


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (Sent("", "u1", "c1"), "without namespace"),
        (Sent("ns", "", "c1"), "without UID"),
        (Sent("ns", "u1", ""), "without name"),
        (Sent("ns/../..", "u1", "c1"), "is not a namespace"),
        (Sent("ns", "../../etc", "c1"), "is not a claim UID"),
        (Sent("ns", "u1\n", "c1"), "is not a claim UID"),
        (Sent("ns", "u" * 64, "c1"), "is not a claim UID"),
        (Sent("ns", "u1", "c1/x"), "is not the name of a ResourceClaim"),
        (Sent("ns", "u1", "C1"), "is not the name of a ResourceClaim"),
        (Sent("ns", "u1", ".".join(["a" * 60] * 5)), "is not the name of a ResourceClaim"),
    ],
)
def test_a_claim_that_the_api_server_cannot_have_made_fails_alone(sent: Sent, words: str) -> None:
    batch = read_batch([Sent("ns", "good", "c0"), sent])
    assert [claim.uid for claim in batch.claims] == ["good"]
    assert list(batch.failed) == [sent.uid]
    assert words in batch.failed[ClaimUid(sent.uid)].message


def test_long_but_legal_names_pass() -> None:
    name = ".".join(["a" * 62] * 4)
    batch = read_batch([Sent("n" * 63, "0f8fad5b-d9cb-469f-a165-70867728950e", name)])
    assert len(batch.claims) == 1


def test_every_claim_is_answered_once_and_no_other() -> None:
    answers: dict[ClaimUid, str | ClaimFailed] = {
        ClaimUid("u1"): "fine",
        ClaimUid("u3"): ClaimFailed("two\nlines"),
        ClaimUid("foreign"): "x",
    }
    done = complete([ref("u1"), ref("u2"), ref("u3")], answers)
    assert list(done) == ["u1", "u2", "u3"]
    assert done[ClaimUid("u1")] == "fine"
    assert done[ClaimUid("u2")] == ClaimFailed("the driver gave no answer for this claim")
    assert done[ClaimUid("u3")] == ClaimFailed("two lines")


@given(st.text(alphabet=st.characters(), max_size=3000))
def test_a_failure_is_never_empty_one_printable_line_and_bounded(text: str) -> None:
    message = failure(text).message
    raw = message.encode()
    assert 1 <= len(raw) <= 1024
    assert message.isprintable()


def test_a_failure_keeps_what_is_said_up_to_the_limit() -> None:
    assert failure("device a: EBUSY (in use)").message == "device a: EBUSY (in use)"
    assert failure("").message == "the driver gave no reason"
    cut = failure("é" * 2000).message
    assert cut.endswith("é...")
    assert len(cut.encode()) in (1023, 1024)


@pytest.mark.parametrize(
    ("remaining", "seconds"), [(None, 44.0), (45.0, 44.0), (500.0, 44.0), (10.0, 9.0), (0.4, 0.0), (0.0, 0.0)]
)
def test_the_handler_gets_kubelets_deadline_less_the_way_back(
    remaining: float | None, seconds: float
) -> None:
    budget = Budget.of(remaining, now=100.0)
    assert budget.seconds == seconds
    assert budget.deadline == 100.0 + seconds
