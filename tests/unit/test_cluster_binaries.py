"""Which programs a cluster gets, at which version, and what a failed build says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kndsim.cache import Cache
from kndsim.cluster import ClusterSpec, binaries
from kndsim.cluster.binaries import PINS, BuildFailed, build_arguments, program_names, read_pin
from kndsim.cluster.toolchain import toolchain
from kndsim.progress import Progress

OLD = ClusterSpec(kubernetes="1.34", containerd="2.1")
NEW = ClusterSpec(kubernetes="1.37", containerd="2.4")
ALL = sorted({*OLD.pins, *NEW.pins})


def pin_at(tmp_path: Path, text: str) -> Path:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "go.mod").write_text(text)
    (tmp_path / "it" / "go.sum").write_text("")
    return tmp_path


@pytest.mark.parametrize("spec", [OLD, NEW])
def test_every_program_a_cluster_starts_is_pinned(spec: ClusterSpec) -> None:
    programs = {name for pin in spec.pins for name in program_names(read_pin(pin)).values()}
    control_plane = {"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"}
    node = {"kubelet", "containerd", "containerd-shim-runc-v2", "ctr", "runc"}
    assert programs == control_plane | node | {"bridge", "host-local", "loopback"}


@pytest.mark.parametrize("name", ALL)
def test_a_pins_name_says_its_version_and_its_hashes_are_there(name: str) -> None:
    pin = read_pin(name)
    kind, _, version = name.partition("-")
    shortened = {"kubernetes": "v1.", "containerd": "v2."}
    if version:
        assert pin.version.startswith(f"v{version}.")
        assert pin.version.startswith(shortened[kind])
    module = next(line for line in (PINS / name / "go.mod").read_text().splitlines() if pin.version in line)
    assert f"{module.split()[0]} {pin.version} h1:" in (PINS / name / "go.sum").read_text()


def test_a_program_is_built_from_hashed_modules_and_told_its_version(tmp_path: Path) -> None:
    pin = read_pin("kubernetes-1.34")
    argv = build_arguments(pin, "k8s.io/kubernetes/cmd/kubelet", tmp_path)
    assert "-mod=readonly" in argv
    assert "-trimpath" in argv
    assert f"k8s.io/component-base/version.gitVersion={pin.version}" in argv[argv.index("-ldflags") + 1]
    assert argv[-2:] == [str(tmp_path / "kubelet"), "k8s.io/kubernetes/cmd/kubelet"]


def test_etcds_program_is_not_called_after_its_folder(tmp_path: Path) -> None:
    (command,) = read_pin("etcd").commands
    assert str(tmp_path / "etcd") in build_arguments(read_pin("etcd"), command, tmp_path)


def test_one_line_and_block_directives_are_both_read(tmp_path: Path) -> None:
    pins = pin_at(
        tmp_path, "module m\n\ngo 1.26.0\n\ntool a.b/c/cmd/d // it\n\nrequire a.b/c v1.2.3 // indirect\n"
    )
    pin = read_pin("it", pins)
    assert (pin.go, pin.version, pin.commands) == ("1.26.0", "v1.2.3", ("a.b/c/cmd/d",))


def test_an_unknown_pin_names_those_there_are() -> None:
    with pytest.raises(BuildFailed, match=r"no pin 'kubernetes-1\.99': known are .*kubernetes-1\.37"):
        read_pin("kubernetes-1.99")


def test_a_pin_that_names_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="no `tool` line"):
        read_pin("it", pin_at(tmp_path, "module m\n\ngo 1.26.0\n"))


def test_without_go_the_reader_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildFailed, match=r"no `go` here: install .*golang-go"):
        binaries.binaries("etcd", Progress("test"), Cache(tmp_path))


def fake_go(folder: Path, monkeypatch: pytest.MonkeyPatch, build: str, version: str = "go1.26.0") -> None:
    """A `go` that answers questions and runs `build` for all else."""
    script = folder / "go"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$1 $2" in "env GOVERSION") echo {version} ;; "env GOARCH") echo amd64 ;; *) {build} ;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_go_that_may_not_fetch_the_one_it_needs_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "go"
    said = "go: go.mod requires go >= 1.26.0 (running go 1.24.4; GOTOOLCHAIN=local)"
    script.write_text(f'#!/bin/sh\n[ "$PWD" = / ] && echo go1.24.4 && exit\necho "{said}" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BuildFailed, match=r"build etcd: .*running go 1\.24\.4.*set GOTOOLCHAIN=auto"):
        binaries.binaries("etcd", Progress("test"), Cache(tmp_path / "cache"))


def test_a_go_too_old_to_fetch_a_newer_one_is_helped_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes as a module has no executable file in it."""
    home = tmp_path / "fetched"
    (home / "bin").mkdir(parents=True)
    (home / "pkg/tool").mkdir(parents=True)
    newer = home / "bin/go"
    newer.write_text(f'#!/bin/sh\n[ "$GOROOT" = {home} ] && echo go1.26.8\n')
    newer.chmod(0o444)
    fake_go(
        tmp_path, monkeypatch, f'echo "$3 $4" >{tmp_path}/asked; echo \'{{"Dir": "{home}"}}\'', "go1.19.8"
    )
    found = toolchain(PINS / "etcd")
    assert (found.command, found.version) == (str(newer), "go1.26.8")
    assert (tmp_path / "asked").read_text() == "-json golang.org/toolchain@v0.0.1-go1.26.8.linux-amd64\n"


def test_a_failed_build_says_why_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_go(tmp_path, monkeypatch, 'echo "ld: cannot find -lseccomp: No such file" >&2; exit 1')
    cache = tmp_path / "cache"
    with pytest.raises(BuildFailed, match=r"(?s)pin runc failed.*cannot find -lseccomp.*libseccomp-dev"):
        binaries.binaries("runc", Progress("test"), Cache(cache))
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_a_build_that_takes_too_long_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_go(tmp_path, monkeypatch, f"sleep 60 & echo $! >{tmp_path}/child; wait")
    recipe = binaries.Recipe(limit=0.5)
    monkeypatch.setattr(binaries, "RECIPES", {**binaries.RECIPES, "etcd": recipe})
    with pytest.raises(BuildFailed, match=r"etcd took longer than 0\.5 s"):
        binaries.binaries("etcd", Progress("test"), Cache(tmp_path / "cache"))
    child = int((tmp_path / "child").read_text())
    assert _ended(child)


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
