"""Ways out of a pod that pass the kernel's queues and hooks by, and the rights that they need: those of any
container.

Layouts are those of uapi linux/if_xdp.h and linux/capability.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from kndsim.waiting import wait_until

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)

_SOL_PACKET, _PACKET_QDISC_BYPASS = 263, 20

_AF_XDP, _SOL_XDP = 44, 283
_MMAP_OFFSETS, _TX_RING, _UMEM_REG, _FILL_RING, _COMPLETION_RING = 1, 3, 4, 5, 6
_TX_AT, _COMPLETION_AT = 0x80000000, 0x180000000
_XDP_COPY = 2
_RING = 64
_CHUNK = 4096
_OFFSETS = struct.Struct("=16Q")
"""Of the rings rx, tx, fill and completion each: producer, consumer, descriptors, flags."""

_CAPSET = 126 if os.uname().machine == "x86_64" else 91
_CAPABILITY_VERSION_3 = 0x20080522
_DEFAULT = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
"""What container runtimes leave a container: CHOWN to SETPCAP, NET_BIND_SERVICE, NET_RAW (13), SYS_CHROOT,
MKNOD, AUDIT_WRITE, SETFCAP."""


def with_default_capabilities(work: Callable[[], T]) -> T:
    """work with what a container may do by default, in the calling thread, which has no more after it."""
    low = sum(1 << number for number in _DEFAULT)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", low, low, 0, 0, 0, 0))
    if _libc.syscall(_CAPSET, header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    return work()


def by_packet_socket(device: str, frame: bytes, count: int, *, past_the_queues: bool = True) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((device, 0))
        sock.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, past_the_queues)
        for _ in range(count):
            sock.send(frame)


def by_xdp_socket(device: str, frame: bytes, count: int) -> None:
    """Without a program and without the driver's help: copy mode, which every device has."""
    with socket.socket(_AF_XDP, socket.SOCK_RAW, 0) as sock, _memory(sock, frame) as (tx, completions):
        address = struct.pack("=HHIII", _AF_XDP, _XDP_COPY, socket.if_nametoindex(device), 0, 0)
        if _libc.bind(sock.fileno(), address, len(address)) != 0:
            raise OSError(ctypes.get_errno(), "bind of an XDP socket")
        for number in range(1, count + 1):
            tx.give(number - 1, struct.pack("=QII", 0, len(frame), 0), number)
            # The kernel sends in this call, as many as it thinks good.
            wait_until(partial(_sent, sock, completions, number), what="a frame to be sent")


def _sent(sock: socket.socket, completions: _Ring, number: int) -> bool:
    with contextlib.suppress(BlockingIOError, InterruptedError):
        if _libc.sendto(sock.fileno(), None, 0, socket.MSG_DONTWAIT, None, 0) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    if completions.produced < number:
        return False
    completions.taken(number)
    return True


class _Ring:
    """One ring that is shared with the kernel. at: where its producer, consumer and entries are in it."""

    def __init__(self, memory: mmap.mmap, at: tuple[int, ...]) -> None:
        self._memory = memory
        self._producer, self._consumer, self._entries = at[:3]

    @property
    def produced(self) -> int:
        return int(struct.unpack_from("=I", self._memory, self._producer)[0])

    def taken(self, number: int) -> None:
        struct.pack_into("=I", self._memory, self._consumer, number)

    def give(self, number: int, entry: bytes, produced: int) -> None:
        place = self._entries + number % _RING * len(entry)
        self._memory[place : place + len(entry)] = entry
        struct.pack_into("=I", self._memory, self._producer, produced)


@contextlib.contextmanager
def _memory(sock: socket.socket, frame: bytes) -> Iterator[tuple[_Ring, _Ring]]:
    """The frame at address 0 of the socket's memory, and its rings for what is to be sent and what was."""
    with mmap.mmap(-1, _RING * _CHUNK) as frames:
        frames[: len(frame)] = frame
        start = ctypes.addressof(ctypes.c_char.from_buffer(frames))
        sock.setsockopt(_SOL_XDP, _UMEM_REG, struct.pack("=QQIII4x", start, len(frames), _CHUNK, 0, 0))
        for ring in (_FILL_RING, _COMPLETION_RING, _TX_RING):
            sock.setsockopt(_SOL_XDP, ring, _RING)
        offsets = _OFFSETS.unpack(sock.getsockopt(_SOL_XDP, _MMAP_OFFSETS, _OFFSETS.size))
        # A ring of so few entries is not longer.
        size = mmap.PAGESIZE
        with (
            mmap.mmap(sock.fileno(), size, offset=_TX_AT) as tx,
            mmap.mmap(sock.fileno(), size, offset=_COMPLETION_AT) as completions,
        ):
            yield _Ring(tx, offsets[4:8]), _Ring(completions, offsets[12:16])
