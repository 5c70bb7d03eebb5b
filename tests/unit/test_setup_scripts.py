"""What the set-up scripts promise, with stand-ins for apt, dpkg, python and pip.

Invariant: set-up asks nothing, repeats at no cost, never prints on stdout, and an interrupted or failed run
is not taken for a finished one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASH = "/bin/bash"


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{body}\n")
    path.chmod(0o755)


# --- Debian packages --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine whose installed packages and user are what a test says."""

    folder: Path

    def run(self, *, installed: str, user: int = 0, apt: bool = True) -> subprocess.CompletedProcess[str]:
        commands = self.folder / "bin"
        script(
            commands / "dpkg-query",
            f'case " {installed} " in *" $4 "*) echo -n install ok installed ;; *) exit 1 ;; esac',
        )
        script(commands / "id", f"echo {user}")
        if apt:
            script(commands / "apt-get", f'echo "$DEBIAN_FRONTEND: $*" >>{self.folder}/apt; echo talk')
        (commands / "cat").symlink_to(shutil.which("cat") or "")
        wanted = self.folder / "list"
        wanted.write_text("# a comment\none   # reason\n\ntwo-3   # reason\n")
        return subprocess.run(
            [BASH, ROOT / "deploy/install-packages.sh", wanted],
            env={"PATH": str(commands)},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def apt_calls(self) -> list[str]:
        log = self.folder / "apt"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_nothing_is_asked_of_apt_when_nothing_is_missing(machine: Machine) -> None:
    done = machine.run(installed="one two-3", user=1000)
    assert (done.returncode, done.stdout, done.stderr, machine.apt_calls) == (0, "", "", [])


def test_what_is_missing_is_installed_without_questions(machine: Machine) -> None:
    done = machine.run(installed="one")
    assert (done.returncode, done.stdout) == (0, "")
    update, install = machine.apt_calls
    assert update.startswith("noninteractive: update")
    assert install.startswith("noninteractive: install -y --no-install-recommends two-3")


def test_without_root_it_says_what_to_run(machine: Machine) -> None:
    done = machine.run(installed="two-3", user=1000)
    assert (done.returncode, machine.apt_calls) == (1, [])
    assert "as root run: apt-get install -y --no-install-recommends one" in done.stderr


def test_on_another_distribution_it_says_what_is_missing(machine: Machine) -> None:
    done = machine.run(installed="", apt=False)
    assert done.returncode == 1
    assert "missing: one two-3" in done.stderr


# --- the virtual environment ------------------------------------------------------------------------

PYTHON = """
case "$*" in
    -VV | -V) echo "$VERSION" ;;
    "-m venv --system-site-packages "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip "*) echo "$*" >>"$LOG"; [ -z "${FAIL:-}" ] || exit 1 ;;
    *) echo "unexpected: $*" >>"$LOG"; exit 9 ;;
esac
echo talk
"""


@dataclass(frozen=True, slots=True)
class Checkout:
    root: Path

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.root / "log").unlink(missing_ok=True)
        given = {"VERSION": "3.11.2", "LOG": str(self.root / "log"), "PYTHON": str(self.root / "python")}
        return subprocess.run(
            [self.root / "deploy/make-venv.sh"],
            env={"PATH": os.environ["PATH"]} | given | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def pip_calls(self) -> list[str]:
        log = self.root / "log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def environments(self) -> list[Path]:
        return sorted((self.root / ".cache").glob("venv-*"))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    script(tmp_path / "deploy/make-venv.sh", (ROOT / "deploy/make-venv.sh").read_text())
    script(tmp_path / "python", PYTHON)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/lock.txt").write_text("a==1\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return Checkout(tmp_path)


def test_the_environment_is_made_from_the_lock_by_hash_and_once(checkout: Checkout) -> None:
    done = checkout.run()
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lock, project = checkout.pip_calls
    for flag in ("--require-hashes", "--only-binary :all:", "--force-reinstall", "requirements/lock.txt"):
        assert flag in lock
    assert "-e ." in project
    assert "--no-deps" in project
    assert (checkout.root / ".venv").resolve() == checkout.environments[0]

    again = checkout.run()
    assert (again.returncode, again.stdout, again.stderr, checkout.pip_calls) == (0, "", "", [])


@pytest.mark.parametrize("what", ["lock", "interpreter"])
def test_a_changed_input_makes_a_new_environment_and_drops_the_old(checkout: Checkout, what: str) -> None:
    checkout.run()
    old = checkout.environments
    if what == "lock":
        (checkout.root / "requirements/lock.txt").write_text("a==2\n")
    done = checkout.run(VERSION="3.13.5" if what == "interpreter" else "3.11.2")
    assert done.returncode == 0, done.stderr
    assert len(checkout.environments) == 1
    assert checkout.environments != old
    assert (checkout.root / ".venv").resolve() == checkout.environments[0]


def test_a_changed_project_is_installed_anew_and_nothing_else(checkout: Checkout) -> None:
    checkout.run()
    (checkout.root / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    checkout.run()
    (only,) = checkout.pip_calls
    assert "-e ." in only


def test_a_failed_run_keeps_the_old_environment_and_the_next_starts_over(checkout: Checkout) -> None:
    checkout.run()
    old = (checkout.root / ".venv").resolve()
    (checkout.root / "requirements/lock.txt").write_text("a==2\n")
    assert checkout.run(FAIL="1").returncode != 0
    assert (checkout.root / ".venv").resolve() == old
    assert checkout.run().returncode == 0
    assert len(checkout.pip_calls) == 2
    assert (checkout.root / ".venv").resolve() != old


def test_an_environment_made_by_hand_is_left_alone(checkout: Checkout) -> None:
    (checkout.root / ".venv/bin").mkdir(parents=True)
    done = checkout.run()
    assert (done.returncode, done.stdout, checkout.pip_calls) == (0, "", [])
    assert "made by hand" in done.stderr


def test_with_a_wheelhouse_no_network_is_needed(checkout: Checkout) -> None:
    (checkout.root / "wheelhouse").mkdir()
    assert checkout.run().returncode == 0
    assert "--no-index --find-links wheelhouse" in checkout.pip_calls[0]
