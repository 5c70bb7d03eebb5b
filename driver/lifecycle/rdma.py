"""RDMA as the life of a claim needs it: the node's mode, what goes with a device, whose a device file is.

Invariant: the mode is the kernel's, read when it matters and never remembered; a device file is given to a
pod only as long as its numbers are that pod's device.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace

from driver.errors import NotNow, Refusal
from driver.execute.probe import Host
from driver.execute.rdma import find_at_home
from driver.execute.target import Target
from driver.model import Attachment, Device, DeviceName, NicConfig, Preparation
from driver.policy.rdma import RdmaRules
from driver.rdma import AT_BOOT, NO_WISHES, RdmaBinding, RdmaMode, SoftRdma, SysfsProof
from hw.errors import Busy, HwError, Unsupported
from hw.model import DeviceKind, RdmaName
from hw.rdma.netlink import RdmaSocket

log = logging.getLogger(__name__)

INFINIBAND = "InfiniBand"
"""A link layer, as sysfs and libibverbs have it."""
_NAME_MAX = 63
"""IB_DEVICE_NAME_MAX without its end."""


class NodeRdma:
    """Opens a socket for each question: the module may come and go."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._sysfs = host.sysfs
        self._open = host.rdma

    # --- the node's mode ----------------------------------------------------------------------------

    def apply(self, rules: RdmaRules) -> None:
        """Put the node into the policy's mode, or say in the log why the kernel does not take it."""
        problem = self._set_mode(rules)
        if problem:
            log.error("%s; until then no RDMA device is given away", problem)

    def _set_mode(self, rules: RdmaRules) -> str:
        """What stands against it, a sentence, or ""."""
        wanted = rules.mode.mode
        if wanted is None:
            return ""
        try:
            with self._open(None) as socket:
                if _mode(socket) is not wanted:
                    socket.set_exclusive(wanted is RdmaMode.EXCLUSIVE)
                    log.info("RDMA devices are %s from now on (policy rdma.mode)", wanted)
        except Busy:
            how = AT_BOOT.format(int(wanted is RdmaMode.SHARED))
            return (
                f"the policy wants rdma.mode {wanted}, which the kernel takes only while there is no network "
                f"namespace beside the host's: {how}"
            )
        except (HwError, OSError) as error:
            return f"the policy wants rdma.mode {wanted}: {error}"
        return ""

    # --- prepare ------------------------------------------------------------------------------------

    def binding(self, device: Device, config: NicConfig, rules: RdmaRules) -> RdmaBinding | None:
        """What goes with a device of this config. Refusal where the claim or the policy asks for what is not
        there; None where nobody asks and nothing is."""
        if config.by_file:
            _check_no_wishes(config, f"{device.name} is given by vfio's files")
            return None
        soft = rules.software.kind if device.kind is not DeviceKind.RDMA else None
        # What somebody made on its netdev ends when that moves.
        facts = device.rdma if device.rdma is not None and not device.rdma.software else None
        if facts is None and soft is None:
            _check_no_wishes(config, f"{device.name} has no RDMA device that could go into a pod with it")
            return None
        try:
            with self._open(None) as socket:
                mode = _mode(socket)
                known = socket.by_name(facts.name) if facts is not None else None
        except Unsupported as error:
            raise Refusal("NoRdma", f"{device.name}: {error}: modprobe it") from error
        _check_mode(device, config, rules, mode)
        _check_partition(device, config)
        _check_ipoib(device, config, mode)
        self._check_module(device, "ib_uverbs", rules)
        self._check_cgroup(device, config)
        rdma_cm = rules.load_modules or self._is_loaded("rdma_ucm")
        if facts is not None:
            if known is None:
                raise NotNow(f"{device.name}: its RDMA device {facts.name} is not at home")
            if facts.shared and mode is RdmaMode.EXCLUSIVE:
                raise Refusal(
                    "RdmaShared",
                    f"{device.name}: its RDMA device {facts.name} is that of other interfaces too, and would "
                    "leave with this one: use rdma.mode shared",
                )
            guid = known.node_guid or ""
            return RdmaBinding(name=known.name, mode=mode, index=known.index, node_guid=guid, rdma_cm=rdma_cm)
        assert soft is not None
        if soft is SoftRdma.SIW and mode is RdmaMode.EXCLUSIVE:
            raise Refusal("RdmaMode", f"{device.name}: siw stays where it is: use rxe, or rdma.mode shared")
        self._check_module(device, soft.module, rules)
        return RdmaBinding(name=soft_name(soft, device.name), mode=mode, software=soft, rdma_cm=rdma_cm)

    def _check_module(self, device: Device, module: str, rules: RdmaRules) -> None:
        if not rules.load_modules and not self._is_loaded(module):
            raise Refusal(
                "NoModule",
                f"{device.name}: the kernel's module {module} is not loaded: modprobe {module}, at boot too, "
                "or let the node policy have it loaded (rdma.loadModules)",
            )

    def _check_cgroup(self, device: Device, config: NicConfig) -> None:
        """The agent's own cgroup has the controllers that the runtime gives to containers."""
        if not config.rdma.limits:
            return
        controllers = self._sysfs.text("fs/cgroup/cgroup.controllers")
        if "rdma" not in (controllers or "").split():
            found = f"they are {controllers}" if controllers else "there is no cgroup version 2"
            raise Refusal(
                "NoRdmaCgroup",
                f"{device.name}: the claim or its class has rdma.limits, for which containers need the "
                f"cgroup controller rdma on this node: {found}; enable it, or leave the limits out",
            )

    def _is_loaded(self, module: str) -> bool:
        return self._sysfs.names(f"module/{module}") is not None

    # --- files that are given -----------------------------------------------------------------------

    def binding_now(self, target: Target) -> RdmaBinding | None:
        """Of a device that is prepared: its driver may have begun anew with it meanwhile."""
        binding = target.preparation.rdma
        if binding is None or binding.software is not None:
            return binding
        with self._open(None) as socket:
            device = find_at_home(socket, target, self.host)
        return replace(binding, index=device.index) if device is not None else binding

    def is_home(self, target: Target) -> bool:
        """Of a device that is nothing else and was in a pod: the kernel tells nobody when it comes back."""
        with self._open(None) as socket:
            return find_at_home(socket, target, self.host) is not None

    def proofs(self, attachment: Attachment, preparation: Preparation) -> tuple[SysfsProof, ...]:
        """By what anyone can see, without netlink and in whatever namespace, that the numbers of a pod's
        files are still its device: by its PCI address, or by the name of what was made for it."""
        given, binding = attachment.rdma, preparation.rdma
        if given is None or binding is None:
            return ()
        address = preparation.pci_address if binding.software is None else None
        found = []
        for file in given.files:
            folder = _CLASSES.get(re.sub("[0-9]+$", "", file.name))
            if folder is None:
                found.append(SysfsProof(f"class/misc/{file.name}/dev", f"{file.major}:{file.minor}"))
                continue
            base = f"class/{folder}/{file.name}"
            found.append(SysfsProof(f"{base}/dev", f"{file.major}:{file.minor}"))
            if address is not None:
                found.append(SysfsProof(f"{base}/device", address, link=True))
            else:
                found.append(SysfsProof(f"{base}/ibdev", given.name))
        return tuple(found)

    def names_now(self, given: Iterable[Attachment]) -> tuple[str, ...]:
        """What the kernel calls pods' RDMA devices at this moment: a tenant may have renamed its own."""
        return tuple(map(self._name_now, given))

    def _name_now(self, attachment: Attachment) -> str:
        assert attachment.rdma is not None
        files = (file.name for file in attachment.rdma.files if file.name.startswith("uverbs"))
        told = (self._sysfs.text(f"class/{_CLASSES['uverbs']}/{file}/ibdev") for file in files)
        return next((name for name in told if name), attachment.rdma.name)

    def disproved(self, proofs: Iterable[SysfsProof]) -> str:
        """Why a container must not be given these files (any more), a sentence; "" if it may."""
        for proof in proofs:
            read = self._sysfs.target_name if proof.link else self._sysfs.text
            found = read(proof.path)
            if found != proof.value:
                return (
                    f"a device file was given anew: {proof.path} in /sys is {found!a} and was {proof.value}; "
                    "delete the pod, so that another gets the device's own"
                )
        return ""


