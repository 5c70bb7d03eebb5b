"""Programs that others had on a device before it was given away: on record, and off meanwhile where wished.

Invariant: what is taken off can be put back, or nothing is taken off. A place that others have stays theirs,
a link's or one among the others of a hook, with a program in it that does nothing. What was there is pinned
until then, so it outlives owner and agent, and the pin's name says where it belongs. An owner that changed
its link meanwhile has the last word; what a pod took off, kept or not, is there again. Calls that name an
ifindex mean the calling thread's netns.
"""

from __future__ import annotations

import contextlib
import errno
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from bpf import sys, xdp
from bpf.attach import RETURN_UNSPEC
from bpf.errors import Ambiguous, CallRefused
from bpf.foreign import ForeignHook, ForeignProgram, Own, described, foreign_programs
from bpf.pins import make_pin_directory
from bpf.xdp import XdpMode

_FOLDER = "foreign"
_NOTED = "noted"
"""A folder in a device's: all that was there is on record."""
_PASS = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)
"""A whole program: return XDP_PASS."""
_ENTRY = re.compile(r"(tcx_egress|tcx_ingress|xdp)-([0-9]+)-([0-9]+)-([0-9]+)-([0-9]+)")
_WHERE = {
    ForeignHook.TCX_EGRESS: sys.AttachType.TCX_EGRESS,
    ForeignHook.TCX_INGRESS: sys.AttachType.TCX_INGRESS,
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """mode: of an XDP program that netlink attached, else 0. link: 0 where there is none. standin: what has
    its place meanwhile, itself where it is kept; 0 once it is back for good."""

    hook: ForeignHook
    mode: int
    link: sys.LinkId
    program: sys.ProgramId
    standin: sys.ProgramId

    @property
    def is_off(self) -> bool:
        return self.standin not in (0, self.program)

    @property
    def pin(self) -> str:
        return f"{self.hook.name.lower()}-{self.mode}-{self.link}-{self.program}-{self.standin}"


class Parked:
    """Pinned under pins/foreign, a folder a device. Calls for one name must not overlap."""

    def __init__(self, pins: Path) -> None:
        self._root = pins / _FOLDER

    def is_new(self) -> bool:
        """Whether make_folder was not called yet since the machine started, and nothing noted."""
        return not self._root.is_dir()

    def make_folder(self) -> None:
        """So that is_new is over. May be repeated."""
        make_pin_directory(self._root)

    def note(self, name: str, ifindex: int, own: Own, *, off: bool) -> tuple[ForeignProgram, ...]:
        """Put on record what others have on a device, and take it off if so wished; returns that.

        May be repeated. Ambiguous, CallRefused or OSError, a sentence each, if it could not be put back; then
        all that was taken off before is back.
        """
        found = foreign_programs(ifindex, own=own)
        standins = {entry.standin for entry in self._entries(name) if entry.is_off}
        new = [each for each in found if each.program not in standins]
        try:
            for each in new:
                for stale in self._of(name, each):
                    self._path(name, stale).unlink()
                self._note(name, ifindex, each, off=off)
            self.mark(name)
        except (Ambiguous, CallRefused, OSError):
            self.put_back(name, ifindex)
            self.forget(name)
            raise
        return tuple(new)

    def put_back(self, name: str, ifindex: int | None) -> None:
        """Give every place its program again, once, for which the device must be at home unless a link has
        it. May be repeated, also where nothing was taken off: what its owner took off since stays off."""
        for entry in self._entries(name):
            if entry.standin:
                with sys.obj_get_program(self._path(name, entry)) as program:
                    _give_back(entry, program, ifindex)
                    self._amend(name, entry, standin=sys.ProgramId(0))

    def forget(self, name: str) -> None:
        """What is on the device is no concern of ours any more. May be repeated."""
        folder = self._root / name
        if folder.is_dir():
            # First: half a record would make the rest a tenant's.
            with contextlib.suppress(FileNotFoundError):
                (folder / _NOTED).rmdir()
            for pin in folder.iterdir():
                pin.unlink()
            folder.rmdir()

    def mark(self, name: str) -> None:
        """That what is on record is all there was. May be repeated."""
        make_pin_directory(self._root / name / _NOTED)

    def is_noted(self, name: str) -> bool:
        """Whether what is on a device and not on record came there later."""
        return (self._root / name / _NOTED).is_dir()

    def own(self, name: str) -> Own:
        """What was noted, and what has its place meanwhile: to be left alone by whoever cleans the device."""
        entries = self._entries(name)
        programs = {each for entry in entries for each in (entry.program, entry.standin) if each}
        return Own(frozenset(entry.link for entry in entries if entry.link), frozenset(programs))

    def is_off(self, name: str) -> bool:
        """Whether something stands in for a program of others."""
        return any(entry.is_off for entry in self._entries(name))

    def described(self, name: str) -> tuple[str, ...]:
        """Hook and program of each."""
        found = []
        for entry in self._entries(name):
            with sys.obj_get_program(self._path(name, entry)) as program:
                found.append(described(entry.hook, program))
        return tuple(found)

    def names(self) -> frozenset[str]:
        return frozenset(path.name for path in self._root.iterdir()) if self._root.is_dir() else frozenset()

    def _note(self, name: str, ifindex: int, found: ForeignProgram, *, off: bool) -> None:
        link = found.links[0] if len(found.links) == 1 else sys.LinkId(0)
        entry = _Entry(found.hook, 0, link, found.program, found.program)
        with sys.prog_get_fd_by_id(found.program) as program:
            if not off:
                for mode in _modes(ifindex, found):
                    self._pin(name, replace(entry, mode=mode), program)
            elif found.hook is ForeignHook.XDP:
                self._take_xdp_off(name, ifindex, found, program)
            else:
                with sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="knd_standin") as standin:
                    self._pin(name, _with(entry, standin), program)
                    if link:
                        _update(link, program, standin)
                    else:
                        sys.prog_attach(standin, ifindex, _WHERE[found.hook], program)

    def _take_xdp_off(self, name: str, ifindex: int, found: ForeignProgram, program: sys.ProgramFd) -> None:
        """By netlink first, which means this device alone; the kernel refuses that if a link holds it."""
        for mode, attached in xdp.attached_programs(ifindex).items():
            if attached != found.program:
                continue
            if mode is XdpMode.HARDWARE:
                raise Ambiguous(
                    f"interface {ifindex} has an XDP program in its hardware, which has no other beside it"
                )
            with sys.prog_load(sys.ProgramType.XDP, _PASS, name="knd_standin") as standin:
                entry = self._pin(
                    name,
                    _with(_Entry(found.hook, mode, sys.LinkId(0), attached, attached), standin),
                    program,
                )
                try:
                    xdp.replace(ifindex, mode, program.fd, standin.fd)
                except OSError as error:
                    self._path(name, entry).unlink()
                    if error.errno != errno.EBUSY:
                        raise
                    self._take_link_off(name, ifindex, found, program, standin)

    def _take_link_off(
        self, name: str, ifindex: int, found: ForeignProgram, program: sys.ProgramFd, standin: sys.ProgramFd
    ) -> None:
        if len(found.links) != 1:
            raise Ambiguous(
                f"interface {ifindex} has an XDP program on a link and {len(found.links)} links could be its "
                "own, devices in other network namespaces having the same number: it is not known which is "
                "to have it back"
            )
        entry = _Entry(found.hook, 0, found.links[0], found.program, found.program)
        self._pin(name, _with(entry, standin), program)
        _update(found.links[0], program, standin)

    def _pin(self, name: str, entry: _Entry, program: sys.ProgramFd) -> _Entry:
        make_pin_directory(self._root / name)
        sys.obj_pin(program, self._path(name, entry))
        return entry

    def _amend(self, name: str, entry: _Entry, *, standin: sys.ProgramId) -> None:
        self._path(name, entry).rename(self._path(name, replace(entry, standin=standin)))

    def _path(self, name: str, entry: _Entry) -> Path:
        return self._root / name / entry.pin

    def _entries(self, name: str) -> list[_Entry]:
        folder = self._root / name
        found = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            fields = _ENTRY.fullmatch(path.name)
            if fields is not None:
                numbers = [int(each) for each in fields.groups()[1:]]
                mode, link, program, standin = numbers
                hook = ForeignHook[fields[1].upper()]
                found.append(
                    _Entry(hook, mode, sys.LinkId(link), sys.ProgramId(program), sys.ProgramId(standin))
                )
        return found

    def _of(self, name: str, found: ForeignProgram) -> list[_Entry]:
        """What a crash left before it was taken off, or an earlier look."""
        return [e for e in self._entries(name) if (e.hook, e.program) == (found.hook, found.program)]


