"""Which claims this kubelet holds, for which pods, and kubelet's checkpoint file of them.

Invariant: a claim is written to the checkpoint before a driver is asked to prepare it and leaves it
only after every driver has unprepared it. Whether it is prepared is not written: after a restart it is
not known.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kndsim.kubelet_model import ClaimLike, ImpossibleUse, PrepareFailed, SimClaim, SimDevice


@dataclass(slots=True)
class ClaimRecord:
    """A claim held by kubelet. drivers has an entry for every driver that was ever asked."""

    claim: SimClaim
    pods: set[str] = field(default_factory=set)
    drivers: dict[str, tuple[SimDevice, ...]] = field(default_factory=dict)
    prepared: set[str] = field(default_factory=set)
    """Drivers that prepared it in this run of kubelet."""


class ClaimCache:
    """Kubelet's claims by UID, mirrored to the file at path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, ClaimRecord] = {}

    def get(self, uid: str) -> ClaimRecord | None:
        return self._records.get(uid)

    def reference(self, driver: str, claims: Iterable[ClaimLike], pod: str) -> list[ClaimRecord]:
        """Note that pod uses the claims, before the driver is asked."""
        found = []
        for claim in claims:
            self._refuse_namesake(claim)
            held = SimClaim(claim.namespace, claim.name, claim.uid)
            record = self._records.setdefault(claim.uid, ClaimRecord(held))
            record.pods.add(pod)
            record.drivers.setdefault(driver, ())
            found.append(record)
        self.save()
        return found

    def dereference(self, driver: str, claims: Iterable[ClaimLike], pod: str) -> list[ClaimRecord]:
        """Drop the pod's use of the claims; return those that no other pod uses.

        Those keep their last reference until `drop`. ImpossibleUse, and nothing changed, if the pod does
        not use one of them or the driver was never asked for it.
        """
        records = []
        for claim in claims:
            record = self._records.get(claim.uid)
            if record is None or driver not in record.drivers:
                raise ImpossibleUse(
                    f"claim {claim.uid} is not held here for {driver}: force=True asks anyway"
                )
            if pod not in record.pods:
                users = ", ".join(sorted(record.pods))
                raise ImpossibleUse(f"claim {claim.uid} is not used by pod {pod!r} but by {users}")
            records.append(record)
        last = [record for record in records if record.pods == {pod}]
        for record in records:
            if record.pods != {pod}:
                record.pods.discard(pod)
        self.save()
        return last

    def drop(self, driver: str, uid: str) -> None:
        """The driver unprepared the claim; it is forgotten when no other driver has it."""
        record = self._records.get(uid)
        if record is None:
            return
        record.drivers.pop(driver, None)
        record.prepared.discard(driver)
        if not record.drivers:
            del self._records[uid]
        self.save()

    def cdi_ids_of_others(self, driver: str, uids: Sequence[str]) -> dict[str, str]:
        """CDI id to claim UID, of every (claim, driver) but these claims of this driver."""
        return {
            cdi_id: uid
            for uid, record in self._records.items()
            for name, devices in record.drivers.items()
            if name != driver or uid not in uids
            for device in devices
            for cdi_id in device.cdi_ids
        }

    def _refuse_namesake(self, claim: ClaimLike) -> None:
        for uid, record in self._records.items():
            same_name = (record.claim.namespace, record.claim.name) == (claim.namespace, claim.name)
            if same_name and uid != claim.uid:
                raise PrepareFailed(
                    f"old ResourceClaim with same name {claim.name} and UID {uid} still exists"
                )

    def save(self) -> None:
        data = {
            "kind": "DRACheckpoint",
            "apiVersion": "checkpoint.dra.kubelet.k8s.io/v1",
            "Entries": [_entry(record) for record in self._records.values()],
        }
        text = json.dumps(data, separators=(",", ":"))
        document = {"Data": text, "Checksum": zlib.crc32(text.encode())}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staged = self._path.with_name(f".{self._path.name}")
        staged.write_text(json.dumps(document))
        staged.rename(self._path)

    def load(self) -> None:
        """Take over what an earlier run left; ValueError if the file is damaged."""
        self._records = {}
        if not self._path.exists():
            return
        document = json.loads(self._path.read_text())
        if zlib.crc32(document["Data"].encode()) != document["Checksum"]:
            raise ValueError(f"{self._path} is corrupt")
        for entry in json.loads(document["Data"])["Entries"]:
            record = _record(entry)
            self._records[record.claim.uid] = record


def _entry(record: ClaimRecord) -> dict[str, Any]:
    return {
        "ClaimUID": record.claim.uid,
        "ClaimName": record.claim.name,
        "Namespace": record.claim.namespace,
        "PodUIDs": {pod: {} for pod in sorted(record.pods)},
        "DriverState": {
            driver: {
                "Devices": [
                    {
                        "PoolName": device.pool,
                        "DeviceName": device.device,
                        "ShareID": device.share_id,
                        "RequestNames": list(device.requests),
                        "CDIDeviceIDs": list(device.cdi_ids),
                    }
                    for device in devices
                ]
            }
            for driver, devices in record.drivers.items()
        },
    }


def _record(entry: dict[str, Any]) -> ClaimRecord:
    return ClaimRecord(
        claim=SimClaim(entry["Namespace"], entry["ClaimName"], entry["ClaimUID"]),
        pods=set(entry["PodUIDs"]),
        drivers={
            driver: tuple(
                SimDevice(
                    requests=tuple(device["RequestNames"]),
                    pool=device["PoolName"],
                    device=device["DeviceName"],
                    cdi_ids=tuple(device["CDIDeviceIDs"]),
                    share_id=device["ShareID"],
                )
                for device in state["Devices"]
            )
            for driver, state in entry["DriverState"].items()
        },
    )
