"""CDI specs and live files: what the container runtime reads, so that no container starts without its
devices.

Invariant: a projection, written from the journal and never read to decide. A claim's spec stands only
while the claim has a live attachment, and names a hook that compares the container's network namespace
with the claim's live file. Order does the rest: the live file is in place before the spec appears, and
the spec is gone before the live file is. Files are replaced whole, so that no reader sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from driver.errors import NotNow, Refusal
from driver.model import ClaimUid, DeviceName, PreparationKey
from driver.paths import Paths
from driver.rdma import NO_WISHES, DeviceFile, RdmaConfig, RdmaInPod, SysfsProof
from driver.whole_file import beside, replace_whole
from hw.model import IfName, NetnsCookie, PciAddress, check_ifname

CDI_CLASS = "nic"
CDI_VERSION = "0.5.0"
"""The oldest that allows device names to start with a digit, as claim UIDs may."""
HOOK_NAME = "knd-netns-check"
RDMA_DEVICE = "RDMA_DEVICE"
"""What of env_name a container has that names the claim of an RDMA device, and no other."""
_HOOK_SECONDS = 10
_COOKIE_MAX = 2**64 - 1

_UID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,98}[A-Za-z0-9])?")
_DRIVER = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_PROOF = re.compile(r"class/[A-Za-z0-9_]+(/[A-Za-z0-9_.:-]+)+ [A-Za-z0-9_.:-]+")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def _checked(pattern: re.Pattern[str], value: str, what: str) -> str:
    """value, which will be part of a file name or CDI id. Refusal where it could be anything else."""
    if not pattern.fullmatch(value):
        raise Refusal("BadName", f"{value[:100]!r} is not a {what}; nothing is written under that name")
    return value


def _uid(claim_uid: ClaimUid) -> str:
    return _checked(_UID, claim_uid, "claim UID")


def _device_name(key: PreparationKey) -> str:
    _checked(_LABEL, key.device, "device name")
    if key.share_id is not None:
        _checked(_UID, key.share_id, "share id")
    return f"{_uid(key.claim_uid)}-{key.unit}"


def env_name(what: str, key: PreparationKey) -> str:
    """The variable that tells a container of a device, which it may have many of:
    `KND_INTERFACE_PCI_0000_3B_00_2`."""
    return f"KND_{what}_{re.sub('[^A-Z0-9]', '_', key.unit.upper())}"


def cdi_id(driver: str, key: PreparationKey) -> str:
    """The fully qualified CDI device name that kubelet hands to the runtime. The claim UID in it makes
    it unlike any other claim's: runtimes cache specs by name."""
    return f"{_checked(_DRIVER, driver, 'driver name')}/{CDI_CLASS}={_device_name(key)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CdiEntry:
    """One attached device of a claim: its key, and what a pod has of it: a netdev by its name there, device
    files, an RDMA device and what was asked about it."""

    key: PreparationKey
    ifname: IfName | None
    pci_address: PciAddress | None = None
    files: tuple[Path, ...] = ()
    rdma: RdmaInPod | None = None
    wishes: RdmaConfig = NO_WISHES

    def __post_init__(self) -> None:
        if self.ifname is not None:
            check_ifname(self.ifname)

    @property
    def edits(self) -> dict[str, object]:
        """What a container that names the claim gets: environment and device nodes.

        The environment is keyed by device: `KND_INTERFACE_PCI_0000_3B_00_2=net1`,
        `KND_PCI_ADDRESS_PCI_0000_3B_00_2=0000:3b:00.2`.
        """
        values: dict[str, object] = {"INTERFACE": self.ifname, "PCI_ADDRESS": self.pci_address}
        if self.rdma is not None:
            values[RDMA_DEVICE], values["RDMA_PORT"] = self.rdma.name, self.rdma.port
            values["RDMA_GID_INDEX"] = self.rdma.gid_index
            values["RDMA_PKEY_INDEX"] = self.rdma.pkey_index
        edits: dict[str, object] = {
            "env": [
                f"{env_name(what, self.key)}={value}" for what, value in values.items() if value is not None
            ]
        }
        nodes: list[dict[str, object]] = [
            {"path": str(file), "type": "c", "permissions": "rw"} for file in self.files
        ]
        if self.rdma is not None:
            nodes += map(_by_number, self.rdma.files)
        if nodes:
            edits["deviceNodes"] = nodes
        return edits


