#!/bin/bash
# Usage: base.sh
# First part of the image's recipe, as root in a minimal Debian 13: the packages that stay. Run by the
# Dockerfile's stage of this name and by kndsim.agent_image.
set -euo pipefail
deploy=$(cd "$(dirname "$0")/.." && pwd)

"$deploy/install-packages.sh" "$deploy/debian-packages-image.txt"
apt-get clean

# Licences stay; manuals, translations and the logs of the making do not.
find /usr/share/doc -type f ! -name copyright -delete
find /usr/share/doc -depth -type d -empty -delete
rm -rf /usr/share/{man,info,locale,lintian}/* /var/lib/apt/lists/* /var/cache/debconf/*-old \
    /var/cache/ldconfig/aux-cache /var/log/*.log /var/log/apt/* /etc/machine-id

# Compiled files that do not depend on times: the file system is read-only when the agent runs, so what
# is not valid as it is would be compiled anew at each start.
find /usr/lib/python3* -name __pycache__ -prune -exec rm -rf {} +
python3 -m compileall -q -j 2 --invalidation-mode unchecked-hash /usr/lib/python3*
