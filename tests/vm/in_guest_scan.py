"""Run in a guest: what the repository's own code finds on its buses, as one JSON object.

Invariant: nothing here knows what ought to be found.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hw.netlink import LinkSocket
from hw.rdma import discovery, verbs
from hw.scan import scan, uplinks_of
from hw.sysfs import Sysfs

if __name__ == "__main__":
    sysfs = Sysfs(Path("/sys"))
    with LinkSocket(None) as links:
        devices = scan(sysfs, links.dump(), uplinks_of(links))
    rdma = discovery.discover(sysfs)
    seen = {
        "devices": [asdict(device) for device in devices],
        "sysfs": {str(one.ports[0].netdev_name): asdict(one) for one in rdma.software},
        "verbs": [asdict(device) for device in verbs.devices().values()],
    }
    print(json.dumps(seen, default=str))
