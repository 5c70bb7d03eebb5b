"""What the programs of a cluster are told: files and flags as data, for each version.

Invariant: pure. Every address, folder and name is an argument or a constant here, so a test can read what a
node would be told without starting one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

API_PORT = 443
"""The port of kubernetes.default's Service too: with the service address on the first node, pods reach the
server without address translation, so without kube-proxy."""
SERVICES = "10.96.0.0/16"
SERVICE_ADDRESS = "10.96.0.1"
PODS = "10.244.0.0/16"
PKI = PurePosixPath("/etc/kubernetes/pki")
CONF = PurePosixPath("/etc/kubernetes")
MANIFESTS = CONF / "manifests"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"

_SINCE_1_34 = (
    "DRAAdminAccess DRAConsumableCapacity DRADeviceBindingConditions DRADeviceTaints DRAExtendedResource "
    "DRAPartitionableDevices DRAPrioritizedList DRAResourceClaimDeviceStatus DRASchedulerFilterTimeout "
    "ResourceHealthStatus"
)
_SINCE_1_37 = (
    "DRADerivedAttributes DRADeviceCompatibilityGroups DRADeviceTaintRules DRAFractionalCapacityRange "
    "DRAListTypeAttributes DRANodeAllocatableResources DRAOptionalNodeOperations DRAPartitionableDevicesType "
    "DRAResourceClaimGranularStatusAuthorization DRAResourcePoolStatus ResourceHealthStatusMessage"
)
GATES: Mapping[str, tuple[str, ...]] = {
    "1.34": tuple(_SINCE_1_34.split()),
    # DRAWorkloadResourceClaims is left off: it needs workload-aware scheduling, another alpha.
    "1.37": tuple(f"{_SINCE_1_34} {_SINCE_1_37}".split()),
}
_BETAS = {
    "1.34": ("v1beta1", "v1beta2", "v1alpha3"),
    "1.37": ("v1beta1", "v1beta2", "v1alpha3"),
}


def gates_flag(kubernetes: str) -> str:
    return "--feature-gates=" + ",".join(f"{gate}=true" for gate in GATES[kubernetes])


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConf:
    """One node: index counts from 1. address is where other nodes reach it."""

    name: str
    index: int
    address: str
    cgroup_root: str
    """Of kubelet: a cgroup folder of the node's own in every hierarchy."""
    may_raise_oom: bool
    """Whether processes there may lower an oom_score_adj (CAP_SYS_RESOURCE)."""
    hook_seconds: int = 2
    """That containerd waits for an NRI plugin, for its registration more than twice as long."""

    @property
    def pods(self) -> str:
        return f"10.244.{self.index}.0/24"


def etcd_flags() -> list[str]:
    return [
        "--name=default",
        "--data-dir=/var/lib/etcd",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=default=http://127.0.0.1:2380",
        # It lives as long as one test run: losing it with the machine loses nothing.
        "--unsafe-no-fsync",
        "--log-level=warn",
        "--logger=zap",
    ]


def api_server_flags(kubernetes: str, address: str) -> list[str]:
    served = ",".join(f"resource.k8s.io/{beta}=true" for beta in _BETAS[kubernetes])
    return [
        "--etcd-servers=http://127.0.0.1:2379",
        "--bind-address=0.0.0.0",
        f"--secure-port={API_PORT}",
        f"--advertise-address={address}",
        f"--client-ca-file={PKI}/ca.crt",
        f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet-client.key",
        f"--kubelet-certificate-authority={PKI}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-key-file={PKI}/sa.pub",
        f"--service-account-signing-key-file={PKI}/sa.key",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-cluster-ip-range={SERVICES}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction,ValidatingAdmissionPolicy",
        "--allow-privileged=true",
        f"--runtime-config={served}",
        "--profiling=false",
        # Else it waits a minute for watches to end by themselves when it is told to stop.
        "--shutdown-watch-termination-grace-period=1s",
        gates_flag(kubernetes),
    ]


def controller_manager_flags(kubernetes: str) -> list[str]:
    return [
        *_client_flags("controller-manager"),
        f"--service-account-private-key-file={PKI}/sa.key",
        f"--root-ca-file={PKI}/ca.crt",
        # Without accounts of their own the controllers leave nodes tainted for ever.
        "--use-service-account-credentials=true",
        # The client's usual limit delays the first service accounts by seconds.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        "--allocate-node-cidrs=false",
        f"--cluster-signing-cert-file={PKI}/ca.crt",
        f"--cluster-signing-key-file={PKI}/ca.key",
        gates_flag(kubernetes),
    ]


