"""A config is taken whole or refused with every problem and its path; the JSON Schema says the same."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from driver.claimconfig import API_VERSION, FIELDS, GUARDED_FIELDS, KIND, decode, json_schema

EXAMPLES = Path(__file__).parents[2] / "deploy/examples/claims"
HEADER = {"apiVersion": API_VERSION, "kind": KIND}
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def decoded(**content: Any) -> dict[str, str]:
    document, found = decode(json.dumps(HEADER | content))
    assert (document is None) == bool(found)
    return {problem.path: problem.message for problem in found}


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("", "", "is not JSON"),
        ("[]", "", "must be an object, not a list"),
        ("null", "", "must be an object, not null"),
        ('{"kind": "NetworkDeviceConfig"}', "", "needs apiVersion: knd.internal/v1alpha1"),
        ('{"apiVersion": "knd.internal/v2"}', "apiVersion", "must be 'knd.internal/v1alpha1'"),
        ('{"interface": {"mtu": NaN}}', "", "NaN is not a JSON number"),
        ('{"interface": {"mtu": 1500, "mtu": 1400}}', "interface.mtu", "is given twice"),
        ('{"kind": "NetworkDeviceConfig", "kind": "NetworkDeviceConfig"}', "kind", "is given twice"),
        ('{"a b\\n": 1}', "['a b\\n']", "is not a known field"),
        ('{"interface": {"mtu": 15e999}}', "interface.mtu", "must be an integer"),
        ("[" * 100_000, "", "is 100000 characters long"),
        ("[" * 60_000, "", "is nested more than 32 levels deep"),
        ('{"a":' * 5000 + "1" + "}" * 5000, ".".join("a" * 33), "is nested more than 32 levels deep"),
        ('{"interface": {"mtu": ' + "9" * 5000 + "}}", "", "is not JSON"),
    ],
)
def test_malformed_text_is_refused_with_its_place(text: str, path: str, words: str) -> None:
    document, found = decode(text)
    assert document is None
    assert any(problem.path == path and words in problem.message for problem in found) or (
        # Where the interpreter itself gives up on the depth, there is no path.
        "levels deep" in words and any(words in problem.message for problem in found)
    )


@pytest.mark.parametrize(
    ("interface", "path", "words"),
    [
        ({"mtu": "1500"}, "interface.mtu", "must be an integer, not '1500'"),
        ({"mtu": True}, "interface.mtu", "must be an integer, not true"),
        ({"mtu": None}, "interface.mtu", "must be an integer, not null"),
        ({"mtu": 1500.5}, "interface.mtu", "must be an integer, not 1500.5"),
        ({"mtu": 67}, "interface.mtu", "must be 68 to 65535, not 67"),
        ({"mtu": 65536}, "interface.mtu", "must be 68 to 65535, not 65536"),
        ({"name": ""}, "interface.name", "is not an interface name"),
        ({"name": "a" * 16}, "interface.name", "is not an interface name"),
        ({"name": "a/b"}, "interface.name", "is not an interface name"),
        ({"name": "a\nb"}, "interface.name", "is not an interface name"),
        ({"name": ".."}, "interface.name", "is not an interface name"),
        ({"name": "eth0"}, "interface.name", "belongs to the pod's main network"),
        ({"name": "lo"}, "interface.name", "is the pod's loopback"),
        ({"name": 5}, "interface.name", "must be a string, not 5"),
        ({"hardwareAddress": "01:00:00:00:00:01"}, "interface.hardwareAddress", "multicast"),
        ({"hardwareAddress": "00:00:00:00:00:00"}, "interface.hardwareAddress", "all-zero"),
        ({"hardwareAddress": " 02:00:00:00:00:01"}, "interface.hardwareAddress", "white space"),
        ({"hardwareAddress": "02-00-00-00-00-01"}, "interface.hardwareAddress", "is not a MAC address"),
        ({"addresses": "192.0.2.1/24"}, "interface.addresses", "must be a list, not '192.0.2.1/24'"),
        ({"addresses": ["192.0.2.1"]}, "interface.addresses[0]", "with its prefix length"),
        ({"addresses": ["192.0.2.1/33"]}, "interface.addresses[0]", "with its prefix length"),
        ({"addresses": ["192.0.2.1/255.255.255.0"]}, "interface.addresses[0]", "with its prefix length"),
        ({"addresses": ["192.0.2.01/24"]}, "interface.addresses[0]", "with its prefix length"),
        ({"addresses": ["fe80::1%eth0/64"]}, "interface.addresses[0]", "with its prefix length"),
        ({"addresses": ["127.0.0.1/8"]}, "interface.addresses[0]", "loopback"),
        ({"addresses": ["224.0.0.1/24"]}, "interface.addresses[0]", "multicast"),
        ({"addresses": ["::/0"]}, "interface.addresses[0]", "unspecified"),
        ({"addresses": ["::ffff:192.0.2.1/128"]}, "interface.addresses[0]", "write it as IPv4"),
        ({"addresses": ["::1/64", "192.0.2.1/24"]}, "interface.addresses[0]", "loopback"),
        (
            {"addresses": ["2001:db8::1/64", "2001:DB8:0::1/64"]},
            "interface.addresses[1]",
            "is the same as interface.addresses[0]",
        ),
        ({"addresses": [f"192.0.2.{n}/24" for n in range(1, 18)]}, "interface.addresses", "0 to 16 entries"),
        ({"nmae": "net1"}, "interface.nmae", "did you mean name?"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path_and_reason(
    interface: dict[str, object], path: str, words: str
) -> None:
    found = decoded(interface=interface)
    assert words in found[path]
    assert len(found) == 1
    document = HEADER | {"interface": interface}
    assert not VALIDATOR.is_valid(document) or only_what_a_pattern_cannot_say(document)


@pytest.mark.parametrize(
    "content",
    [{name: {}} for name in ("routes", "rules", "neighbors", "ethtool")]
    + [{"interface": {name: 1}} for name in ("dhcp", "vrf", "forwarding", "gsoMaxSize")],
)
def test_what_is_ours_but_not_built_is_not_called_unknown(content: dict[str, object]) -> None:
    (message,) = decoded(**content).values()
    assert message == "is not supported by this version"


def test_control_characters_of_a_value_do_not_reach_the_reader() -> None:
    (message,) = decoded(interface={"name": "a\x1b[31m\n"}).values()
    assert message.isprintable()
    (path,) = decoded(**{"x\x1b\n": 1})
    assert path.isprintable()


def test_a_whole_number_may_be_written_as_a_float() -> None:
    document, _ = decode(json.dumps(HEADER | {"interface": {"mtu": 1500.0}}))
    assert document is not None
    assert document.interface is not None
    assert document.interface.mtu == 1500
    assert isinstance(document.interface.mtu, int)


def test_every_field_that_can_hurt_others_is_guarded() -> None:
    assert {
        *("interface.hardwareAddress", "vf.driver", "vf.vlan", "vf.spoofCheck", "vf.trust", "vf.minRate"),
        *("rdma.deviceFiles", "rdma.partition", "qos.class", "qos.egress.minRate"),
    } == FIELDS & GUARDED_FIELDS


@pytest.mark.parametrize(
    ("vf", "path", "words"),
    [
        ({"vlan": {}}, "vf.vlan", "needs id"),
        ({"vlan": 7}, "vf.vlan", "must be an object, not 7"),
        ({"vlan": {"id": 4095}}, "vf.vlan.id", "must be 0 to 4094, not 4095"),
        ({"vlan": {"id": -1}}, "vf.vlan.id", "must be 0 to 4094, not -1"),
        ({"vlan": {"id": 7, "qos": 8}}, "vf.vlan.qos", "must be 0 to 7, not 8"),
        ({"vlan": {"id": 7, "protocol": "qinq"}}, "vf.vlan.protocol", "must be one of 802.1q, 802.1ad"),
        ({"vlan": {"id": 0, "qos": 1}}, "vf.vlan", "id 0 means no VLAN"),
        ({"vlan": {"id": 0, "protocol": "802.1ad"}}, "vf.vlan", "id 0 means no VLAN"),
        ({"spoofCheck": "off"}, "vf.spoofCheck", "must be true or false"),
        ({"trust": 1}, "vf.trust", "must be true or false"),
        ({"linkState": "up"}, "vf.linkState", "must be one of auto, enable, disable"),
        ({"maxRate": 1000}, "vf.maxRate", "must be a string, not 1000"),
        ({"maxRate": "1000"}, "vf.maxRate", "is not a rate like 500M or 25G"),
        ({"maxRate": "0M"}, "vf.maxRate", "is not a rate"),
        ({"maxRate": "1.5G"}, "vf.maxRate", "is not a rate"),
        ({"maxRate": "1Gi"}, "vf.maxRate", "is not a rate"),
        ({"minRate": "11T"}, "vf.minRate", "is above 10T"),
        ({"max_rate": "1G"}, "vf.max_rate", "did you mean maxRate?"),
    ],
)
def test_a_wrong_setting_of_a_vf_is_refused_with_its_path_and_reason(
    vf: dict[str, object], path: str, words: str
) -> None:
    found = decoded(vf=vf)
    assert words in found[path]
    assert len(found) == 1
    says_more_than_a_schema = "no VLAN" in words
    assert VALIDATOR.is_valid(HEADER | {"vf": vf}) == says_more_than_a_schema


@pytest.mark.parametrize(
    ("rate", "megabits"), [("0", 0), ("1M", 1), ("9999999M", 9_999_999), ("25G", 25_000), ("10T", 10_000_000)]
)
def test_a_rate_is_bits_per_second_in_whole_megabits(rate: str, megabits: int) -> None:
    document, found = decode(json.dumps(HEADER | {"vf": {"minRate": rate, "maxRate": rate}}))
    assert not found
    assert document is not None
    assert document.vf is not None
    assert (document.vf.min_rate, document.vf.max_rate) == (megabits, megabits)
    VALIDATOR.validate(HEADER | {"vf": {"maxRate": rate}})


@pytest.mark.parametrize(
    ("rdma", "path", "words"),
    [
        ({"mode": "asIs"}, "rdma.mode", "must be one of shared, exclusive"),
        ({"deviceFiles": ["uverbs"]}, "rdma.deviceFiles[0]", "must be one of umad, issm"),
        ({"deviceFiles": ["umad", "umad"]}, "rdma.deviceFiles[1]", "is the same as"),
        ({"nccl": "yes"}, "rdma.nccl", "must be true or false"),
        ({"device_files": []}, "rdma.device_files", "did you mean deviceFiles?"),
        ({"partition": "0x8000"}, "rdma.partition", "is no partition"),
        ({"partition": "0x18001"}, "rdma.partition", "is not a partition key"),
        ({"partition": 32769}, "rdma.partition", "must be a string"),
        ({"ipoib": {"name": "eth0"}}, "rdma.ipoib.name", "belongs to the pod's main network"),
        ({"ipoib": {"mode": "connected"}}, "rdma.ipoib", "needs name"),
        ({"ipoib": {"name": "ib1", "mtu": 4093}}, "rdma.ipoib", "mode datagram goes up to 4092"),
        ({"ipoib": {"name": "ib1", "mtu": 65521}}, "rdma.ipoib.mtu", "must be 68 to 65520"),
        ({"ipoib": {"name": "ib1", "addresses": ["192.0.2.7"]}}, "rdma.ipoib.addresses[0]", "prefix length"),
        ({"limits": {"objects": 0}}, "rdma.limits.objects", "must be 1 to 2147483647"),
        ({"limits": {"handles": True}}, "rdma.limits.handles", "must be an integer"),
        ({"limits": {"hca_object": 1}}, "rdma.limits.hca_object", "is not"),
    ],
)
def test_a_wrong_wish_about_rdma_is_refused_with_its_path_and_reason(
    rdma: dict[str, object], path: str, words: str
) -> None:
    found = decoded(rdma=rdma)
    assert words in found[path]
    assert len(found) == 1


# --- the schema -------------------------------------------------------------------------------------


def test_the_schema_is_a_legal_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


def opaque_parameters(value: object) -> list[Mapping[str, object]]:
    """Every opaque config of ours anywhere in a manifest."""
    if isinstance(value, list):
        return [found for item in value for found in opaque_parameters(item)]
    if not isinstance(value, dict):
        return []
    if value.get("driver") == "knd.internal" and "parameters" in value:
        return [value["parameters"]]
    return [found for item in value.values() for found in opaque_parameters(item)]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_are_valid(file: Path) -> None:
    found = opaque_parameters(list(yaml.safe_load_all(file.read_text())))
    assert found
    for parameters in found:
        VALIDATOR.validate(parameters)
        assert decode(json.dumps(parameters))[1] == ()


words = st.text(max_size=18)
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    words,
    st.lists(words, max_size=2),
    st.dictionaries(words, st.integers(), max_size=2),
)
names = st.one_of(
    st.text("abz09_.-/ A%", max_size=17), st.sampled_from(["lo", "eth0", "eth1", "..", "all", "tunl0"])
)
macs = st.one_of(
    st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":")),
    st.binary(min_size=5, max_size=7).map(lambda raw: raw.hex(":").upper()),
    st.just("00:00:00:00:00:00"),
)
prefixes = st.one_of(st.integers(0, 140).map(str), st.sampled_from(["", "024", "-1", "255.255.255.0"]))
hosts = st.one_of(
    st.ip_addresses().map(str),
    st.sampled_from(["0.0.0.0", "127.3.2.1", "224.0.0.1", "239.1.1.1", "255.255.255.255", "01.2.3.4"]),
    st.text("0123456789.", max_size=16),
    st.text("0123456789abcdef:.", max_size=24),
)
addresses = st.lists(st.builds("{}/{}".format, hosts, prefixes) | hosts | words, max_size=18)
near = {
    "name": names,
    "mtu": st.integers(60, 80) | st.integers(65530, 65540) | st.sampled_from([1500.0, 1500.5]),
    "hardwareAddress": macs,
    "addresses": addresses | st.integers(14, 18).map(lambda count: [f"192.0.2.{n}/24" for n in range(count)]),
}
"""Values of each field on both sides of what is legal."""
interfaces = st.fixed_dictionaries(
    {}, optional={field: values | words | junk for field, values in near.items()} | {"dhcp": st.booleans()}
)
one_field = st.one_of([st.fixed_dictionaries({field: values}) for field, values in near.items()])
documents = st.fixed_dictionaries(
    {},
    optional={
        "apiVersion": st.just(API_VERSION) | junk,
        "kind": st.just(KIND) | junk,
        "interface": interfaces | junk,
        "fixed": st.lists(st.sampled_from([*sorted(FIELDS), "interface"]), max_size=3) | junk,
        "routes": junk,
    },
)


def ends_a_line(value: object) -> bool:
    """Python's `$` also matches before a last newline; that of JSON Schema's dialect does not."""
    if isinstance(value, str):
        return value.endswith("\n")
    if isinstance(value, dict):
        return any(map(ends_a_line, value.values()))
    return isinstance(value, list) and any(map(ends_a_line, value))


def only_what_a_pattern_cannot_say(document: Any) -> bool:
    """IPv6 text, and whether two spellings are one address, are beyond a schema."""
    _, found = decode(json.dumps(document))
    return all(
        problem.path.startswith("interface.addresses[")
        and (":" in str(document["interface"]["addresses"]) or "is the same as" in problem.message)
        for problem in found
    )


@settings(deadline=None)
@given(
    st.one_of(
        documents,
        documents.map(lambda document: HEADER | document),
        one_field.map(lambda interface: HEADER | {"interface": interface}),
    ).filter(lambda document: not ends_a_line(document))
)
@example(HEADER | {"interface": {"addresses": ["192.0.2.1/24", "192.0.2.1/24"]}})
@example(HEADER | {"interface": {"mtu": 65535, "name": "a" * 15, "hardwareAddress": "02:00:00:00:00:01"}})
def test_decoder_and_schema_give_the_same_verdict(document: dict[str, Any]) -> None:
    taken = not decode(json.dumps(document))[1]
    by_schema = VALIDATOR.is_valid(document)
    if taken:
        assert by_schema, list(VALIDATOR.iter_errors(document))
    elif by_schema:
        assert only_what_a_pattern_cannot_say(document)


@settings(deadline=None)
@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_schema_and_decoder_agree_on_every_ipv4_address(host: ipaddress.IPv4Address, prefix: int) -> None:
    document = HEADER | {"interface": {"addresses": [f"{host}/{prefix}"]}}
    assert VALIDATOR.is_valid(document) == (not decode(json.dumps(document))[1])


@settings(deadline=None)
@given(
    st.text(max_size=300)
    | documents.map(json.dumps).flatmap(lambda text: st.integers(0, len(text)).map(lambda cut: text[:cut]))
)
def test_no_text_makes_the_decoder_fail(text: str) -> None:
    document, found = decode(text)
    assert (document is None) == bool(found)
