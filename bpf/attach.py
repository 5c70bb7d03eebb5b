"""Pinned tcx links: one pair per device, which follows the device wherever it goes.

Invariant: a device has at most one egress and one ingress program of ours, and a pin that is kept belongs
to a living link. tcx links survive a move into a pod's netns, renames, the way back and the end of the agent,
and nobody inside the pod can take them off. Calls that name an ifindex mean the calling thread's netns.
Crashes between two steps leave at worst half a pair or a dead pin; attach and detach heal both.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from bpf import sys
from bpf.accounting import Accounting
from bpf.errors import BpfError, CallRefused
from bpf.layout import Framing, Hook, Slot
from bpf.loaded import place_of
from bpf.maps import LINKS
from bpf.pins import make_pin_directory

T = TypeVar("T")

_SUFFIXES = ("-eg", "-in")
_CHILD = "_child"
"""After a device's name, in which there is no `_`."""
_HOOKS = (sys.AttachType.TCX_EGRESS, sys.AttachType.TCX_INGRESS)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")
_CLONE_NEWNET = 0x40000000
_LOOPBACK = 1
"""ifindex of `lo` in a new netns."""
RETURN_UNSPEC = struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)
"""A whole program: return -1, the next one decides."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """One direction. ifindex is the device's in its own netns, 0 once the device is gone."""

    link: sys.LinkId
    program: sys.ProgramId
    ifindex: int


@dataclass(frozen=True, slots=True)
class LinkPair:
    """Both directions; None where there is no pin."""

    egress: LinkState | None
    ingress: LinkState | None

    @property
    def complete(self) -> bool:
        """Both are there and on a device that exists."""
        return all(half is not None and half.ifindex != 0 for half in (self.egress, self.ingress))

    @property
    def alive(self) -> bool:
        """The device exists, in whatever netns."""
        return any(half is not None and half.ifindex != 0 for half in (self.egress, self.ingress))


class TcxPrograms:
    """The links pinned under pins/links as NAME-eg and NAME-in. Calls for one name must not overlap."""

    def __init__(self, pins: Path, accounting: Accounting) -> None:
        """BpffsMissing if pins is not on a bpffs."""
        self._links = pins / LINKS
        self._accounting = accounting
        make_pin_directory(self._links)

    def attach(self, name: str, ifindex: int, slot: Slot, framing: Framing = Framing.ETHERNET) -> None:
        """Count both directions of a device of this thread's netns, whose packets are framed so, into slot.

        May be repeated, also with another slot or a device made anew. On failure what was there before is
        there again. ValueError for a name that cannot be a file, CallRefused.
        """
        _check_name(name)
        with contextlib.ExitStack() as fds, contextlib.ExitStack() as undo:
            # Both are loaded before anything changes, as loading is what fails, if anything does.
            load = partial(self._accounting.load, slot, framing=framing)
            programs = [fds.enter_context(load(way)) for way in range(len(_HOOKS))]
            for way, program in enumerate(programs):
                pin = self._pin(name, way)
                link = _link_on(pin, ifindex, _HOOKS[way])
                if link is None:
                    _remove(pin)
                    _make(pin, program, ifindex, _HOOKS[way])
                    undo.callback(_remove, pin)
                else:
                    fds.enter_context(link)
                    before = fds.enter_context(sys.prog_get_fd_by_id(sys.link_info(link).program))
                    sys.link_update(link, program)
                    undo.callback(sys.link_update, link, before)
            undo.pop_all()

    def detach(self, name: str) -> None:
        """Take both programs off, wherever the device is, and forget the links; a child's as well. May be
        repeated."""
        _check_name(name)
        for each in (child_of(name), name):
            for way in range(len(_HOOKS)):
                _remove(self._pin(each, way))

    def state(self, name: str) -> LinkPair | None:
        """What is pinned for name; None if nothing is."""
        _check_name(name)
        halves = [_state(self._pin(name, way)) for way in range(len(_HOOKS))]
        return LinkPair(*halves) if any(halves) else None

    def slot(self, name: str) -> Slot | None:
        """The slot that name's egress program counts into; None where nothing is pinned."""
        _check_name(name)
        try:
            with sys.obj_get_link(self._pin(name, 0)) as link:
                info = sys.link_info(link)
        except CallRefused as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        with sys.prog_get_fd_by_id(info.program) as program:
            place = place_of(program)
        return None if place is None else place.slot

    def names(self) -> frozenset[str]:
        """Every name with at least one pin; that of a child is its device's."""
        found = (path.name for path in self._links.iterdir())
        pinned = (name[: -len(_SUFFIXES[0])] for name in found if name.endswith(_SUFFIXES))
        return frozenset(name.removesuffix(_CHILD) for name in pinned)

    def repoint_all(self, slots: Mapping[str, Slot]) -> frozenset[str]:
        """Give every whole pair named in slots fresh programs: what an agent does when it starts. They read
        what those before read, and so do the programs of a child.

        Works whatever netns the devices are in. Returns the names in slots that have no whole pair: their
        device is gone or a crash came in between, and attach makes them anew. Pins of other names stay.
        """
        wanting: set[str] = set()
        for name, slot in slots.items():
            pair = self.state(name)
            if pair is None or not pair.complete:
                wanting.add(name)
                continue
            self._repoint(name, slot)
            child = self.state(child_of(name))
            if child is not None and child.complete:
                self._repoint(child_of(name), slot)
        return frozenset(wanting)

    def _repoint(self, name: str, slot: Slot) -> None:
        for way in range(len(_HOOKS)):
            with (
                sys.obj_get_link(self._pin(name, way)) as link,
                self._accounting.load(slot, way, _framing_of(link)) as program,
            ):
                sys.link_update(link, program)

    def is_on(self, name: str, ifindex: int) -> bool:
        """Whether a device of this thread's netns is the one that name's programs are on."""
        link = _link_on(self._pin(name, 0), ifindex, _HOOKS[0])
        if link is not None:
            link.close()
        return link is not None

    def links_of(self, name: str) -> frozenset[sys.LinkId]:
        """The links pinned for one device: what foreign_programs and detach_foreign leave alone on it."""
        pair = self.state(name)
        halves = (pair.egress, pair.ingress) if pair is not None else ()
        return frozenset(half.link for half in halves if half is not None)

    def _pin(self, name: str, way: int) -> Path:
        return self._links / f"{name}{_SUFFIXES[way]}"


