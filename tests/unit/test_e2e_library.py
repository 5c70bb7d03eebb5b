"""The end-to-end suite's own reading of the world, where that needs no cluster."""

from __future__ import annotations

import pytest

from tests.e2e.e2e_ground import DeviceKind, Feature, ground_of
from tests.e2e.e2e_links import Link, parse_links
from tests.e2e.e2e_objects import Claim, Container, Pod, Request, nic
from tests.real_cluster import CHOICES, chosen

BUSYBOX = r"""
1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue qlen 1000\    link/loopback 00:00:00:00:00:00 brd 00:00:00:00:00:00
7: eth0@if8: <BROADCAST,MULTICAST,UP,LOWER_UP,M-DOWN> mtu 1500 qdisc noqueue qlen 1000\    link/ether 0a:58:0a:f4:01:0c brd ff:ff:ff:ff:ff:ff
12: net1: <BROADCAST,MULTICAST> mtu 1400 qdisc noop qlen 1000\    link/ether 02:00:5e:10:00:01 brd ff:ff:ff:ff:ff:ff
said by something else
"""  # noqa: E501 - as the tool prints it


def test_links_are_read_as_the_tool_prints_them() -> None:
    assert parse_links(BUSYBOX) == {
        "lo": Link("lo", "00:00:00:00:00:00", 65536, True),
        "eth0": Link("eth0", "0a:58:0a:f4:01:0c", 1500, True),
        "net1": Link("net1", "02:00:5e:10:00:01", 1400, False),
    }


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({}, ""),
        ({"nodes": 2, "devices": 8, "wired": True, "feature": Feature.DEVICE_TAINT_RULES}, ""),
        ({"nodes": 3}, "needs 3 nodes"),
        ({"devices": 9}, "needs 9 devices"),
        ({"kind": DeviceKind.VF}, "needs devices of kind vf"),
    ],
)
def test_a_case_is_taken_out_with_the_first_need_that_the_ground_does_not_meet(
    wanted: dict[str, object], why: str
) -> None:
    said = ground_of(CHOICES["machine-1.37"]).lacks(wanted)
    assert said.startswith(why)
    assert bool(said) == bool(why)


def test_a_cluster_that_there_is_not_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KND_CLUSTER", "moon")
    with pytest.raises(pytest.UsageError, match=r"KND_CLUSTER=moon.*machine-1\.37"):
        chosen()


def test_a_pod_without_containers_of_its_own_has_one_that_names_every_claim() -> None:
    spec = Pod(name="p", templates={"a": "ta"}, claims={"b": "cb"}).object()["spec"]
    assert spec["resourceClaims"] == [
        {"name": "a", "resourceClaimTemplateName": "ta"},
        {"name": "b", "resourceClaimName": "cb"},
    ]
    (container,) = spec["containers"]
    assert container["resources"] == {"claims": [{"name": "a"}, {"name": "b"}]}
    assert container["command"][2].startswith("ip -o link")


def test_a_claims_config_is_for_the_requests_it_names() -> None:
    claim = Claim(requests=(Request(device_class="c", name="a"),), configs=(nic("net1", requests=["a"]),))
    (config,) = claim.claim("x")["spec"]["devices"]["config"]
    assert config["requests"] == ["a"]
    assert config["opaque"]["parameters"]["interface"] == {"name": "net1"}
    assert "resources" not in Container().object()
