"""What is looked at, and done, on a node itself: links, a pod's pause process, its network namespace.

Invariant: everything goes through the node's Place, so that it is the same on every ground.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tests.e2e.e2e_links import Link, parse_links
from tests.e2e.e2e_space import LivePod

if TYPE_CHECKING:
    from kndsim.place import Place

SPARE = "net-e2e"

# The pause program of this cluster's own image, or of a public one; nothing else is started by such a path.
_PAUSE_OF = r"""
wanted=$(echo "$1" | sed 's/-/[-_]/g')
for process in /proc/[0-9]*; do
    case "$(tr '\0' ' ' <"$process/cmdline" 2>/dev/null)" in
    /pause*|/knd-tool*) if grep -qs "$wanted" "$process/cgroup"; then echo "${process#/proc/}"; fi ;;
    esac
done
"""


def links_of(place: Place, prefix: str = "net-") -> Mapping[str, Link]:
    """The node's own links whose names begin so."""
    found = parse_links(place.run(["ip", "-o", "link"]).out)
    return {name: link for name, link in found.items() if name.startswith(prefix)}


def pauses_of(place: Place, pod: LivePod) -> list[int]:
    """The processes that hold the pod's sandboxes: one, or none while kubelet makes it anew."""
    return [int(pid) for pid in place.run(["sh", "-c", _PAUSE_OF, "sh", pod.uid]).out.split()]


def pause_of(place: Place, pod: LivePod) -> int:
    found = pauses_of(place, pod)
    assert len(found) == 1, f"pause processes of {pod.name}: {found}"
    return found[0]


def kill_sandbox(place: Place, pod: LivePod) -> int:
    """SIGKILL to the pause process: kubelet makes a sandbox anew. The pid it had."""
    pid = pause_of(place, pod)
    place.run(["kill", "-9", str(pid)])
    return pid


UPLINK, UPLINK_FAR = "share-0", "share-far"
UPLINK_ADDRESS, FAR_ADDRESS = "198.18.7.1/24", "198.18.7.2/24"


@contextlib.contextmanager
def uplink(place: Place) -> Iterator[str]:
    """A device that the node itself uses, with an address, and somebody at its other end: the policy gives it
    out in shares. The CEL that selects it."""
    far = "e2e-uplink"
    try:
        for command in (
            f"ip netns add {far}",
            f"ip link add {UPLINK} type veth peer name {UPLINK_FAR} netns {far}",
            f"ip -n {far} addr add {FAR_ADDRESS} dev {UPLINK_FAR}",
            f"ip -n {far} link set {UPLINK_FAR} up",
            f"ip addr add {UPLINK_ADDRESS} dev {UPLINK}",
            f"ip link set {UPLINK} up",
        ):
            place.run(command.split())
        yield f'device.attributes["knd.internal"].ifName == "{UPLINK}"'
    finally:
        place.run(["ip", "link", "del", UPLINK], check=False)
        place.run(["ip", "netns", "del", far], check=False)


@contextlib.contextmanager
def spare_nic(place: Place) -> Iterator[str]:
    """A virtual device of the case's own on the node, wired to nothing: one that may be destroyed. A veth
    dies with its network namespace where no agent holds that open. The CEL that selects it."""
    place.run(["ip", "link", "add", SPARE, "type", "veth", "peer", "name", "e2e-far"])
    try:
        yield f'device.attributes["knd.internal"].ifName == "{SPARE}"'
    finally:
        place.run(["ip", "link", "del", SPARE], check=False)
