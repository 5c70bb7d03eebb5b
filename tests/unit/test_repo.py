"""The rules of the house, and the packaging, as tests over the tracked files.

Invariant: a rule here is one a reader can rely on without looking: what is listed as an offender is
mended, never excused by a list of exceptions that grows.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("driver", "bpf", "hw")
SIMULATION = "ci/kind-sriov-sim/kndsim"
GENERATED = "driver/pb/"

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


@cache
def tracked() -> tuple[Path, ...]:
    """Every file git knows that is in the work tree, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    paths = map(Path, filter(None, listed.stdout.split("\0")))
    return tuple(path for path in paths if (ROOT / path).is_file())


def written(*suffixes: str) -> list[Path]:
    """Tracked files with these suffixes that people wrote."""
    return [path for path in tracked() if path.suffix in suffixes and not str(path).startswith(GENERATED)]


def text(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(text(path), str(path))


def matching(pattern: str, paths: list[Path]) -> list[str]:
    """`path:line: text` of each line that the pattern is found in."""
    wanted = re.compile(pattern)
    return [
        f"{path}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(text(path).splitlines(), 1)
        if wanted.search(line)
    ]


def none(offenders: Iterable[str]) -> None:
    """Fail with all of them, one a line."""
    if listed := "\n".join(offenders):
        pytest.fail(listed, pytrace=False)


def in_product(path: Path) -> bool:
    return path.parts[0] in PACKAGES


# --- size and shape ---------------------------------------------------------------------------------


def test_no_file_is_too_long_to_read_in_one_go() -> None:
    lengths = {path: len(text(path).splitlines()) for path in written(".py", ".c", ".h", ".sh", ".md")}
    none(f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES)


def test_no_function_is_too_long() -> None:
    functions = [
        (path, node)
        for path in written(".py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [
        f"{path}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path, node in functions
        if node.end_lineno is not None and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    none(long)


def test_every_module_opens_with_what_it_is_for() -> None:
    modules = [path for path in written(".py") if in_product(path) or str(path).startswith(SIMULATION)]
    none(str(path) for path in modules if tree(path).body and not ast.get_docstring(tree(path)))


def test_broad_and_silenced_have_a_reason_on_the_line() -> None:
    none(matching(r"^\s*except\s*:", written(".py")))
    bare_silence = r"# noqa(?!: [A-Z]+[0-9]+(, ?[A-Z]+[0-9]+)* - \S)|# type: ignore(?!\[)"
    own = Path("tests/unit/test_repo.py")
    none(matching(bare_silence, [path for path in written(".py") if path != own]))


def test_nothing_is_left_for_later() -> None:
    marks = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X"))
    none(matching(rf"\b({marks})\b", written(".py", ".c", ".h", ".sh", ".md", ".yaml", ".toml")))


def test_no_file_names_the_machine_it_was_written_on() -> None:
    paths = "|".join(("/wo" + "rk/", "/roo" + "t/", "/ho" + "me/[a-z]"))
    hosts = "|".join((r"pypi\." + "org", r"deb\.debian\." + "org", "pythonhosted" + r"\."))
    licences = {"LICENSE", "LICENSES"}
    ours = [path for path in tracked() if path.parts[0] not in licences]
    none(matching(rf"(?<![\w.])({paths})|{hosts}", ours))


def test_no_file_is_empty_or_binary() -> None:
    empty_by_nature = {"__init__.py", "py.typed"}
    suspects = [path for path in tracked() if path.name not in empty_by_nature]
    none(str(path) for path in suspects if not (ROOT / path).stat().st_size)
    none(str(path) for path in suspects if b"\0" in (ROOT / path).read_bytes())


# --- the product ------------------------------------------------------------------------------------


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_product_starts_no_process_but_the_compiler() -> None:
    starters = {"subprocess", "pty", "multiprocessing"}
    found = [str(path) for path in written(".py") if in_product(path) and starters & set(_imports(path))]
    assert found in ([], ["bpf/cache.py"])
    calls = r"\bos\.(system|popen|exec[lv]|spawn|posix_spawn|fork)|create_subprocess_"
    none(matching(calls, [path for path in written(".py") if in_product(path)]))


def test_c_sources_say_their_licence() -> None:
    headers = {path: text(path).splitlines()[0] for path in written(".c", ".h")}
    none(str(path) for path, line in headers.items() if "SPDX-License-Identifier:" not in line)


def test_c_helpers_compile_without_a_warning(tmp_path: Path) -> None:
    """Programs for the host. The BPF sources are compiled, warnings counted, by their own tests."""
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Wformat=2", "-Werror"]
    for path in written(".c"):
        if path.parts[0] != "bpf":
            command = ["gcc", *flags, "-c", str(ROOT / path), "-o", str(tmp_path / "out.o")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


# --- the tests --------------------------------------------------------------------------------------


def test_test_files_can_be_told_apart() -> None:
    tests = [path for path in written(".py") if path.parts[0] == "tests"]
    names = Counter(path.name for path in tests if path.name != "conftest.py")
    none(name for name, times in names.items() if times > 1)
    # A package below tests/ would shadow the product's package of that name.
    none(str(path) for path in tracked() if path.parts[0] == "tests" and path.name == "__init__.py")


def _sleeps(inside: ast.AST, *, polling: bool = False) -> Iterator[ast.Call]:
    """Calls of time.sleep that are not the short pause of a loop that looks again."""
    for node in ast.iter_child_nodes(inside):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep":
            pause = node.args[0]
            if not (polling and isinstance(pause, ast.Constant) and pause.value <= 0.05):
                yield node
        yield from _sleeps(node, polling=polling or isinstance(node, ast.While))


def test_tests_wait_for_what_they_need_instead_of_sleeping() -> None:
    tests = [path for path in written(".py") if path.parts[0] == "tests" and path.name != "conftest.py"]
    none(f"{path}:{call.lineno}" for path in tests for call in _sleeps(tree(path)))


# --- packaging --------------------------------------------------------------------------------------


def _project() -> dict[str, dict[str, object]]:
    return tomllib.loads(text(Path("pyproject.toml")))


def _pins() -> dict[str, str]:
    """Normalised name to version, of everything in the lock."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+) \\$", text(Path("requirements/lock.txt")), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_our_import_names_are_ours_alone() -> None:
    owners = importlib.metadata.packages_distributions()
    assert {name: set(owners.get(name, [])) for name in PACKAGES} == {name: {"knd"} for name in PACKAGES}


def test_the_lock_answers_everything_the_project_asks_for() -> None:
    project = _project()["project"]
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    pins = _pins()
    for line in [*project["dependencies"], *extras["dev"]]:  # type: ignore[misc]
        wanted = Requirement(line)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        assert name in pins, f"{line} is not in the lock: run `make lock`"
        assert pins[name] in wanted.specifier, f"{line} against {pins[name]}: run `make lock`"


def test_every_pin_is_installed_here_whatever_the_system_has() -> None:
    wrong = []
    for name, version in _pins().items():
        found = importlib.metadata.distribution(name)
        inside = Path(str(found.locate_file(""))).resolve().is_relative_to(Path(sys.prefix).resolve())
        if found.version != version or not inside:
            wrong.append(f"{name}: {found.version} in {found.locate_file('')}, the lock says {version}")
    none(wrong)


def test_every_debian_package_has_its_reason() -> None:
    lists = [path for path in tracked() if re.fullmatch(r"deploy/debian-packages.*\.txt", str(path))]
    assert lists
    none(matching(r"^[^#]*$", lists))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from the tracked files alone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, source / path)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_the_wheel_carries_the_product_and_nothing_else(wheel: list[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_carries_every_file_of_the_product(wheel: list[str]) -> None:
    """C sources and py.typed too: a node compiles the programs from what is installed."""
    assert {str(path) for path in tracked() if in_product(path)} - set(wheel) == set()


def test_the_wheel_carries_both_licences(wheel: list[str]) -> None:
    names = {Path(name).name for name in wheel if ".dist-info/" in name}
    assert {"LICENSE", "GPL-2.0-only.txt"} <= names


# --- generated code ---------------------------------------------------------------------------------


def test_generated_code_is_what_the_sources_make(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "proto/generate.py"), "--into", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    fresh = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    # The package's own docstring is written by hand.
    by_hand = {"driver/__init__.py", "driver/pb/__init__.py"}
    stale = [name for name, path in fresh.items() if name not in by_hand and _differs(name, path)]
    orphans = {str(path) for path in tracked() if str(path).startswith(GENERATED)} - fresh.keys() - by_hand
    assert (stale, sorted(orphans)) == ([], []), "run `make generate`"


def _differs(name: str, fresh: Path) -> bool:
    kept = ROOT / name
    return not kept.is_file() or kept.read_bytes() != fresh.read_bytes()
