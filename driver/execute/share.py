"""Acts for the interface of a share: made on top of the device that is given out in parts, and removed.

Invariant: as for every act, safe to repeat and safe where it does not apply. The device underneath is the
host's, and nothing of it is changed.
"""

from __future__ import annotations

import errno
from collections.abc import Collection

from bpf.attach import TcxPrograms
from driver.errors import NotNow, Refusal
from driver.execute.target import Target
from hw.errors import Busy, NotFound, Refused, Unsupported
from hw.model import IfIndex, LinkInfo, SoftwareIdentity
from hw.subinterface import MADE_UNDERNEATH, SubinterfaceKind

CANNOT = "ShareRefused"
_MODULES = {SubinterfaceKind.VLAN: "8021q"}
"""Where they are not called like the kind."""


def made_past(target: Target, known: Collection[IfIndex]) -> tuple[LinkInfo, ...]:
    """Interfaces that a pod with NET_ADMIN made on the device underneath, by way of its share: no program
    counts what they send, and nothing limits it. known: indices of shares, of which the pod may have
    several."""
    identity = target.preparation.identity
    if target.preparation.share is None or target.pod is None or not isinstance(identity, SoftwareIdentity):
        return ()
    return tuple(
        link
        for link in target.pod.dump()
        if link.kind in MADE_UNDERNEATH
        and (link.peer, link.peer_nsid is None) == (identity.peer, False)
        and link.ifindex not in known
    )


class ShareActs:
    """Bound to this node's programs, which say of an interface that is not to be found whether it still
    lives; None where it has no tcx."""

    def __init__(self, programs: TcxPrograms | None) -> None:
        self._programs = programs

    def make(self, target: Target) -> None:
        """At home, down. Nothing if there is one, here or in the pod; NotNow if it is where nobody can see
        it, or the device under it is not there."""
        preparation = target.preparation
        share, identity = preparation.share, preparation.identity
        if share is None or target.find_at_home() is not None or target.find_in_pod() is not None:
            return
        assert isinstance(identity, SoftwareIdentity)
        assert identity.peer is not None
        self._check_ended(target)
        try:
            target.home.add_subinterface(
                share.interface,
                index=identity.ifindex,
                parent=identity.peer,
                name=preparation.baseline.name,
                mac=preparation.baseline.mac if share.interface.has_own_mac else None,
            )
            # The kernel takes no alias for what it is making.
            target.home.change(identity.ifindex, alias=preparation.baseline.alias)
        except NotFound as error:
            raise NotNow(f"{target.device}: {error}") from error
        except Busy as error:
            raise Refusal(
                CANNOT,
                f"{target.device} cannot be made: {error}; {preparation.key.device} is in a bridge or bond, "
                "or has interfaces of another kind on top of it already",
            ) from error
        except Unsupported as error:
            kind = share.interface.kind
            raise Refusal(
                CANNOT,
                f"{target.device} cannot be made: {error}; this kernel has no {kind}: modprobe "
                f"{_MODULES.get(kind, kind)}",
            ) from error
        except Refused as error:
            if error.errno != errno.EEXIST:
                raise
            self._check_index(target, identity.ifindex)
            if share.interface.vlan is None:
                raise
            raise Refusal(
                CANNOT,
                f"{target.device} cannot be made: others have VLAN {share.interface.vlan} of "
                f"{preparation.key.device} already",
            ) from error

    def remove(self, target: Target) -> None:
        """Wherever it is. NotNow where that is a netns that nobody told us of."""
        link = target.find_in_pod()
        if link is not None and target.pod is not None:
            target.pod.delete(link.ifindex)
        link = target.find_at_home()
        if link is not None:
            target.home.delete(link.ifindex)
        self._check_ended(target)

    def _check_ended(self, target: Target) -> None:
        pair = self._programs.state(target.device) if self._programs is not None else None
        if pair is not None and pair.alive:
            raise NotNow(
                f"{target.device} is in a network namespace that its pod made, which still lives: end what "
                "is left of the pod"
            )

    def _check_index(self, target: Target, index: IfIndex) -> None:
        if target.home.by_index(index) is not None:
            raise NotNow(f"{target.device}: another interface has the index {index} that was chosen for it")
