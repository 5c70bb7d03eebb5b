"""Which PF's VFs this driver made: one file per PF, in words that outlive a version.

Invariant: a file is whole or absent, and is on the disk before what it tells of is begun. What cannot be read
was not made by us. A record speaks of one boot: a reboot unmakes every VF.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from driver.errors import NotNow
from driver.model import BootId
from hw.model import EswitchMode, PfAddress, parse_pf_address

_VERSION = 1
_LIMIT = 16 * 1024
_ADDED: Mapping[str, object] = {"mode": "", "instance": 0}
"""Fields that earlier records do not have, and what that means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What was begun on a PF, and what it was like before that in this boot.

    vfs is the number that is or was to be made, from previous ones. done: all of them are as settings says.
    """

    address: PfAddress
    boot_id: BootId
    vfs: int
    previous: int
    settings: str
    done: bool
    autoprobe: bool
    was_up: bool
    mtu: int
    mode: str = ""
    """The eswitch mode it was in; "": it is left in the one it is in."""

    instance: int = 0
    """Of the first VF, once they are done: VFs that others made since have another. 0: not known."""

    def made(self, number: int, instance: int | None, boot_id: BootId) -> bool:
        """Whether this is how its VFs came to be that many, and these. instance: of the first there is."""
        if self.boot_id != boot_id or number not in (self.vfs, self.previous):
            return False
        return not (self.done and self.instance) or instance in (None, self.instance)


class Makings:
    """The folder with the records. Not thread-safe for one PF: its device locks are held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> tuple[Mapping[PfAddress, Making], tuple[str, ...]]:
        """All that can be read, and a sentence for each that cannot."""
        found: dict[PfAddress, Making] = {}
        problems: list[str] = []
        try:
            paths = sorted(self._folder.glob("*.json"))
        except OSError as error:
            return {}, (f"{self._folder} cannot be listed: {error.strerror}",)
        for path in paths:
            try:
                making = _parse(path)
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                problems.append(f"{path} is not a record of VFs that were made, and counts as none: {error}")
                continue
            found[making.address] = making
        return found, tuple(problems)

    def write(self, making: Making) -> None:
        """NotNow if it cannot be put on the disk: then nothing may be begun."""
        path = self._path(making.address)
        text = json.dumps({"version": _VERSION, **asdict(making)}, indent=1)
        new = path.with_suffix(".json.new")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(new, "w", encoding="ascii", opener=_private) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, path)
            self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise NotNow(f"{path} cannot be written, so no VFs are made: {error.strerror}") from error

    def forget(self, address: PfAddress) -> None:
        """None there is no error."""
        try:
            self._path(address).unlink(missing_ok=True)
        except OSError as error:
            raise NotNow(f"{self._path(address)} cannot be removed: {error.strerror}") from error

    def _path(self, address: PfAddress) -> Path:
        return self._folder / f"{parse_pf_address(address)}.json"

    def _sync(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _parse(path: Path) -> Making:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        tree = json.loads(file.read(_LIMIT + 1))
    if not isinstance(tree, dict) or tree.pop("version", None) != _VERSION:
        raise ValueError("it is of another version")
    types = {"str": str, "int": int, "bool": bool, "PfAddress": str, "BootId": str}
    wanted = {field.name: types[str(field.type)] for field in fields(Making)}
    # Records of this boot may be those of an earlier version.
    tree = {**_ADDED, **tree}
    if tree.keys() != wanted.keys() or any(type(tree[name]) is not kind for name, kind in wanted.items()):
        raise ValueError("its fields are not those of a record")
    if min(tree["vfs"], tree["previous"], tree["mtu"]) < 0:
        raise ValueError("it has a number below zero")
    if tree["mode"] not in ("", *(mode.value for mode in EswitchMode)):
        raise ValueError("it names an eswitch mode that there is not")
    making = Making(**tree)
    if f"{parse_pf_address(making.address)}.json" != path.name:
        raise ValueError("it is filed under the name of another PF")
    return making
