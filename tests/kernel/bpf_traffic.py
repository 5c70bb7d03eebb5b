"""Frames sent as they are, through a packet socket in a netns."""

from __future__ import annotations

import ctypes
import socket
import struct
from types import TracebackType
from typing import Self

from kndsim.links import SimNetns

_SOL_PACKET, _PACKET_VNET_HDR = 263, 15
_ETH_P_ALL = 0x0003

ARP_FRAME = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x08\x06" + bytes(28)


class Sender:
    """A packet socket on one device. vnet: every frame comes with a virtio header of its own."""

    def __init__(self, where: SimNetns, device: str, *, vnet: bool = False) -> None:
        def open_socket() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            made.bind((device, 0))
            return made

        self._vnet = vnet
        self._socket = where.run(open_socket)
        if vnet:
            self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)

    def send(self, frame: bytes, count: int = 1, *, header: bytes = b"") -> int:
        """Send count times; returns count, or raises."""
        for _ in range(count):
            sent = self._socket.send(header + frame)
            assert sent == len(header) + len(frame)
        return count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


def virtio_header(*, flags: int = 0, gso_type: int = 0, header: int = 0, size: int = 0) -> bytes:
    """struct virtio_net_hdr; header is how many bytes go into the packet's linear part."""
    return struct.pack("=BBHHHH", flags, gso_type, header, size, 0, 0)


def send_frames(where: SimNetns, device: str, count: int, frame: bytes = ARP_FRAME) -> None:
    """Frames that nobody answers: ARP of an unknown kind."""
    with Sender(where, device) as sender:
        sender.send(frame, count)


def pin_to_cpu(cpu: int) -> None:
    """The calling thread alone."""
    mask = ctypes.c_ulong(1 << cpu)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.sched_setaffinity(0, ctypes.sizeof(mask), ctypes.byref(mask)) == 0
