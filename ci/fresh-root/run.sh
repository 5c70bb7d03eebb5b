#!/bin/bash
# Usage: ci/fresh-root/run.sh [bookworm|trixie]... [-- TARGET...]
# `make test` and `make demo` (or the targets named) as a newcomer runs them: in a root file system that
# has nothing but Debian's minimal system and git, make, ca-certificates. Needs root and mmdebstrap.
#
# What this machine knows of reaching packages goes into the root at run time (apt's sources and settings,
# pip's settings, certificates, proxies, name resolution); nothing of it is written here. Every mount is
# made in a mount namespace of its own, so that none is left however this ends.
set -euo pipefail

if [ "${KND_FRESH_ROOT:-}" != inside ]; then
    if [ "$(id -u)" != 0 ]; then
        echo 'run this as root: it makes mounts and a chroot' >&2
        exit 1
    fi
    if ! command -v mmdebstrap >/dev/null; then
        echo 'mmdebstrap is missing: apt-get install mmdebstrap' >&2
        exit 1
    fi
    KND_FRESH_ROOT=inside exec unshare --mount --propagation private "$BASH" "$0" "$@"
fi
unset KND_FRESH_ROOT

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
suites=()
while [ $# -gt 0 ]; do
    case $1 in
        bookworm | trixie) suites+=("$1") ;;
        --)
            shift
            break
            ;;
        *)
            echo "unknown suite: $1 (bookworm, trixie)" >&2
            exit 2
            ;;
    esac
    shift
done
targets=("$@")
[ ${#suites[@]} -gt 0 ] || suites=(bookworm trixie)
[ ${#targets[@]} -gt 0 ] || targets=(test demo)

here=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
scratch=$(mktemp -d /var/tmp/knd-root.XXXXXX)

cleanup() {
    local point
    # Mounts first: what is still mounted below must not be deleted through.
    awk -v top="$scratch/" 'index($5, top) == 1 { print $5 }' /proc/self/mountinfo | sort -r |
        while read -r point; do umount -l "$point"; done
    rm -rf --one-file-system "$scratch"
}
trap cleanup EXIT

sources() { # SUITE: this machine's own Debian sources, for that suite
    local file
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        # Third parties' archives have no place in a newcomer's root.
        if [ -e "$file" ] && grep -q "$here" "$file" && grep -q '/debian' "$file"; then
            sed "s/\b$here\b/$1/g" "$file"
            echo
        fi
    done
}

apt_settings() { # files that say how apt reaches its archives
    local file
    for file in /etc/apt/apt.conf /etc/apt/apt.conf.d/* /etc/apt/auth.conf.d/*; do
        if [ -f "$file" ] && grep -qE '^(Acquire|machine)' "$file"; then echo "$file"; fi
    done
}

settings() { # ROOT: how this machine reaches packages
    local file root=$1
    for file in /etc/resolv.conf /etc/hosts /etc/pip.conf $(apt_settings); do
        if [ -e "$file" ]; then cp -L "$file" "$root$file"; fi
    done
    mkdir -p "$root/usr/local/share/ca-certificates"
    find /usr/local/share/ca-certificates -name '*.crt' \
        -exec cp {} "$root/usr/local/share/ca-certificates/" \;
}

in_root() { # ROOT COMMAND...: with nothing of this environment but what has to do with reaching packages
    local root=$1 variables kept
    shift
    kept='PIP_(INDEX_URL|EXTRA_INDEX_URL|CERT|TRUSTED_HOST|DEFAULT_TIMEOUT)|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE'
    kept+='|(https?|no|all)_proxy|(HTTPS?|NO|ALL)_PROXY'
    mapfile -t variables < <(env | grep -E "^($kept)=")
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "${variables[@]}" chroot "$root" "$@"
}

make_root() { # SUITE ROOT
    local suite=$1 root=$2 list=$scratch/$1 format=list file options=()
    sources "$suite" >"$list"
    if grep -q '^Types:' "$list"; then format=sources; fi
    mv "$list" "$list.$format"
    while read -r file; do options+=(--aptopt="$file"); done < <(apt_settings)
    mmdebstrap --quiet --variant=minbase --include=git,make,ca-certificates "${options[@]}" \
        "$suite" "$root" "$list.$format"
    rm -f "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/*
    cp "$list.$format" "$root/etc/apt/sources.list.d/debian.$format"
    settings "$root"
    in_root "$root" update-ca-certificates >/dev/null
    git clone -q --no-hardlinks "$repository" "$root/srv/knd"
    # A chroot's / is a mount point only if the folder is one, and programs change its propagation.
    mount --bind "$root" "$root"
    for file in proc sys dev; do mount --rbind "/$file" "$root/$file"; done
    mount -t tmpfs tmpfs "$root/run"
}

try() { # SUITE
    local suite=$1 root=$scratch/root-$1 target status=0
    echo "=== $suite: making a minimal root"
    make_root "$suite" "$root"
    for target in "${targets[@]}"; do
        echo "=== $suite: make $target"
        in_root "$root" make -C /srv/knd "$target" </dev/null || {
            status=1
            echo "=== $suite: make $target FAILED"
        }
    done
    return "$status"
}

failed=()
for suite in "${suites[@]}"; do
    started=$SECONDS
    # A function in a condition runs without -e, so each suite has a shell of its own.
    status=0
    (trap - EXIT; set -e; try "$suite") & wait $! || status=$?
    [ "$status" = 0 ] || failed+=("$suite")
    echo "=== $suite: status $status after $((SECONDS - started)) s"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed in: ${failed[*]}" >&2
    exit 1
fi
echo "make ${targets[*]}: fine in ${suites[*]}"