_CLASSES = {"uverbs": "infiniband_verbs", "umad": "infiniband_mad", "issm": "infiniband_mad"}


def soft_name(soft: SoftRdma, device: DeviceName) -> RdmaName:
    """The same for a device each time, and no other device's."""
    return RdmaName(f"{soft}_{device.replace('-', '_')}"[:_NAME_MAX])


def _mode(socket: RdmaSocket) -> RdmaMode:
    try:
        return RdmaMode.EXCLUSIVE if socket.exclusive() else RdmaMode.SHARED
    except Unsupported:
        # A kernel from before there were modes.
        return RdmaMode.SHARED


def _check_no_wishes(config: NicConfig, why: str) -> None:
    if config.rdma != NO_WISHES:
        raise Refusal("NoRdma", f"{why}, and the claim has a section rdma: leave it out, or ask for another")


def _check_partition(device: Device, config: NicConfig) -> None:
    on_infiniband = device.rdma is not None and device.rdma.link_layer == INFINIBAND
    if config.rdma.partition is not None and not on_infiniband:
        raise Refusal(
            "NoPartition",
            f"{device.name} is not on InfiniBand and has no partitions: leave rdma.partition out",
        )


def _check_ipoib(device: Device, config: NicConfig, mode: RdmaMode) -> None:
    """A driver makes a port's own interface anew when the RDMA device moves: without programs, and without
    what was made on it."""
    if config.rdma.ipoib is not None and mode is RdmaMode.EXCLUSIVE:
        how = AT_BOOT.format(1)
        raise Refusal(
            "RdmaMode",
            f"{device.name}: rdma.ipoib needs RDMA devices to be shared, and they are {mode}: {how}",
        )


def _check_mode(device: Device, config: NicConfig, rules: RdmaRules, mode: RdmaMode) -> None:
    for who, wanted in (("the claim", config.rdma.mode), ("the node policy", rules.mode.mode)):
        if wanted is not None and wanted is not mode:
            how = AT_BOOT.format(int(wanted is RdmaMode.SHARED))
            raise Refusal(
                "RdmaMode",
                f"{device.name}: {who} wants rdma.mode {wanted}, and RDMA devices are {mode} here: {how}",
            )
