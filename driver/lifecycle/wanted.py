"""What a claim is to have, checked and on its way to be a record.

Invariant: pure but for what it is told. What cannot be had is refused with a reason before anything is
touched.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from bpf.layout import Hook, Slot
from driver import claimconfig, limits, shares
from driver.claimconfig import ClaimLimits
from driver.lifecycle import one_address
from driver.lifecycle.fitting import check_fits, check_ipoib
from driver.lifecycle.shares import as_share, owner_of
from driver.model import (
    AllocatedDevice,
    Claim,
    Device,
    DeviceName,
    NicConfig,
    PodUid,
    Preparation,
    PreparationKey,
    PreparationState,
)
from driver.qos import QosPolicy
from driver.rdma import NO_NETDEV
from hw.model import DeviceKind, IfIndex, IfName, LinkSettings

Named = tuple[str, NicConfig, IfName]
"""A device as claimconfig.check_together wants it: its label, its config, its name in the pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A device that a claim is to have, or a share of one. size: Mb/s of a share."""

    key: PreparationKey
    request: str
    device: Device
    config: NicConfig
    size: int | None

    @property
    def unit(self) -> DeviceName:
        return self.key.unit


@dataclass(frozen=True, slots=True)
class Coming:
    """A claim that is being prepared: what the other claims of its pods must stand beside."""

    reserved_for: frozenset[PodUid]
    devices: tuple[Named, ...]
    addresses: tuple[one_address.Has, ...]


def want(
    claim: Claim, allocated: AllocatedDevice, device: Device, rules: ClaimLimits, qos: QosPolicy, hook: Hook
) -> Wanted:
    """Every check of one device that needs no lock. ConfigError, Refusal."""
    size = shares.amount(allocated, device)
    config = claimconfig.resolve(allocated, claim.configs, rules)
    config = limits.sized(device, config) if size is None else limits.shared(device, config, size)
    shares.check_share(device, config)
    check_fits(device, config)
    check_ipoib(device, config, hook)
    limits.check(device, config, qos)
    return Wanted(
        key=PreparationKey(claim.ref.uid, allocated.pool, device.name, allocated.share_id),
        request=allocated.base_request,
        device=device,
        config=config,
        size=size,
    )


def named(wanted: Sequence[Wanted]) -> list[Named]:
    """Those that will have a netdev in the pod."""
    return [
        (each.unit, each.config, each.config.interface.name or each.device.settings.name)
        for each in wanted
        if each.device.settings is not None and not each.config.by_file
    ]


def asking(claim: Claim, wanted: Sequence[Wanted]) -> tuple[one_address.Has, ...]:
    """The addresses that the claim chose."""
    whose = f"{claim.ref.namespace}/{claim.ref.name}"
    return one_address.asking([(each.unit, each.config) for each in wanted], whose)


def record(claim: Claim, wanted: Wanted, driver: str, indices: Collection[IfIndex]) -> Preparation:
    """Of a device that passed every check; slot and generation are the book's to give. indices: of interfaces
    that other records tell of."""
    device, config = wanted.device, wanted.config
    assert device.settings is not None or device.kind is DeviceKind.RDMA
    portion = device.portion if device.kind is DeviceKind.VF else None
    whole = Preparation(
        key=wanted.key,
        claim=claim.ref,
        request=wanted.request,
        identity=device.identity,
        kind=device.kind,
        dies_with_netns=device.dies_with_netns,
        config=limits.settled(device, config),
        baseline=clean(device.settings) if device.settings is not None else NO_NETDEV,
        attributes=device.attributes,
        capacities=device.capacities,
        reserved_for=claim.reserved_for,
        slot=Slot(0),
        state=PreparationState.PREPARING,
        generation=0,
        home_driver=device.driver or "",
        vf_baseline=device.vf,
        port=device.port,
        size=wanted.size or (portion.size if portion is not None else None),
    )
    if wanted.size is None:
        return whole
    return as_share(whole, device, config, owner=owner_of(driver, wanted.key.pool), taken=indices)


def clean(settings: LinkSettings) -> LinkSettings:
    """The baseline of a device from how it was found: what a tenant could have left on is off."""
    return replace(settings, promisc=False, allmulti=False)
