"""The program cache: compiled once, never with bcc in this process, never trusted when damaged."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from bpf import cache as cache_module
from bpf import source
from bpf.cache import PREBUILT_NAME, ProgramCache
from bpf.errors import CompileFailed, CompilerMissing
from bpf.program import CompiledPrograms

_CAPSET = {"x86_64": 126, "aarch64": 91}
_PR_SET_SECUREBITS, _SECBIT_NOROOT = 28, 1


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of the children that were started."""
    started: list[list[str]] = []
    real = subprocess.run

    def run(command: list[str], **more: object) -> object:
        started.append(command)
        return real(command, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(cache_module.subprocess, "run", run)
    return started


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledPrograms:
    folder = tmp_path_factory.mktemp("programs")
    return ProgramCache(folder, prebuilt=folder / "none").ensure()


def cache_in(tmp_path: Path, sources: Path = source.DIRECTORY) -> ProgramCache:
    return ProgramCache(tmp_path / "state/programs", sources=sources, prebuilt=tmp_path / "prebuilt")


def the_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "state/programs").iterdir()
    return path


def test_it_compiles_once_in_a_child_that_is_isolated(
    tmp_path: Path, compiles: list[list[str]], compiled: CompiledPrograms
) -> None:
    assert cache_in(tmp_path).ensure() == compiled
    assert cache_in(tmp_path).ensure() == compiled
    assert [command[1:4] for command in compiles] == [["-I", "-m", "bpf.compile"]]
    assert "bcc" not in sys.modules
    assert the_file(tmp_path).stat().st_mode & 0o77 == 0
    assert the_file(tmp_path).parent.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-40],
        lambda text: text.replace("instructions", "x"),
        lambda text: "{}",
    ],
    ids=["empty", "cut", "renamed", "hollow"],
)
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, compiles: list[list[str]], compiled: CompiledPrograms, damage: object
) -> None:
    cache_in(tmp_path).ensure()
    path = the_file(tmp_path)
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    assert cache_in(tmp_path).ensure() == compiled
    assert len(compiles) == 2
    assert CompiledPrograms.parse(path.read_text()) == compiled


def test_changed_source_or_header_or_compiler_is_compiled_anew_and_the_old_file_goes(
    tmp_path: Path, compiles: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(source.DIRECTORY, tmp_path / "c")
    cache_in(tmp_path, tmp_path / "c").ensure()
    for name in ("acct.bpf.c", "acct.h", "include/asm/page.h"):
        path = tmp_path / "c" / name
        path.write_text(path.read_text() + "\n/* changed */\n")
        cache_in(tmp_path, tmp_path / "c").ensure()
    assert len(compiles) == 4
    assert the_file(tmp_path)
    monkeypatch.setattr(source, "compiler_version", lambda: "99.0")
    cache_in(tmp_path, tmp_path / "c").ensure()
    assert len(compiles) == 5


def test_a_file_that_says_it_is_of_another_source_is_not_used(
    tmp_path: Path, compiled: CompiledPrograms, compiles: list[list[str]]
) -> None:
    cache_in(tmp_path).ensure()
    for other in (replace(compiled, source_key="0" * 64), replace(compiled, compiler="0")):
        the_file(tmp_path).write_text(other.dump())
        assert cache_in(tmp_path).ensure() == compiled
    assert len(compiles) == 3


def test_agents_that_start_together_all_get_programs_and_leave_one_file(
    tmp_path: Path, compiled: CompiledPrograms
) -> None:
    found: list[CompiledPrograms] = []
    threads = [threading.Thread(target=lambda: found.append(cache_in(tmp_path).ensure())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [compiled] * 3
    assert the_file(tmp_path).suffix == ".json"


def test_without_bcc_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match="python3-bpfcc"):
        cache_in(tmp_path).ensure()


def test_prebuilt_programs_need_no_bcc_and_no_writable_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: CompiledPrograms, compiles: list[list[str]]
) -> None:
    (tmp_path / "prebuilt").mkdir()
    (tmp_path / "prebuilt" / PREBUILT_NAME).write_text(compiled.dump())
    monkeypatch.setattr(source, "compiler_version", lambda: None)
    assert cache_in(tmp_path).ensure() == compiled
    assert not compiles
    assert not (tmp_path / "state").exists()


def test_prebuilt_programs_of_another_source_are_not_used(
    tmp_path: Path, compiled: CompiledPrograms, compiles: list[list[str]]
) -> None:
    (tmp_path / "prebuilt").mkdir()
    other = replace(compiled, source_key="0" * 64)
    (tmp_path / "prebuilt" / PREBUILT_NAME).write_text(other.dump())
    assert cache_in(tmp_path).ensure() == compiled
    assert len(compiles) == 1


def test_a_source_that_does_not_compile_shows_the_compilers_words(tmp_path: Path) -> None:
    shutil.copytree(source.DIRECTORY, tmp_path / "c")
    main = tmp_path / "c/acct.bpf.c"
    main.write_text(main.read_text().replace("int egress(", "int egress(nonsense "))
    with pytest.raises(CompileFailed, match=r"acct\.bpf\.c(.|\n)*unknown type name 'nonsense'"):
        cache_in(tmp_path, tmp_path / "c").ensure()
    assert not (tmp_path / "state").exists()


def test_a_compiler_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "COMPILE_SECONDS", 0.001)
    with pytest.raises(CompileFailed, match="did not compile"):
        cache_in(tmp_path).ensure()


def test_a_missing_source_is_an_incomplete_installation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="installation is incomplete"):
        cache_in(tmp_path, tmp_path / "nothing").ensure()


def test_the_version_is_read_without_importing_bcc() -> None:
    def ask(code: str) -> list[str]:
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.split()

    (real,) = ask("import bcc; print(bcc.__version__)")
    read = "import sys; from bpf import source; print(source.compiler_version(), 'bcc' in sys.modules)"
    assert ask(read) == [real, "False"]


def without_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0:
        assert libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NOROOT, 0, 0, 0) == 0
    assert libc.syscall(_CAPSET[platform.machine()], header, nothing) == 0


def test_compiling_needs_no_privilege(compiled: CompiledPrograms) -> None:
    """An image build may do it: no map is made, nothing is loaded."""
    done = subprocess.run(
        [sys.executable, "-I", "-m", "bpf.compile"],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=without_capabilities,
    )
    assert CompiledPrograms.parse(done.stdout) == compiled
