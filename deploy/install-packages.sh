#!/bin/bash
# Usage: deploy/install-packages.sh LIST...
# Install the Debian packages of the lists that are missing; touch nothing, not even apt's index, when
# none is. Asks no questions. All output goes to stderr, so that a caller's stdout stays its own.
set -euo pipefail
exec >&2

# apt gives up where another apt is at work: targets that are made side by side take turns.
if command -v flock >/dev/null; then
    exec 9<"${BASH_SOURCE[0]}"
    flock 9
fi

missing=()
while read -r package _; do
    case $package in '' | '#'*) continue ;; esac
    status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$status" = 'install ok installed' ] || missing+=("$package")
done < <(cat "$@")

[ ${#missing[@]} -gt 0 ] || exit 0
install=(apt-get install -y --no-install-recommends "${missing[@]}")
if ! command -v apt-get >/dev/null; then
    echo "missing: ${missing[*]}. These are Debian's names; install what this system calls them, then run make again."
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "missing Debian packages; as root run: ${install[*]}"
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
echo "installing Debian packages: ${missing[*]}"
# A fresh machine has no index, an old one a stale index: both are mended by one update.
apt-get update -qq
"${install[@]}" -qq -o Dpkg::Use-Pty=0 </dev/null
