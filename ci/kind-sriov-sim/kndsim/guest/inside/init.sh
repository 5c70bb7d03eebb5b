#!/bin/bash
# What a booted node has: file systems, devices with their drivers, the shares. `settings` is written for
# each start by kndsim.guest.machine.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd /usr/lib/knd-guest || exit 1

mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts -o gid=5,mode=620,ptmxmode=666
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run -o mode=755
mount -t tmpfs tmp /tmp -o mode=1777
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug
mount --make-rshared /
mkdir -p /run/netns /run/lock /run/knd-guest
read -ra controllers </sys/fs/cgroup/cgroup.controllers
for controller in "${controllers[@]}"; do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done

# Made at each start.
# shellcheck source=/dev/null
. ./settings
hostname "$HOSTNAME"
echo "$HOSTNAME" >/etc/hostname
echo "127.0.0.1 localhost $HOSTNAME" >/etc/hosts
tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
ip link set lo up

/lib/systemd/systemd-udevd --daemon
# PCI, virtio and network devices alone: the rest costs time on an emulated processor.
udevadm trigger --action=add --subsystem-match=pci --subsystem-match=virtio --subsystem-match=net
modprobe -qa virtio_console 9pnet_virtio 9p overlay
udevadm settle -t 60

while read -r tag path options; do
    mkdir -p "$path"
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$options" "$tag" "$path"
done <shares

# The checkout as it is on the host, over which the guest writes into its own memory.
mkdir -p /run/knd-guest/over /srv/knd
mount -t tmpfs over /run/knd-guest/over
mkdir -p /run/knd-guest/over/new /run/knd-guest/over/work
mount -t overlay knd -o lowerdir=/run/knd-guest/project,upperdir=/run/knd-guest/over/new,workdir=/run/knd-guest/over/work /srv/knd
for packages in /opt/knd/venv/lib/python3*/site-packages; do
    printf '%s\n' /srv/knd /srv/knd/ci/kind-sriov-sim >"$packages/knd.pth"
done
printf '#!/bin/sh\nexec /opt/knd/venv/bin/python -m driver "$@"\n' >/usr/local/bin/knd
chmod +x /usr/local/bin/knd

if [ -n "$HOST_LINK" ]; then
    for link in /sys/class/net/*; do
        if [ "$(cat "$link/address")" = "$HOST_LINK" ]; then
            ip link set "${link##*/}" down
            ip link set "${link##*/}" name host0
            ip address add 10.0.2.15/24 dev host0
            ip link set host0 up
            ip route add default via 10.0.2.2
        fi
    done
fi
