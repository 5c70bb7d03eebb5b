#!/bin/busybox sh
# The kernel's first program: find the disk, put /knd-guest onto it, go on there.
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do
    /bin/busybox insmod "/modules/$module" || echo "knd: insmod $module failed"
done </modules/order
tries=0
while [ ! -b /dev/vda ] && [ "$tries" -lt 200 ]; do
    /bin/busybox usleep 50000
    tries=$((tries + 1))
done
if ! /bin/busybox mount -t ext4 -o rw,noatime /dev/vda /disk; then
    echo 'knd: the disk /dev/vda cannot be mounted'
    exit 1
fi
/bin/busybox cp -a /knd-guest /disk/usr/lib/knd-guest
/bin/busybox cp /knd-guest/inittab /disk/etc/inittab
/bin/busybox mount --move /dev /disk/dev
exec /bin/busybox switch_root /disk /bin/busybox init
