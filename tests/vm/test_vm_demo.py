"""The whole agent with simulated peers on real virtual functions, on each kernel that nodes run.

Invariant: the demo's own verdict counts every byte and compares every device; here a second, independent look
at sysfs says that the machine is as it was.
"""

from __future__ import annotations

import json

import pytest

from kndsim.guest import Guest, Kernel
from kndsim.guest.machine import IGB_PORTS
from kndsim.runtime import RuntimeMode

DEVICES = r"""
cd /sys/class/net
for link in *; do
    vfs=$(cat $link/device/sriov_numvfs $link/device/sriov_drivers_autoprobe 2>/dev/null)
    echo "$link: address $(cat $link/address) flags $(cat $link/flags) mtu $(cat $link/mtu)" \
        "txqlen $(cat $link/tx_queue_len) alias $(cat $link/ifalias) index $(cat $link/ifindex)" \
        "vfs and autoprobe" $vfs
done
ls /sys/bus/pci/devices /sys/bus/netdevsim/devices 2>/dev/null
ls /var/run/netns /sys/fs/bpf /var/run/cdi /etc/cdi 2>/dev/null || true
"""

HOOKS = {Kernel.NEWEST: "tcx", Kernel.STABLE: "tcx", Kernel.DEBIAN12: "clsact"}
"""Where `--hook auto` counts: tcx came with kernel 6.6."""

CASES = [
    (Kernel.NEWEST, RuntimeMode.POD_RPC, "auto"),
    (Kernel.STABLE, RuntimeMode.CRIO, "auto"),
    (Kernel.DEBIAN12, RuntimeMode.POD_RPC, "auto"),
    (Kernel.STABLE, RuntimeMode.POD_RPC, "netdevsim"),
]


@pytest.mark.parametrize(("vm", "mode", "backend"), CASES, indirect=["vm"], ids=str)
def test_every_byte_is_counted_and_every_device_comes_home(
    vm: Guest, mode: RuntimeMode, backend: str
) -> None:
    vm.run(["modprobe", "netdevsim"])
    before = vm.run(["bash", "-c", DEVICES]).out
    assert before.count("vfs and autoprobe 0 1") == IGB_PORTS
    command = ["python", "-m", "kndsim.demo", "-o", "json", "--hook-seconds", "30"]
    command += ["--runtime", mode, "--backend", backend]
    done = vm.run(command, check=False, timeout=300)
    assert done.out.startswith("{"), done.err
    told = json.loads(done.out)
    assert (done.code, told["problems"]) == (0, []), done.err
    assert told["backend"] == ("sriov" if backend == "auto" else backend), told["backend_reason"]
    assert told["hook"] == HOOKS[vm.request.kernel]
    assert told["agent_restarts"] == 1
    assert told["devices_home"]
    assert told["slices_back"]
    assert len(told["rows"]) == 32
    assert all(row["sent_bytes"] == row["counted_bytes"] > row["sent_while_down"] > 0 for row in told["rows"])
    assert {row["device"].split("-")[0] for row in told["rows"]} == {"pci" if backend == "auto" else "nsim"}
    assert vm.run(["bash", "-c", DEVICES]).out == before
