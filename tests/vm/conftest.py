"""Guests for the tests below: one for each kernel, used by all tests that ask for it.

Invariant: tests that share a guest leave its devices as they were; what needs a guest of its own starts one.
A guest emulates its processor and is some fifteen times slower than this machine: limits are generous, and
nothing here is about speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from kndsim.guest import Guest, Image, Kernel, guest, image
from kndsim.progress import Progress

LIMIT = 1800.0
"""Seconds for one test, its guest's start and the making of an image included."""


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


class Guests:
    """One of each kernel, started when it is first asked for; an idle guest costs memory alone."""

    def __init__(self, made: Image, progress: Progress) -> None:
        self._made, self._progress = made, progress
        self._stack = ExitStack()
        self._running: dict[Kernel, Guest] = {}

    def of(self, kernel: Kernel) -> Guest:
        if kernel not in self._running:
            opened = guest(kernel=kernel, name=kernel.value, memory=3072, made=self._made)
            with self._progress.phase(f"start of a guest, kernel {self._made.names[kernel]}"):
                self._running[kernel] = self._stack.enter_context(opened)
        return self._running[kernel]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="session")
def guests(made: Image, progress: Progress) -> Iterator[Guests]:
    with closing(Guests(made, progress)) as opened:
        yield opened


@pytest.fixture(scope="session", params=list(Kernel), ids=str)
def vm(request: pytest.FixtureRequest, guests: Guests) -> Guest:
    """The guest of a kernel. A test that does not name its kernels runs on all."""
    return guests.of(request.param)
