"""Guests for the tests below: one for each kernel, used by all tests that ask for it, one after the other.

Invariant: tests that share a guest leave its devices as they were; what needs a guest of its own starts one.
A guest emulates its processor and is some fifteen times slower than this machine: limits are generous, and
nothing here is about speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kndsim.guest import Guest, Image, Kernel, guest, image
from kndsim.progress import Progress

LIMIT = 900.0
"""Seconds for one test, its guest's start included."""
BUILD_LIMIT = 1800.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/vm/" in item.nodeid and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMIT))


@pytest.fixture(scope="session")
def progress(pytestconfig: pytest.Config) -> Iterator[Progress]:
    """Tells phases as they go, past pytest's capturing; the table comes at the end."""
    told = Progress("tests/vm")
    yield told
    if not told.phases:
        return
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{told.table()}")


@pytest.fixture(scope="session")
def made(progress: Progress) -> Image:
    return image(progress=progress)


@pytest.fixture(scope="session", params=list(Kernel), ids=str)
def vm(request: pytest.FixtureRequest, made: Image, progress: Progress) -> Iterator[Guest]:
    """A guest of each kernel in turn; a test that does not name its kernels runs on all."""
    kernel: Kernel = request.param
    with ExitStack() as stack:
        with progress.phase(f"start of a guest, kernel {made.names[kernel]}"):
            running = stack.enter_context(guest(kernel=kernel, name=kernel.value, memory=3072, made=made))
        yield running
