"""What tests/conftest.py promises of a run, shown on small runs of their own.

Invariant: a run that skipped what it had to do, or left something behind, does not end green.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
# Nothing here takes the kernel any time to take apart.
CONFTEST = (TESTS / "conftest.py").read_text().replace("SETTLE_SECONDS = 5.0", "SETTLE_SECONDS = 0.2")
INI = f"""
[pytest]
testpaths = tests
addopts = -ra -p no:cacheprovider --import-mode=importlib --disable-plugin-autoload
pythonpath = {TESTS.parent / "ci/kind-sriov-sim"}
"""

SKIPS = "import pytest\ndef test_asks_too_much(): pytest.skip('no such device')\ndef test_runs(): pass\n"
RUNS = "def test_runs(): pass\n"

Run = Callable[..., tuple[int, str]]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the host guard watches runs of root alone")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run pytest on files given by their path below tests/; returns exit code and output.

    Without `guarded` the run does not look at the machine, on which others may be at work.
    """

    def go(
        files: dict[str, str], *arguments: str, require: str = "", guarded: bool = False
    ) -> tuple[int, str]:
        guard = () if guarded else ("-p", "no:knd-host-guard")
        (tmp_path / "pytest.ini").write_text(INI)
        for name, content in {"conftest.py": CONFTEST, **files}.items():
            path = tmp_path / "tests" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-c", str(tmp_path / "pytest.ini"), *guard, *arguments],
            cwd=tmp_path,
            env=os.environ | {"KND_REQUIRE": require, "KND_BESIDE": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return go


@pytest.mark.parametrize("required", ["", "bpf", "bpf,node"])
def test_a_skip_is_fine_where_nothing_was_promised(run: Run, required: str) -> None:
    code, output = run({"unit/test_a.py": SKIPS, "bpf/test_b.py": RUNS}, require=required)
    assert code == 0, output


def test_a_skip_in_a_required_environment_fails_the_run_with_its_reason(run: Run) -> None:
    code, output = run({"unit/test_a.py": SKIPS}, require="unit,bpf")
    assert code == 1, output
    assert "must run, but it was skipped: tests/unit/test_a.py::test_asks_too_much: no such device" in output


def test_a_file_skipped_as_a_whole_counts_as_a_skip(run: Run) -> None:
    skips = "import pytest\npytest.skip('no kernel', allow_module_level=True)\n"
    code, output = run({"kernel/test_a.py": skips, "kernel/test_b.py": RUNS}, require="kernel")
    assert code == 1, output
    assert "tests/kernel/test_a.py: no kernel" in output


def test_a_required_environment_that_never_ran_fails_the_run(run: Run) -> None:
    ignored = {"conftest.py": CONFTEST + "\ncollect_ignore = ['bpf']\n"}
    files = {"unit/test_a.py": RUNS, "bpf/test_b.py": RUNS, **ignored}
    code, output = run(files, require="unit,bpf")
    assert code == 1, output
    assert "no test ran in tests/bpf" in output


def test_asking_for_one_file_does_not_demand_the_others(run: Run) -> None:
    files = {"unit/test_a.py": RUNS, "bpf/test_b.py": RUNS}
    code, output = run(files, "tests/unit/test_a.py", require="unit,bpf")
    assert code == 0, output


def test_asking_for_a_whole_environment_demands_that_it_ran(run: Run) -> None:
    nothing = {"node/test_a.py": "", "unit/test_a.py": RUNS}
    code, output = run(nothing, "tests/node", "tests/unit", require="unit,node,bpf")
    assert code == 1, output
    assert output.count("no test ran in") == 1
    assert "no test ran in tests/node" in output


@pytest.mark.parametrize(
    ("arguments", "require"), [(["tests/vm"], ""), (["tests/vm/test_b.py"], ""), ([], "vm")]
)
def test_what_needs_a_guest_runs_when_it_is_named(run: Run, arguments: list[str], require: str) -> None:
    code, output = run({"unit/test_a.py": RUNS, "vm/test_b.py": RUNS}, *arguments, require=require)
    assert code == 0, output
    assert ("1 passed" if arguments else "2 passed") in output
    assert "left out" not in output


@pytest.mark.parametrize("arguments", [[], ["tests"], ["tests/unit"]])
def test_what_needs_a_guest_is_else_left_out_and_the_run_says_so(run: Run, arguments: list[str]) -> None:
    fails = "def test_fails(): assert 0\n"
    code, output = run({"unit/test_a.py": RUNS, "vm/test_b.py": fails, "e2e/test_c.py": fails}, *arguments)
    assert code == 0, output
    assert "1 passed" in output
    for name in ("vm", "e2e"):
        assert f"left out: tests/{name}: it runs when it is named (make test-{name})" in output


def test_an_unknown_environment_is_a_wrong_usage(run: Run) -> None:
    code, output = run({"unit/test_a.py": RUNS}, require="unit,kernle")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "KND_REQUIRE names kernle: choose from unit" in output


LEAVERS = {
    "file": "import pathlib\ndef test_a(): pathlib.Path({left!r}).touch()\n",
    "process": (
        "import subprocess\nkept = []\n"
        "def test_a(): kept.append(subprocess.Popen(['sh', '-c', 'setsid sleep 60 & :'])); kept[0].wait()\n"
    ),
}


@needs_root
@pytest.mark.parametrize("what", LEAVERS)
def test_what_a_run_leaves_behind_fails_it(run: Run, what: str) -> None:
    left = Path(f"/tmp/knd-left-behind-{os.getpid()}")
    try:
        code, output = run(
            {"unit/test_a.py": LEAVERS[what].format(left=str(left))}, require="unit", guarded=True
        )
    finally:
        left.unlink(missing_ok=True)
    assert code == 1, output
    assert f"{what} left behind: " in output
    for pid in re.findall(r"process left behind: process ([0-9]+) \(sleep 60\)", output):
        os.kill(int(pid), signal.SIGKILL)
    assert "1 passed" in output


@needs_root
def test_beside_another_run_a_difference_is_told_but_not_judged(run: Run) -> None:
    """The run that this test is part of is the other one."""
    left = Path(f"/tmp/knd-left-behind-{os.getpid()}")
    try:
        code, output = run({"unit/test_a.py": LEAVERS["file"].format(left=str(left))}, guarded=True)
    finally:
        left.unlink(missing_ok=True)
    assert code == 0, output
    assert f"file left behind: {left}" in output
    assert str(os.getpid()) in output


def test_a_short_directory_is_short_private_and_gone(run: Run) -> None:
    code, output = run(
        {
            "unit/test_a.py": "from pathlib import Path\nseen = []\n"
            "def test_a(short_tmp):\n"
            "    seen.append(short_tmp); assert len(str(short_tmp)) < 20\n"
            "    assert short_tmp.stat().st_mode & 0o77 == 0; (short_tmp / 'x').mkdir()\n"
            "def test_b(): assert not seen[0].exists()\n"
        }
    )
    assert code == 0, output


def test_waiting_ends_with_what_was_waited_for(run: Run) -> None:
    code, output = run({"unit/test_a.py": "def test_a(wait_until): wait_until(lambda: 0, 0.1, 'the moon')\n"})
    assert code == 1, output
    assert "not within 0.1 s: the moon" in output
