"""Fixtures of the end-to-end cases: the cluster, the agents deployed in it, a namespace for each case.

Invariant: the agents come from deploy/ alone, once for the whole session; what they ever said holds no
traceback, or the session fails.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest

from kndsim.cluster import Cluster
from tests.e2e import e2e_ground
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_api import Api
from tests.e2e.e2e_deploy import asked_for, deployed
from tests.e2e.e2e_ground import Ground, ground_of
from tests.e2e.e2e_objects import DeviceClass
from tests.e2e.e2e_space import Space
from tests.real_cluster import chosen, cluster

__all__ = ["cluster"]

LIMIT = 180.0
"""Seconds that a case may take on the machine's own cluster before it is ended."""
NIC_CLASS = "e2e-nic"
_NUMBERS = itertools.count(1)
_NOT_APPLICABLE = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(...): what the ground must have (tests/e2e/e2e_ground.py)")
    config.stash[_NOT_APPLICABLE] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked_for()
    own = [item for item in items if "tests/e2e/" in item.nodeid]
    ground = ground_of(chosen())
    out, reasons = e2e_ground.take_out(own, ground)
    config.stash[_NOT_APPLICABLE] += reasons
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
    for item in own:
        if item.get_closest_marker("timeout") is None:
            # Fixtures have deadlines of their own: the first may build and start a whole cluster.
            item.add_marker(pytest.mark.timeout(LIMIT * ground.pace, func_only=True))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    if reasons := config.stash[_NOT_APPLICABLE]:
        terminalreporter.section("not applicable on this ground")
        for reason in reasons:
            terminalreporter.line(reason)


@pytest.fixture(scope="session")
def ground() -> Ground:
    return ground_of(chosen())


@pytest.fixture(scope="session")
def api(cluster: Cluster, ground: Ground) -> Iterator[Api]:
    made = Api(cluster.kubeconfig, limit=10 * ground.pace)
    yield made
    made.close()


@pytest.fixture(scope="session")
def agents(cluster: Cluster, api: Api, ground: Ground) -> Iterator[Agents]:
    """Ready on every node. At the end of the session: not one traceback in all their logs."""
    with deployed(cluster, ground, api):
        found = Agents(api, cluster, ground)
        found.ready()
        api.create(DeviceClass(name=NIC_CLASS, selectors=(ground.selector,)).object())
        yield found
        bare = api.list("Event", fieldSelector="reason=RanWithoutDevices")
        assert not bare, f"containers ran without their devices: {bare}"
        if wrong := found.tracebacks():
            pytest.fail("agents' logs have tracebacks:\n" + "\n\n".join(wrong), pytrace=False)


@pytest.fixture
def space(api: Api, agents: Agents, ground: Ground, request: pytest.FixtureRequest) -> Iterator[Space]:
    """A namespace of the case's own; agents ready before and after it."""
    agents.ready()
    words = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())
    # Numbered: an earlier namespace of the same words may still be on its way out.
    name = f"e{next(_NUMBERS)}-{words[:40]}".rstrip("-")
    with Space(api, name, ground.pace, NIC_CLASS) as made:
        yield made
        if request.node.stash.get(_FAILED, False):
            print(made.describe())
            print(agents.describe())


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call" and report.failed:  # type: ignore[attr-defined]
        item.stash[_FAILED] = True
    return report
