"""`knd cleanup` for a node that is to be without an agent."""

from __future__ import annotations

import pytest

from kndsim.demo.devices import Devices, changes, dump
from kndsim.node import SimNode
from tests.node.node_stage import play, running

pytestmark = pytest.mark.timeout(120)


def test_cleanup_refuses_in_one_sentence_while_a_pod_has_a_device_and_takes_it_home_when_forced() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        await running(sim, "p", name="net1")
        assert await sim.stop_agent() == 0
        refused = sim.knd("cleanup", f"--policy={sim.policy_file}")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == "knd: pods have devices of this node: default/p; see --force\n"
        forced = sim.knd("cleanup", "--force", f"--policy={sim.policy_file}")
        assert (forced.returncode, forced.stdout, forced.stderr) == (0, "every device is home\n", "")
        assert changes(before, dump()) == []

    play(1, story)
