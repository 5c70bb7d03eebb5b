"""Acts for the RDMA device that goes with a device: moved in and home, or made and removed in software.

Invariant: as for every act, safe to repeat and safe where it does not apply. A device is found by its index
or node GUID, a software one by the name we gave it; and what leaves a namespace is sent over a socket of it
and by a thread in it: kernels differ in which of the two they ask.
"""

from __future__ import annotations

import time

from driver.errors import NotNow, Refusal
from driver.execute.probe import Host
from driver.execute.target import NotClean, Target, Vanished
from driver.rdma import RdmaBinding
from hw.errors import NotFound, Unsupported
from hw.netns import NetnsHandle, run_in
from hw.rdma.netlink import RdmaSocket
from hw.rdma.nldev import NldevDevice
from hw.sriov.discovery import DEVICES

HOME_SECONDS = 1.0
"""For what the kernel does by itself, in a queue of its own, after a netns died or a netdev left."""
_PAUSE = 0.02


def binding_of(target: Target) -> RdmaBinding:
    binding = target.preparation.rdma
    assert binding is not None, "no RDMA device goes with it"
    return binding


def places_of(target: Target) -> tuple[NetnsHandle | None, ...]:
    """The namespaces that the device may be in, the pod's first; None is home."""
    return (target.pod_netns, None) if binding_of(target).moves and target.pod_netns is not None else (None,)


def find(socket: RdmaSocket, target: Target) -> NldevDevice | None:
    """The device, as the socket's namespace sees it."""
    binding, devices = binding_of(target), socket.devices()
    if binding.software is not None:
        return next((device for device in devices if device.name == binding.name), None)
    given = target.attachment.rdma if target.attachment is not None else None
    indexes = {binding.index, given.index if given is not None else None}
    by_index = next((device for device in devices if device.index in indexes), None)
    guids = guids_of(target) - {""}
    if by_index is not None or not guids:
        return by_index
    return next((device for device in devices if device.node_guid in guids), None)


def guids_of(target: Target) -> frozenset[str]:
    """The node GUIDs that it may have: its own, and what the policy gave it while the claim has it, which its
    PF vouches for. "" for none."""
    wish = target.preparation.infiniband
    return frozenset({binding_of(target).node_guid, *({wish.guid} if wish is not None else ())})


def find_at_home(socket: RdmaSocket, target: Target, host: Host) -> NldevDevice | None:
    """As find; by its PCI function too, where its driver has begun anew with it."""
    device, address = find(socket, target), target.preparation.pci_address
    if device is not None or address is None or binding_of(target).software is not None:
        return device
    names = host.sysfs.names(f"{DEVICES}/{address}/infiniband") or ()
    return next((device for device in socket.devices() if device.name in names), None)


def move_in(target: Target, host: Host) -> None:
    """With exclusive devices. Refusal where the kernel never will."""
    assert target.pod_netns is not None
    with host.rdma(target.pod_netns) as pod:
        if find(pod, target) is not None:
            return
    with host.rdma(None) as home:
        device = find_at_home(home, target, host)
        if device is None:
            raise NotNow(f"the RDMA device {binding_of(target).name} of {target.device} is not at home")
        try:
            home.move(device.index, target.pod_netns)
        except Unsupported as error:
            raise Refusal(
                "RdmaStays",
                f"{target.device}: {error}; give it to pods on a node with rdma.mode shared",
            ) from error


def move_home(target: Target, host: Host) -> None:
    netns = target.pod_netns
    if netns is None or not binding_of(target).moves:
        return

    def leave() -> None:
        with host.rdma(None) as pod:
            device = find(pod, target)
            if device is not None:
                pod.move(device.index, target.home_netns)

    run_in(netns, leave)


def restore_name(target: Target, host: Host) -> None:
    """A tenant may have called it something else, and its driver does when it begins anew."""
    binding = binding_of(target)
    if binding.software is not None:
        return
    with host.rdma(None) as home:
        device = find_at_home(home, target, host)
        if device is not None and device.name != binding.name:
            home.rename(device.index, binding.name)


def add(target: Target, host: Host) -> None:
    """Make a software device on the interface in the pod. Where it appears is the kernel's choice."""
    binding, link = binding_of(target), target.find_in_pod()
    assert binding.software is not None
    if link is None or target.pod_netns is None:
        raise NotNow(f"{target.device} left the pod's network namespace")
    with host.rdma(target.pod_netns) as pod, host.rdma(None) as home:
        if find(pod, target) is None and find(home, target) is None:
            pod.add_link(binding.software, binding.name, link.name)


def remove(target: Target, host: Host) -> None:
    """Wherever it is. A netdev that leaves its namespace takes it along too, but in the kernel's own time."""
    if target.pod_netns is not None:
        run_in(target.pod_netns, lambda: _delete(target, host))
    _delete(target, host)


def _delete(target: Target, host: Host) -> None:
    """In the namespace of the calling thread."""
    with host.rdma(None) as here:
        device = find(here, target)
        if device is None:
            return
        try:
            here.delete_link(device.index)
        except NotFound:
            # Its netdev went, and the kernel was faster.
            return


def verify(target: Target, host: Host) -> None:
    """NotClean, NotNow or Vanished unless the RDMA side is as it was: hardware at home under its name,
    nothing in software left over."""
    look = _software_left if binding_of(target).software is not None else _hardware_home
    give_up = time.monotonic() + HOME_SECONDS
    while True:
        try:
            look(target, host)
        except (NotClean, NotNow):
            if time.monotonic() > give_up:
                raise
            time.sleep(_PAUSE)
        else:
            return


def _software_left(target: Target, host: Host) -> None:
    link = target.find_at_home()
    with host.rdma(None) as home:
        left = find(home, target)
        found = [left.name] if left is not None else []
        if link is not None:
            found += [device.name for device in home.devices() if _stands_on(home, device, link.ifindex)]
    if found:
        name = found[0]
        raise NotClean(
            target.device, (f"the software RDMA device {name!a} is still on it: rdma link delete it",)
        )


def _stands_on(socket: RdmaSocket, device: NldevDevice, ifindex: int) -> bool:
    try:
        return any(port.netdev_index == ifindex for port in socket.ports(device.index))
    except NotFound:
        return False


def _hardware_home(target: Target, host: Host) -> None:
    binding = binding_of(target)
    with host.rdma(None) as home:
        device = find_at_home(home, target, host)
    if device is None:
        _look_in_pod(target, host)
        address = target.preparation.pci_address
        if address is not None and host.sysfs.names(f"{DEVICES}/{address}") is None:
            raise Vanished(f"{target.device}: there is no PCI function {address} (any more)")
        raise NotClean(target.device, (f"its RDMA device {binding.name} did not come home",))
    problems = []
    if device.name != binding.name:
        problems.append(f"its RDMA device's name is {device.name!a}, should be {binding.name}")
    found = device.node_guid or ""
    if found not in guids_of(target):
        problems.append(f"its RDMA device's node GUID is {found!a}, should be {binding.node_guid}")
    if problems:
        raise NotClean(target.device, tuple(problems))


def _look_in_pod(target: Target, host: Host) -> None:
    if target.pod_netns is None:
        return
    with host.rdma(target.pod_netns) as pod:
        if find(pod, target) is not None:
            raise NotNow(f"the RDMA device of {target.device} is still in the pod's network namespace")
