"""The contract: each case runs against the simulated peer and, where KND_CLUSTER names one, the real one.

Invariant: a case sees its peer through one small interface and never asks which it is. Without KND_CLUSTER
the real side is not there at all, rather than skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.contract.api_peer import ApiPeer, real_api, simulated_api
from tests.real_cluster import VARIABLE, chosen, cluster

if TYPE_CHECKING:
    from kndsim.cluster import Cluster

__all__ = ["cluster"]

SIMULATED = {"api": ["sim"]}
"""Fixture to its simulated forms; the real one's form is `real`."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture in SIMULATED.keys() & set(metafunc.fixturenames):
        forms = [*SIMULATED[fixture], *(["real"] if os.environ.get(VARIABLE) else [])]
        metafunc.parametrize(fixture, forms, indirect=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "since(version): older real ones differ; the simulated peer is as new")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A case that a real peer is too old for is taken out, and counted as such."""
    out = [item for item in items if _too_old(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def _too_old(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("since")
    callspec = getattr(item, "callspec", None)
    if mark is None or callspec is None or "real" not in callspec.params.values():
        return False
    return chosen().version < tuple(map(int, mark.args[0].split(".")))


def pytest_report_header() -> list[str]:
    name = os.environ.get(VARIABLE)
    return [f"contract: simulated peers{f' and the real ones of {chosen().name}' if name else ''}"]


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
