"""What the ground that a run stands on has, and which cases need what of it.

Invariant: known from the choice of cluster alone, before anything is started. A case whose needs a ground
does not meet is not part of the run there: it is taken out, with the reason in the summary, and never
counted as passed or skipped.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from tests.real_cluster import GUEST, Choice

MARKER = "needs"


class DeviceKind(enum.StrEnum):
    VETH = "veth"
    VF = "vf"
    NETDEVSIM = "netdevsim"


class Feature(enum.StrEnum):
    """What not every cluster has."""

    DEVICE_TAINT_RULES = "DeviceTaintRule"
    EXTENDED_RESOURCES = "extended resources by DRA"
    USER_NAMESPACES = "pods in user namespaces"
    AMOUNTS = "scheduler that gives amounts of a device that is not the first of its slice"
    """1.34's compares what is asked for with the slice's first device (allocator_experimental.go,
    allocateDevice), and so gives nothing of any other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """devices: of this kind, on each node. wired: those of all nodes reach each other."""

    choice: Choice
    kind: DeviceKind
    nodes: int
    devices: int
    wired: bool
    features: frozenset[Feature]
    selector: str
    """CEL: the devices that the cases may use."""

    @property
    def pace(self) -> float:
        return self.choice.pace

    def lacks(self, needs: Mapping[str, object]) -> str:
        """Why a case cannot run here; "" if it can."""
        for name, wanted in needs.items():
            match name, wanted:
                case ("nodes", int()) if self.nodes < wanted:
                    return f"needs {wanted} nodes, there are {self.nodes}"
                case ("devices", int()) if self.devices < wanted:
                    return f"needs {wanted} devices on a node, there are {self.devices}"
                case ("wired", True) if not self.wired:
                    return "needs devices that reach each other"
                case ("kind", DeviceKind()) if self.kind is not wanted:
                    return f"needs devices of kind {wanted}, they are {self.kind}"
                case ("feature", Feature()) if wanted not in self.features:
                    return f"Kubernetes {self.choice.kubernetes} here has no {wanted}"
        return ""


_KND = 'device.attributes["knd.internal"]'
DEVICES = 8
_FEATURES = {
    (1, 37): frozenset(Feature),
    (1, 34): frozenset(Feature) - {Feature.AMOUNTS},
}


def ground_of(choice: Choice) -> Ground:
    """A guest's devices are VFs of two PFs on one wire, named as the veths of a machine's cluster are."""
    kind, published = (DeviceKind.VF, "vf") if choice.name == GUEST else (DeviceKind.VETH, "netdev")
    return Ground(
        choice=choice,
        kind=kind,
        nodes=choice.nodes,
        devices=DEVICES,
        wired=True,
        features=_FEATURES[choice.version],
        selector=(
            f'device.driver == "knd.internal" && {_KND}.kind == "{published}" '
            f'&& {_KND}.ifName.startsWith("net-")'
        ),
    )


def needs(
    *,
    nodes: int = 1,
    devices: int = 1,
    wired: bool = False,
    kind: DeviceKind | None = None,
    feature: Feature | None = None,
) -> pytest.MarkDecorator:
    """Marks a case that does not run on every ground."""
    return pytest.mark.needs(nodes=nodes, devices=devices, wired=wired, kind=kind, feature=feature)


def take_out(items: list[pytest.Item], ground: Ground) -> tuple[list[pytest.Item], list[str]]:
    """The cases that do not apply here, and a sentence for each."""
    out, reasons = [], []
    for item in items:
        for mark in item.iter_markers(MARKER):
            if reason := ground.lacks(mark.kwargs):
                out.append(item)
                reasons.append(f"{item.nodeid}: {reason}")
                break
    return out, reasons
