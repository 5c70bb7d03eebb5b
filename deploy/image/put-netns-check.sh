#!/bin/sh
# Usage: put-netns-check FOLDER
# The init container's work: have the host's FOLDER hold this image's knd-netns-check. Container runtimes
# run it with no agent there, at any time: so it is never half written and never absent once it was there.
set -eu
folder=$1
mkdir -p "$folder"
cp /usr/libexec/knd/knd-netns-check "$folder/.knd-netns-check.new"
chmod 755 "$folder/.knd-netns-check.new"
sync "$folder/.knd-netns-check.new"
mv -f "$folder/.knd-netns-check.new" "$folder/knd-netns-check"
