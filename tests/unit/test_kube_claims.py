"""A claim is read whole and right, or refused with a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from driver.errors import NotNow, Refusal
from driver.kube.claims import KubeClaimReader, parse_claim
from driver.kube.client import ApiClient
from driver.kube.failures import Unavailable
from driver.kube.wire import Malformed
from driver.model import Claim, ClaimRef, ClaimUid, ConfigSource
from kndsim.api import SimApi, new_share_id
from tests.unit.kube_support import DRIVER, NODE, client_of

OTHER = "gpu.example.com"


@pytest.fixture
def api() -> Iterator[SimApi]:
    with SimApi() as api:
        yield api


@pytest.fixture
def read(api: SimApi, tmp_path: Path) -> Iterator[Callable[[ClaimRef], Claim]]:
    with client_of(api, tmp_path) as client, ThreadPoolExecutor(1) as executor:
        reader = KubeClaimReader(DRIVER, lambda: client, executor, lambda *_: None)

        async def read_claim(ref: ClaimRef) -> Claim:
            return await reader.read_claim(ref)

        yield lambda ref: asyncio.run(read_claim(ref))


def ref(uid: str, name: str = "c") -> ClaimRef:
    return ClaimRef("d", name, ClaimUid(uid))


def test_only_this_drivers_part_is_taken(api: SimApi, read: Callable[[ClaimRef], Claim]) -> None:
    foreign = {"request": "gpu", "driver": OTHER, "pool": NODE, "device": "gpu-0"}
    uid = api.add_claim(
        "d",
        "c",
        devices=[("net", NODE, "vf-1", None)],
        extra_results=[foreign],
        configs=[
            {"source": "FromClass", "opaque": {"driver": OTHER, "parameters": {"x": 1}}},
            {"parameters": {"mtu": 9000}},
        ],
        reserved_for=["pod-1", "pod-2"],
    )
    claim = read(ref(uid))
    assert claim.allocated
    assert [(each.request, each.pool, each.device) for each in claim.devices] == [("net", NODE, "vf-1")]
    assert [each.parameters for each in claim.configs] == ['{"mtu": 9000}']
    assert claim.reserved_for == {"pod-1", "pod-2"}


def test_config_keeps_the_schedulers_order_source_and_requests(
    api: SimApi, read: Callable[[ClaimRef], Claim]
) -> None:
    configs = [
        {"source": "FromClass", "requests": ["a"], "opaque": {"driver": DRIVER, "parameters": {"n": 1}}},
        {"source": "FromClaim", "requests": ["a"], "opaque": {"driver": DRIVER, "parameters": {"n": 2}}},
        {"source": "FromClaim", "requests": ["a"], "opaque": {"driver": DRIVER, "parameters": {"n": 2}}},
        {"source": "FromClaim", "opaque": {"driver": DRIVER, "parameters": {"n": 3}}},
    ]
    uid = api.add_claim("d", "c", devices=[("a/fast", NODE, "vf", None)], configs=configs)
    claim = read(ref(uid))
    assert [(each.source, each.requests, each.parameters) for each in claim.configs] == [
        (ConfigSource.CLASS, ("a",), '{"n": 1}'),
        (ConfigSource.CLAIM, ("a",), '{"n": 2}'),
        (ConfigSource.CLAIM, ("a",), '{"n": 2}'),
        (ConfigSource.CLAIM, (), '{"n": 3}'),
    ]
    assert claim.devices[0].base_request == "a"
    assert all(each.applies_to(claim.devices[0]) for each in claim.configs)


def test_admin_access_share_and_consumed_capacity_are_kept(
    api: SimApi, read: Callable[[ClaimRef], Claim]
) -> None:
    share = new_share_id()
    shared = {
        "request": "net",
        "driver": DRIVER,
        "pool": NODE,
        "device": "up-0",
        "shareID": share,
        "adminAccess": True,
        "consumedCapacity": {"bandwidth": "5859375Ki", "vfs": 1},
    }
    uid = api.add_claim("d", "c", extra_results=[shared])
    (device,) = read(ref(uid)).devices
    assert device.share_id == share
    assert device.admin_access
    assert device.consumed_capacity == {"bandwidth": "5859375Ki", "vfs": "1"}


def test_an_unallocated_claim_is_read_as_that(api: SimApi, read: Callable[[ClaimRef], Claim]) -> None:
    claim = read(ref(api.add_claim("d", "c")))
    assert not claim.allocated
    assert claim.devices == ()


def test_only_pods_count_as_consumers(api: SimApi, read: Callable[[ClaimRef], Claim]) -> None:
    uid = api.add_claim("d", "c", devices=[("net", NODE, "vf", None)], reserved_for=["p"])

    def add_group(claim: dict[str, Any]) -> dict[str, Any]:
        group = {"apiGroup": "scheduling.k8s.io", "resource": "podgroups", "name": "g", "uid": "u"}
        claim["status"]["reservedFor"].append(group)
        return claim

    api.edit("resourceclaims", "c", add_group, "d")
    assert read(ref(uid)).reserved_for == {"p"}


@pytest.mark.parametrize(
    "config",
    [
        {"source": "FromNode", "opaque": {"driver": DRIVER, "parameters": {}}},
        {"opaque": {"driver": DRIVER, "parameters": {}}},
        {"source": "FromClaim", "structured": {"driver": DRIVER}},
        {"source": "FromClass"},
    ],
)
def test_config_of_an_unknown_source_or_type_is_refused(
    api: SimApi, read: Callable[[ClaimRef], Claim], config: dict[str, Any]
) -> None:
    uid = api.add_claim("d", "c", devices=[("net", NODE, "vf", None)], configs=[config])
    with pytest.raises(Refusal, match="d/c") as caught:
        read(ref(uid))
    assert caught.value.reason == "UnknownConfig"


def test_another_claim_of_the_same_name_is_refused(api: SimApi, read: Callable[[ClaimRef], Claim]) -> None:
    api.add_claim("d", "c", devices=[("net", NODE, "vf", None)])
    with pytest.raises(Refusal, match="another one") as caught:
        read(ref("00000000-0000-0000-0000-000000000000"))
    assert caught.value.reason == "ClaimReplaced"


def test_a_claim_that_is_gone_is_refused(read: Callable[[ClaimRef], Claim]) -> None:
    with pytest.raises(Refusal, match="does not exist"):
        read(ref("u"))


@pytest.mark.parametrize("code", [401, 403, 429, 500])
def test_a_server_that_cannot_be_asked_now_is_asked_again_later(
    api: SimApi, read: Callable[[ClaimRef], Claim], code: int
) -> None:
    uid = api.add_claim("d", "c", devices=[("net", NODE, "vf", None)])
    api.fail(code, message="no way")
    with pytest.raises(NotNow, match="no way"):
        read(ref(uid))
    assert read(ref(uid)).allocated


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"metadata":{"uid":7}}',
        b'{"metadata":{"uid":"u"},"status":[]}',
        b'{"metadata":{"uid":"u"},"status":{"allocation":{"devices":{"results":[{"driver":"knd.internal"}]}}}}',
        b'{"metadata":{"uid":"u"},"status":{"allocation":{"devices":{"results":{}}}}}',
        b'{"metadata":{"uid":"u"},"status":{"reservedFor":[{"resource":"pods"}]}}',
    ],
)
def test_what_is_no_claim_is_refused_with_the_field(
    api: SimApi, read: Callable[[ClaimRef], Claim], body: bytes
) -> None:
    api.answer_raw(body)
    with pytest.raises(Refusal, match="cannot be understood"):
        read(ref("u"))


def test_a_parameter_written_twice_reaches_the_strict_decoder(
    api: SimApi, read: Callable[[ClaimRef], Claim]
) -> None:
    api.answer_raw(
        b'{"metadata":{"uid":"u"},"status":{"allocation":{"devices":{"config":[{"source":"FromClaim",'
        b'"opaque":{"driver":"knd.internal","parameters":{"mtu":1500,"mtu":9000}}}]}}}}'
    )
    assert read(ref("u")).configs[0].parameters == '{"mtu": 1500, "mtu": 9000}'


def test_parsing_alone_says_malformed() -> None:
    with pytest.raises(Malformed, match="uid"):
        parse_claim({}, ref("u"), DRIVER)


def test_before_there_is_a_configuration_it_says_not_now() -> None:
    def none() -> ApiClient:
        raise Unavailable("connect", 0, "name a kubeconfig file")

    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            reader = KubeClaimReader(DRIVER, none, executor, lambda *_: None)
            with pytest.raises(NotNow, match="kubeconfig"):
                await reader.read_claim(ref("u"))
        with pytest.raises(NotNow, match="stopping"):
            await reader.read_claim(ref("u"))

    asyncio.run(main())