def _by_number(file: DeviceFile) -> dict[str, object]:
    """With its numbers, so that no runtime looks for them under a name; for every user, as udev has it."""
    return {
        "path": f"/dev/infiniband/{file.name}",
        "type": "c",
        "major": file.major,
        "minor": file.minor,
        "fileMode": 0o666,
        "permissions": "rw",
    }


def library_environment(entries: Sequence[CdiEntry]) -> list[str]:
    """What NCCL and UCX are told where it was asked for: one list over all devices of the claim.

    `=` has NCCL take names as they are, not as beginnings of names. It takes one GID index for all devices,
    so where theirs differ it is left to find each by itself; and so it is with partitions, of which NCCL
    takes the index and UCX the key.
    """
    for_nccl = [entry for entry in entries if entry.rdma is not None and entry.wishes.nccl]
    for_ucx = [entry.rdma for entry in entries if entry.rdma is not None and entry.wishes.ucx]
    given = [entry.rdma for entry in for_nccl if entry.rdma is not None]
    names = [entry.ifname for entry in for_nccl if entry.ifname is not None]
    indexes = {each.gid_index for each in given}
    found = []
    if given:
        found.append(f"NCCL_IB_HCA=={_ports(given)}")
    if names:
        found.append(f"NCCL_SOCKET_IFNAME=={','.join(names)}")
    if len(indexes) == 1 and None not in indexes:
        found.append(f"NCCL_IB_GID_INDEX={indexes.pop()}")
    pkeys = {each.pkey_index for each in given}
    if len(pkeys) == 1 and None not in pkeys:
        found.append(f"NCCL_IB_PKEY={pkeys.pop()}")
    if for_ucx:
        found.append(f"UCX_NET_DEVICES={_ports(for_ucx)}")
    chosen = {entry.wishes.partition for entry in entries if entry.rdma is not None and entry.wishes.ucx}
    if len(chosen) == 1 and (partition := chosen.pop()) is not None:
        found.append(f"UCX_IB_PKEY={partition:#06x}")
    return found


def _ports(given: Sequence[RdmaInPod]) -> str:
    return ",".join(f"{each.name}:{each.port}" for each in given)


