"""ResourceClaims, read fresh and reduced to what concerns this driver.

Invariant: a claim this driver does not wholly understand is refused with a sentence, never half used:
config of an unknown type or source may be what keeps a tenant apart.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor

from driver.errors import NotNow, Refusal
from driver.kube.client import ApiClient, Resource
from driver.kube.failures import ApiFailure, Forbidden, NotFound
from driver.kube.wire import JsonObject, Malformed, child, children, flag, needed_text, text, texts
from driver.model import (
    AllocatedDevice,
    Claim,
    ClaimRef,
    ConfigSource,
    DeviceName,
    OpaqueConfig,
    PodUid,
    PoolName,
    ShareId,
)

Seen = Callable[[ClaimRef, JsonObject], None]
"""Told of every claim read, with the raw object."""


class KubeClaimReader:
    """The port ClaimReader. client may block, so it is called in the executor."""

    def __init__(self, driver: str, client: Callable[[], ApiClient], executor: Executor, seen: Seen) -> None:
        self._driver = driver
        self._client = client
        self._executor = executor
        self._seen = seen

    async def read_claim(self, ref: ClaimRef) -> Claim:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, self._read, ref)
        except RuntimeError as error:
            raise NotNow(f"claim {ref.namespace}/{ref.name} was not read: the agent is stopping") from error

    def _read(self, ref: ClaimRef) -> Claim:
        shown = f"{ref.namespace}/{ref.name}"
        try:
            raw = self._client().get(Resource.RESOURCE_CLAIMS, ref.name, ref.namespace, exact=True)
        except NotFound as error:
            raise Refusal("ClaimGone", f"ResourceClaim {shown} does not exist (any more)") from error
        except Forbidden as error:
            advice = "give the agent's role get on resourceclaims"
            raise NotNow(f"ResourceClaim {shown} cannot be read, {advice}: {error.message}") from error
        except ApiFailure as error:
            raise NotNow(f"the API server did not give ResourceClaim {shown}: {error}") from error
        try:
            claim = parse_claim(raw, ref, self._driver)
        except Malformed as error:
            raise Refusal("ClaimMalformed", f"ResourceClaim {shown} cannot be understood: {error}") from error
        self._seen(ref, raw)
        return claim


def parse_claim(raw: JsonObject, ref: ClaimRef, driver: str) -> Claim:
    """The claim as this driver sees it. Refusal for another UID or config it must not ignore; Malformed
    for an object that is no ResourceClaim of resource.k8s.io/v1."""
    uid = needed_text(child(raw, "metadata"), "uid")
    if uid != ref.uid:
        raise Refusal(
            "ClaimReplaced",
            f"ResourceClaim {ref.namespace}/{ref.name} is another one now (UID {uid}, asked for {ref.uid})",
        )
    status = child(raw, "status")
    allocation = child(status, "allocation")
    devices = child(allocation, "devices")
    results = [each for each in children(devices, "results") if text(each, "driver") == driver]
    return Claim(
        ref=ref,
        allocated=bool(status.get("allocation")),
        devices=tuple(_device(result) for result in results),
        configs=tuple(
            config
            for entry in children(devices, "config")
            if (config := _config(entry, driver, ref)) is not None
        ),
        reserved_for=frozenset(
            PodUid(needed_text(consumer, "uid"))
            for consumer in children(status, "reservedFor")
            if text(consumer, "resource") == "pods"
        ),
    )


def _device(result: JsonObject) -> AllocatedDevice:
    share = text(result, "shareID")
    consumed: Mapping[str, str] = {
        name: _quantity(name, value) for name, value in child(result, "consumedCapacity").items()
    }
    return AllocatedDevice(
        request=needed_text(result, "request"),
        pool=PoolName(needed_text(result, "pool")),
        device=DeviceName(needed_text(result, "device")),
        share_id=ShareId(share) if share else None,
        admin_access=flag(result, "adminAccess"),
        consumed_capacity=consumed,
    )


def _quantity(name: str, value: object) -> str:
    """The server writes quantities as strings; a hand-made object may have a number."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise Malformed(f"consumedCapacity.{name} is not a quantity")


def _config(entry: JsonObject, driver: str, ref: ClaimRef) -> OpaqueConfig | None:
    """None: another driver's. Order in the allocation is the scheduler's and is kept by the caller."""
    if entry.get("opaque") is None:
        kinds = sorted(key for key in entry if key not in ("source", "requests"))
        raise Refusal(
            "UnknownConfig",
            f"ResourceClaim {ref.namespace}/{ref.name} has config of a type this driver does not know"
            f" ({', '.join(kinds) or 'none'}): it may be meant for this driver, so nothing is prepared",
        )
    opaque = child(entry, "opaque")
    if text(opaque, "driver") != driver:
        return None
    try:
        source = ConfigSource(text(entry, "source"))
    except ValueError as error:
        raise Refusal(
            "UnknownConfig",
            f"ResourceClaim {ref.namespace}/{ref.name} has config from {text(entry, 'source')!r};"
            f" this driver knows {ConfigSource.CLASS} and {ConfigSource.CLAIM}",
        ) from error
    parameters = child(opaque, "parameters")
    return OpaqueConfig(
        source=source,
        requests=texts(entry, "requests"),
        parameters=json.dumps(parameters, ensure_ascii=False),
    )
