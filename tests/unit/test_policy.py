"""A node policy is taken whole or refused with file, line and field of every problem."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from driver import inventory
from driver.claimconfig import FieldPath
from driver.errors import ConfigError
from driver.policy import (
    ForeignChoice,
    HookPreference,
    NetdevSelector,
    NodePolicy,
    ResetPolicy,
    load_policy,
    policy_schema,
)
from driver.policy.rules import OWN_ATTRIBUTES, POLICY_ATTRIBUTES
from driver.qos import DEFAULT_CLASSES, EgressShaper
from hw.model import (
    DeviceKind,
    HwDevice,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    PciAddress,
    PciFacts,
    PciIdentity,
    SoftwareIdentity,
)

EXAMPLES = Path(__file__).parents[2] / "deploy/examples/policy"
HEADER = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"


def load(body: str) -> NodePolicy:
    return load_policy(HEADER + body, "policy.yaml")


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_policy(text, "policy.yaml")
    return [str(problem) for problem in caught.value.problems]


def link(name: str = "net-1", kind: str | None = "veth", link_type: int = 1) -> LinkInfo:
    return LinkInfo(
        ifindex=IfIndex(7), name=IfName(name), flags=LinkFlags(0), link_type=link_type, mtu=1500, kind=kind
    )


def vf(name: str = "ens1f0v2", pf_name: str = "ens1f0", driver: str | None = "mlx5_core") -> HwDevice:
    address = PciAddress("0000:3b:00.2")
    return HwDevice(
        kind=DeviceKind.VF,
        identity=PciIdentity(address, PciAddress("0000:3b:00.0"), 0),
        link=link(name, None),
        pci=PciFacts(address=address, vendor="15b3", product="101e", driver=driver),
        pf_name=IfName(pf_name),
    )


def veth() -> HwDevice:
    return HwDevice(
        kind=DeviceKind.NETDEV, identity=SoftwareIdentity("veth", IfIndex(7), None, None), link=link()
    )


NAME = "pci-0000-3b-00-2"


# --- what is offered --------------------------------------------------------------------------------


def test_without_a_policy_physical_devices_are_offered_and_software_ones_are_not() -> None:
    policy = NodePolicy()
    assert policy.withheld(vf(), NAME) == ""
    assert policy.attributes_for(vf(), NAME) == {}
    assert not policy.selects(link())


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ("{kinds: [veth]}", True),
        ("{kinds: [macvlan, veth]}", True),
        ("{kinds: [macvlan]}", False),
        ("{names: ['net-*']}", True),
        ("{names: ['eth*', 'net-?']}", True),
        ("{names: ['net-*'], kinds: [macvlan]}", False),
        ("{names: ['NET-*']}", False),
    ],
)
def test_software_interfaces_are_offered_where_all_criteria_of_a_selector_fit(
    selector: str, selected: bool
) -> None:
    assert load(f"netdevs: [{selector}]").selects(link()) is selected


def test_one_fitting_selector_is_enough() -> None:
    assert load("netdevs: [{kinds: [macvlan]}, {kinds: [veth]}]").selects(link())


def test_an_interface_without_kind_fits_no_kind() -> None:
    assert not load("netdevs: [{kinds: ['*']}]").selects(link(kind=None))


def test_loopback_is_never_offered() -> None:
    assert not load("netdevs: [{names: ['*']}]").selects(link("lo", None, link_type=772))


@pytest.mark.parametrize(
    ("match", "selected"),
    [
        ("{names: ['pci-0000-3b-*']}", True),
        ("{names: ['pci-0000-1a-*']}", False),
        ("{kinds: [vf]}", True),
        ("{kinds: [pf, rdma]}", False),
        ("{vendors: [15B3]}", True),
        ("{vendors: ['8086']}", False),
        ("{products: ['101e'], vendors: [15b3]}", True),
        ("{products: ['101e'], vendors: ['8086']}", False),
        ("{drivers: ['mlx5*']}", True),
        ("{drivers: [igbvf]}", False),
        ("{pfNames: [ens1f0]}", True),
        ("{pfNames: [ens2f0]}", False),
        ("{interfaces: ['ens1f0v*']}", True),
        ("{interfaces: [eth1]}", False),
    ],
)
def test_a_rule_is_about_devices_that_fit_all_its_criteria(match: str, selected: bool) -> None:
    policy = load(f"devices: [{{match: {match}, offer: false}}]")
    assert bool(policy.withheld(vf(), NAME)) is selected


@pytest.mark.parametrize(
    "match", ["drivers: ['*']", "pfNames: ['*']", "vendors: [15b3]", "interfaces: ['*']"]
)
def test_what_a_device_lacks_fits_nothing(match: str) -> None:
    bare = HwDevice(kind=DeviceKind.RDMA, identity=PciIdentity(PciAddress("0000:3b:00.2")), link=None)
    assert load(f"devices: [{{match: {{{match}}}, offer: false}}]").withheld(bare, NAME) == ""


def test_later_rules_win_over_earlier_ones() -> None:
    policy = load(
        "devices:\n"
        "- {offer: false, attributes: {fabric: blue, rail: 0}}\n"
        "- {match: {kinds: [vf]}, offer: true, attributes: {rail: 1}}\n"
    )
    assert policy.withheld(vf(), NAME) == ""
    assert policy.attributes_for(vf(), NAME) == {"fabric": "blue", "rail": 1}
    assert policy.withheld(veth(), "veth-7") != ""
    assert policy.attributes_for(veth(), "veth-7") == {"fabric": "blue", "rail": 0}


def test_attributes_keep_their_types() -> None:
    policy = load("devices: [{attributes: {a: true, b: 1, c: 'yes', d: yes, e: '1', f: 02:00:00:00:00:01}}]")
    found = policy.attributes_for(vf(), NAME)
    assert found == {"a": True, "b": 1, "c": "yes", "d": "yes", "e": "1", "f": "02:00:00:00:00:01"}
    assert type(found["a"]) is bool
    assert type(found["b"]) is int


def test_a_policy_cannot_replace_what_the_driver_itself_publishes() -> None:
    always = {"kind", "rdma", "virtual", "ebpf"}
    assert always | set(inventory.OPTIONAL) <= OWN_ATTRIBUTES
    assert POLICY_ATTRIBUTES == inventory.POLICY_LIMIT


def test_a_policy_has_no_more_attributes_than_there_are_places() -> None:
    def body(count: int) -> str:
        return "devices:\n" + "".join(f"- {{attributes: {{a{n}: {n}}}}}\n" for n in range(count))

    assert len(load(body(POLICY_ATTRIBUTES)).attributes_for(vf(), NAME)) == POLICY_ATTRIBUTES
    (problem,) = problems(HEADER + body(POLICY_ATTRIBUTES + 1))
    assert "7 different attributes" in problem


# --- the other sections -----------------------------------------------------------------------------


def test_all_sections_are_read() -> None:
    policy = load(
        "netdevs: [{kinds: [veth]}]\n"
        "claims: {allow: [interface.hardwareAddress], deny: [interface.name], mtu: {maximum: 9000}}\n"
        "qosClasses: [{name: rest, index: 0}, {name: gold, index: 1, dscp: [46, 44], pcp: [5]}]\n"
        "hook: clsact\n"
        "reset: none\n"
        "foreignPrograms: detach\n"
    )
    assert policy.netdevs == (NetdevSelector(kinds=("veth",)),)
    assert policy.claim_limits.settable(FieldPath("interface.hardwareAddress"), "02:00:00:00:00:01")
    assert not policy.claim_limits.settable(FieldPath("interface.name"), "net1")
    assert (policy.claim_limits.mtu.minimum, policy.claim_limits.mtu.maximum) == (68, 9000)
    assert policy.classes[1].dscp == {44, 46}
    assert policy.hook is HookPreference.CLSACT
    assert policy.reset is ResetPolicy.NONE
    assert policy.foreign_programs is ForeignChoice.DETACH


def test_an_empty_policy_is_the_default_one() -> None:
    assert load("") == NodePolicy()
    assert NodePolicy().classes == DEFAULT_CLASSES
    assert NodePolicy().foreign_programs is ForeignChoice.REPORT, "nothing is taken from others unasked"


# --- problems ---------------------------------------------------------------------------------------


def test_all_problems_come_at_once_in_the_order_of_their_lines() -> None:
    assert problems(
        HEADER + "hook: yes\n"
        "netdevs:\n"
        "- {}\n"
        "devices:\n"
        "- match: {vendors: [1234], kind: vf}\n"
        "  attributes:\n"
        "    kind: vf\n"
        "    rail: 1.5\n"
        "claims:\n"
        "  deny: [interface.colour]\n"
        "  mtu:\n"
        "    minimum: 9000\n"
        "    maximum: 1500\n"
    ) == [
        "policy.yaml:3: hook: must be one of auto, tcx, clsact, not 'yes'",
        "policy.yaml:5: netdevs[0]: needs names or kinds: it would select every interface of the node",
        "policy.yaml:7: devices[0].match.vendors[0]: must be a string, not 1234",
        "policy.yaml:7: devices[0].match.kind: is not a known field; did you mean kinds?",
        "policy.yaml:9: devices[0].attributes.kind: is read from the hardware and cannot be set by policy",
        "policy.yaml:10: devices[0].attributes.rail: must be true, false, a 64-bit integer or a string of "
        "at most 64 bytes, not 1.5",
        "policy.yaml:12: claims.deny[0]: 'interface.colour' is not a field; the fields are "
        "interface.addresses, interface.hardwareAddress, interface.mtu, interface.name, qos.class, "
        "qos.egress.burst, qos.egress.minRate, qos.egress.rate, qos.enforcement, qos.ingress.rate, "
        "rdma.deviceFiles, rdma.ipoib, rdma.limits.handles, rdma.limits.objects, rdma.mode, rdma.nccl, "
        "rdma.partition, rdma.ucx, subinterface.vlan, "
        "vf.driver, vf.linkState, vf.maxRate, vf.minRate, vf.spoofCheck, vf.trust, vf.vlan",
        "policy.yaml:13: claims.mtu: minimum 9000 is above maximum 1500",
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("off", "one of keep, report, detach, not 'off'"),
        ("Detach", "one of keep, report, detach, not 'Detach'"),
        ("[keep]", "a string, not a list"),
        ("", "a string, not null"),
    ],
)
def test_what_is_done_with_programs_of_others_is_one_of_three_words(given: str, words: str) -> None:
    assert problems(f"{HEADER}foreignPrograms: {given}\n") == [
        f"policy.yaml:3: foreignPrograms: must be {words}"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "policy.yaml:1: is empty"),
        ("# only a comment\n", "policy.yaml:1: is empty"),
        ("a: [1\nb: 2\n", "policy.yaml:2: is not YAML: while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", "policy.yaml:2: is not YAML"),
        ("a: 1\nb: \x07\n", "policy.yaml:2: is not YAML: character 0x7 is not allowed"),
        ("a: &x 1\n", "policy.yaml:1: uses an anchor or alias ('x')"),
        ("a: 1\nb: *x\n", "policy.yaml:2: uses an anchor or alias ('x')"),
        ("a: !!python/name:os.system x\n", "has the tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("a: 1\n---\nb: 2\n", "policy.yaml:2: is not YAML: expected a single document"),
        ("- 1\n", "policy.yaml:1: must be an object, not a list"),
        (HEADER + "hook: tcx\nhook: auto\n", "policy.yaml:4: hook: is given twice (first in line 3)"),
        (HEADER + "<<: {hook: tcx}\n", "policy.yaml:3: ['<<']: is not a known field"),
        (HEADER + "? [a]\n: 1\n", "policy.yaml:3: has a key that is not a word"),
        (HEADER + "devices:\n", "policy.yaml:3: devices: must be a list, not null"),
        (HEADER + "devices: [{match: {}}]\n", "devices[0].match: needs a criterion"),
        (HEADER + "devices: [{match: {kinds: [vf]}}]\n", "devices[0]: says nothing"),
        (HEADER + "netdevs: [{names: []}]\n", "netdevs[0].names: must have 1 to 64 entries, not 0"),
        (HEADER + "netdevs: [{names: ['a b']}]\n", "netdevs[0].names[0]: 'a b' is not a pattern"),
        (HEADER + "devices: [{attributes: {1a: 1}}]\n", "is not an attribute name"),
        (HEADER + "devices: [{attributes: {a/b: 1, a_.b/c: 1}}]\n", "'a_.b' is not a domain name"),
        (HEADER + "devices: [{attributes: {resource.kubernetes.io/numaNode: 1}}]\n", "belongs to Kubernetes"),
        (HEADER + f"devices: [{{attributes: {{a: {'x' * 65}}}}}]\n", "at most 64 bytes"),
        (HEADER + "devices: [{attributes: {a: 9223372036854775808}}]\n", "a 64-bit integer"),
        (HEADER + "claims: {allow: [interface.mtu], deny: [interface.mtu]}\n", "both allowed and denied"),
        ("apiVersion: knd.internal/v1\nkind: NodePolicy\n", "policy.yaml:1: apiVersion: must be"),
        ("kind: NodePolicy\n", "policy.yaml:1: needs apiVersion: knd.internal/v1alpha1"),
        ("a: " + "[" * 40 + "]" * 40, "is nested more than 32 levels deep"),
        ("[" * 100_000, "is nested more than 32 levels deep"),
        ("a" * (1 << 20) + "a", "is 1048577 characters long"),
    ],
)
def test_a_bad_policy_is_refused_with_its_place(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems(text)), problems(text)


def test_overlapping_classes_are_refused_with_the_line_of_the_second() -> None:
    found = problems(
        HEADER + "qosClasses:\n- {name: a, index: 0, dscp: [1]}\n- name: b\n  index: 2\n  dscp: [5, 1]\n"
    )
    assert found == [
        "policy.yaml:3: qosClasses: index 1 is missing: indices go from 0 without a gap",
        "policy.yaml:7: qosClasses[1].dscp: 1 is already in class a",
    ]


def test_a_ceiling_that_fq_could_not_keep_is_refused_and_htb_keeps_it() -> None:
    classes = "qosClasses:\n- {name: a, index: 0}\n- {name: b, index: 1, ceiling: 80}\n"
    assert problems(HEADER + classes + "shaper: fq\n") == [
        "policy.yaml:5: qosClasses[1].ceiling: is kept by htb only, and shaper is fq: leave one of them out"
    ]
    assert load_policy(HEADER + classes, "policy.yaml").qos.shaper is EgressShaper.HTB
    assert load_policy(HEADER + "shaper: fq\n", "policy.yaml").qos.shaper is EgressShaper.FQ
    assert "shaper" in problems(HEADER + "shaper: tbf\n")[0]


@settings(deadline=None)
@given(
    st.text(max_size=200)
    | st.integers(0, 3000).map(lambda cut: (EXAMPLES / "gpu-node.yaml").read_text()[:cut])
)
def test_no_text_makes_the_reader_fail(text: str) -> None:
    with contextlib.suppress(ConfigError):
        load_policy(text, "policy.yaml")


# --- examples and schema ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_example_policies_are_valid(file: Path) -> None:
    load_policy(file.read_text(), file.name)
    schema = policy_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads(json.dumps(yaml.safe_load(file.read_text())))
    jsonschema.Draft202012Validator(schema).validate(document)


def test_the_example_of_the_default_policy_is_the_default_policy() -> None:
    assert load_policy((EXAMPLES / "default.yaml").read_text(), "default.yaml") == NodePolicy()