def scheduler_flags(kubernetes: str) -> list[str]:
    return [*_client_flags("scheduler"), gates_flag(kubernetes)]


def _client_flags(name: str) -> list[str]:
    kubeconfig = CONF / f"{name}.kubeconfig"
    return [
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
    ]


def kubelet_flags(kubernetes: str, node: NodeConf) -> list[str]:
    return [
        f"--config={CONF}/kubelet.json",
        f"--kubeconfig={CONF}/kubelet.kubeconfig",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        gates_flag(kubernetes),
        "--v=2",
    ]


def kubelet_config(node: NodeConf) -> str:
    """JSON is YAML too."""
    nothing = "0%"
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{PKI}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{PKI}/kubelet.crt",
        "tlsPrivateKeyFile": f"{PKI}/kubelet.key",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": node.cgroup_root,
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": -999 if node.may_raise_oom else 0,
        "maxOpenFiles": 20000,
        "makeIPTablesUtilChains": False,
        "resolvConf": "",
        # A disk that is nearly full is the machine's business; images removed here could not be pulled.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": nothing,
            "nodefs.inodesFree": nothing,
            "imagefs.available": nothing,
            "imagefs.inodesFree": nothing,
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeStatusUpdateFrequency": "5s",
        "syncFrequency": "10s",
        "staticPodPath": str(MANIFESTS),
        "volumePluginDir": "/var/lib/kubelet/volumeplugins",
        "readOnlyPort": 0,
        "healthzBindAddress": "127.0.0.1",
    }
    return json.dumps(config, indent=1)


def kubeconfig(server: str, ca: bytes, certificate: bytes, key: bytes) -> str:
    """The same form for programs and people; JSON is YAML too."""

    def packed(data: bytes) -> str:
        return base64.b64encode(data).decode()

    cluster = {"server": server, "certificate-authority-data": packed(ca)}
    user = {"client-certificate-data": packed(certificate), "client-key-data": packed(key)}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "knd", "cluster": cluster}],
        "users": [{"name": "knd", "user": user}],
        "contexts": [{"name": "knd", "context": {"cluster": "knd", "user": "knd"}}],
        "current-context": "knd",
    }
    return json.dumps(config, indent=1)


def cni_config(node: NodeConf) -> str:
    """A bridge for the pods of a node; what is between nodes is routed. No masquerade: nothing leads out."""
    base = node.pods.removesuffix("0/24")
    ranges = [[{"subnet": node.pods, "rangeStart": f"{base}10", "gateway": f"{base}1"}]]
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": "/run/cni-ipam",
        },
    }
    return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}, indent=1)


def containerd_config(node: NodeConf, pause: str, runc: PurePosixPath, cni: PurePosixPath) -> str:
    """Configuration version 3: containerd 2.0 and later."""
    absent = ("btrfs", "devmapper", "zfs", "blockfile", "erofs")
    disabled = [f"io.containerd.snapshotter.v1.{name}" for name in absent]
    restricted = "false" if node.may_raise_oom else "true"
    return f"""version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = {_toml_list(disabled)}
[grpc]
address = "{CONTAINERD_SOCKET}"
[plugins.'io.containerd.cri.v1.images']
snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{pause}"
[plugins.'io.containerd.cri.v1.runtime']
enable_cdi = true
cdi_spec_dirs = ["/etc/cdi", "/var/run/cdi"]
restrict_oom_score_adj = {restricted}
disable_apparmor = true
disable_hugetlb_controller = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["{cni}"]
conf_dir = "/etc/cni/net.d"
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = "runc"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "{runc}"
SystemdCgroup = false
[plugins.'io.containerd.nri.v1.nri']
disable = false
disable_connections = false
socket_path = "/var/run/nri/nri.sock"
plugin_path = "/opt/nri/plugins"
plugin_config_path = "/etc/nri/conf.d"
plugin_registration_timeout = "{5 * node.hook_seconds // 2}s"
plugin_request_timeout = "{node.hook_seconds}s"
"""


def _toml_list(values: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"
