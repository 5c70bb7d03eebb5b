"""Whether a device can do what a claim asks of it, before anything is done.

Invariant: pure; what cannot be is a ConfigError with every problem and its field.
"""

from __future__ import annotations

from bpf.layout import Hook
from driver import limits
from driver.errors import ConfigError, FieldProblem
from driver.model import Device, NicConfig
from driver.nicconfig import BY_SIZE
from hw.ipoib import has_ipoib_address
from hw.model import DeviceKind
from hw.sriov.abilities import ability_for


def check_fits(device: Device, config: NicConfig) -> None:
    """ConfigError for what the device cannot do: the kernel would refuse it only when the pod's sandbox is
    there, and then each time again."""
    problems = _check_vf(device, config)
    mtu = config.interface.mtu
    if device.kind is DeviceKind.RDMA:
        problems += _check_no_interface(config, f"{device.name} is an RDMA device and has no interface")
    elif config.by_file:
        problems += _check_by_file(device, config)
    elif mtu is not None:
        least, most = device.min_mtu or 0, device.max_mtu
        if mtu < least or (most is not None and mtu > most):
            bounds = f"{least} to {most}" if most is not None else f"at least {least}"
            problems.append(FieldProblem("interface.mtu", f"{device.name} takes {bounds}, not {mtu}"))
    if problems:
        raise ConfigError(problems)


def check_ipoib(device: Device, config: NicConfig, hook: Hook) -> None:
    """ConfigError for an IPoIB interface that could not be made, or would not be counted."""
    if config.rdma.ipoib is None:
        return
    reason = ""
    if device.kind not in (DeviceKind.VF, DeviceKind.PF) or device.settings is None:
        reason = f"{device.name} has no port's own interface, on which it would be made"
    elif not has_ipoib_address(device.settings):
        reason = f"{device.name} is not on InfiniBand"
    elif hook is not Hook.TCX:
        reason = (
            f"{device.name} can have none on this node: its kernel has no tcx (Linux 6.6), by which what "
            "passes through it would be counted"
        )
    if reason:
        raise ConfigError([FieldProblem("rdma.ipoib", f"{reason}; leave it out, or ask for another device")])


def _check_vf(device: Device, config: NicConfig) -> list[FieldProblem]:
    """What is asked of something that is no VF."""
    if device.kind is DeviceKind.VF:
        return []
    asked = (config.field_of(name) for name in config.on_pf())
    return [FieldProblem(path, f"{device.name} is no VF") for path in asked if path.startswith("vf.")]


def check_pf(device: Device, config: NicConfig) -> None:
    """ConfigError for what a VF's PF would have to do and cannot."""
    config = limits.settled(device, config)
    asked = [config.field_of(name) for name in config.on_pf()]
    problems = []
    if device.vf is None:
        absent = f"{device.name} is a VF whose PF is not to be seen here, and only there could it be set"
        # A netdev can be given an address all the same.
        needs_pf = [path for path in asked if not path.startswith("interface.") or config.by_file]
        problems = [FieldProblem(path, absent) for path in needs_pf]
    problems += _beyond(device, config)
    mtu = config.interface.mtu
    if mtu is not None and device.pf_mtu is not None and mtu > device.pf_mtu:
        reason = f"{device.name} takes up to {device.pf_mtu}, the MTU of its PF, not {mtu}"
        problems.append(FieldProblem("interface.mtu", reason))
    if problems:
        raise ConfigError(problems)


def _beyond(device: Device, config: NicConfig) -> list[FieldProblem]:
    """What the driver of a VF's PF is known not to do. What is so already takes nothing, and a limit that can
    be kept otherwise is not refused for this."""
    problems = []
    for name, value in config.on_pf().items():
        path = config.field_of(name)
        as_it_is = device.vf is not None and getattr(device.vf, name) == value
        cannot = ability_for(name, value) in device.vf_cannot and not path.startswith(("qos.", BY_SIZE))
        if cannot and value and not as_it_is:
            shown = f"{value}M" if name in ("min_rate", "max_rate") else str(value)
            told = (
                f"{device.name} cannot have {path} {shown}: {device.pf_driver}, which drives its PF, cannot "
                "do that; leave it out of the claim, or choose another device by its attribute vfSettings"
            )
            problems.append(FieldProblem(path, told))
    return problems


def _check_by_file(device: Device, config: NicConfig) -> list[FieldProblem]:
    problems = []
    if device.kind is not DeviceKind.VF or not device.driver:
        problems.append(FieldProblem("vf.driver", f"{device.name} is no VF with a driver to take it from"))
    no_interface = f"{device.name} is given by its files (vf.driver): it has no interface to set up"
    return problems + _check_no_interface(config, no_interface)


def _check_no_interface(config: NicConfig, reason: str) -> list[FieldProblem]:
    given = {
        "name": config.interface.name,
        "mtu": config.interface.mtu,
        "addresses": config.interface.addresses,
    }
    return [FieldProblem(f"interface.{name}", reason) for name, value in given.items() if value]
