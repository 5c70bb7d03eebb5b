"""UDP as fast as one process can, through sockets given as descriptors: `python flood.py FD...`.

Every socket in turn sends one datagram of PAYLOAD bytes. A line says that it is under way. A line on stdin
ends it; then the datagrams sent of each socket are one JSON line.
"""

from __future__ import annotations

import json
import select
import socket
import sys

PAYLOAD = bytes(120)
ROUNDS = 512


def main() -> None:
    sockets = [socket.socket(fileno=int(each)) for each in sys.argv[1:]]
    sent = [0] * len(sockets)
    while not sum(sent) or not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(ROUNDS):
            for number, each in enumerate(sockets):
                each.send(PAYLOAD)
                sent[number] += 1
        if sent[0] == ROUNDS:
            print("under way", flush=True)
    print(json.dumps(sent))


if __name__ == "__main__":
    main()
