"""A Debian root file system as a folder: made, and run in, without a container engine.

Invariant: nothing of this machine can be written from inside. What a command may see of it (sources,
settings, certificates, name resolution) are copies, bound in for the length of that command and not in the
root afterwards; /proc is read-only, /dev holds harmless devices. Every mount lives in a mount namespace of
the command, so none is left however it ends.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_KEPT = re.compile(
    r"PIP_(INDEX_URL|EXTRA_INDEX_URL|CERT|TRUSTED_HOST|DEFAULT_TIMEOUT)|SSL_CERT_(FILE|DIR)"
    r"|REQUESTS_CA_BUNDLE|(https?|no|all)_proxy|(HTTPS?|NO|ALL)_PROXY"
)
"""Variables that have to do with reaching packages; no other goes into the root."""

_BARE = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "LANG": "C.UTF-8"}
_ENTER = """
root=$1; shift
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir -m 1777 "$root/dev/shm"
mount -t proc -o ro proc "$root/proc"
while [ "$1" != -- ]; do mount --bind "$1" "$root$2"; shift 2; done
shift
exec chroot "$root" "$@"
"""
_BUNDLE = "/run/machine-ca.crt"
_CA_VARIABLES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


class RootFailed(Exception):
    """A command in the root, or the making of it, failed: which, and the end of what it said."""


def make_root(root: Path, suite: str) -> None:
    """Debian's minimal system of that suite at root, which does not exist yet or is empty."""
    _must_be_able()
    with tempfile.TemporaryDirectory() as scratch:
        sources = _sources(Path(scratch), suite)
        options = [f"--aptopt={file}" for file in _apt_settings()]
        options.append("--dpkgopt=path-exclude=/usr/share/man/*")
        _run(
            ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *options, suite, root, sources],
            timeout=900,
            environment=_environment(),
        )
    for left in (*root.glob("etc/apt/sources.list*"), *root.glob("etc/*/*.d/99mmdebstrap")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for name in ("etc/resolv.conf", "etc/hostname"):
        (root / name).unlink(missing_ok=True)


def run_in(
    root: Path,
    argv: Sequence[str],
    *,
    binds: Mapping[Path, str] | None = None,
    packages: bool = False,
    timeout: float = 900,
) -> None:
    """Run argv in the root, in process and mount namespaces of its own. RootFailed if it does not end well.

    binds: what of this machine is seen where, for the command alone. packages: it may reach package archives.
    """
    _must_be_able()
    environment = _BARE
    with tempfile.TemporaryDirectory() as scratch:
        wanted = [(source, target) for source, target in (binds or {}).items()]
        namespaces = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
        if packages:
            wanted += ways_to_packages(Path(scratch), _suite_of(root))
            environment = _environment() | dict.fromkeys(_CA_VARIABLES, _BUNDLE)
            environment.pop("SSL_CERT_DIR", None)
        else:
            namespaces.append("--net")
        with _mount_points(root, wanted):
            command = ["unshare", *namespaces, "bash", "-euc", _ENTER, "enter", str(root)]
            for source, target in wanted:
                command += [str(source), target]
            _run([*command, "--", *argv], timeout=timeout, environment=environment)


def _must_be_able() -> None:
    if os.geteuid() != 0:
        raise RootFailed("a Debian root is made with mounts and chroot: run this as root")
    if shutil.which("mmdebstrap") is None:
        raise RootFailed("mmdebstrap is missing: apt-get install mmdebstrap")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)} | _BARE


def _run(command: Sequence[str | Path], *, timeout: float, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        shown = " ".join(map(str, command)).replace(_ENTER, "...")
        raise RootFailed(f"{shown} ended with {done.returncode}: {done.stdout.strip()[-3000:]}")


# --- how this machine reaches packages ----------------------------------------------------------------


def _suite_of(root: Path) -> str:
    found = re.search(r"^VERSION_CODENAME=(\S+)$", (root / "etc/os-release").read_text(), re.MULTILINE)
    if found is None:
        raise RootFailed(f"{root}/etc/os-release names no Debian suite (VERSION_CODENAME)")
    return found[1]


def _sources(scratch: Path, suite: str) -> Path:
    """This machine's own Debian sources, for that suite, as one file in scratch."""
    here = _suite_of(Path("/"))
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.*"))]
    texts = [file.read_text() for file in files if file.is_file()]
    # Third parties' archives have no place in it.
    ours = [text for text in texts if here in text and "/debian" in text]
    if not ours:
        raise RootFailed(f"apt's sources on this machine name no Debian archive of its suite, {here}")
    text = re.sub(rf"\b{here}\b", suite, "\n".join(ours))
    kind = "sources" if re.search(r"^Types:", text, re.MULTILINE) else "list"
    (made := scratch / f"debian.{kind}").write_text(text)
    return made


def _apt_settings() -> list[Path]:
    """Files that say how apt reaches its archives."""
    files = [Path("/etc/apt/apt.conf"), *sorted(Path("/etc/apt").glob("*.conf.d/*"))]
    return [
        file
        for file in files
        if file.is_file() and re.search(r"^(Acquire|machine)", file.read_text(), re.MULTILINE)
    ]


def ways_to_packages(scratch: Path, suite: str) -> list[tuple[Path, str]]:
    """What is to be seen where so that apt and pip reach their archives: copies in scratch, all of them,
    since what runs in the root is root and packages do write to such places."""
    plain = [Path("/etc/resolv.conf"), Path("/etc/hosts"), Path("/etc/pip.conf"), *_apt_settings()]
    bound = [(_copied(path, scratch), str(path)) for path in plain if path.exists()]
    sources = _sources(scratch, suite)
    bound.append((sources, f"/etc/apt/sources.list.d/{sources.name}"))
    bundle = Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")
    if bundle.exists():
        (told := scratch / "98-certificates").write_text(f'Acquire::https::CaInfo "{_BUNDLE}";\n')
        bound += [(told, f"/etc/apt/apt.conf.d/{told.name}"), (_copied(bundle, scratch), _BUNDLE)]
    return bound


def _copied(path: Path, scratch: Path) -> Path:
    copy = scratch / str(path).lstrip("/").replace("/", "-")
    shutil.copyfile(path, copy)
    return copy


@contextmanager
def _mount_points(root: Path, wanted: Sequence[tuple[Path, str]]) -> Iterator[None]:
    """What is not there to mount on is there for the body, and gone after it."""
    made: list[Path] = []
    try:
        for source, target in wanted:
            point = root / target.lstrip("/")
            missing = [path for path in (point, *point.parents) if not path.exists()]
            for path in reversed(missing):
                if path == point and not source.is_dir():
                    path.touch()
                else:
                    path.mkdir()
                made.append(path)
        yield
    finally:
        for path in reversed(made):
            if not path.is_dir():
                path.unlink(missing_ok=True)
            elif not any(path.iterdir()):  # a package may have come to live there meanwhile
                path.rmdir()
