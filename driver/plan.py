"""What is to be done to a device, as data: an ordered list of steps, each with its undo.

Invariant: pure. A plan is made from the records alone; every step and every undo is safe to repeat and
safe where it was never done, so that after a crash the whole of a plan's undo brings the device home,
wherever the crash was.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bpf.layout import Hook
from driver.model import Attachment, Preparation, attachment_owner, preparation_owner
from driver.rdma import RdmaBinding


class Act(enum.StrEnum):
    """One change to the node. What each does is in driver.execute.actions."""

    ARM = "arm-programs"
    DISARM = "disarm-programs"
    ZERO_SLOT = "zero-slot"
    MOVE_IN = "move-in"
    FILTER = "attach-filters"
    SHAPE = "set-limits"
    UNSHAPE = "take-limits-off"
    ADDRESS = "add-addresses"
    UP = "link-up"
    DOWN = "link-down"
    FOLD = "fold-counters"
    METER = "begin-meters"
    STRIP = "strip-tenant-state"
    MOVE_HOME = "move-home"
    TIDY = "put-in-order"
    RESTORE = "restore-baseline"
    VERIFY = "verify-clean"
    SET_VF = "set-on-pf"
    RESTORE_VF = "restore-on-pf"
    VERIFY_VF = "verify-on-pf"
    UNBIND = "take-from-driver"
    TO_VFIO = "bind-to-vfio"
    TO_KERNEL = "bind-to-kernel"
    VERIFY_VFIO = "verify-vfio"
    RESTORE_PORT = "restore-port"
    NOTE_FOREIGN = "note-foreign-programs"
    PUT_FOREIGN_BACK = "put-foreign-programs-back"
    RDMA_IN = "move-rdma-in"
    RDMA_HOME = "move-rdma-home"
    RDMA_ADD = "make-rdma"
    RDMA_REMOVE = "remove-rdma"
    RDMA_FILES = "find-rdma-files"
    RDMA_RESTORE = "name-rdma"
    RDMA_VERIFY = "verify-rdma"
    PORT_ACTIVE = "wait-for-port"
    PARTITION = "find-partition"
    IPOIB_MAKE = "make-ipoib"
    IPOIB_IN = "move-ipoib-in"
    IPOIB_UP = "ipoib-up"
    IPOIB_FOLD = "fold-ipoib-counters"
    IPOIB_REMOVE = "remove-ipoib"
    SHARE_MAKE = "make-share"
    SHARE_REMOVE = "remove-share"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """undo lists acts, in the order they are run. budget is how many seconds must be left to start it:
    about the worst case seen of its kernel call, so that a step begun is a step finished in time."""

    act: Act
    undo: tuple[Act, ...] = ()
    budget: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """owner names the record this is done for, in the journal's step table. A homeward plan goes on when
    the journal cannot be written: its acts are safe to repeat, and a device must not be kept by a full
    disk."""

    owner: str
    generation: int
    steps: tuple[Step, ...]
    homeward: bool = False


# The kernel waits for all readers of the device when it changes its netns: about 20 ms, 50 ms at p99.
_MOVE_BUDGET = 0.12

# Unbinding waits for the driver to let go, and binding for its probe: a second each on a busy node.
_BIND_BUDGET = 5.0

# A PF's firmware may take its time; and for an address the VF's driver may have to begin anew.
_PF_BUDGET = 3.0

# The kernel unregisters and registers its clients with a device that moves, uverbs among them.
_RDMA_BUDGET = 0.2

_SHARE = Step(act=Act.SHARE_MAKE, undo=(Act.SHARE_REMOVE,), budget=0.1)

# Queues are made for it, by the device's firmware, and programs are loaded.
_IPOIB_BUDGET = 0.2

_RDMA_CLEAN: Mapping[bool, tuple[Act, ...]] = {True: (Act.RDMA_RESTORE, Act.RDMA_VERIFY), False: ()}
"""By whether an RDMA device goes with it."""

_HOMEWARD = (Act.DOWN, Act.UNSHAPE, Act.STRIP, Act.MOVE_HOME, Act.RESTORE)


def prepare(preparation: Preparation, hook: Hook) -> Plan:
    """Everything slow that needs no pod. clsact filters die in a move, so only tcx is armed here. What others
    have on the device is on record before anything is done to it."""
    steps = [] if preparation.share is None else [_SHARE]
    if not preparation.by_file:
        steps.append(Step(act=Act.NOTE_FOREIGN, undo=(Act.PUT_FOREIGN_BACK,), budget=0.1))
    if not preparation.rdma_only and preparation.share is None:
        steps.append(Step(act=Act.TIDY, budget=0.1))
    if preparation.rdma is not None:
        steps.append(Step(act=Act.RDMA_VERIFY, budget=_RDMA_BUDGET))
    if preparation.vf_wanted is not None:
        address = preparation.config.interface.hardware_address is not None
        probes = preparation.can_be_probed and (address or preparation.infiniband is not None)
        budget = _PF_BUDGET + (_BIND_BUDGET if probes else 0.0)
        steps.append(Step(act=Act.SET_VF, undo=(Act.RESTORE_VF, Act.RESTORE), budget=budget))
    if preparation.infiniband is not None and preparation.rdma is not None:
        # Its driver began anew, and may have called its device something else.
        wait = preparation.infiniband.active_seconds + _RDMA_BUDGET
        steps += [Step(act=Act.RDMA_RESTORE), Step(act=Act.PORT_ACTIVE, budget=wait)]
    if preparation.config.rdma.partition is not None and preparation.rdma is not None:
        # Once the port is active: the subnet manager fills its table.
        steps.append(Step(act=Act.PARTITION))
    if preparation.config.by_file:
        steps.append(Step(act=Act.TO_VFIO, undo=(Act.TO_KERNEL, Act.RESTORE), budget=_BIND_BUDGET))
    elif hook is Hook.TCX and not preparation.rdma_only:
        steps.append(Step(act=Act.ARM, undo=(Act.DISARM,), budget=0.1))
    return Plan(
        owner=preparation_owner(preparation.key), generation=preparation.generation, steps=tuple(steps)
    )


def unprepare(preparation: Preparation, *, reset: bool = False) -> Plan:
    """After the last detach. No undo: it goes forward until the device is clean or quarantined.

    reset: a VF's driver begins anew with it. Its PF's settings are changed while no driver has it: whoever
    had it can see nothing of the host's VLAN, and the driver starts with the address that it is to have. A
    GUID is given up in no other way.
    """
    reset = reset or preparation.infiniband is not None
    probes = preparation.config.by_file or (reset and preparation.can_be_probed)
    on_pf = preparation.vf_baseline is not None
    netdev = not preparation.rdma_only and preparation.share is None
    acts = [
        *((Act.SHARE_REMOVE,) if preparation.share is not None else ()),
        *(() if preparation.by_file else (Act.DISARM, Act.PUT_FOREIGN_BACK)),
        *((Act.UNBIND,) if probes else ()),
        *((Act.RESTORE_VF,) if on_pf else ()),
        *((Act.TO_KERNEL,) if probes else ()),
        *((Act.RESTORE,) if netdev else ()),
        *((Act.VERIFY_VF,) if on_pf else ()),
        *((Act.VERIFY,) if netdev else ()),
        *((Act.RESTORE_PORT,) if preparation.port is not None else ()),
        *_RDMA_CLEAN[preparation.rdma is not None],
    ]
    return Plan(
        owner=preparation_owner(preparation.key),
        generation=preparation.generation,
        homeward=True,
        steps=tuple(Step(act=act) for act in acts),
    )


def tidy(preparation: Preparation) -> Plan:
    """Make a device that is in no pod ready for the next one again and see whether it is. What its PF was
    told for it may be gone: a reboot makes VFs anew."""
    set_vf = (Step(act=Act.SET_VF),) if preparation.vf_wanted is not None else ()
    rdma = tuple(Step(act=act) for act in _RDMA_CLEAN[preparation.rdma is not None])
    on_vfio = (*set_vf, Step(act=Act.TO_VFIO), Step(act=Act.VERIFY_VFIO))
    netdev = (Step(act=Act.RESTORE), *set_vf, Step(act=Act.VERIFY), *rdma)
    return Plan(
        owner=preparation_owner(preparation.key),
        generation=preparation.generation,
        homeward=True,
        steps=on_vfio if preparation.config.by_file else rdma if preparation.rdma_only else netdev,
    )


def remake(preparation: Preparation) -> Plan:
    """Have an interface there again that was made for a share: a pod or a reboot ended it, or the device that
    it was made on was away."""
    return Plan(
        owner=preparation_owner(preparation.key),
        generation=preparation.generation,
        homeward=True,
        steps=(Step(act=Act.SHARE_MAKE),),
    )


def attach(attachment: Attachment, preparation: Preparation, hook: Hook) -> Plan:
    """From home into the pod: only what needs the pod's netns.

    The programs are attached before the move (tcx) or before the link is up (clsact), so no packet of
    the pod passes uncounted; what passed before an undo is folded like everything else. What the device
    counts itself is read last: some drivers begin anew when the link is set up.
    """
    steps = [Step(act=Act.ZERO_SLOT, undo=(Act.FOLD,))]
    if preparation.config.by_file:
        steps.append(Step(act=Act.VERIFY_VFIO))
    else:
        netdev = [] if preparation.rdma_only else _netdev_in(preparation, hook)
        steps += _with_rdma(preparation.rdma, netdev)
    steps.append(Step(act=Act.METER))
    return Plan(owner=attachment_owner(attachment.id), generation=attachment.generation, steps=tuple(steps))


def _netdev_in(preparation: Preparation, hook: Hook) -> list[Step]:
    steps = [Step(act=Act.MOVE_IN, undo=_HOMEWARD, budget=_MOVE_BUDGET)]
    ipoib = preparation.config.rdma.ipoib is not None
    if ipoib:
        # While the interface that it is made on is at home. It is gone again before that one comes back.
        make = Step(act=Act.IPOIB_MAKE, undo=(Act.IPOIB_REMOVE,), budget=_IPOIB_BUDGET)
        steps = [make, *steps, Step(act=Act.IPOIB_IN, undo=(Act.IPOIB_REMOVE,), budget=_MOVE_BUDGET)]
    if hook is Hook.CLSACT:
        steps.append(Step(act=Act.FILTER, budget=0.05))
    steps.append(Step(act=Act.SHAPE, budget=0.05))
    if preparation.config.interface.addresses:
        steps.append(Step(act=Act.ADDRESS))
    # The kernel has an IPoIB interface work no sooner than its port's own one is up; and that one takes it
    # along when it is set down.
    after = [Step(act=Act.IPOIB_UP, undo=(Act.IPOIB_FOLD,), budget=0.05)] if ipoib else []
    return [*steps, Step(act=Act.UP, undo=(Act.DOWN,), budget=0.05), *after]


def _with_rdma(binding: RdmaBinding | None, netdev: list[Step]) -> list[Step]:
    """Hardware goes in before its netdev: drivers make that one anew when the RDMA device moves. What is
    software stands on the netdev, is made when that is there, and ends before it leaves."""
    if binding is None:
        return netdev
    move = Step(act=Act.RDMA_IN, undo=(Act.RDMA_HOME, Act.RDMA_RESTORE), budget=_RDMA_BUDGET)
    moves = [move] if binding.moves else []
    files = Step(act=Act.RDMA_FILES, budget=0.1)
    if binding.software is None:
        return [*moves, *netdev, files]
    make = Step(act=Act.RDMA_ADD, undo=(Act.RDMA_REMOVE,), budget=_RDMA_BUDGET)
    return [*netdev, make, *(replace(each, undo=()) for each in moves), files]


def detach(attachment: Attachment, preparation: Preparation) -> Plan:
    """From the pod home. No undo. The link is down before the counters are read, so they are final, and its
    queues are there still, with what they dropped; and the netdev is home before the RDMA device that it
    belongs to is.

    A device given by its files stays bound to vfio until the claim ends: a sandbox made anew is not prepared
    again. vfio resets it when its last user closes it.
    """
    binding = preparation.rdma
    netdev = not preparation.rdma_only
    acts = [
        *((Act.IPOIB_FOLD, Act.IPOIB_REMOVE) if preparation.config.rdma.ipoib is not None else ()),
        *((Act.DOWN,) if netdev else ()),
        Act.FOLD,
        *((Act.UNSHAPE,) if netdev else ()),
        *((Act.RDMA_REMOVE,) if binding is not None and binding.software is not None else ()),
        *((Act.STRIP, Act.MOVE_HOME) if netdev else ()),
        *((Act.RDMA_HOME,) if binding is not None and binding.software is None else ()),
        *((Act.RESTORE, Act.VERIFY) if netdev else ()),
        *_RDMA_CLEAN[binding is not None],
    ]
    if preparation.config.by_file:
        acts = [Act.FOLD, Act.VERIFY_VFIO]
    return Plan(
        owner=attachment_owner(attachment.id),
        generation=attachment.generation,
        homeward=True,
        steps=tuple(Step(act=act) for act in acts),
    )
