#!/bin/sh
# First program of the default guest: loads the virtio modules, mounts the root file system, hands over to its init.
export PATH=/bin
set -f
mount -t devtmpfs -o mode=0755,nosuid dev /dev
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sys /sys
while read -r module; do
    insmod "/modules/$module"
done </modules/order

root=/dev/vda type=ext4 flags= mode=ro init=/sbin/init wait=100
read -r words </proc/cmdline
for word in $words; do
    case $word in
        root=*) root=${word#root=} ;;
        rootfstype=*) type=${word#rootfstype=} ;;
        rootflags=*) flags=,${word#rootflags=} ;;
        ro | rw) mode=$word ;;
        init=*) init=${word#init=} ;;
    esac
done
device=
while [ -z "$device" ] && [ "$wait" -gt 0 ]; do
    case $root in
        LABEL=* | UUID=*) device=$(findfs "$root" 2>/dev/null) ;;
        *) [ -b "$root" ] && device=$root ;;
    esac
    [ -n "$device" ] || sleep 0.1
    wait=$((wait - 1))
done
if [ -z "$device" ] || ! mount -t "$type" -o "$mode$flags" "$device" /root; then
    echo "initramfs: cannot mount the root file system ${root}; this shell is for looking around" >/dev/console
    exec setsid -c sh </dev/console >/dev/console 2>&1
fi
mount -o move /dev /root/dev
mount -o move /proc /root/proc
mount -o move /sys /root/sys
exec switch_root /root "$init" "$@"
