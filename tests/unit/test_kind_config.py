"""What kind is told: the same API as on the machine's cluster, in fields that kind has."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from kndsim.cluster import conf
from kndsim.cluster.binaries import program_names, read_pin
from kndsim.cluster.kind import devices_of
from kndsim.kind.config import IMAGES, BadSpec, KindSpec, cluster_config, containerd_patch, served
from kndsim.kind.engine import Engine
from kndsim.kind.model import DeviceId, Home
from kndsim.kind.plan import Given, Ground
from kndsim.kind.up import PORTS, VETHS, VFS, Wanted, plan_for

VERSIONS = sorted(conf.GATES)

FIELDS: dict[str, Any] = {
    "kind": str,
    "apiVersion": str,
    "name": str,
    "nodes": [
        {
            "role": str,
            "image": str,
            "labels": {str: str},
            "extraMounts": [{"hostPath": str, "containerPath": str, "readOnly": bool, "propagation": str}],
            "kubeadmConfigPatches": [str],
        }
    ],
    "featureGates": {str: bool},
    "runtimeConfig": {str: str},
    "kubeadmConfigPatches": [str],
    "containerdConfigPatches": [str],
}
"""Of kind.x-k8s.io/v1alpha4, as kind documents it; it refuses a field that it does not know."""


def misfits(value: object, form: Any, where: str = "") -> list[str]:
    """Paths of what kind would not decode."""
    if isinstance(form, list) and isinstance(value, list):
        return [each for n, item in enumerate(value) for each in misfits(item, form[0], f"{where}[{n}]")]
    if isinstance(form, dict) and isinstance(value, dict):
        if str in form:
            form = dict.fromkeys(value, form[str])
        return [
            each
            for key, item in value.items()
            for each in (
                misfits(item, form[key], f"{where}.{key}") if key in form else [f"{where}.{key} is unknown"]
            )
        ]
    return [] if isinstance(form, type) and type(value) is form else [f"{where} is {value!r}"]


@pytest.mark.parametrize("kubernetes", VERSIONS)
def test_kind_knows_every_field(kubernetes: str) -> None:
    config = cluster_config(KindSpec(kubernetes=kubernetes))
    assert misfits(config, FIELDS) == []
    assert misfits({**config, "featureGatez": {}}, FIELDS) == [".featureGatez is unknown"]
    assert misfits({"featureGates": {"X": "true"}}, FIELDS) == [".featureGates.X is 'true'"]


@pytest.mark.parametrize("kubernetes", VERSIONS)
def test_the_api_is_that_of_the_machines_cluster(kubernetes: str) -> None:
    config = cluster_config(KindSpec(kubernetes=kubernetes))
    gates = ",".join(f"{gate}={str(on).lower()}" for gate, on in config["featureGates"].items())
    assert conf.gates_flag(kubernetes) == f"--feature-gates={gates}"
    told = ",".join(f"{version}={value}" for version, value in served(kubernetes).items())
    assert f"--runtime-config={told}" in conf.api_server_flags(kubernetes, "192.0.2.1")
    assert config["runtimeConfig"] == served(kubernetes) != {}


@pytest.mark.parametrize("version", [2, 3])
def test_every_node_has_nri_and_cdi_as_the_machines_nodes_have(version: int) -> None:
    patch = tomllib.loads(containerd_patch(version))
    node = conf.NodeConf(name="n", index=1, address="", cgroup_root="", may_raise_oom=True)
    ours = tomllib.loads(
        conf.containerd_config(node, "pause", conf.PKI, conf.PKI)  # any path does
    )
    runtime = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}[version]
    assert patch["version"] == version
    for plugin, theirs in (("io.containerd.nri.v1.nri",) * 2, (runtime, "io.containerd.cri.v1.runtime")):
        for key, value in patch["plugins"][plugin].items():
            assert ours["plugins"][theirs][key] == value, key
    assert patch["plugins"][runtime]["enable_cdi"] is True
    assert patch["plugins"]["io.containerd.nri.v1.nri"]["disable"] is False


def test_every_version_of_the_machines_cluster_has_its_image_by_digest() -> None:
    assert IMAGES.keys() == conf.GATES.keys()
    for kubernetes, image in IMAGES.items():
        name, _, digest = image.partition("@sha256:")
        assert name.startswith(f"kindest/node:v{kubernetes}.")
        assert len(digest) == 64


def test_nodes_are_called_what_kind_calls_their_containers() -> None:
    spec = KindSpec(name="x", workers=3)
    assert spec.nodes == ("x-control-plane", "x-worker", "x-worker2", "x-worker3")
    roles = [node["role"] for node in cluster_config(spec)["nodes"]]
    assert roles == ["control-plane", "worker", "worker", "worker"]


def test_another_image_is_taken_for_all_nodes() -> None:
    config = cluster_config(KindSpec(image="localhost/mine:1"))
    assert {node["image"] for node in config["nodes"]} == {"localhost/mine:1"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"kubernetes": "1.12"}, r"1\.12 is not known: choose from 1\.34"), ({"workers": 0}, "from 1 to 8")],
)
def test_a_cluster_that_cannot_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        KindSpec(**fields)


def test_kind_itself_is_pinned_and_built_as_the_clusters_programs_are() -> None:
    pin = read_pin("kind")
    assert (pin.version, program_names(pin)) == ("v0.33.0", {"sigs.k8s.io/kind": "kind"})


@pytest.mark.parametrize(("client", "name"), [("docker", "docker"), ("/usr/bin/podman", "podman")])
def test_kind_uses_the_engine_that_we_use(client: str, name: str) -> None:
    assert Engine(client).for_kind == {"KIND_EXPERIMENTAL_PROVIDER": name}


def test_a_kernel_without_netdevsim_still_gives_every_node_devices() -> None:
    spec = KindSpec(workers=1)
    plan = plan_for(spec, Wanted(), "docker", with_netdevsim=False)
    assert (plan.ports, plan.vfs, plan.veths) == (0, 0, VETHS)
    assert plan.nodes == {node: f"container:{node}" for node in spec.nodes}
    plan = plan_for(spec, Wanted(), "docker", with_netdevsim=True)
    assert (plan.ports, plan.vfs, plan.veths) == (PORTS, VFS, VETHS)


def test_lent_functions_are_dealt_out_in_turn() -> None:
    lend = ("0000:21:10.0", "0000:21:10.2", "0000:21:10.4")
    plan = plan_for(KindSpec(workers=1), Wanted(lend=lend), "docker", with_netdevsim=False)
    assert [(each.id, each.home) for each in plan.lent] == [
        (DeviceId("pci", "0000:21:10.0"), Home("knd-control-plane", "lent0")),
        (DeviceId("pci", "0000:21:10.2"), Home("knd-worker", "lent0")),
        (DeviceId("pci", "0000:21:10.4"), Home("knd-control-plane", "lent1")),
    ]


def test_a_nodes_devices_are_those_that_can_be_given_away() -> None:
    kinds = ("netdevsim-port", "netdevsim-pf", "netdevsim-vf", "veth", "uplink", "lent")
    ground = Ground(tuple(Given(Home("one", kind), kind, None) for kind in kinds))
    devices = devices_of(ground, "one")
    assert devices.netdevs == ("netdevsim-port", "netdevsim-vf", "veth", "lent")
    assert devices.uplink == "uplink"
    assert devices_of(ground, "other").uplink is None
