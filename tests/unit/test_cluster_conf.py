"""What the programs of a cluster are told, read without starting one."""

from __future__ import annotations

import base64
import json
import tomllib
from dataclasses import replace
from pathlib import PurePosixPath

import pytest

from kndsim.cluster import ClusterSpec, conf
from kndsim.cluster.conf import GATES, NodeConf


def node(index: int = 2, *, may_raise_oom: bool = False) -> NodeConf:
    return NodeConf(
        name=f"node-{index}",
        index=index,
        address=f"10.88.0.{index}",
        cgroup_root=f"/knd-node-{index}",
        may_raise_oom=may_raise_oom,
    )


SLOW = replace(node(), hook_seconds=20)


def flag(flags: list[str], name: str) -> str:
    (found,) = [each.partition("=")[2] for each in flags if each.startswith(f"--{name}=")]
    return found


@pytest.mark.parametrize("kubernetes", GATES)
def test_all_parts_of_a_cluster_have_the_same_gates(kubernetes: str) -> None:
    told = [
        conf.api_server_flags(kubernetes, "10.88.0.1"),
        conf.controller_manager_flags(kubernetes),
        conf.scheduler_flags(kubernetes),
        conf.kubelet_flags(kubernetes, node()),
    ]
    assert {flag(flags, "feature-gates") for flags in told} == {
        ",".join(f"{gate}=true" for gate in GATES[kubernetes])
    }


def test_an_older_kubernetes_is_not_told_gates_it_does_not_know() -> None:
    assert set(GATES["1.34"]) < set(GATES["1.37"])
    assert "DRADeviceTaintRules" not in GATES["1.34"]
    assert "DRAConsumableCapacity" in GATES["1.34"]


def test_a_node_may_only_write_what_is_its_own() -> None:
    flags = conf.api_server_flags("1.37", "10.88.0.1")
    assert flag(flags, "authorization-mode") == "Node,RBAC"
    admission = flag(flags, "enable-admission-plugins").split(",")
    assert {"NodeRestriction", "ValidatingAdmissionPolicy"} <= set(admission)


def test_pods_of_two_nodes_have_addresses_of_their_own() -> None:
    ranges = [json.loads(conf.cni_config(node(index)))["plugins"][0]["ipam"]["ranges"] for index in (1, 2)]
    assert ranges[0] != ranges[1]
    assert ranges[1][0][0] == {
        "subnet": "10.244.2.0/24",
        "rangeStart": "10.244.2.10",
        "gateway": "10.244.2.1",
    }


def test_containerd_offers_nri_and_cdi_where_the_driver_looks() -> None:
    text = conf.containerd_config(node(), "localhost/pause:1", PurePosixPath("/x/runc"), PurePosixPath("/x"))
    plugins = tomllib.loads(text)["plugins"]
    assert plugins["io.containerd.nri.v1.nri"]["socket_path"] == "/var/run/nri/nri.sock"
    assert not plugins["io.containerd.nri.v1.nri"]["disable"]
    runtime = plugins["io.containerd.cri.v1.runtime"]
    assert runtime["enable_cdi"]
    assert runtime["cdi_spec_dirs"] == ["/etc/cdi", "/var/run/cdi"]


@pytest.mark.parametrize(("node_", "request_", "registration"), [(node(), "2s", "5s"), (SLOW, "20s", "50s")])
def test_a_slow_node_waits_longer_for_a_plugin(node_: NodeConf, request_: str, registration: str) -> None:
    text = conf.containerd_config(node_, "p:1", PurePosixPath("/runc"), PurePosixPath("/cni"))
    nri = tomllib.loads(text)["plugins"]["io.containerd.nri.v1.nri"]
    assert nri["plugin_request_timeout"] == request_
    assert nri["plugin_registration_timeout"] == registration


@pytest.mark.parametrize("allowed", [True, False])
def test_oom_scores_are_lowered_only_where_that_is_allowed(allowed: bool) -> None:
    told = node(may_raise_oom=allowed)
    text = conf.containerd_config(told, "p:1", PurePosixPath("/runc"), PurePosixPath("/cni"))
    restricted = tomllib.loads(text)["plugins"]["io.containerd.cri.v1.runtime"]["restrict_oom_score_adj"]
    assert restricted is not allowed
    assert json.loads(conf.kubelet_config(told))["oomScoreAdj"] == (-999 if allowed else 0)


def test_kubelet_stays_in_a_cgroup_of_its_node() -> None:
    assert json.loads(conf.kubelet_config(node(1)))["cgroupRoot"] == "/knd-node-1"


def test_a_kubeconfig_carries_its_keys_and_no_path() -> None:
    config = json.loads(conf.kubeconfig("https://127.0.0.1:5", b"ca", b"certificate", b"key"))
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    assert cluster["server"] == "https://127.0.0.1:5"
    assert base64.b64decode(cluster["certificate-authority-data"]) == b"ca"
    assert base64.b64decode(user["client-key-data"]) == b"key"


def test_the_first_node_has_the_control_plane_and_names_are_stable() -> None:
    spec = ClusterSpec(nodes=2, kubernetes="1.34", containerd="2.1")
    assert spec.node_names == ["node-1", "node-2"]
    assert spec.pins == (
        "kubernetes-1.34", "containerd-2.1", "runc", "etcd", "cni", "kubernetes-1.37"
    )  # fmt: skip


def test_a_cluster_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="1 to 9 nodes, not 0"):
        ClusterSpec(nodes=0)
    with pytest.raises(ValueError, match=r"no Kubernetes '1\.20' is pinned: choose from 1\.34, 1\.37"):
        ClusterSpec(kubernetes="1.20")
