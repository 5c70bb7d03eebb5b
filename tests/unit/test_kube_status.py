"""status.devices: all of ours, only ours, once, and never in a pod's way."""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from driver.kube.client import ApiClient, Resource
from driver.kube.status import KubeStatusWriter, entries_of
from driver.model import ClaimRef, ClaimUid, DeviceName, DeviceStatus, PoolName, ShareId
from driver.rdma import IpoibConfig
from hw.ipoib import IpoibMode
from hw.model import IfName, InterfaceAddress, MacAddress
from kndsim.api import SimApi, new_share_id
from tests.conftest import WaitUntil
from tests.unit.kube_support import DRIVER, FAST, NODE, ManualClock, client_of, rate, running

OTHER = "gpu.example.com"


@dataclass
class Setting:
    api: SimApi
    client: ApiClient
    writer: KubeStatusWriter
    clock: ManualClock

    def devices(self, name: str = "c") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api.claim("d", name)["status"].get("devices", [])
        return found

    def applies(self) -> int:
        return len(self.api.requests("patch", "resourceclaims/status"))


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    clock = ManualClock()
    with SimApi() as api, client_of(api, tmp_path) as client:
        writer = KubeStatusWriter(DRIVER, lambda: client, clock, FAST)
        with running(writer.worker):
            yield Setting(api, client, writer, clock)


def claim_with(api: SimApi, *devices: str, name: str = "c", **more: Any) -> ClaimRef:
    uid = api.add_claim("d", name, devices=[("net", NODE, device, None) for device in devices], **more)
    return ClaimRef("d", name, ClaimUid(uid))


def status_of(claim: ClaimRef, device: str, **more: Any) -> DeviceStatus:
    values: dict[str, Any] = {
        "claim": claim,
        "pool": PoolName(NODE),
        "device": DeviceName(device),
        "share_id": None,
        "ready": True,
        "reason": "Attached",
        "message": "",
    }
    return DeviceStatus(**{**values, **more})


def address(text: str) -> InterfaceAddress:
    return ipaddress.ip_interface(text)


def test_an_entry_says_where_the_device_is(setting: Setting, wait_until: WaitUntil) -> None:
    claim = claim_with(setting.api, "vf-1")
    status = status_of(
        claim,
        "vf-1",
        interface=IfName("net1"),
        mac=MacAddress("02:00:00:00:00:01"),
        addresses=(address("192.0.2.5/24"), address("2001:DB8:0:0:0:0:0:1/64"), address("192.0.2.5/24")),
        hook="tcx",
        message="in the pod",
    )
    setting.writer.write_status(claim, [status])
    (entry,) = wait_until(setting.devices)
    assert entry == {
        "driver": DRIVER,
        "pool": NODE,
        "device": "vf-1",
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "Attached",
                "message": "in the pod",
                "lastTransitionTime": "1970-01-12T13:46:40Z",
            }
        ],
        "networkData": {
            "interfaceName": "net1",
            "hardwareAddress": "02:00:00:00:00:01",
            "ips": ["192.0.2.5/24", "2001:db8::1/64"],
        },
        "data": {"accountingHook": "tcx"},
    }


IPOIB = IpoibConfig(name=IfName("ib1"), mode=IpoibMode.CONNECTED, addresses=(address("192.0.2.7/24"),))


def test_an_ipoib_interface_is_told_beside_the_devices_own_and_not_as_that(
    setting: Setting, wait_until: WaitUntil
) -> None:
    claim = claim_with(setting.api, "vf-1")
    own = {"interface": IfName("ib0"), "addresses": (address("192.0.2.5/24"),)}
    status = status_of(claim, "vf-1", hook="tcx", partition=0x8001, ipoib=IPOIB, **own)
    setting.writer.write_status(claim, [status])
    (entry,) = wait_until(setting.devices)
    assert entry["networkData"] == {"interfaceName": "ib0", "ips": ["192.0.2.5/24"]}
    assert entry["data"] == {
        "accountingHook": "tcx",
        "ipoib": {
            "interfaceName": "ib1",
            "partition": "0x8001",
            "mode": "connected",
            "ips": ["192.0.2.7/24"],
        },
    }


def test_what_a_claim_can_ask_of_an_ipoib_interface_fits_into_a_status() -> None:
    long = ipaddress.ip_address("2001:db8:1111:2222:3333:4444:5555:6666")
    wish = replace(IPOIB, addresses=tuple(ipaddress.ip_interface(f"{long + n}/128") for n in range(40)))
    status = status_of(ClaimRef("d", "c", ClaimUid("u")), "vf-1", partition=0xFFFF, ipoib=wish)
    (entry,) = entries_of([status], DRIVER, (), 0.0)
    assert len(json.dumps(entry["data"])) < 1024


