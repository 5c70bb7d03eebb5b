"""Acts on what a PF holds of one of its VFs: VLAN, address, rates, spoof check, trust, link state.

Invariant: one setting per message, in ORDER on the way out and in reverse on the way back; nothing is taken
for done before it was read back. What is set where is in the record (wishes and baseline), so that the way
back is the same whatever was done of the way out.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator

from driver.errors import NotNow, Refusal
from driver.execute import probe
from driver.execute.target import NotClean, Target
from driver.model import NicConfig, Preparation
from hw.errors import Busy, HwError, NotFound, Refused, Unsupported
from hw.model import LinkInfo, MacAddress, NetdevsimIdentity, PciIdentity, VfSettings
from hw.pf import read_vf, write_vf
from hw.sriov import binding
from hw.vf import VfRates, VfValue

log = logging.getLogger(__name__)

GUIDS = ("node_guid", "port_guid")
ORDER = ("vlan", "mac", "rates", "spoof_check", "trust", *GUIDS, "link_state")
"""VLAN first: what follows could give a VF on the wrong one more than it should have. The link last: a port
that is up without its GUID is known to the subnet manager under another."""
KEEPS_ADDRESS = frozenset({errno.EADDRNOTAVAIL, errno.EPERM, errno.EACCES})
"""What VF drivers (igbvf, ixgbevf, iavf) say to another address than their PF gave them."""
SETTLE_SECONDS = 2.0
"""For a PF's firmware to do what it said it would; iavf's PFs are known to take their time with addresses."""
_PAUSE = 0.05


def set_vf(target: Target, host: probe.Host) -> None:
    """Have the PF set what the claim asks for, and the VF's own driver take up the address it was given.

    Refusal with field, device and driver for what that driver refuses. What was set by then is for the plan's
    undo: restore_vf.
    """
    preparation = target.preparation
    wanted = preparation.vf_wanted
    if wanted is None:
        return
    pf, vf = _place(target)
    now = _read(target, pf, vf)
    for setting in ORDER:
        if value_of(wanted, setting) != value_of(now, setting):
            _set_wish(target, host, pf, vf, setting, wanted)
    different = _settled(target, pf, vf, wanted)
    if different:
        driver = _pf_driver(target, host)
        raise Refusal("VfSettingNotTaken", f"{target.device}: {driver} did not do as asked: {different}")
    address = preparation.config.interface.hardware_address
    if address is not None and preparation.can_be_probed and not preparation.config.by_file:
        take_up_address(target, host, address)


def restore_vf(target: Target, host: probe.Host) -> None:
    """Every setting as it was, whatever became of the others. NotNow while a pod may still drive the VF: it
    would be in the host's VLAN."""
    baseline = target.preparation.vf_baseline
    if baseline is None:
        return
    probe.check_in_nobodys_hands(target, host)
    pf, vf = _place(target)
    now = _read(target, pf, vf)
    problems: list[HwError] = []
    for setting in reversed(ORDER):
        if _is_back(target.preparation, setting, now):
            continue
        try:
            write_vf(target.home, pf, vf, setting, value_of(baseline, setting))
        except HwError as error:
            if setting in GUIDS and isinstance(error, Unsupported):
                # A driver that has no GUIDs was given none.
                continue
            problems.append(error)
    if problems:
        raise NotClean(target.device, tuple(map(str, problems)))


def verify_vf(target: Target) -> None:
    """NotClean, naming each setting, unless the PF holds of it what it held when it was prepared."""
    baseline = target.preparation.vf_baseline
    if baseline is None:
        return
    pf, vf = _place(target)
    give_up = time.monotonic() + SETTLE_SECONDS
    while problems := tuple(_unclean(target.preparation, _read(target, pf, vf))):
        if time.monotonic() > give_up:
            raise NotClean(target.device, problems)
        time.sleep(_PAUSE)


def take_up_address(target: Target, host: probe.Host, wanted: MacAddress) -> LinkInfo | None:
    """See that a VF's netdev at home has an address, which its PF gave it. Where its driver takes none but
    that, it takes that one only when it begins anew."""
    link = target.find_at_home()
    if link is None:
        raise NotNow(f"{target.device} is not in the host's network namespace")
    if link.mac == wanted:
        return None
    try:
        target.home.change(link.ifindex, mac=wanted)
        return None
    except Refused as error:
        if error.errno not in KEEPS_ADDRESS or target.given_mac() != wanted:
            raise
        log.info("%s takes up its address %s when it is probed anew: %s", target.device, wanted, error)
    link = probe.again(target, host)
    if link.mac != wanted:
        raise NotClean(target.device, (f"address is {link.mac}, should be {wanted}, as its PF was told",))
    return link


def _place(target: Target) -> tuple[LinkInfo, int]:
    pf, index = target.pf(), _vf_index(target.preparation)
    if pf is None or index is None:
        raise NotNow(f"the PF of {target.device} is not in the host's network namespace now")
    return pf, index


def _vf_index(preparation: Preparation) -> int | None:
    identity = preparation.identity
    return identity.vf_index if isinstance(identity, PciIdentity | NetdevsimIdentity) else None