def pinned_links(pins: Path) -> frozenset[sys.LinkId]:
    """Of every device and every release of the agent, for whoever only looks."""
    states = (_state(path) for path in pins.rglob(f"{LINKS}/*") if path.name.endswith(_SUFFIXES))
    return frozenset(state.link for state in states if state is not None)


def child_of(name: str) -> str:
    """What the programs are pinned as that are on an interface made on the device called name, and count into
    its slot."""
    return f"{name}{_CHILD}"


def _check_name(name: str) -> None:
    # A bpffs takes no dots, and the suffix must stay recognisable.
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a BPF pin: 1 to 200 of letters, digits, '_', '-'")


def _state(pin: Path) -> LinkState | None:
    try:
        link = sys.obj_get_link(pin)
    except CallRefused as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    with link:
        info = sys.link_info(link)
    if info.type != sys.LinkType.TCX or info.ifindex is None:
        raise BpfError(f"{pin} is not a tcx link: something else pinned it there; remove that file")
    return LinkState(info.id, info.program, info.ifindex)


def _link_on(pin: Path, ifindex: int, hook: sys.AttachType) -> sys.LinkFd | None:
    """The pinned link, open, if it is on this device of this thread's netns."""
    state = _state(pin)
    # The number in the link's own description may be that of another netns; the device's list may not.
    if state is None or all(state.link != entry.link for entry in sys.prog_query(ifindex, hook)):
        return None
    return sys.obj_get_link(pin)


def _framing_of(link: sys.LinkFd) -> Framing:
    """What the link's program reads."""
    with sys.prog_get_fd_by_id(sys.link_info(link).program) as program:
        place = place_of(program)
    return Framing.ETHERNET if place is None else place.framing


def _make(pin: Path, program: sys.ProgramFd, ifindex: int, hook: sys.AttachType) -> None:
    # Closing it before it is pinned detaches it: nothing stays behind when pinning fails.
    with sys.link_create(program, ifindex, hook) as link:
        sys.obj_pin(link, pin)


def _remove(pin: Path) -> None:
    try:
        link = sys.obj_get_link(pin)
    except CallRefused as error:
        if error.errno == errno.ENOENT:
            return
        raise
    with link:
        # Detached rather than only unpinned: someone else may hold a descriptor of it.
        sys.link_detach(link)
    pin.unlink(missing_ok=True)


def probe_tcx() -> Hook:
    """What this kernel offers, found by a trial on the loopback of a netns made for it and gone afterwards.

    CallRefused or OSError if not even that can be tried: no CAP_SYS_ADMIN, no BPF.
    """
    return in_new_netns(_try_tcx)


def _try_tcx() -> Hook:
    with sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="knd_probe") as program:
        try:
            sys.link_create(program, _LOOPBACK, sys.AttachType.TCX_INGRESS).close()
        except CallRefused as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return Hook.CLSACT
            raise
    return Hook.TCX


def in_new_netns(work: Callable[[], T]) -> T:
    """Run work in a thread of its own, which alone is in the netns and takes it along when it ends."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(_CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"making a network namespace for a trial: {os.strerror(code)}")
            results.append(work())
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="knd-probe")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
