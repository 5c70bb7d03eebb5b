"""Shared by all tests: what a run needs, what it may not skip, and what it may not leave behind.

Invariant: a directory below tests/ is the environment its tests need. An environment named in
KND_REQUIRE (`unit,contract,bpf,kernel,node`) must really have run: a skip in it fails the run. Those that
take a guest or a cluster (`vm`, `e2e`) are collected only when named, there or on the command line. As root
the machine is compared before and after the whole run, and a difference fails the run; with KND_BESIDE set,
only if no other run goes on here, since then who started both has to compare.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
from hypothesis import settings

from kndsim import hostguard, waiting

# How long an example takes is the machine's affair: no test fails for a time that it took.
settings.register_profile("knd", deadline=None)
settings.load_profile("knd")

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent
ENVIRONMENTS = ("unit", "contract", "bpf", "kernel", "node", "vm", "e2e")
ONLY_IF_NAMED = ("vm", "e2e")
"""Environments that a plain run leaves out: each takes minutes, and downloads of its own."""

SETTLE_SECONDS = 5.0
"""The kernel takes a netns, and the links in it, apart some time after its last user is gone."""


def _environment(path: Path) -> str | None:
    """The directory below tests/ that path is in; None for what lies elsewhere."""
    try:
        parts = path.resolve().relative_to(ROOT).parts
    except ValueError:
        return None
    return parts[0] if len(parts) > 1 else None


def _required() -> frozenset[str]:
    wanted = frozenset(filter(None, os.environ.get("KND_REQUIRE", "").split(",")))
    if unknown := wanted - set(ENVIRONMENTS):
        raise pytest.UsageError(
            f"KND_REQUIRE names {', '.join(sorted(unknown))}: choose from {', '.join(ENVIRONMENTS)}"
        )
    return wanted


def _named(config: pytest.Config) -> frozenset[str]:
    """Environments in which the command line, by paths of its own, names a file or the whole folder."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        return frozenset()
    here = config.invocation_params.dir
    paths = [here / argument.partition("::")[0] for argument in config.args]
    return frozenset(filter(None, (_environment(path / "_") for path in paths)))


def _left_out(config: pytest.Config) -> list[str]:
    chosen = _named(config) | _required()
    return [name for name in ONLY_IF_NAMED if name not in chosen and (ROOT / name).is_dir()]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """None leaves the decision to others."""
    inside = _environment(collection_path / "_")
    return True if inside in _left_out(config) else None


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [
        f"left out: tests/{name}: it runs when it is named (make test-{name})" for name in _left_out(config)
    ]


class Gates:
    """Fails a run in which a required environment was skipped, wholly or for one test."""

    def __init__(self, required: frozenset[str]) -> None:
        self.required = required
        self.skipped: list[str] = []
        self.ran: set[str] = set()
        self.complaints: list[str] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        environment = _environment(ROOT.parent / report.nodeid.partition("::")[0])
        if environment is None:
            return
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            if environment in self.required:
                self.skipped.append(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")
        elif report.when == "call":
            self.ran.add(environment)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.complaints = [f"KND_REQUIRE says this must run, but it was skipped: {it}" for it in self.skipped]
        self.complaints += [
            f"no test ran in tests/{name}, which KND_REQUIRE names"
            for name in sorted(self.required & _asked_for_whole(session) - self.ran)
            if any((ROOT / name).rglob("test_*.py"))
        ]
        if self.complaints:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        _section(terminalreporter, "required environments", self.complaints)


def _asked_for_whole(session: pytest.Session) -> frozenset[str]:
    """Environments of which this run was to run everything."""
    config = session.config
    if config.option.keyword or config.option.markexpr or session.shouldstop or session.shouldfail:
        return frozenset()
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        return frozenset(ENVIRONMENTS)
    folders = {config.invocation_params.dir / argument for argument in config.args}
    return frozenset(name for name in ENVIRONMENTS if ROOT / name in folders)


class HostGuard:
    """Compares the machine before and after. Beside another run it can only tell, not judge."""

    def __init__(self, *, strict: bool) -> None:
        os.environ[hostguard.RUN_MARK] = f"{os.getpid()}-{time.monotonic_ns()}"
        self._strict = strict
        self._presence = hostguard.Presence()
        self._others = self._presence.others()
        self._before = hostguard.look()
        self.complaints: list[str] = []

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        give_up = time.monotonic() + SETTLE_SECONDS
        while found := hostguard.differences(self._before, hostguard.look()):
            if time.monotonic() > give_up:
                break
            time.sleep(0.1)
        self._others |= self._presence.others()
        self._presence.close()
        self.complaints = found
        if found and (self._strict or not self._others):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif found:
            runs = ", ".join(map(str, sorted(self._others)))
            self.complaints.append(f"not counted as a failure: the other runs here may have done it ({runs})")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        _section(terminalreporter, "host guard: the machine is not as it was", self.complaints)


def _section(reporter: pytest.TerminalReporter, title: str, lines: list[str]) -> None:
    if lines:
        reporter.section(title, red=True)
        for line in lines:
            reporter.line(line, red=True)


def pytest_configure(config: pytest.Config) -> None:
    # Whoever sets a run a limit ends it with SIGTERM: what was made is taken down, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    required = _required()
    config.pluginmanager.register(Gates(required), "knd-gates")
    if os.geteuid() == 0 and not config.option.collectonly:
        strict = bool(required) and not os.environ.get("KND_BESIDE")
        config.pluginmanager.register(HostGuard(strict=strict), "knd-host-guard")


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A private directory with a short path, for unix sockets (107 bytes at most). Gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="knd-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


class WaitUntil(Protocol):
    def __call__(self, condition: Callable[[], T], within: float = 5.0, what: str = "") -> T: ...


class WaitUntilAsync(Protocol):
    async def __call__(self, condition: Callable[[], T], within: float = 5.0, what: str = "") -> T: ...


@pytest.fixture
def wait_until() -> WaitUntil:
    """See kndsim.waiting.wait_until."""
    return waiting.wait_until


@pytest.fixture
def wait_until_async() -> WaitUntilAsync:
    """See kndsim.waiting.wait_until_async."""
    return waiting.wait_until_async
