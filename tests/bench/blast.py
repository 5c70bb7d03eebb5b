"""Send UDP datagrams as fast as one process can, and say how many and for how much CPU.

Invariant: it sends exactly as many as it was told. A script, so that several run on several CPUs; it sends
through whatever netns it was started in.

    python blast.py ADDRESS PORT COUNT PAYLOAD DSCP CPU     ->  "COUNT CPU_SECONDS"
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time

BATCH = 64


class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class MsgHdr(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(IoVec)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class MMsgHdr(ctypes.Structure):
    _fields_ = [("header", MsgHdr), ("sent", ctypes.c_uint)]


def open_socket(address: str, port: int, dscp: int) -> socket.socket:
    """Connected, so that the route is looked up once."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, dscp << 2)
    else:
        made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)
    made.connect((address, port))
    return made


def blast(made: socket.socket, count: int, payload: int) -> float:
    """Send count datagrams; returns the CPU seconds of this process, softirqs in its name included."""
    content = ctypes.create_string_buffer(max(payload, 1))
    vector = IoVec(ctypes.addressof(content), payload)
    messages = (MMsgHdr * BATCH)()
    for message in messages:
        message.header.vectors = ctypes.pointer(vector)
        message.header.vector_count = 1
    sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg
    start, left = time.process_time(), count
    while left:
        sent = sendmmsg(made.fileno(), messages, min(BATCH, left), 0)
        if sent < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        left -= sent
    return time.process_time() - start


def main() -> None:
    address, port, count, payload, dscp, cpu = sys.argv[1], *map(int, sys.argv[2:7])
    os.sched_setaffinity(0, {cpu})
    with open_socket(address, port, dscp) as made:
        print(count, blast(made, count, payload))


if __name__ == "__main__":
    main()
