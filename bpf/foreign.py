"""Programs that others left on a device, so that one tenant's do not reach the next.

Invariant: only programs of the one device meant are taken off. tcx programs are listed by the kernel per
device; an XDP link is found among all links of the machine by device number and program, and since numbers
repeat between network namespaces, none is touched unless the device certainly has one and only one fits.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

from bpf import sys, xdp
from bpf.errors import Ambiguous, CallRefused

_TCX = (sys.AttachType.TCX_EGRESS, sys.AttachType.TCX_INGRESS)


class ForeignHook(enum.StrEnum):
    TCX_EGRESS = "tcx/egress"
    TCX_INGRESS = "tcx/ingress"
    XDP = "xdp"


@dataclass(frozen=True, slots=True)
class ForeignProgram:
    """links is empty for a program attached without one. For XDP it holds every link that could be this
    device's, which may be none of them."""

    hook: ForeignHook
    program: sys.ProgramId
    links: tuple[sys.LinkId, ...] = ()


@dataclass(frozen=True, slots=True)
class Own:
    """What is not foreign: links, of TcxPrograms.links_of, and programs, by whatever they are attached.
    everything: no pod can have left any."""

    links: frozenset[sys.LinkId] = frozenset()
    programs: frozenset[sys.ProgramId] = frozenset()
    everything: bool = False


def described(hook: ForeignHook, program: sys.ProgramFd) -> str:
    """For people: bpftool knows it by the number."""
    return f"{hook} {sys.prog_name(program)!a} (program {sys.prog_id(program)})"


def foreign_programs(ifindex: int, *, own: Own) -> tuple[ForeignProgram, ...]:
    """What is on a device of this thread's netns, less what is ours.

    OSError (ENODEV: no such device), CallRefused.
    """
    if own.everything:
        return ()
    found = [
        ForeignProgram(_hook(where), entry.program, (entry.link,) if entry.link else ())
        for where in _TCX
        for entry in _query(ifindex, where)
        if entry.link not in own.links and entry.program not in own.programs
    ]
    attached = xdp.attached_programs(ifindex)
    links = _xdp_links(ifindex) if attached else {}
    found += [
        ForeignProgram(ForeignHook.XDP, program, links.get(program, ()))
        for program in dict.fromkeys(attached.values())
        if program not in own.programs and not own.links & set(links.get(program, ()))
    ]
    return tuple(found)


def detach_foreign(ifindex: int, *, own: Own) -> tuple[ForeignProgram, ...]:
    """Take off what foreign_programs gives, whoever holds it, and say what it was.

    CallRefused or OSError from the kernel; Ambiguous: only an XDP program is left.
    """
    found = foreign_programs(ifindex, own=own)
    for program in found:
        if program.hook is not ForeignHook.XDP:
            _remove_tcx(ifindex, program)
    for program in found:
        if program.hook is ForeignHook.XDP:
            _remove_xdp(ifindex, program)
    return found


def _remove_tcx(ifindex: int, found: ForeignProgram) -> None:
    try:
        if found.links:
            _detach(found.links[0])
        else:
            with sys.prog_get_fd_by_id(found.program) as program:
                sys.prog_detach(program, ifindex, sys.AttachType[found.hook.name])
    except CallRefused as error:
        # Gone between listing and removing.
        if error.errno != errno.ENOENT:
            raise


def _remove_xdp(ifindex: int, found: ForeignProgram) -> None:
    """By netlink first, which means this device alone; the kernel refuses that if a link holds it."""
    for mode, program in xdp.attached_programs(ifindex).items():
        if program != found.program:
            continue
        try:
            xdp.detach(ifindex, mode)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if len(found.links) != 1:
                raise Ambiguous(
                    f"interface {ifindex} has an XDP program on a link and {len(found.links)} links could be "
                    "its own, devices in other network namespaces having the same number: bind the device's "
                    "driver anew to unload it"
                ) from None
            _detach(found.links[0])


def _detach(number: sys.LinkId) -> None:
    with sys.link_get_fd_by_id(number) as link:
        sys.link_detach(link)


def _hook(where: sys.AttachType) -> ForeignHook:
    return ForeignHook[where.name]


def _query(ifindex: int, where: sys.AttachType) -> tuple[sys.Attached, ...]:
    try:
        return sys.prog_query(ifindex, where)
    except CallRefused as error:
        # A kernel without tcx has nothing there.
        if error.errno == errno.EINVAL:
            return ()
        raise


def _xdp_links(ifindex: int) -> dict[sys.ProgramId, tuple[sys.LinkId, ...]]:
    """XDP links on devices with this number, in whatever netns, by program."""
    found: dict[sys.ProgramId, tuple[sys.LinkId, ...]] = {}
    number = sys.link_get_next_id(0)
    while number is not None:
        try:
            with sys.link_get_fd_by_id(number) as link:
                info = sys.link_info(link)
        except CallRefused as error:
            # Gone, or not made yet.
            if error.errno not in (errno.ENOENT, errno.EAGAIN):
                raise
        else:
            if info.type == sys.LinkType.XDP and info.ifindex == ifindex:
                found[info.program] = (*found.get(info.program, ()), info.id)
        number = sys.link_get_next_id(number)
    return found
