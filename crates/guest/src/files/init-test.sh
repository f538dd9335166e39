#!/bin/sh
# First program of the test guest: a root shell on the console, or an immediate exit.
export PATH=/bin HOME=/root TERM=dumb ENV=/etc/shrc
/bin/busybox --install -s /bin
mount -t devtmpfs -o mode=0755 dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
while read -r module; do
    insmod "/modules/$module"
done </modules/order
ip link set lo up

mode=shell
read -r words </proc/cmdline
for word in $words; do
    case $word in ringfort.init=*) mode=${word#ringfort.init=} ;; esac
done
read -r uptime rest </proc/uptime
echo "@READY@$uptime"
case $mode in
    poweroff) poweroff -f ;;
    reboot) reboot -f ;;
esac

# What busybox's halt, poweroff and reboot send to the first process.
trap 'sync; halt -f' USR1
trap 'sync; poweroff -f' USR2
trap 'sync; reboot -f' TERM
read -r consoles </sys/class/tty/console/active
tty=/dev/${consoles##* }
while :; do
    setsid -c sh <"$tty" >"$tty" 2>&1 &
    wait $!
done
