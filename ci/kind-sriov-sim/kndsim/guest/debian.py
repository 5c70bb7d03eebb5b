"""Debian's packages for a root file system that is not this machine's, reached as this machine reaches them.

Invariant: no address is written here: they come from the machine's own sources at run time, and nothing of
them, nor of its proxies and certificates, goes into a root that is made. The machine's own package state
stays as it is.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kndsim.guest.work import Work

ETC_APT = Path("/etc/apt")


class NoPackages(Exception):
    """Debian's packages cannot be reached from here, or not the ones that are needed."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One archive that has this machine's release."""

    uri: str
    signed_by: str
    security: bool


def archives(etc: Path = ETC_APT, codename: str | None = None) -> list[Archive]:
    """Debian's archives among the machine's sources; others' have no place in a guest."""
    here = codename or platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    found: dict[str, Archive] = {}
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.suffix in (".list", ".sources") and path.is_file():
            read = _stanzas if path.suffix == ".sources" else _lines
            for archive in read(path.read_text(), here):
                found.setdefault(archive.uri, archive)
    if not here or not found:
        raise NoPackages(
            f"no Debian archive for {here or 'this system'} in {etc}: the guest is made on Debian 12 or 13"
        )
    return list(found.values())


def _stanzas(text: str, codename: str) -> list[Archive]:
    found = []
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            key, colon, value = line.partition(":")
            if colon and not line.startswith(("#", " ", "\t")):
                fields[key.strip().lower()] = value.strip()
        suites, uris = fields.get("suites", "").split(), fields.get("uris", "").split()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes") != "no":
            found += _ours(uris, suites, codename, fields.get("signed-by", ""))
    return found


def _lines(text: str, codename: str) -> list[Archive]:
    found = []
    for line in text.splitlines():
        words = line.partition("#")[0].replace("[", " [ ").replace("]", " ] ").split()
        if words[:1] != ["deb"]:
            continue
        signed_by = ""
        if words[1:2] == ["["]:
            end = words.index("]")
            signed_by = "".join(
                w.removeprefix("signed-by=") for w in words[2:end] if w.startswith("signed-by=")
            )
            words = ["deb", *words[end + 1 :]]
        if len(words) >= 3:
            found += _ours([words[1]], [words[2]], codename, signed_by)
    return found


def _ours(uris: Sequence[str], suites: Sequence[str], codename: str, signed_by: str) -> list[Archive]:
    wanted = [suite for suite in suites if suite == codename or suite.startswith(f"{codename}-")]
    security = any(suite.endswith("-security") for suite in wanted)
    return [Archive(uri, signed_by, security) for uri in uris if wanted and "/debian" in uri]


def sources(known: Sequence[Archive], release: str, *, backports: bool = False) -> str:
    """An apt sources file, in apt's own format, for a release."""
    stanzas = []
    for archive in known:
        suites = [f"{release}-security"] if archive.security else [release, f"{release}-updates"]
        if backports and not archive.security:
            suites.append(f"{release}-backports")
        lines = ["Types: deb", f"URIs: {archive.uri}", f"Suites: {' '.join(suites)}", "Components: main"]
        if archive.signed_by:
            lines.append(f"Signed-By: {archive.signed_by}")
        stanzas.append("\n".join(lines) + "\n")
    return "\n".join(stanzas)


def settings() -> list[Path]:
    """The machine's apt settings that say how its archives are reached."""
    files = [ETC_APT / "apt.conf", *sorted((ETC_APT / "apt.conf.d").glob("*"))]
    return [
        path
        for path in files
        if path.is_file() and any(line.startswith("Acquire") for line in path.read_text().splitlines())
    ]


class Apt:
    """A package index of its own in a folder. Nothing is installed by it; packages are downloaded."""

    def __init__(self, work: Work, folder: Path, sources: str) -> None:
        self._work = work
        for name in ("lists/partial", "cache/archives/partial", "sources"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        (folder / "sources/guest.sources").write_text(sources)
        told = {
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": folder / "sources",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            # Would take the index of the machine's own away.
            "APT::Update::Post-Invoke": "",
        }
        self._options = [part for key, value in told.items() for part in ("-o", f"{key}={value}")]
        work.run(["apt-get", *self._options, "-qq", "update"])

    def _ask(self, *question: str) -> str:
        return self._work.run(["apt-cache", *self._options, *question])

    def newest(self, package: str, suites: str) -> str:
        """The highest version of a package in the suites whose name starts so, but not in its backports
        unless those are meant."""
        for line in self._ask("madison", package).splitlines():
            _, version, origin = (part.strip() for part in line.split("|"))
            suite = origin.split()[1].partition("/")[0]
            if suite == suites or (suite.startswith(f"{suites}-") and not suite.endswith("-backports")):
                return version
        raise NoPackages(f"no {package} in Debian's {suites}: is the machine's package mirror complete?")

    def needs(self, package: str, version: str = "") -> list[str]:
        """The packages a package depends on, first alternatives."""
        shown = self._ask("show", f"{package}={version}" if version else package)
        for line in shown.splitlines():
            if line.startswith("Depends: "):
                wants = line.removeprefix("Depends: ").split(",")
                return [want.split("|")[0].split()[0].partition(":")[0] for want in wants]
        return []

    def download(self, packages: Sequence[str], into: Path) -> list[Path]:
        into.mkdir(parents=True, exist_ok=True)
        before = set(into.glob("*.deb"))
        self._work.run(["apt-get", *self._options, "-qq", "download", *packages], cwd=into)
        return sorted(set(into.glob("*.deb")) - before)


def make_root(
    work: Work, root: Path, packages: Sequence[str], known: Sequence[Archive], *, variant: str = "minbase"
) -> None:
    """A root file system of Debian 13 with these packages and without documentation, sources and lists."""
    source = root.parent / f"{root.name}.sources"
    source.write_text(sources(known, "trixie"))
    unwanted = ("doc", "man", "locale", "info", "lintian", "bug")
    work.run(
        [
            "mmdebstrap",
            "--quiet",
            "--mode=root",
            f"--variant={variant}",
            f"--include={','.join(packages)}",
            "--aptopt=APT::Install-Recommends false",
            "--aptopt=Acquire::Languages none",
            *(f"--aptopt={path}" for path in settings()),
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in unwanted),
            "trixie",
            str(root),
            str(source),
        ]
    )
    for path in [root / "etc/apt/sources.list", *(root / "etc/apt").glob("*.d/*")]:
        if path.exists():
            path.unlink()


def listed(path: Path) -> list[str]:
    """The packages of a list with reasons, as deploy/debian-packages.txt is one."""
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
