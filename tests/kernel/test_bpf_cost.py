"""What a packet costs, told of traffic and by a trial; the kernel times nothing after, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys as python

import pytest

from bpf import cost, sys
from bpf.accounting import pinned_counters
from bpf.attach import RETURN_UNSPEC
from bpf.cache import ProgramCache
from bpf.errors import BpfError
from bpf.loaded import Place
from kndsim.waiting import wait_until
from tests.kernel.bpf_node import NAME, SLOT, Node, both_ways, counting_node

pytestmark = pytest.mark.usefixtures("tcx_kernel")

MEASURING = (
    "import time; from bpf import sys; timing = sys.enable_stats(); print('on', flush=True); time.sleep(60)"
)


def is_timed(program: sys.ProgramFd) -> bool:
    before = cost.runs_of(program).count
    sys.prog_test_run(program, bytes(60), repeat=10)
    return cost.runs_of(program).count == before + 10


def test_every_packet_of_the_measured_time_is_told_by_direction_and_none_else(node: Node) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    both_ways(node, 5)
    node.assert_counted(5, 5)

    def pass_some() -> None:
        before = node.packets()
        both_ways(node, 20)
        wait_until(lambda: node.packets() == (before[0] + 20, before[1] + 20), within=5.0, what="they are in")

    found = cost.measure(pinned_counters(node.pins), pass_some)
    both_ways(node, 5)
    assert [each.place for each in found.programs] == [Place(SLOT, 0), Place(SLOT, 1)]
    # The kernel's own IPv6 chatter may be among them.
    assert all(20 <= each.runs <= 40 for each in found.programs), found
    assert all(each.nanoseconds / each.runs > found.timing / 2 > 0 for each in found.programs), found


def test_a_device_that_nothing_passes_is_told_so(node: Node) -> None:
    node.host.netlink(lambda ipr: ipr.link("set", index=node.device, state="down"))
    node.tcx.attach(NAME, node.device, SLOT)
    found = cost.measure(pinned_counters(node.pins), lambda: None)
    assert [each.runs for each in found.programs] == [0, 0]


def test_programs_of_another_agent_are_not_measured(node: Node, cache: ProgramCache) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    with counting_node(cache) as other, pytest.raises(BpfError, match="no device is prepared"):
        cost.measure(pinned_counters(other.pins), lambda: None)


def test_timing_is_off_when_measuring_is_over_or_was_killed(node: Node) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    with sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="witness") as witness:
        cost.measure(pinned_counters(node.pins), lambda: None)
        assert not is_timed(witness)
        child = subprocess.Popen(
            [python.executable, "-c", MEASURING],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, python.path))},
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"on\n"
            assert is_timed(witness)
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        wait_until(lambda: not is_timed(witness), within=5.0, what="the kernel times no more")


def test_a_trial_tells_what_counting_adds_and_whether_it_is_machine_code(cache: ProgramCache) -> None:
    tried = cost.trial(cache.ensure())
    assert 0 < tried.empty < tried.counting < 10_000
    with sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="witness") as witness:
        assert tried.jited == cost.is_jited(witness)
