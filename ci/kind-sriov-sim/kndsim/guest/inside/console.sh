#!/bin/bash
# The serial console: a shell where one was asked for, else nothing that could disturb the kernel's words.
cd /usr/lib/knd-guest || exit 1
# Made at each start.
# shellcheck source=/dev/null
. ./settings
[ -n "$SHELL_TERM" ] || exec sleep infinity
while [ ! -e /run/knd-guest/ready ]; do sleep 0.1; done
dmesg -n 1
stty rows "$SHELL_ROWS" cols "$SHELL_COLUMNS"
export TERM=$SHELL_TERM HOME=/ PATH=/opt/knd/venv/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
cd /srv/knd || exit 1
exec setsid -c bash --login
