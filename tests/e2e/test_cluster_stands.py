"""The cluster by itself: it stands, its pods run and reach each other, and nothing of it is left.

Invariant: these cases start clusters of their own, so they hold whatever the session's cluster is doing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kndsim import hostguard
from kndsim.cluster import Cluster, ClusterSpec, NotUp, cluster
from kndsim.place import Place
from kndsim.waiting import wait_until
from tests.real_cluster import chosen

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/knd-tool:1"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def stand() -> Iterator[Cluster]:
    choice = chosen()
    with cluster(ClusterSpec(kubernetes=choice.kubernetes, containerd=choice.containerd, nodes=2)) as made:
        yield made


def run_pod(stand: Cluster, name: str, node: str, *command: str, **spec: Any) -> None:
    """Returns when it runs."""
    container = {"name": "main", "image": IMAGE, "imagePullPolicy": "Never", **spec.pop("container", {})}
    if command:
        container["command"] = list(command)
    told = {"nodeName": node, "terminationGracePeriodSeconds": 1, "containers": [container], **spec}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": told}
    stand.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    stand.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s", timeout=70)


def answers(place: Place, target: str) -> bool:
    """busybox's: the cluster's packages bring no other ping."""
    return place.run(["busybox", "ping", "-c1", "-W1", target], check=False).code == 0


def address(stand: Cluster, pod: str) -> str:
    return stand.kubectl("get", "pod", pod, "-o", "jsonpath={.status.podIP}").out


def test_the_versions_that_run_are_those_that_were_asked_for(stand: Cluster) -> None:
    choice = chosen()
    assert stand.versions["API server"].startswith(f"v{choice.kubernetes}.")
    for node in stand.nodes:
        assert f" v{choice.kubernetes}." in stand.versions[f"kubelet on {node}"]
        assert f" v{choice.containerd}." in stand.versions[f"containerd on {node}"]
        assert stand.versions[f"runc on {node}"].startswith("runc version ")


def test_pods_of_two_nodes_reach_each_other_and_the_api(stand: Cluster) -> None:
    first, second = stand.nodes
    run_pod(stand, "near", first)
    run_pod(stand, "far", second)
    stand.kubectl("exec", "near", "--", "ping", "-c1", "-W2", address(stand, "far"))
    ask = r"printf 'GET / HTTP/1.0\r\n\r\n' | nc -w2 10.96.0.1 443"
    # It speaks TLS alone, and says so.
    assert "HTTPS server" in stand.kubectl("exec", "far", "--", "sh", "-c", ask).out


def test_the_nics_of_two_nodes_are_on_one_wire(stand: Cluster) -> None:
    places = [node.place for node in stand.nodes.values()]
    for number, place in enumerate(places, 1):
        place.run(["ip", "address", "add", f"198.51.100.{number}/24", "dev", "net-7"])
        place.run(["ip", "link", "set", "net-7", "up"])
    try:
        wait_until(lambda: answers(places[0], "198.51.100.2"), 10, "a frame between the nodes' NICs")
    finally:
        for place in places:
            place.run(["ip", "address", "flush", "dev", "net-7"])
            place.run(["ip", "link", "set", "net-7", "down"])


def test_no_link_of_a_node_leads_to_the_machine(stand: Cluster) -> None:
    ours = hostguard.look().sections["link"]
    for node in stand.nodes.values():
        assert not set(node.devices.netdevs) & set(ours)
        # The way to all that is not the cluster's ends on its cable, where nobody answers.
        assert node.place.run(["ip", "route", "get", "192.0.2.1"]).out.split()[2] == "cable-0"
        assert not answers(node.place, "192.0.2.1")


def test_containers_have_the_seccomp_profile_they_ask_for(stand: Cluster) -> None:
    profile = {"seccompProfile": {"type": "RuntimeDefault"}}
    run_pod(stand, "filtered", next(iter(stand.nodes)), container={"securityContext": profile})
    status = stand.kubectl("exec", "filtered", "--", "cat", "/proc/self/status").out
    assert "Seccomp:\t2" in status


def test_a_pod_can_have_a_user_namespace_of_its_own(stand: Cluster) -> None:
    run_pod(stand, "userns", next(iter(stand.nodes)), hostUsers=False)
    inside, outside, _ = stand.kubectl("exec", "userns", "--", "cat", "/proc/self/uid_map").out.split()
    assert inside == "0"
    assert int(outside) > 0


def test_an_agent_sees_sockets_namespaces_and_the_nodes_own_bpffs(stand: Cluster) -> None:
    """The shape of a DaemonSet pod; a namespace made after it started comes through its mount."""
    node = list(stand.nodes.values())[1]
    paths = {
        "netns": "/run/netns",
        "nri": "/var/run/nri",
        "kubelet": "/var/lib/kubelet",
        "bpf": "/sys/fs/bpf",
    }
    mounts = [
        {"name": name, "mountPath": path, "mountPropagation": "HostToContainer"}
        for name, path in paths.items()
    ]
    run_pod(
        stand,
        "agent",
        node.name,
        hostNetwork=True,
        volumes=[{"name": name, "hostPath": {"path": path}} for name, path in paths.items()],
        container={"securityContext": {"privileged": True}, "volumeMounts": mounts},
    )

    def inside(*argv: str) -> str:
        return stand.kubectl("exec", "agent", "--", *argv).out

    before = set(inside("ls", "/run/netns").split())
    run_pod(stand, "later", node.name)
    (new,) = set(inside("ls", "/run/netns").split()) - before
    assert address(stand, "later") in inside("nsenter", f"--net=/run/netns/{new}", "ip", "-o", "address")
    inside("test", "-S", "/var/run/nri/nri.sock")
    inside("test", "-d", "/var/lib/kubelet/plugins_registry")
    assert set(node.devices.netdevs) <= set(inside("ls", "/sys/class/net").split())
    inside("mkdir", "/sys/fs/bpf/knd-test")
    assert (node.root / "sys/fs/bpf/knd-test").is_dir()
    assert not Path("/sys/fs/bpf/knd-test").exists()


@pytest.mark.parametrize("service", ["kubelet", "containerd", "kube-apiserver"])
def test_a_pod_outlives_a_restart_and_the_next_one_starts(stand: Cluster, service: str) -> None:
    node = next(iter(stand.nodes.values()))
    run_pod(stand, f"before-{service}", node.name)
    node.restart(service)
    wait_until(lambda: stand.api.answers("/readyz"), 60, "the API server is ready")
    run_pod(stand, f"after-{service}", node.name)
    template = "{.status.phase} {.status.containerStatuses[0].restartCount}"
    said = stand.kubectl("get", "pod", f"before-{service}", "-o", f"jsonpath={template}").out
    assert said == "Running 0"


def test_a_node_that_does_not_come_up_says_what_its_program_said() -> None:
    spec = ClusterSpec(kubernetes=chosen().kubernetes, containerd=chosen().containerd)
    with cluster(spec) as made:
        node = next(iter(made.nodes.values()))
        node.stop("kubelet")
        node.place.run(["sh", "-c", "echo '{' >/etc/kubernetes/kubelet.json"])
        with pytest.raises(
            NotUp, match=r"(?s)on node-1: kubelet ended before .*failed to load.*kubelet\.json"
        ):
            node.start("kubelet")


def left_of(folder: Path) -> list[str]:
    """What can be seen of a cluster: its files, cgroups, mounts in our namespace, and processes."""
    found = [str(folder)] if folder.exists() else []
    found += map(str, Path("/sys/fs/cgroup").glob(f"**/{folder.name}*"))
    state = hostguard.look().sections
    found += [item for item in state["mount"] if str(folder) in item]
    return found + [f"{item}: {command}" for item, command in state["process"].items()]


def test_a_killed_driver_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a test run is killed while its cluster is up."""
    monkeypatch.setenv(hostguard.RUN_MARK, f"killed-{os.getpid()}")
    argv = [sys.executable, "-m", "kndsim.cluster", "up", "--kubernetes", chosen().kubernetes]
    argv += ["--containerd", chosen().containerd]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "ci/kind-sriov-sim")}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            folder = Path(driver.stdout.readline().strip().partition("KUBECONFIG=")[2]).parent
            assert (folder / "kubeconfig").exists()
            seen = left_of(folder)
        finally:
            driver.send_signal(signal.SIGKILL)
    programs = ("kube-apiserver", "kubelet", "containerd", "etcd", "knd-tool")
    assert not [name for name in programs if not any(name in each for each in seen)], seen
    assert any(each.startswith("/sys/fs/cgroup/") for each in seen)
    wait_until(lambda: not left_of(folder), 20, "all of the cluster is gone")
