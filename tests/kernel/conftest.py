"""What a kernel must have for some of the tests, and what several of them use.

Invariant: on a kernel that has it nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bpf.attach import probe_tcx
from bpf.cache import ProgramCache
from bpf.layout import Hook
from bpf.program import CompiledPrograms
from tests.kernel.bpf_node import Node, counting_node
from tests.kernel.counted_wire import Wire, counted_wire
from tests.kernel.limited_pair import Pair, limited_pair


@pytest.fixture(scope="session")
def tcx_kernel() -> None:
    """For tests of tcx itself; what is counted is tested on every kernel."""
    if probe_tcx() is not Hook.TCX:
        pytest.skip("this kernel has no tcx, which came with 6.6")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledPrograms:
    return ProgramCache(tmp_path_factory.mktemp("programs")).ensure()


@pytest.fixture
def pair(compiled: CompiledPrograms) -> Iterator[Pair]:
    """Two ends of a wire, the pod's with programs that limit it."""
    with limited_pair(compiled) as made:
        yield made


@pytest.fixture
def wire(compiled: CompiledPrograms) -> Iterator[Wire]:
    """A counted device and its peer."""
    with counted_wire(compiled) as made:
        yield made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ProgramCache:
    """That has nothing prebuilt."""
    folder = tmp_path_factory.mktemp("programs")
    return ProgramCache(folder, prebuilt=folder / "none")


@pytest.fixture
def node(cache: ProgramCache) -> Iterator[Node]:
    """A device that can be counted, as an agent has it."""
    with counting_node(cache) as made:
        yield made
