"""The policy's section `rdma`: the node's mode, and RDMA in software where there is no hardware for it.

Invariant: the defaults change nothing on a node: its mode stays, no device is made, no module is asked for.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

from driver.policy.infiniband import InfinibandRules
from driver.rdma import RdmaMode, SoftRdma
from driver.strict import Key, boolean, choice, record


class ModeChoice(enum.StrEnum):
    """asIs: whichever the node is in."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"
    AS_IS = "asIs"

    @property
    def mode(self) -> RdmaMode | None:
        return None if self is ModeChoice.AS_IS else RdmaMode(self.value)


class SoftChoice(enum.StrEnum):
    RXE = "rxe"
    SIW = "siw"
    NONE = "none"

    @property
    def kind(self) -> SoftRdma | None:
        return None if self is SoftChoice.NONE else SoftRdma(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaRules:
    """What the policy says of RDMA."""

    mode: Annotated[
        ModeChoice,
        Key(
            "mode",
            choice(ModeChoice),
            "The mode the node is to be in. Set when the agent starts and when this changes; the kernel "
            "takes it only while there is no other network namespace: else it has to be done at boot "
            "(ib_core.netns_mode).",
        ),
    ] = ModeChoice.AS_IS
    software: Annotated[
        SoftChoice,
        Key(
            "software",
            choice(SoftChoice),
            "For tests and edge clusters: what is made on an attached interface that has no RDMA device of "
            "its own, and removed when it leaves the pod.",
        ),
    ] = SoftChoice.NONE
    infiniband: Annotated[
        InfinibandRules | None,
        Key("infiniband", record(InfinibandRules), "What VFs on InfiniBand are given; absent: nothing."),
    ] = None
    load_modules: Annotated[
        bool,
        Key(
            "loadModules",
            boolean(),
            "The kernel may load a software device's module when one is made; false: that is done at boot.",
        ),
    ] = False


DEFAULT_RDMA = RdmaRules()
