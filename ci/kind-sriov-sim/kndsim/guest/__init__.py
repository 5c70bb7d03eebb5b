"""A node as a whole machine: an emulated one with SR-IOV ports and kernels of choice. See vm.guest()."""

from __future__ import annotations

from kndsim.guest.channel import GuestGone
from kndsim.guest.image import Image, image
from kndsim.guest.kernels import Kernel
from kndsim.guest.machine import Disk, Forward, Share, Terminal, Topology
from kndsim.guest.vm import BootFailed, Guest, guest
from kndsim.guest.work import BuildFailed

__all__ = [
    "BootFailed",
    "BuildFailed",
    "Disk",
    "Forward",
    "Guest",
    "GuestGone",
    "Image",
    "Kernel",
    "Share",
    "Terminal",
    "Topology",
    "guest",
    "image",
]
