"""The suite is held to account: an agent that does not do what it says turns it red."""

from __future__ import annotations

import contextlib

import pytest

from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_api import Api
from tests.e2e.e2e_deploy import Sabotage, sabotaged
from tests.e2e.e2e_space import Space
from tests.e2e.test_e2e_core import test_a_pod_has_its_nic_renamed_and_addressed_before_its_first_act as core


def test_the_core_case_fails_with_an_agent_that_attaches_nothing(
    space: Space, agents: Agents, api: Api
) -> None:
    with contextlib.ExitStack() as broken:
        with agents.being_replaced():
            broken.enter_context(sabotaged(api, Sabotage.ATTACH_NOTHING))
        with pytest.raises(KeyError, match="net1"):
            core(space, agents)
        space.empty()
        with agents.being_replaced():
            broken.close()
