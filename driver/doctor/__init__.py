"""Whether this node can do what the agent is for; each thing that it cannot says what to do.

Invariant: reads only, safe beside a running agent, and no finding keeps another from being made. One module
per subject; a new one is added to SUBJECTS.
"""

from collections.abc import Iterator
from typing import Any

from driver.doctor import foreign, kernel, kubelet, policy, programs, rdma, records, rights, runtime, sriov
from driver.doctor.model import Finding, Place, Subject, Verdict, fail, ok, warn

SUBJECTS: tuple[Subject[Any], ...] = (
    rights.SUBJECT,
    kernel.SUBJECT,
    programs.SUBJECT,
    records.SUBJECT,
    policy.SUBJECT,
    kubelet.SUBJECT,
    runtime.SUBJECT,
    foreign.SUBJECT,
    sriov.SUBJECT,
    rdma.SUBJECT,
)
"""In the order in which one would mend them."""


def examine(place: Place) -> Iterator[tuple[str, Finding]]:
    """Every finding with the name of its subject."""
    for subject in SUBJECTS:
        for finding in subject.examine(place):
            yield subject.name, finding


__all__ = ["SUBJECTS", "Finding", "Place", "Subject", "Verdict", "examine", "fail", "ok", "warn"]
