"""Changing a card's eswitch mode.

Invariant: whoever calls has seen to it that nobody uses the card or its VFs. A mode that is there already is
not set again. What goes with a mode (the nodes of a rate tree) is deleted by name, and said.
"""

from __future__ import annotations

import errno
import logging

from hw.devlink import Devlink, switch
from hw.devlink_codec import DevlinkHandle
from hw.errors import Busy, HwError, Unsupported
from hw.model import EswitchMode, PfAddress

log = logging.getLogger(__name__)

BEFORE_VFS = frozenset({"ice"})
"""PF drivers that change their mode only while they have no VFs. mlx5 and the others do it under VFs that are
there and that no driver has; bnxt needs some, and netdevsim goes back to legacy mode with its last."""


def mode_of(card: PfAddress) -> EswitchMode | None:
    """None where it has no switch with a mode."""
    try:
        with Devlink() as devlink:
            return devlink.eswitch_mode(DevlinkHandle.of_card(card))
    except Unsupported:
        return None


def change(card: PfAddress, mode: EswitchMode) -> bool:
    """Whether it was in another one. Busy with ETIMEDOUT where its driver is long about it; HwError else."""
    now = mode_of(card)
    if now is mode or (now is None and mode is EswitchMode.LEGACY):
        return False
    handle = DevlinkHandle.of_card(card)
    what = f"set the eswitch mode of {handle} to {mode}"
    if now is None:
        raise Unsupported(what, errno.EOPNOTSUPP, "its driver has none")
    if mode is EswitchMode.LEGACY:
        _delete_nodes(handle)
    log.info("%s, which was %s", what, now)
    switch(handle, mode)
    if mode_of(card) is not mode:
        raise HwError(f"{what}: the kernel said that it is done, and it is not")
    return True


def _delete_nodes(handle: DevlinkHandle) -> None:
    """Of a rate tree: no card goes back to legacy mode with one."""
    with Devlink() as devlink:
        mine = [rate for rate in devlink.rates() if rate.handle == handle]
        for leaf in mine:
            if leaf.port is not None and leaf.parent is not None:
                devlink.set_leaf(handle, leaf.port, parent="")
        left = [rate.node for rate in mine if rate.node is not None]
        while left:
            kept = []
            for node in left:
                try:
                    devlink.delete_node(handle, node)
                    log.info("deleted rate node %a of %s", node, handle)
                except Busy:
                    # A node below it has to go first.
                    kept.append(node)
            if len(kept) == len(left):
                raise Busy(f"delete rate nodes {kept} of {handle}", errno.EBUSY)
            left = kept