def _with(entry: _Entry, standin: sys.ProgramFd) -> _Entry:
    return replace(entry, standin=sys.prog_id(standin))


def _modes(ifindex: int, found: ForeignProgram) -> tuple[int, ...]:
    """Of an XDP program that netlink attached; what a link has, only whoever has the link takes off."""
    if found.hook is not ForeignHook.XDP or found.links:
        return (0,)
    attached = xdp.attached_programs(ifindex)
    return tuple(mode for mode, program in attached.items() if program == found.program)


def _update(link: sys.LinkId, before: sys.ProgramFd, after: sys.ProgramFd) -> None:
    with sys.link_get_fd_by_id(link) as held:
        sys.link_update(held, after, before)


def _give_back(entry: _Entry, program: sys.ProgramFd, ifindex: int | None) -> None:
    """Nothing where the place is no more, or its owner put something else there. A place without a link can
    be emptied by whoever has the device: then the program is attached anew."""
    try:
        if entry.link:
            with sys.prog_get_fd_by_id(entry.standin) as standin:
                _update(entry.link, standin, program)
        elif ifindex is not None and entry.mode:
            _give_xdp_back(entry, program, ifindex)
        elif ifindex is not None and entry.hook is not ForeignHook.XDP:
            _give_tcx_back(entry, program, ifindex)
    except (CallRefused, OSError) as error:
        if error.errno not in _OVER:
            raise


def _give_xdp_back(entry: _Entry, program: sys.ProgramFd, ifindex: int) -> None:
    mode = XdpMode(entry.mode)
    now = xdp.attached_programs(ifindex).get(mode)
    if now is None:
        xdp.replace(ifindex, mode, None, program.fd)
    elif now == entry.standin:
        with sys.prog_get_fd_by_id(entry.standin) as standin:
            xdp.replace(ifindex, mode, standin.fd, program.fd)


def _give_tcx_back(entry: _Entry, program: sys.ProgramFd, ifindex: int) -> None:
    where = _WHERE[entry.hook]
    now = {each.program for each in sys.prog_query(ifindex, where)}
    if entry.standin in now:
        with sys.prog_get_fd_by_id(entry.standin) as standin:
            sys.prog_attach(program, ifindex, where, standin)
    elif entry.program not in now:
        sys.prog_attach(program, ifindex, where)


_OVER = (errno.ENOENT, errno.ENOLINK, errno.EPERM, errno.EEXIST, errno.EBUSY, errno.ENODEV)
"""No such link, one without a device, another program in it than the one that stood in, by link or by
netlink, a link in its place, no such device."""
