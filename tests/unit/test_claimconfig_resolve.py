"""The config of a device is what class and claim say together, and nothing a claim may not say."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from driver.claimconfig import API_VERSION, KIND, ClaimLimits, FieldPath, MtuBounds, check_together, resolve
from driver.errors import ConfigError
from driver.model import (
    AllocatedDevice,
    ConfigSource,
    DeviceName,
    InterfaceConfig,
    NicConfig,
    OpaqueConfig,
    PoolName,
    VfConfig,
)
from driver.rdma import IpoibConfig, RdmaConfig, RdmaFile, RdmaLimits, RdmaMode
from driver.traffic import Enforcement, QosConfig
from hw.ipoib import IpoibMode
from hw.model import IfName, MacAddress, VfLinkState, VfVlan

DEFAULTS = ClaimLimits()
EXAMPLES = Path(__file__).parents[2] / "deploy/examples/claims"
MAC = "02:00:00:00:00:01"


def nic(request: str = "nic") -> AllocatedDevice:
    return AllocatedDevice(request=request, pool=PoolName("node"), device=DeviceName("veth-5"))


def entry(source: ConfigSource, *requests: str, **content: Any) -> OpaqueConfig:
    document = {"apiVersion": API_VERSION, "kind": KIND, **content}
    return OpaqueConfig(source=source, requests=requests, parameters=json.dumps(document))


def of_class(*requests: str, **content: Any) -> OpaqueConfig:
    return entry(ConfigSource.CLASS, *requests, **content)


def of_claim(*requests: str, **content: Any) -> OpaqueConfig:
    return entry(ConfigSource.CLAIM, *requests, **content)


def problems(*configs: OpaqueConfig, limits: ClaimLimits = DEFAULTS, request: str = "nic") -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        resolve(nic(request), configs, limits)
    return {problem.path: problem.message for problem in caught.value.problems}


# --- merging ----------------------------------------------------------------------------------------


def test_no_config_keeps_what_the_device_has() -> None:
    assert resolve(nic(), [], DEFAULTS) == NicConfig()


def test_a_claim_wins_over_its_class_field_by_field() -> None:
    merged = resolve(
        nic(),
        [
            of_class(interface={"name": "net1", "mtu": 9000}),
            of_claim(interface={"mtu": 1500, "addresses": ["192.0.2.5/24"]}),
        ],
        DEFAULTS,
    )
    assert merged.interface == InterfaceConfig(
        name=IfName("net1"), mtu=1500, addresses=(ipaddress.ip_interface("192.0.2.5/24"),)
    )


def test_a_claim_wins_over_its_class_in_whatever_order_they_come() -> None:
    configs = [of_claim(interface={"mtu": 1500}), of_class(interface={"mtu": 9000})]
    assert resolve(nic(), configs, DEFAULTS).interface.mtu == 1500


def test_a_later_entry_wins_over_an_earlier_one_of_the_same_source() -> None:
    configs = [of_claim(interface={"mtu": 1500, "name": "a"}), of_claim(interface={"mtu": 1400})]
    assert resolve(nic(), configs, DEFAULTS).interface == InterfaceConfig(name=IfName("a"), mtu=1400)


def test_an_entry_that_comes_again_is_later_than_what_came_between() -> None:
    first, between = of_claim(interface={"mtu": 1500}), of_claim(interface={"mtu": 1400})
    assert resolve(nic(), [first, between, first], DEFAULTS).interface.mtu == 1500


def test_a_later_list_replaces_the_earlier_one_whole() -> None:
    configs = [
        of_class(interface={"addresses": ["192.0.2.1/24", "2001:db8::1/64"]}),
        of_claim(interface={"addresses": []}),
    ]
    assert resolve(nic(), configs, DEFAULTS).interface.addresses == ()


@pytest.mark.parametrize(
    ("requests", "request_name", "applies"),
    [
        ((), "nic", True),
        (("nic",), "nic", True),
        (("nic",), "nic/fast", True),
        (("nic/fast",), "nic/fast", True),
        (("nic/slow",), "nic/fast", False),
        (("other",), "nic", False),
    ],
)
def test_an_entry_applies_to_its_requests(
    requests: tuple[str, ...], request_name: str, applies: bool
) -> None:
    config = resolve(nic(request_name), [of_claim(*requests, interface={"mtu": 1400})], DEFAULTS)
    assert (config.interface.mtu == 1400) is applies


def test_what_does_not_apply_to_the_device_is_not_judged() -> None:
    assert resolve(nic(), [of_claim("other", nonsense=1)], DEFAULTS) == NicConfig()


def test_the_problem_of_a_repeated_entry_is_reported_once() -> None:
    # The API server repeats an entry for each of its requests that was allocated.
    twice = of_claim("nic", interface={"mtu": 1})
    with pytest.raises(ConfigError) as caught:
        resolve(nic(), [twice, twice], DEFAULTS)
    assert len(caught.value.problems) == 1


# --- what a claim may not do ------------------------------------------------------------------------


def test_a_claim_cannot_change_what_its_class_fixes() -> None:
    fixed = of_class(fixed=["interface.mtu"], interface={"mtu": 9000})
    found = problems(fixed, of_claim(interface={"mtu": 1500}))
    assert found == {"interface.mtu": "is fixed by the DeviceClass and cannot be set by a claim"}


def test_a_claim_cannot_set_a_fixed_field_that_the_class_leaves_to_the_device() -> None:
    found = problems(of_class(fixed=["interface.name"]), of_claim(interface={"name": "net1"}))
    assert set(found) == {"interface.name"}


def test_a_claim_may_repeat_what_its_class_fixes() -> None:
    configs = [
        of_class(fixed=["interface.mtu"], interface={"mtu": 9000}),
        of_claim(interface={"mtu": 9000}),
    ]
    assert resolve(nic(), configs, DEFAULTS).interface.mtu == 9000


def test_a_class_is_not_bound_by_what_it_fixes() -> None:
    configs = [
        of_class(fixed=["interface.mtu"], interface={"mtu": 9000}),
        of_class(interface={"mtu": 4200}),
    ]
    assert resolve(nic(), configs, DEFAULTS).interface.mtu == 4200


def test_only_a_class_can_fix_fields() -> None:
    assert "only a DeviceClass" in problems(of_claim(fixed=["interface.mtu"]))["fixed"]


def test_a_mac_address_is_taken_from_a_claim_only_where_policy_allows_it() -> None:
    config = of_claim(interface={"hardwareAddress": MAC})
    assert "node policy" in problems(config)["interface.hardwareAddress"]
    allowed = ClaimLimits(allow=(FieldPath("interface.hardwareAddress"),))
    assert resolve(nic(), [config], allowed).interface.hardware_address == MAC


def test_a_mac_address_is_taken_from_a_class() -> None:
    config = of_class(interface={"hardwareAddress": MAC.upper()})
    assert resolve(nic(), [config], DEFAULTS).interface.hardware_address == MAC


def test_policy_can_keep_a_harmless_field_from_claims() -> None:
    limits = ClaimLimits(deny=(FieldPath("interface.name"),))
    assert set(problems(of_claim(interface={"name": "net1"}), limits=limits)) == {"interface.name"}


def test_policy_bounds_the_mtu_of_claims_and_not_of_classes() -> None:
    limits = ClaimLimits(mtu=MtuBounds(minimum=1280, maximum=1500))
    for mtu in (1279, 1501):
        assert "1280 to 1500" in problems(of_claim(interface={"mtu": mtu}), limits=limits)["interface.mtu"]
    for mtu in (1280, 1500):
        assert resolve(nic(), [of_claim(interface={"mtu": mtu})], limits).interface.mtu == mtu
    assert resolve(nic(), [of_class(interface={"mtu": 9000})], limits).interface.mtu == 9000


def test_a_class_bounds_the_mtu_of_claims_beside_the_policy() -> None:
    bounded = of_class(bounds={"mtu": {"minimum": 4000, "maximum": 9000}}, interface={"mtu": 1500})
    limits = ClaimLimits(mtu=MtuBounds(maximum=5000))
    assert resolve(nic(), [bounded], limits).interface.mtu == 1500
    assert resolve(nic(), [bounded, of_claim(interface={"mtu": 4000})], limits).interface.mtu == 4000
    # The class's own value stays legal when a claim repeats it.
    assert resolve(nic(), [bounded, of_claim(interface={"mtu": 1500})], limits).interface.mtu == 1500
    assert problems(bounded, of_claim(interface={"mtu": 3999}), limits=limits) == {
        "interface.mtu": "must be 4000 to 9000, not 3999 (in the DeviceClass, bounds.mtu)"
    }
    assert (
        "node policy" in problems(bounded, of_claim(interface={"mtu": 5001}), limits=limits)["interface.mtu"]
    )


def test_only_a_class_can_bound_fields() -> None:
    assert "only a DeviceClass" in problems(of_claim(bounds={"mtu": {"minimum": 68}}))["bounds"]


def test_limits_that_contradict_themselves_cannot_be_made() -> None:
    field = FieldPath("interface.mtu")
    with pytest.raises(ValueError, match="both allowed and denied"):
        ClaimLimits(allow=(field,), deny=(field,))
    with pytest.raises(ValueError, match="above maximum"):
        MtuBounds(minimum=1500, maximum=1400)


# --- problems ---------------------------------------------------------------------------------------


def test_all_problems_of_all_entries_come_at_once_and_say_whose_they_are() -> None:
    found = problems(
        of_class(interface={"mtu": 1}, fixed=["interface.colour"]),
        of_claim(interface={"name": "a/b", "addresses": ["192.0.2.1/24", "192.0.2.1"]}),
        OpaqueConfig(source=ConfigSource.CLAIM, requests=(), parameters="{"),
    )
    assert set(found) == {
        "interface.mtu",
        "fixed[0]",
        "interface.name",
        "interface.addresses[1]",
        "",
    }
    assert found["interface.mtu"] == "must be 68 to 65535, not 1 (in the DeviceClass)"
    assert found[""].startswith("the config is not JSON")
    assert found["interface.name"].endswith("(in the claim)")


def test_a_bad_class_does_not_hide_what_is_wrong_with_the_claim() -> None:
    found = problems(of_class(interfaces={}), of_claim(interface={"hardwareAddress": MAC}))
    assert set(found) == {"interfaces", "interface.hardwareAddress"}


# --- devices side by side ---------------------------------------------------------------------------


def together(*devices: tuple[str, InterfaceConfig, str]) -> list[tuple[str, str]]:
    try:
        check_together(
            [(label, NicConfig(interface=interface), IfName(name)) for label, interface, name in devices]
        )
    except ConfigError as error:
        return [(problem.path, problem.message) for problem in error.problems]
    return []


def test_two_devices_of_a_pod_cannot_have_one_name() -> None:
    plain = InterfaceConfig()
    assert together(("a", plain, "net1"), ("b", plain, "net2")) == []
    ((path, message),) = together(("a", plain, "net1"), ("b", plain, "net1"))
    assert path == "interface.name"
    assert message == "a and b would both be named net1 in one pod"


@pytest.mark.parametrize("name", ["lo", "eth0", "all", "default", "tunl0"])
def test_no_device_takes_a_name_that_means_something_else_in_a_pod(name: str) -> None:
    ((path, message),) = together(("a", InterfaceConfig(), name))
    assert path == "interface.name"
    assert name in message
    assert "set interface.name" in message


def test_two_devices_of_a_pod_cannot_have_one_mac_or_one_address() -> None:
    def config(prefix: int) -> InterfaceConfig:
        return InterfaceConfig(
            hardware_address=MacAddress(MAC), addresses=(ipaddress.ip_interface(f"192.0.2.1/{prefix}"),)
        )

    found = together(("a", config(24), "net1"), ("b", config(32), "net2"))
    assert [path for path, _ in found] == ["interface.hardwareAddress", "interface.addresses"]


def test_one_device_may_have_an_address_with_two_prefix_lengths() -> None:
    addresses = tuple(ipaddress.ip_interface(f"192.0.2.1/{prefix}") for prefix in (24, 32))
    assert together(("a", InterfaceConfig(addresses=addresses), "net1")) == []


def test_devices_with_one_label_are_still_two_devices() -> None:
    # A shared device can be allocated twice in one claim, under two share ids.
    plain = InterfaceConfig()
    assert len(together(("a", plain, "net1"), ("a", plain, "net1"))) == 1


# --- settings of a VF -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vf", "path"),
    [
        ({"vlan": {"id": 7}}, "vf.vlan"),
        ({"vlan": {"id": 0}}, "vf.vlan"),
        ({"trust": True}, "vf.trust"),
        ({"spoofCheck": False}, "vf.spoofCheck"),
        ({"minRate": "1G"}, "vf.minRate"),
    ],
)
def test_a_claim_may_not_harm_others_through_its_vf(vf: dict[str, object], path: str) -> None:
    assert "cannot be set by a claim on this node" in problems(of_claim(vf=vf))[path]
    resolve(nic(), [of_claim(vf=vf)], ClaimLimits(allow=(FieldPath(path),)))
    resolve(nic(), [of_class(vf=vf), of_claim(vf=vf)], DEFAULTS)


@pytest.mark.parametrize(
    "vf",
    [{"trust": False}, {"spoofCheck": True}, {"minRate": "0"}, {"maxRate": "1G"}, {"linkState": "disable"}],
)
def test_a_claim_may_ask_for_what_harms_nobody(vf: dict[str, object]) -> None:
    resolve(nic(), [of_claim(vf=vf)], DEFAULTS)
    (name,) = vf
    assert problems(of_claim(vf=vf), limits=ClaimLimits(deny=(FieldPath(f"vf.{name}"),)))


def test_a_vlan_is_taken_whole_and_the_rest_field_by_field() -> None:
    merged = resolve(
        nic(),
        [
            of_class(
                vf={"vlan": {"id": 7, "qos": 5, "protocol": "802.1ad"}, "maxRate": "1G", "trust": False}
            ),
            of_claim(vf={"vlan": {"id": 8}, "linkState": "enable"}),
        ],
        ClaimLimits(allow=(FieldPath("vf.vlan"),)),
    )
    assert merged.vf == VfConfig(vlan=VfVlan(id=8), max_rate=1000, trust=False, link_state=VfLinkState.ENABLE)


def test_rates_of_class_and_claim_that_do_not_fit_together_are_refused() -> None:
    found = problems(of_class(vf={"minRate": "2G"}), of_claim(vf={"maxRate": "1G"}))
    assert found == {"vf.minRate": "is 2000M, above vf.maxRate, which is 1000M"}
    resolve(nic(), [of_class(vf={"minRate": "2G"}), of_claim(vf={"maxRate": "0"})], DEFAULTS)


# --- traffic ----------------------------------------------------------------------------------------


def test_a_section_within_a_section_is_merged_field_by_field() -> None:
    of = of_class(qos={"egress": {"rate": "2G", "burst": "256Ki"}, "ingress": {"rate": "1G"}})
    merged = resolve(
        nic(), [of, of_claim(qos={"egress": {"rate": "1G"}, "enforcement": "software"})], DEFAULTS
    )
    assert merged.qos == QosConfig(
        enforcement=Enforcement.SOFTWARE, egress_rate=1000, egress_burst=256 << 10, ingress_rate=1000
    )


@pytest.mark.parametrize("way", ["egress", "ingress"])
@pytest.mark.parametrize("rate", ["2G", "0"])
def test_a_claim_can_lower_a_limit_of_its_class_and_not_raise_it(way: str, rate: str) -> None:
    found = problems(of_class(qos={way: {"rate": "1G"}}), of_claim(qos={way: {"rate": rate}}))
    assert found == {f"qos.{way}.rate": "can be lowered by a claim, and is 1000M in the DeviceClass"}
    resolve(nic(), [of_class(qos={way: {"rate": "1G"}}), of_claim(qos={way: {"rate": "500M"}})], DEFAULTS)
    resolve(nic(), [of_class(qos={way: {"rate": "0"}}), of_claim(qos={way: {"rate": rate}})], DEFAULTS)


def test_limits_that_say_two_things_are_refused() -> None:
    twice = {"vf": {"maxRate": "1G"}, "qos": {"egress": {"rate": "1G"}}}
    assert "says the same as vf.maxRate" in problems(of_class(**twice))["qos.egress.rate"]
    above = {"egress": {"minRate": "2G", "rate": "1G"}}
    assert problems(of_class(qos=above)) == {
        "qos.egress.minRate": "is 2000M, above qos.egress.rate, which is 1000M"
    }


def test_a_claim_chooses_no_class_and_takes_no_rate_from_others() -> None:
    for qos, path in (({"class": "cnp"}, "qos.class"), ({"egress": {"minRate": "1G"}}, "qos.egress.minRate")):
        assert "cannot be set by a claim on this node" in problems(of_claim(qos=qos))[path]
        resolve(nic(), [of_claim(qos=qos)], ClaimLimits(allow=(FieldPath(path),)))


# --- RDMA -------------------------------------------------------------------------------------------


def test_files_that_reach_the_fabrics_management_come_from_a_class_or_where_the_node_allows_it() -> None:
    rdma = {"deviceFiles": ["umad"], "mode": "shared"}
    assert "cannot be set by a claim" in problems(of_claim(rdma=rdma))["rdma.deviceFiles"]
    allowed = ClaimLimits(allow=(FieldPath("rdma.deviceFiles"),))
    for configs, limits in (([of_claim(rdma=rdma)], allowed), ([of_class(rdma=rdma)], DEFAULTS)):
        assert resolve(nic(), configs, limits).rdma == RdmaConfig(
            mode=RdmaMode.SHARED, files=(RdmaFile.UMAD,)
        )


def test_a_partition_is_the_same_with_its_bit_of_membership_or_without_and_is_the_admins() -> None:
    for key in ("0x8001", "0x0001", "0x1"):
        assert resolve(nic(), [of_class(rdma={"partition": key})], DEFAULTS).rdma.partition == 1
    refused = problems(of_claim(rdma={"partition": "0x8001"}))
    assert "cannot be set by a claim" in refused["rdma.partition"]


def test_an_ipoib_interface_is_of_the_partition_that_the_class_chose() -> None:
    ipoib = {"name": "ib1", "mode": "connected", "mtu": 65520, "addresses": ["192.0.2.7/24"]}
    made = resolve(nic(), [of_class(rdma={"partition": "0x8001"}), of_claim(rdma={"ipoib": ipoib})], DEFAULTS)
    assert made.rdma.ipoib == IpoibConfig(
        name=IfName("ib1"),
        mode=IpoibMode.CONNECTED,
        mtu=65520,
        addresses=(ipaddress.ip_interface("192.0.2.7/24"),),
    )
    assert "needs rdma.partition" in problems(of_claim(rdma={"ipoib": {"name": "ib1"}}))["rdma.ipoib"]


def test_the_example_of_a_partition_is_what_its_class_and_its_claim_say_together() -> None:
    class_made, template, _ = yaml.safe_load_all((EXAMPLES / "partition.yaml").read_text())
    (by_class,) = class_made["spec"]["config"]
    (by_claim,) = template["spec"]["spec"]["devices"]["config"]
    configs = [
        OpaqueConfig(source=source, requests=(), parameters=json.dumps(each["opaque"]["parameters"]))
        for source, each in ((ConfigSource.CLASS, by_class), (ConfigSource.CLAIM, by_claim))
    ]
    made = resolve(nic(), configs, DEFAULTS).rdma
    assert (made.partition, made.mode, made.ipoib is not None) == (0x0001, RdmaMode.SHARED, True)
    refused = problems(*configs, of_claim(rdma={"partition": "0x8002"}))
    assert "rdma.partition" in refused


@pytest.mark.parametrize(
    ("name", "address", "path"),
    [("net1", "192.0.2.8/24", "interface.name"), ("ib1", "192.0.2.7/24", "interface.addresses")],
)
def test_an_ipoib_interface_is_at_odds_with_its_own_device_too(name: str, address: str, path: str) -> None:
    config = NicConfig(
        interface=InterfaceConfig(addresses=(ipaddress.ip_interface("192.0.2.7/24"),)),
        rdma=RdmaConfig(
            partition=1,
            ipoib=IpoibConfig(name=IfName(name), addresses=(ipaddress.ip_interface(address),)),
        ),
    )
    with pytest.raises(ConfigError, match="the IPoIB interface of nic-0") as raised:
        check_together([("nic-0", config, IfName("net1"))])
    assert [problem.path for problem in raised.value.problems] == [path]


def test_an_rdma_limit_of_a_class_is_lowered_by_a_claim_and_never_raised() -> None:
    whole = of_class(rdma={"limits": {"objects": 4096}})
    lowered = resolve(nic(), [whole, of_claim(rdma={"limits": {"objects": 16, "handles": 2}})], DEFAULTS)
    assert lowered.rdma.limits == RdmaLimits(handles=2, objects=16)
    raised = problems(whole, of_claim(rdma={"limits": {"objects": 4097}}))
    assert raised == {"rdma.limits.objects": "can be lowered by a claim, and is 4096 in the DeviceClass"}


def test_class_and_claim_say_together_what_of_rdma_a_pod_gets() -> None:
    merged = resolve(
        nic(),
        [of_class(rdma={"nccl": True, "mode": "exclusive"}), of_claim(rdma={"nccl": False, "ucx": True})],
        DEFAULTS,
    )
    assert merged.rdma == RdmaConfig(mode=RdmaMode.EXCLUSIVE, ucx=True)
