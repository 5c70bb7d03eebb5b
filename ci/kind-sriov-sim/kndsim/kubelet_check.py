"""Strict checks of a driver's answers; pure.

Invariant: what passes is accepted by every kubelet and names only CDI devices that no other claim uses
(runtimes cache specs, so a reused name may give a container another claim's device).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from kndsim.kubelet_model import Answer, ContractBroken, PluginInfo, RegistrationFailed, SimDevice, Version

ERROR_BYTES = 1024

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_REQUEST = re.compile(_LABEL)
_DEVICE = re.compile(_LABEL)
_DRIVER = re.compile(rf"(?=.{{1,63}}\Z){_LABEL}(?:\.{_LABEL})*")
_POOL_PART = rf"{_LABEL}(?:\.{_LABEL})*"
_POOL = re.compile(rf"(?=.{{1,253}}\Z){_POOL_PART}(?:/{_POOL_PART})*")
# vendor, class and name as the CDI specification spells them.
_CDI_ID = re.compile(
    r"[A-Za-z](?:[\w.-]*[A-Za-z0-9])?"
    r"/[A-Za-z](?:[\w-]*[A-Za-z0-9])?"
    r"=[A-Za-z0-9](?:[\w.:-]*[A-Za-z0-9])?",
    re.ASCII,
)


def choose_version(offered: Iterable[str], known: Iterable[Version]) -> Version:
    """The first of the plugin's list that this kubelet knows; RegistrationFailed if there is none."""
    for text in offered:
        for version in known:
            if text == version:
                return version
    raise RegistrationFailed(f"none of the plugin's versions {list(offered)} is known", tell=True)


def check_plugin(info: PluginInfo) -> None:
    """RegistrationFailed if kubelet would refuse the plugin."""
    if not _DRIVER.fullmatch(info.driver):
        raise RegistrationFailed(f"{info.driver!r} is not a driver name", tell=True)
    if not info.endpoint.is_absolute():
        raise RegistrationFailed(f"the endpoint {info.endpoint} is not an absolute path", tell=True)


def check_keys(method: str, asked: Iterable[str], answers: Mapping[str, Answer]) -> None:
    """ContractBroken unless exactly the claims asked for are answered."""
    wanted = set(asked)
    unknown = sorted(set(answers) - wanted)
    if unknown:
        raise ContractBroken(f"{method} returned result for unknown claim UID {unknown[0]}")
    missing = sorted(wanted - set(answers))
    if missing:
        raise ContractBroken(f"{method} skipped {len(missing)} ResourceClaims: {', '.join(missing)}")


def check_error(method: str, answer: Answer) -> None:
    """ContractBroken if the error text could not be shown as one line of an event."""
    if len(answer.error.encode()) > ERROR_BYTES:
        raise ContractBroken(f"{method} gave an error of more than {ERROR_BYTES} bytes")
    if not answer.error.isprintable():
        raise ContractBroken(f"{method} gave an error that is not one line: {answer.error!r}")


def check_devices(uid: str, devices: Iterable[SimDevice], taken: Mapping[str, str]) -> None:
    """ContractBroken if a device of this claim is not well described.

    taken maps the CDI ids of other claims to those claims' UIDs.
    """
    seen: set[tuple[str, str, str | None]] = set()
    for device in devices:
        _check_device(uid, device)
        key = (device.pool, device.device, device.share_id)
        if key in seen:
            raise ContractBroken(f"claim {uid}: device {device.pool}/{device.device} was given twice")
        seen.add(key)
        for cdi_id in device.cdi_ids:
            if taken.get(cdi_id, uid) != uid:
                raise ContractBroken(f"claim {uid}: CDI id {cdi_id} is claim {taken[cdi_id]}'s")


def _check_device(uid: str, device: SimDevice) -> None:
    if not _POOL.fullmatch(device.pool):
        raise ContractBroken(f"claim {uid}: {device.pool!r} is not a pool name")
    if not _DEVICE.fullmatch(device.device):
        raise ContractBroken(f"claim {uid}: {device.device!r} is not a device name")
    if device.share_id == "":
        raise ContractBroken(f"claim {uid}: device {device.device} has an empty share id")
    for request in device.requests:
        if not _REQUEST.fullmatch(request):
            raise ContractBroken(f"claim {uid}: {request!r} is not a base request name")
    if len(set(device.cdi_ids)) != len(device.cdi_ids):
        raise ContractBroken(f"claim {uid}: device {device.device} names a CDI id twice")
    for cdi_id in device.cdi_ids:
        if not _CDI_ID.fullmatch(cdi_id):
            raise ContractBroken(f"claim {uid}: {cdi_id!r} is not a CDI id (vendor/class=name)")
