"""What each act does about programs of others, by itself; and what an older release gave away is known by its
records: nothing on such a device is taken for its owner's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bpf import sys
from bpf.attach import RETURN_UNSPEC
from bpf.parked import Parked
from driver.execute.foreign import Foreign
from driver.model import DeviceName
from driver.policy import ForeignChoice
from tests.kernel.bpf_node import NAME, Node

IN_POD, WITHHELD, LATER = map(DeviceName, ("in-pod", "withheld", "later"))
NONE: frozenset[DeviceName] = frozenset()


def foreign(node: Node) -> Foreign:
    """Of the next agent."""
    return Foreign(Parked(node.pins), None, lambda: ForeignChoice.REPORT)


def is_left_alone(node: Node, *devices: str) -> list[bool]:
    return [foreign(node).own(device).everything for device in devices]


def test_what_it_has_in_pods_or_withholds_is_cleaned_of_everything(node: Node) -> None:
    foreign(node).adopt({IN_POD}, {WITHHELD})
    assert is_left_alone(node, IN_POD, WITHHELD, LATER) == [False, False, True]


def test_what_is_withheld_later_may_never_have_been_noted_and_is_left_alone(node: Node) -> None:
    foreign(node).adopt(NONE, NONE)
    foreign(node).adopt({IN_POD}, {LATER})
    assert is_left_alone(node, IN_POD, LATER) == [False, True]


@pytest.mark.parametrize("choice", ForeignChoice)
def test_they_are_off_only_where_the_policy_says_so_and_put_back_at_once(
    node: Node, tcx_kernel: None, choice: ForeignChoice
) -> None:
    del tcx_kernel
    hook = sys.AttachType.TCX_INGRESS
    home = SimpleNamespace(qdiscs=lambda ifindex: ())
    target: Any = SimpleNamespace(
        device=NAME, find_at_home=lambda: SimpleNamespace(ifindex=node.device), home=home
    )
    acts = Foreign(Parked(node.pins), None, lambda: choice)
    with (
        sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="theirs") as program,
        sys.link_create(program, node.device, hook),
    ):
        before = sys.prog_query(node.device, hook)
        acts.note(target)
        assert (sys.prog_query(node.device, hook) != before) is (choice is ForeignChoice.DETACH)
        acts.put_back(target)
        assert sys.prog_query(node.device, hook) == before