def test_without_addresses_it_has_none_and_without_it_nothing_is_said_of_it() -> None:
    claim = ClaimRef("d", "c", ClaimUid("u"))
    bare = status_of(claim, "vf-1", partition=0x8001, ipoib=replace(IPOIB, addresses=()))
    none = status_of(claim, "vf-2", partition=0x8001)
    first, second = entries_of([bare, none], DRIVER, (), 0.0)
    assert first["data"] == {"ipoib": {"interfaceName": "ib1", "partition": "0x8001", "mode": "connected"}}
    assert "data" not in second


def test_health_is_a_condition_of_its_own_with_a_time_of_its_own(
    setting: Setting, wait_until: WaitUntil
) -> None:
    claim = claim_with(setting.api, "vf-1")

    def conditions(unhealthy: str) -> dict[str, dict[str, str]]:
        setting.writer.write_status(claim, [status_of(claim, "vf-1", unhealthy=unhealthy)])
        wait_until(
            lambda: [c["message"] for d in setting.devices() for c in d["conditions"]] == ["", unhealthy]
        )
        (entry,) = setting.devices()
        return {each["type"]: each for each in entry["conditions"]}

    well = conditions("")
    assert (well["Healthy"]["status"], well["Healthy"]["reason"]) == ("True", "Healthy")
    setting.clock.now += 60.0
    ill = conditions("port 'ens1' has no carrier")
    assert (ill["Healthy"]["status"], ill["Healthy"]["reason"]) == ("False", "Unhealthy")
    assert ill["Healthy"]["lastTransitionTime"] > well["Healthy"]["lastTransitionTime"]
    assert ill["Ready"] == well["Ready"]


def test_the_apply_carries_owned_fields_only_by_force_under_the_drivers_name(
    setting: Setting, wait_until: WaitUntil
) -> None:
    claim = claim_with(setting.api, "vf-1", "vf-2")
    setting.writer.write_status(claim, [status_of(claim, "vf-2"), status_of(claim, "vf-1")])
    wait_until(setting.devices)
    (request,) = setting.api.requests("patch")
    assert request.content_type == "application/apply-patch+yaml"
    assert request.query == {"fieldManager": DRIVER, "force": "true"}
    assert set(request.body) == {"apiVersion", "kind", "metadata", "status"}
    assert request.body["metadata"] == {"name": "c", "namespace": "d", "uid": claim.uid}
    assert set(request.body["status"]) == {"devices"}
    assert [entry["device"] for entry in request.body["status"]["devices"]] == ["vf-1", "vf-2"]


def test_other_drivers_entries_stay(setting: Setting, wait_until: WaitUntil) -> None:
    foreign = {"request": "gpu", "driver": OTHER, "pool": NODE, "device": "gpu-0"}
    claim = claim_with(setting.api, "vf-1", extra_results=[foreign])
    body = {"status": {"devices": [{"driver": OTHER, "pool": NODE, "device": "gpu-0"}]}}
    setting.client.apply(
        Resource.RESOURCE_CLAIMS, "c", body, namespace="d", subresource="status", manager=OTHER
    )
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(lambda: len(setting.devices()) == 2)
    setting.writer.write_status(claim, [status_of(claim, "vf-1", ready=False, reason="Detached")])
    wait_until(lambda: setting.applies() == 3)
    assert {entry["driver"] for entry in setting.devices()} == {DRIVER, OTHER}


def test_entries_no_longer_named_are_removed(setting: Setting, wait_until: WaitUntil) -> None:
    claim = claim_with(setting.api, "vf-1", "vf-2")
    setting.writer.write_status(claim, [status_of(claim, "vf-1"), status_of(claim, "vf-2")])
    wait_until(lambda: len(setting.devices()) == 2)
    setting.writer.write_status(claim, [status_of(claim, "vf-2")])
    wait_until(lambda: [entry["device"] for entry in setting.devices()] == ["vf-2"])


def test_shared_devices_have_an_entry_per_share(setting: Setting, wait_until: WaitUntil) -> None:
    shares = sorted(ShareId(new_share_id()) for _ in range(2))
    uid = setting.api.add_claim("d", "c", devices=[("net", NODE, "up", share) for share in shares])
    claim = ClaimRef("d", "c", ClaimUid(uid))
    setting.writer.write_status(claim, [status_of(claim, "up", share_id=share) for share in shares])
    wait_until(lambda: [entry["shareID"] for entry in setting.devices()] == shares)


def test_a_condition_keeps_its_time_until_it_turns(setting: Setting, wait_until: WaitUntil) -> None:
    claim = claim_with(setting.api, "vf-1")
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(setting.devices)
    first = setting.devices()[0]["conditions"][0]["lastTransitionTime"]
    setting.clock.now += 100
    setting.writer.write_status(claim, [status_of(claim, "vf-1", message="more")])
    wait_until(lambda: setting.applies() == 2)
    assert setting.devices()[0]["conditions"][0]["lastTransitionTime"] == first
    setting.writer.write_status(claim, [status_of(claim, "vf-1", ready=False, reason="LinkDown")])
    wait_until(lambda: setting.devices()[0]["conditions"][0]["status"] == "False")
    assert setting.devices()[0]["conditions"][0]["lastTransitionTime"] != first


