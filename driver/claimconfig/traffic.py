"""What a NetworkDeviceConfig may say of traffic: rates, and the section `qos`.

Invariant: as in sections: a field is None until it is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from driver.strict import Key, Kind, choice, record, shown, text
from driver.traffic import CLASS_NAME_PATTERN, Enforcement, class_name

MAX_RATE = 10_000_000
"""In Mb/s: 10 Tb/s."""
_RATE_UNITS = {"M": 1, "G": 1_000, "T": 1_000_000}


def _rate(value: str) -> int:
    if value == "0":
        return 0
    match = re.fullmatch(r"([1-9][0-9]{0,7})([MGT])", value)
    if match is None:
        raise ValueError(f"{shown(value)} is not a rate like 500M or 25G, in bits per second, nor 0 for none")
    rate = int(match[1]) * _RATE_UNITS[match[2]]
    if rate > MAX_RATE:
        raise ValueError(f"{shown(value)} is above {MAX_RATE // _RATE_UNITS['T']}T")
    return rate


RATE: Kind[int] = text(
    _rate, {"pattern": "^(0|[1-9][0-9]{0,6}M|10000000M|[1-9][0-9]{0,3}G|10000G|[1-9]T|10T)$"}
)
_SIZE_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}
MAX_BURST = 1 << 30


def _size(value: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,9})(Ki|Mi|)", value)
    size = int(match[1]) * _SIZE_UNITS[match[2]] if match is not None else 0
    if not 0 < size <= MAX_BURST:
        raise ValueError(f"{shown(value)} is not a number of bytes like 65536 or 256Ki, up to 1024Mi")
    return size


SIZE: Kind[int] = text(_size, {"pattern": "^[1-9][0-9]{0,9}(Ki|Mi)?$"})
CLASS_NAME: Kind[str] = text(class_name, {"pattern": f"^{CLASS_NAME_PATTERN}$"})


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressSection:
    rate: Annotated[
        int | None, Key("rate", RATE, "Bits per second that it can send at most, like 500M; 0: no limit.")
    ] = None
    burst: Annotated[
        int | None,
        Key("burst", SIZE, "Bytes that may be sent at once after a pause, like 256Ki; by the kernel only."),
    ] = None
    min_rate: Annotated[
        int | None,
        Key(
            "minRate",
            RATE,
            "Bits per second that it can always send; 0: none. Only a device can keep it. From a claim only "
            "where the node policy allows it: it is taken from the other VFs.",
            guarded=True,
            harmless=(0,),
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSection:
    rate: Annotated[
        int | None, Key("rate", RATE, "Bits per second that it takes at most, like 500M; 0: no limit.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QosSection:
    traffic_class: Annotated[
        str | None,
        Key(
            "class",
            CLASS_NAME,
            "The traffic class (qosClasses of the node policy) of all its packets; absent: by their DSCP or "
            "VLAN priority. From a claim only where the node policy allows it.",
            guarded=True,
        ),
    ] = None
    enforcement: Annotated[
        Enforcement | None,
        Key(
            "enforcement",
            choice(Enforcement),
            "Who keeps the egress rates. hardware: the device, or the claim is refused. software: the node's "
            "kernel, which a pod with NET_ADMIN can disturb. auto: the device where it can.",
        ),
    ] = None
    egress: Annotated[EgressSection | None, Key("egress", record(EgressSection), "What the pod sends.")] = (
        None
    )
    ingress: Annotated[
        IngressSection | None,
        Key("ingress", record(IngressSection), "What the pod is sent; kept by the node's kernel."),
    ] = None
