"""Records of parts of devices: what the interface of one will be, before there is one.

Invariant: index and address are on record before the interface is made, so it is known by them whatever
crashes.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import replace

from driver import shares
from driver.errors import NotNow
from driver.lifecycle.context import Context
from driver.model import Device, NicConfig, PoolName, Preparation, Share
from driver.provision.macs import derived
from driver.rdma import NO_NETDEV
from hw import subinterface
from hw.model import DeviceKind, IfIndex, SoftwareIdentity


def owner_of(driver: str, pool: PoolName) -> str:
    """Alias of what this driver makes on this node: at home a tenant's word for it is overwritten."""
    return f"a share of {driver} on {pool}"


def as_share(
    whole: Preparation, device: Device, config: NicConfig, *, owner: str, taken: Collection[IfIndex]
) -> Preparation:
    """The record of a part of the device, from that of the whole of it. owner: as of owner_of. taken: indices
    that others have."""
    assert device.sharable is not None
    assert device.ifindex is not None
    assert device.settings is not None
    made = shares.interface(device.sharable, config)
    index = _free_index(taken)
    # The same each time it is made anew, and on no other node: a share's id is unique in the cluster.
    mac = derived(whole.key.unit) if made.has_own_mac else device.settings.mac
    return replace(
        whole,
        share=Share(interface=made, ifname=device.settings.name),
        # What it is by itself; and releases before this one know of no other kind.
        kind=DeviceKind.NETDEV,
        identity=subinterface.identity(made, index, device.ifindex),
        dies_with_netns=True,
        # What is known of it by then; the rest is read when it is there.
        baseline=replace(
            NO_NETDEV,
            name=subinterface.name_at_home(index),
            mtu=device.settings.mtu,
            mac=mac,
            alias=owner,
            multicast=True,
        ),
        home_driver="",
        rdma=None,
    )


def renewed(context: Context, preparation: Preparation) -> Preparation:
    """The record as it is to be for an interface that must be in order again: the device under it may have
    another index since, MTU or address. NotNow where that is not at home, or not the one that it was."""
    identity, share = preparation.identity, preparation.share
    if share is None or not isinstance(identity, SoftwareIdentity):
        return preparation
    device = context.devices.get(preparation.key.device)
    if device is None or device.ifindex is None or device.settings is None:
        raise NotNow(f"{preparation.key.device} is not in the host's network namespace now")
    if isinstance(device.identity, SoftwareIdentity) and device.settings.name != share.ifname:
        # Software is called by its index, which is another one's after a reboot.
        raise NotNow(f"{preparation.key.device} is {device.settings.name!a} now, and was {share.ifname!a}")
    baseline = replace(preparation.baseline, mtu=min(preparation.baseline.mtu, device.settings.mtu))
    if not share.interface.has_own_mac:
        baseline = replace(baseline, mac=device.settings.mac)
    now = replace(preparation, identity=replace(identity, peer=device.ifindex), baseline=baseline)
    return preparation if now == preparation else context.book.amend_preparation(now)


def _free_index(taken: Collection[IfIndex]) -> IfIndex:
    while True:
        span = subinterface.LAST_INDEX - subinterface.FIRST_INDEX + 1
        index = IfIndex(subinterface.FIRST_INDEX + secrets.randbelow(span))
        if index not in taken:
            return index