def test_nothing_is_written_that_is_there_already_even_after_a_restart(
    setting: Setting, wait_until: WaitUntil
) -> None:
    claim = claim_with(setting.api, "vf-1")
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(setting.devices)
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(lambda: len(setting.writer.worker) == 0)
    assert setting.applies() == 1
    setting.clock.now += 1000
    restarted = KubeStatusWriter(DRIVER, lambda: setting.client, setting.clock, FAST)
    with running(restarted.worker):
        restarted.write_status(claim, [status_of(claim, "vf-1")])
        wait_until(lambda: len(restarted.worker) == 0)
    assert setting.applies() == 1


def test_a_claim_read_at_prepare_is_not_read_again(setting: Setting, wait_until: WaitUntil) -> None:
    claim = claim_with(setting.api, "vf-1")
    raw = setting.client.get(Resource.RESOURCE_CLAIMS, "c", "d")
    setting.writer.seen(claim, raw)
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(setting.devices)
    assert [request.verb for request in setting.api.requests()] == ["get", "patch"]


@pytest.mark.parametrize(("code", "times"), [(500, 3), (429, 1), (409, 1)])
def test_passing_failures_are_retried(setting: Setting, wait_until: WaitUntil, code: int, times: int) -> None:
    claim = claim_with(setting.api, "vf-1")
    setting.api.fail(code, times=times, verb="patch")
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(setting.devices)


@pytest.mark.parametrize("code", [403, 422])
def test_a_denial_is_said_once_verbatim_and_retried_slowly(
    setting: Setting, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    claim = claim_with(setting.api, "vf-1")
    text = 'status.devices: Forbidden: needs "associated-node:patch" on resourceclaims/driver'
    setting.api.fail(code, times=4, verb="patch", message=text)
    with caplog.at_level(logging.ERROR):
        setting.writer.write_status(claim, [status_of(claim, "vf-1")])
        wait_until(setting.devices)
    assert len([record for record in caplog.records if text in record.getMessage()]) == 1
    assert rate([request.at for request in setting.api.requests("patch")]) < 20


def test_a_claim_that_is_gone_ends_the_matter_quietly(
    setting: Setting, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    claim = claim_with(setting.api, "vf-1")
    setting.api.delete("resourceclaims", "c", "d")
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(lambda: len(setting.writer.worker) == 0)
    assert caplog.records == []
    assert setting.api.writes() == []


def test_a_claim_that_took_the_name_since_is_never_written_and_never_complained_of(
    setting: Setting, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    claim = claim_with(setting.api, "vf-1")
    setting.writer.seen(claim, setting.api.claim("d", "c"))
    setting.api.delete("resourceclaims", "c", "d")
    claim_with(setting.api, "vf-1")
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(lambda: len(setting.writer.worker) == 0)
    assert setting.devices() == []
    assert caplog.records == []


def test_a_claim_that_the_server_cannot_write_back_is_told_of_once_with_what_to_do(
    setting: Setting, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    claim = claim_with(setting.api, "vf-1")
    cause = ("status.allocation", "attribute cannot be modified once set")
    setting.api.fail(422, times=10_000, verb="patch", causes=(cause,))
    for message in ("attached", "still attached"):
        setting.writer.write_status(claim, [status_of(claim, "vf-1", message=message)])
        wait_until(lambda: len(setting.writer.worker) == 0)
    assert setting.applies() == 2, "no retry: nobody but the claim's maker can mend it"
    (record,) = caplog.records
    assert "kubectl" in record.getMessage()


def test_an_empty_status_drops_what_was_queued(setting: Setting, wait_until: WaitUntil) -> None:
    claim = claim_with(setting.api, "vf-1")
    setting.api.fail(500, times=10_000, verb="patch")
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(lambda: setting.applies() > 1)
    setting.writer.write_status(claim, [])
    wait_until(lambda: len(setting.writer.worker) == 0)
    setting.api.clear_faults()
    other = claim_with(setting.api, "vf-2", name="other")
    setting.writer.write_status(other, [status_of(other, "vf-2")])
    wait_until(lambda: setting.devices("other"))
    assert setting.devices() == []


def test_a_reason_the_api_would_not_take_does_not_cost_the_status(
    setting: Setting, wait_until: WaitUntil
) -> None:
    claim = claim_with(setting.api, "vf-1")
    odd = replace(status_of(claim, "vf-1"), reason="not a reason!", message="x" * 5000)
    setting.writer.write_status(claim, [odd])
    (entry,) = wait_until(setting.devices)
    assert entry["conditions"][0]["reason"] == "Reported"
    assert len(entry["conditions"][0]["message"]) == 1024


def test_a_claim_that_is_malformed_is_retried_and_does_not_end_the_writer(
    setting: Setting, wait_until: WaitUntil
) -> None:
    claim = claim_with(setting.api, "vf-1")
    setting.api.answer_raw(b'{"metadata":{"uid":5}}', verb="get")
    setting.writer.write_status(claim, [status_of(claim, "vf-1")])
    wait_until(setting.devices)
