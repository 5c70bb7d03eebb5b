"""The contract: each case runs against the simulated peer and, where KND_CLUSTER names one, the real one.

Invariant: a case sees its peer through one small interface and never asks which it is. Without KND_CLUSTER
the real side is not there at all, rather than skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kndsim.runtime import RuntimeMode
from tests.contract.api_peer import ApiPeer, real_api, simulated_api
from tests.contract.kubelet_forms import KubeletPeer, real_kubelet, simulated_kubelet
from tests.contract.runtime_forms import RuntimePeer, real_runtime, simulated_runtime
from tests.real_cluster import VARIABLE, chosen, cluster

if TYPE_CHECKING:
    from kndsim.cluster import Cluster, Node

__all__ = ["cluster"]

_TOO_OLD = pytest.StashKey[list[str]]()
SIMULATED = {"api": ["sim"], "kubelet": ["sim"], "runtime": [RuntimeMode.STATE_CHANGE, RuntimeMode.POD_RPC]}
"""Fixture to its simulated forms; the real one's form is `real`."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture in SIMULATED.keys() & set(metafunc.fixturenames):
        forms = [*SIMULATED[fixture], *(["real"] if os.environ.get(VARIABLE) else [])]
        metafunc.parametrize(fixture, forms, indirect=True, ids=str)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "since(kubernetes, reason): older real ones differ, and why")
    config.stash[_TOO_OLD] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A case that a real peer is too old for is taken out, and counted as such."""
    out = [item for item in items if _too_old(item)]
    if out:
        config.stash[_TOO_OLD] += [f"{item.name}: {_reason(item)}" for item in out]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def _too_old(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("since")
    callspec = getattr(item, "callspec", None)
    if mark is None or callspec is None or "real" not in callspec.params.values():
        return False
    return chosen().version < tuple(map(int, mark.args[0].split(".")))


def _reason(item: pytest.Item) -> str:
    mark = item.get_closest_marker("since")
    return str(mark.args[1]) if mark is not None and len(mark.args) > 1 else "an older server takes it"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    out = terminalreporter.config.stash[_TOO_OLD]
    if out:
        terminalreporter.section(f"not true of {chosen().name}, so not run there")
        for line in out:
            terminalreporter.line(line)


def pytest_report_header() -> list[str]:
    name = os.environ.get(VARIABLE)
    return [f"contract: simulated peers{f' and the real ones of {chosen().name}' if name else ''}"]


Opened = Callable[[], AbstractAsyncContextManager[RuntimePeer]]


@pytest.fixture(scope="session")
def bare_node(cluster: Cluster) -> Iterator[Node]:
    """The last node, with its kubelet stopped: it would end pods that it has not made."""
    node = list(cluster.nodes.values())[-1]
    node.stop("kubelet")
    try:
        yield node
    finally:
        node.start("kubelet")


@pytest.fixture
def runtime(request: pytest.FixtureRequest, short_tmp: Path) -> Opened:
    """Opens the runtime in the loop of whoever calls it."""
    if request.param != "real":
        if os.geteuid() != 0:
            pytest.skip("needs root: pods are network namespaces")
        return lambda: simulated_runtime(short_tmp, request.param)
    node: Node = request.getfixturevalue("bare_node")
    return lambda: real_runtime(node)


@pytest.fixture
def kubelet(
    request: pytest.FixtureRequest, short_tmp: Path
) -> Callable[[], AbstractAsyncContextManager[KubeletPeer]]:
    """Opens the first node's kubelet in the loop of whoever calls it."""
    if request.param != "real":
        return lambda: simulated_kubelet(short_tmp)
    running = _cluster(request)
    node = next(iter(running.nodes.values()))
    return lambda: real_kubelet(node, running.kubeconfig)


def _cluster(request: pytest.FixtureRequest) -> Cluster:
    running: Cluster = request.getfixturevalue("cluster")
    return running


@pytest.fixture
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ApiPeer]:
    if request.param == "sim":
        with simulated_api(tmp_path) as peer:
            yield peer
    else:
        with real_api(_cluster(request).kubeconfig) as peer:
            yield peer