def _read(target: Target, pf: LinkInfo, vf: int) -> VfSettings:
    found = read_vf(target.home, pf, vf)
    if found is None:
        raise NotFound(f"{pf.name!a}, the PF of {target.device}, does not tell of VF {vf} (any more)")
    return found


def value_of(settings: VfSettings, setting: str) -> VfValue:
    """As write_vf takes it. None: the setting is not told."""
    if setting == "rates":
        if settings.min_rate is None and settings.max_rate is None:
            return None
        return VfRates(settings.min_rate or 0, settings.max_rate or 0)
    value: VfValue = getattr(settings, setting)
    return value


def _set_wish(
    target: Target, host: probe.Host, pf: LinkInfo, vf: int, setting: str, wanted: VfSettings
) -> None:
    value = value_of(wanted, setting)
    try:
        write_vf(target.home, pf, vf, setting, value)
    except Busy as error:
        raise NotNow(f"{target.device}: {error}") from error
    except Refused as error:
        config = target.preparation.config
        if setting in GUIDS:
            raise Refusal(
                "GuidRefused",
                f"{target.device} cannot have the GUID {value} of the node policy (rdma.infiniband): "
                f"{_pf_driver(target, host)}, which drives its PF {pf.name!a}, refuses it ({error}); give it "
                "to claims that want no InfiniBand, or leave the section out",
            ) from error
        asked = config.on_pf()
        names = ("min_rate", "max_rate") if setting == "rates" else (setting,)
        told = " and ".join(
            f"{config.field_of(name)} {_shown(name, asked[name])}" for name in names if name in asked
        )
        told = told or f"{setting} {value}"
        raise Refusal(
            "VfSettingRefused",
            f"{target.device} cannot have {told}: {_pf_driver(target, host)}, which drives its PF "
            f"{pf.name!a}, refuses it ({error}); {_advice(config)}",
        ) from error


def _advice(config: NicConfig) -> str:
    if config.qos.by_size and config.qos.on_pf:
        return "only the node's kernel could keep it, for a netdev and with qos.enforcement auto or software"
    return "leave it out of the claim, or choose another device"


def _settled(target: Target, pf: LinkInfo, vf: int, wanted: VfSettings) -> str:
    """What the PF still holds otherwise when it had its time; "" if nothing."""
    give_up = time.monotonic() + SETTLE_SECONDS
    while True:
        now = _read(target, pf, vf)
        config = target.preparation.config
        fields = {name: config.field_of(name) for name in config.on_pf()}
        if now.node_guid is not None:
            # Else its driver does not tell them: the VF's own RDMA device will.
            fields |= {name: name for name in GUIDS}
        different = "; ".join(
            f"{field} is {_shown(name, getattr(now, name))}, "
            f"asked for is {_shown(name, getattr(wanted, name))}"
            for name, field in fields.items()
            if getattr(now, name) != getattr(wanted, name)
        )
        if not different or time.monotonic() > give_up:
            return different
        time.sleep(_PAUSE)


def _shown(name: str, value: object) -> str:
    """As users write it."""
    return f"{value}M" if value and name in ("min_rate", "max_rate") else str(value)


def _unclean(preparation: Preparation, now: VfSettings) -> Iterator[str]:
    baseline = preparation.vf_baseline
    assert baseline is not None
    for setting in ORDER:
        if _is_clean(preparation, setting, now):
            continue
        for name in ("min_rate", "max_rate") if setting == "rates" else (setting,):
            is_now, was = (_shown(name, getattr(each, name)) for each in (now, baseline))
            if is_now != was:
                yield f"{name} on its PF is {is_now}, should be {was}"


def _is_back(preparation: Preparation, setting: str, now: VfSettings) -> bool:
    """As _is_clean; but where no GUID is told they are written once more: none and not told look the same."""
    untold = all(getattr(now, name) is None for name in GUIDS)
    if setting in GUIDS and preparation.infiniband is not None and untold:
        return False
    return _is_clean(preparation, setting, now)


def _is_clean(preparation: Preparation, setting: str, now: VfSettings) -> bool:
    """A setting that was not told when it was prepared has no baseline.

    Of the address some PFs tell the VF's own where they gave it none, and none where its driver let go: both
    are as good as what they told first, unless that was one that they had given it.
    """
    baseline = preparation.vf_baseline
    assert baseline is not None
    if setting in GUIDS:
        told = getattr(now, setting)
        return preparation.infiniband is None or told in (None, getattr(baseline, setting))
    if setting != "mac":
        was = value_of(baseline, setting)
        return was is None or value_of(now, setting) == was
    own = preparation.baseline.mac
    return now.mac in (baseline.mac, own) or (now.mac is None and baseline.mac in (None, own))


def _pf_driver(target: Target, host: probe.Host) -> str:
    identity = target.preparation.identity
    if isinstance(identity, PciIdentity) and identity.pf is not None:
        return binding.driver_of(host.sysfs, identity.pf) or "no driver"
    return "netdevsim"
