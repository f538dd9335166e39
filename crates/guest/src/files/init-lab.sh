#!/bin/sh
# First program of the lab: loads KVM, runs /lab/run on the second serial port, says how it ended, and powers off.
export PATH=/bin:/lab HOME=/root TERM=dumb
/bin/busybox --install -s /bin
mount -t devtmpfs -o mode=0755 dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs shm /dev/shm
# The kernel measures its TSC twice, the second time for a second; KVM keeps for its guests what it finds when it is loaded.
clock=/sys/devices/system/clocksource/clocksource0/current_clocksource
for try in $(seq 100); do
    [ "$(cat $clock)" = tsc-early ] || break
    usleep 50000
done
while read -r module; do
    insmod "/modules/$module" || echo "@LAB@no $module"
done </modules/order
ip link set lo up
tty=/dev/ttyS1
stty -F $tty raw -echo
[ -e /dev/kvm ] && echo "@LAB@ready" >$tty || echo "@LAB@there is no /dev/kvm" >$tty
cd /lab
sh ./run <$tty >$tty 2>&1
echo "@LAB@exit $?" >$tty
poweroff -f
