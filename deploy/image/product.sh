#!/bin/bash
# Usage: product.sh OUT
# Last part of the image's recipe, as root on top of venv.sh, in a copy of the repository that may be
# written to: OUT becomes what lies over the other layers: the product, its BPF programs ready to load, and
# the helper for the host. No network is needed.
set -euo pipefail
out=$1
cd "$(dirname "$0")/../.."

mkdir -p bpf/prebuilt
/usr/bin/python3 -m bpf.compile "$PWD/bpf/c" >bpf/prebuilt/acct.json

pip --disable-pip-version-check wheel --quiet --no-deps --no-index --no-build-isolation --no-cache-dir \
    --wheel-dir build/wheels .
pip --python /opt/knd/bin/python --disable-pip-version-check --no-input install --quiet --no-deps --no-index \
    --root-user-action ignore --no-compile --root "$out" build/wheels/knd-*.whl
/opt/knd/bin/python -m compileall -q --invalidation-mode unchecked-hash -s "$out" "$out/opt/knd/lib"

make -s -C deploy/netns-check OUT="$out/usr/libexec/knd/knd-netns-check"
install -m 755 deploy/image/put-netns-check.sh "$out/usr/libexec/knd/put-netns-check"
