"""The least that an attach can cost: its netlink messages alone, packed by hand, on sockets that are open.

Invariant: does to the kernel what an attach of one device does (move with name, MTU and MAC in one message,
one address, up), on the same kind of device, into a netns made the same way; and nothing else is timed.
"""

from __future__ import annotations

import os
import socket
import struct
import time
import uuid
from pathlib import Path

from kndsim import netns as sim_netns
from kndsim.links import SimNetns

_RTM_SETLINK, _RTM_NEWADDR = 19, 20
_REQUEST, _ACK, _CREATE = 0x1, 0x4, 0x400
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_NET_NS_FD = 1, 3, 4, 28
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
_UP = 1
MAC, MTU, NAME, ADDRESS = "02:00:5e:10:00:01", 1400, "net1", "198.18.0.2/24"
"""What both the floor and the attaches it stands beside set."""


class Floor:
    """One veth of its own, carried back and forth."""

    def __init__(self, host: SimNetns, device: str, folder: Path) -> None:
        self._host = host
        self._folder = folder
        index = host.link_index(device)
        assert index is not None
        self._index = index
        self._device = device

    def attach(self) -> float:
        """Seconds of one attach; the device is home again when it returns."""
        path = self._folder / f"floor-{uuid.uuid4()}"
        sim_netns.create_netns(path)
        home = pod = None
        pod_fd = home_fd = -1
        try:
            pod_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            home_fd = os.dup(self._host.fd)
            home = _open()
            pod = sim_netns.in_netns(path, _open)
            messages = (self._move(pod_fd), self._address(), self._up())
            started = time.perf_counter()
            _exchange(home, messages[0])
            _exchange(pod, messages[1])
            _exchange(pod, messages[2])
            seconds = time.perf_counter() - started
            _exchange(pod, self._back(home_fd))
            return seconds
        finally:
            for sock in (home, pod):
                if sock is not None:
                    sock.close()
            for fd in (pod_fd, home_fd):
                if fd >= 0:
                    os.close(fd)
            sim_netns.delete_netns(path)

    def _move(self, fd: int) -> bytes:
        attributes = (
            _attribute(_IFLA_NET_NS_FD, struct.pack("=I", fd))
            + _attribute(_IFLA_IFNAME, NAME.encode() + b"\0")
            + _attribute(_IFLA_MTU, struct.pack("=I", MTU))
            + _attribute(_IFLA_ADDRESS, bytes.fromhex(MAC.replace(":", "")))
        )
        return _link(self._index, attributes)

    def _back(self, fd: int) -> bytes:
        name = self._device.encode() + b"\0"
        attributes = _attribute(_IFLA_NET_NS_FD, struct.pack("=I", fd)) + _attribute(_IFLA_IFNAME, name)
        return _link(self._index, attributes)

    def _address(self) -> bytes:
        address, _, length = ADDRESS.partition("/")
        packed = socket.inet_aton(address)
        broadcast = packed[:3] + b"\xff"
        body = struct.pack("=BBBBI", socket.AF_INET, int(length), 0, 0, self._index)
        for kind, value in ((_IFA_ADDRESS, packed), (_IFA_LOCAL, packed), (_IFA_BROADCAST, broadcast)):
            body += _attribute(kind, value)
        return _message(_RTM_NEWADDR, _CREATE, body)

    def _up(self) -> bytes:
        return _link(self._index, b"", flags=_UP, change=_UP)


def _link(index: int, attributes: bytes, *, flags: int = 0, change: int = 0) -> bytes:
    return _message(_RTM_SETLINK, 0, struct.pack("=BxHiII", 0, 0, index, flags, change) + attributes)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _open() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    sock.bind((0, 0))
    return sock


def _exchange(sock: socket.socket, message: bytes) -> None:
    sock.send(message)
    answer = sock.recv(65536)
    code = struct.unpack_from("=i", answer, 16)[0]
    if code:
        raise OSError(-code, os.strerror(-code))
