"""The network managers of a node, for a guest: in a root file system of their own, which few tests need.

Invariant: they run in the guest's namespaces and on its udev, so they see and do what they would there; only
their programs are not the guest's. Nothing of them is in the guest's image.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from kndsim.cache import Cache, digest
from kndsim.guest import debian
from kndsim.guest.image import BUILD_SECONDS, HERE, week
from kndsim.guest.machine import Share
from kndsim.guest.work import Work
from kndsim.progress import Progress

PACKAGES = ("systemd", "dbus", "network-manager", "iproute2")
"""systemd has networkd."""
PLACE = PurePosixPath("/opt/managers")


def managers(cache: Cache | None = None, progress: Progress | None = None) -> Share:
    """What a guest is to be given. Built if there is none: about a minute, and 130 MB."""
    telling, when = progress or Progress("guest"), week()

    def build(folder: Path) -> None:
        with telling.phase("network managers"):
            debian.make_root(Work(BUILD_SECONDS), folder / "root", PACKAGES, debian.archives())

    key = digest([HERE / "debian.py", *PACKAGES, when])
    made = (cache or Cache()).folder("guest-managers", key, build)
    return Share("managers", made / "root", PLACE)