class CdiProjection:
    """The CDI specs of this driver: one file per claim, world-readable as runtimes expect."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._prefix = f"{_checked(_DRIVER, paths.driver, 'driver name')}-{CDI_CLASS}-"

    def _file(self, claim_uid: ClaimUid) -> Path:
        return self._paths.cdi / f"{self._prefix}{_uid(claim_uid)}.json"

    def write(self, claim_uid: ClaimUid, entries: Sequence[CdiEntry]) -> None:
        """Replace the claim's spec. Its live file must be in place. NotNow if it cannot be written."""
        if not entries:
            raise ValueError("a CDI spec needs a device; remove the spec of a claim that has none attached")
        if any(entry.key.claim_uid != claim_uid for entry in entries):
            raise ValueError(f"a CDI spec of claim {claim_uid} can only hold that claim's devices")
        # Of the whole spec, so that a container with eight devices runs the hook once.
        edits: dict[str, object] = {"hooks": [self._hook(claim_uid)]}
        environment = library_environment(entries)
        if environment:
            edits["env"] = environment
        spec = {
            "cdiVersion": CDI_VERSION,
            "kind": f"{self._paths.driver}/{CDI_CLASS}",
            "containerEdits": edits,
            "devices": [
                {"name": _device_name(entry.key), "containerEdits": entry.edits} for entry in entries
            ],
        }
        text = json.dumps(spec, indent=1) + "\n"
        with _writing("CDI spec", claim_uid):
            self._paths.cdi.mkdir(mode=0o755, parents=True, exist_ok=True)
            replace_whole(self._file(claim_uid), text, 0o644)

    def _hook(self, claim_uid: ClaimUid) -> dict[str, object]:
        return {
            "hookName": "createRuntime",
            "path": str(self._paths.netns_check),
            "args": [HOOK_NAME, str(live_file(self._paths, claim_uid))],
            "timeout": _HOOK_SECONDS,
        }

    def remove(self, claim_uid: ClaimUid) -> None:
        """From here on the runtime starts no container of the claim. Fine where there is no spec."""
        with _writing("CDI spec", claim_uid):
            _remove(self._file(claim_uid))

    def devices(self, claim_uid: ClaimUid) -> frozenset[DeviceName]:
        """The devices, and shares of devices, that a claim's spec names; none where there is no spec that can
        be read. For when nothing else is left to tell of them."""
        try:
            spec = json.loads(self._file(claim_uid).read_text())
            names = [str(device["name"]) for device in spec["devices"]]
        except (OSError, ValueError, KeyError, TypeError):
            return frozenset()
        return frozenset(DeviceName(name.removeprefix(f"{claim_uid}-")) for name in names)

    def claims(self) -> frozenset[ClaimUid]:
        """Claims that have a spec or the remains of one: for sweeping what is stale."""
        return _claims_in(self._paths.cdi, self._prefix, ".json")


def live_file(paths: Paths, claim_uid: ClaimUid) -> Path:
    return paths.live / _uid(claim_uid)


class LiveFiles:
    """For each claim, the network namespaces its devices are attached in now, and what /sys must say for the
    numbers of its device files to be theirs. For root alone."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def write(
        self, claim_uid: ClaimUid, cookies: Collection[NetnsCookie], proofs: Collection[SysfsProof] = ()
    ) -> None:
        """Replace the claim's file: one decimal cookie a line, one proof a line. NotNow if it cannot be
        written."""
        if not all(_PROOF.fullmatch(f"{proof.path} {proof.value}") for proof in proofs):
            raise Refusal("BadName", f"{proofs!a} are no files of /sys with what they say")
        if any(not 0 < cookie <= _COOKIE_MAX for cookie in cookies):
            raise ValueError(f"{sorted(cookies)} are not all network namespace cookies")
        file = live_file(self._paths, claim_uid)
        with _writing("live file", claim_uid):
            self._paths.run.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._paths.live.mkdir(mode=0o700, exist_ok=True)
            self._paths.live.chmod(0o700)
            lines = [str(cookie) for cookie in sorted(set(cookies))]
            lines += [f"{'at' if each.link else 'is'} {each.path} {each.value}" for each in proofs]
            replace_whole(file, "".join(f"{line}\n" for line in lines), 0o600)

    def remove(self, claim_uid: ClaimUid) -> None:
        """Only after the claim's CDI spec is gone. Fine where there is no file."""
        with _writing("live file", claim_uid):
            _remove(live_file(self._paths, claim_uid))

    def claims(self) -> frozenset[ClaimUid]:
        return _claims_in(self._paths.live, "", "")


# --- files ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(what: str, claim_uid: ClaimUid) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotNow(f"the {what} of claim {claim_uid} cannot be changed: {error}") from error


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    beside(file).unlink(missing_ok=True)


def _claims_in(folder: Path, prefix: str, suffix: str) -> frozenset[ClaimUid]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise NotNow(f"{folder} cannot be listed: {error}") from error
    found = set()
    for name in names:
        plain = name.removeprefix(".").removesuffix(".new") if name.startswith(".") else name
        uid = plain.removeprefix(prefix).removesuffix(suffix)
        if plain == f"{prefix}{uid}{suffix}" and _UID.fullmatch(uid):
            found.add(ClaimUid(uid))
    return frozenset(found)
