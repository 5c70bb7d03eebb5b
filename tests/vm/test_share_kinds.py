"""Shares of every kind, on a kernel that has them all: this machine's may lack ipvlan and VLANs, which are
not tried elsewhere.

Invariant: whatever is left out in the guest, or fails there, fails here, with its words.
"""

from __future__ import annotations

import re

import pytest

from kndsim.guest import Guest, Kernel

FILES = ("tests/kernel/test_shares_made.py", "tests/node/test_shared_counted.py")
SECONDS = 1500.0


@pytest.mark.parametrize("vm", [Kernel.NEWEST], indirect=True, ids=str)
def test_each_kind_of_share_is_made_counted_and_ended(vm: Guest) -> None:
    command = ["env", "KND_SHARE_KINDS=all", "python", "-m", "pytest", "-v", "-rs", *FILES]
    done = vm.run(command, check=False, timeout=SECONDS)
    ended = re.findall(r"::(test_.+?) (PASSED|FAILED|ERROR|SKIPPED)", done.out)
    assert len(ended) >= 20, done.out + done.err
    assert [each for each in ended if each[1] != "PASSED"] == [], done.out + done.err
