"""A node that is a whole machine: a guest with real virtual functions, netdevsim ports, soft RoCE at hand.

Invariant: the node is in the guest's first network namespace, since that is where the kernel sends hardware
home to. Everything of it ends with the guest. The programs and images are not copied: the guest reads them
where the cache of this machine has them, the images unpacked already.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kndsim.agent import free_port
from kndsim.cache import cache_root
from kndsim.cluster import conf, images
from kndsim.cluster.binaries import binaries
from kndsim.cluster.ground import Devices
from kndsim.cluster.node import KUBELET_PORT, Programs
from kndsim.cluster.unpacked import STORE, unpacked
from kndsim.cluster.whole import Cluster, ClusterSpec, cluster_on
from kndsim.guest import Disk, Forward, Guest, Kernel, Share, guest
from kndsim.progress import Progress

NAME = "node-1"
ADDRESS = "10.88.0.1"
MEMORY = 5120
"""MiB. A control plane and a node take about one GiB; images and pods live in memory too."""
CGROUP = "/knd-node"
VFS = 8
SIMULATED = "net-nsim-"
_PORTS = (conf.API_PORT, KUBELET_PORT)
_MODULES = (
    "bridge br_netfilter veth dummy overlay nf_tables nft_chain_nat vfio-pci "
    "netdevsim rdma_rxe ib_uverbs rdma_ucm"
)

_NETWORK = f"""
set -e
modprobe -a {_MODULES}
mkdir -p {STORE}
mount -o noatime /dev/vdb {STORE}
ip link add cable-0 type dummy
ip link set cable-0 up
ip address add {ADDRESS}/24 dev cable-0
ip address add {conf.SERVICE_ADDRESS}/32 dev lo
ip route add default dev cable-0 metric 9000
echo 1 >/proc/sys/net/ipv4/ip_forward
mkdir /sys/fs/cgroup{CGROUP}
"""

# A PF makes VFs that work only while it is up.
_DEVICES = rf"""
set -e
number=0
for pf in /sys/class/net/*/device/sriov_totalvfs; do
    folder=${{pf%/device/*}}
    [ $number -lt {VFS} ] || break
    ip link set "${{folder##*/}}" up
    echo 4 >"$folder/device/sriov_numvfs"
    udevadm settle
    for vf in 0 1 2 3; do
        link=$(ls "$folder/device/virtfn$vf/net")
        ip link set "$link" down
        ip link set "$link" name "net-$number"
        number=$((number + 1))
    done
done
for bus in 1 2; do
    echo "$bus 1" >/sys/bus/netdevsim/new_device
    udevadm settle
    link=$(ls "/sys/bus/netdevsim/devices/netdevsim$bus/net")
    ip link set "$link" name {SIMULATED}$bus
done
exec 3</proc/self/ns/net
link() {{ cat "/sys/class/net/{SIMULATED}$1/ifindex"; }}
echo "3:$(link 1) 3:$(link 2)" >/sys/bus/netdevsim/link_device
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestGround:
    """kndsim.cluster.ground.Ground in a guest. ports: of the guest to the ports here that lead to them."""

    place: Guest
    devices: Devices
    shared: Path
    ports: Mapping[int, int]

    @property
    def address(self) -> str:
        return ADDRESS

    @property
    def root(self) -> Path:
        raise LookupError("the files of a guest are out of reach from here: use its Place")

    @property
    def cgroup_root(self) -> str:
        return CGROUP

    @property
    def may_raise_oom(self) -> bool:
        return True

    @property
    def hook_seconds(self) -> int:
        return 20

    def bring(self, path: Path) -> PurePosixPath:
        path = path.resolve()
        if path.is_relative_to(self.shared):
            return PurePosixPath(path)
        there = PurePosixPath("/var/tmp", path.name)
        self.place.write(there, path.read_bytes())
        return there

    def forward(self, port: int) -> AbstractContextManager[int]:
        if port not in self.ports:
            raise LookupError(f"no port of this machine leads to port {port} of the guest")
        return contextlib.nullcontext(self.ports[port])


@contextlib.contextmanager
def guest_cluster(
    spec: ClusterSpec | None = None, progress: Progress | None = None, kernel: Kernel = Kernel.NEWEST
) -> Iterator[Cluster]:
    """A cluster of one node in a guest. Raises what kndsim.cluster.cluster and kndsim.guest.guest do."""
    spec, progress = spec or ClusterSpec(), progress or Progress("guest's cluster")
    if spec.nodes != 1:
        raise ValueError(f"a guest is one node, not {spec.nodes}")
    folders = {pin: binaries(pin, progress) for pin in spec.pins}
    programs = Programs(folders)
    with progress.phase("images unpacked"):
        tars = [*images.base_images(), *spec.images]
        store = unpacked(tars, programs, release=spec.containerd)
    cache = cache_root().resolve()
    ports = {port: free_port() for port in _PORTS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="knd-cluster.")))
        with progress.phase("guest"):
            vm = stack.enter_context(
                guest(
                    kernel=kernel,
                    name=NAME,
                    memory=MEMORY,
                    shares=[Share("cache", cache, PurePosixPath(cache))],
                    forwards=[Forward(here, there) for there, here in ports.items()],
                    disks=[Disk(store)],
                )
            )
        with progress.phase("network and devices"):
            vm.run(["sh", "-c", _NETWORK])
            vm.run(["sh", "-c", _DEVICES], timeout=120)
        netdevs = (*(f"net-{number}" for number in range(VFS)), f"{SIMULATED}1", f"{SIMULATED}2")
        devices = Devices(netdevs=netdevs, uplink=None)
        ground = GuestGround(place=vm, devices=devices, shared=cache, ports=ports)
        yield stack.enter_context(cluster_on([ground], spec, programs, [], folder, progress, unpacked=tars))
