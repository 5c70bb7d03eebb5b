#!/bin/bash
# Usage: venv.sh
# Second part of the image's recipe, as root on top of base.sh: the packages that build, and /opt/knd with
# the Python packages of requirements/runtime.txt, by hash. Only /opt/knd is taken into the image.
set -euo pipefail
deploy=$(cd "$(dirname "$0")/.." && pwd)

"$deploy/install-packages.sh" "$deploy/debian-packages-image-build.txt"
apt-get clean

# Its Python sees Debian's pyverbs. --force-reinstall: what Debian happens to have as well must be in here,
# since only the copy whose hash was checked is the one that was tested.
/usr/bin/python3 -m venv --system-site-packages --without-pip /opt/knd
pip --python /opt/knd/bin/python --disable-pip-version-check --no-input install --quiet --no-cache-dir \
    --root-user-action ignore --no-compile --force-reinstall --require-hashes --only-binary :all: \
    -r "$deploy/../requirements/runtime.txt"
/opt/knd/bin/python -m compileall -q -j 2 --invalidation-mode unchecked-hash /opt/knd/lib
