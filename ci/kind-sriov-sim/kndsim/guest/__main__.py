"""`python -m kndsim.guest`: build the image, run one command in a fresh guest, or a shell there."""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from kndsim.guest import BootFailed, BuildFailed, Guest, Kernel, Terminal, Topology, guest, image
from kndsim.guest.debian import NoPackages
from kndsim.progress import Progress

_LEAVE = b"\x1d"
"""Ctrl-]"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kndsim.guest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="the image, if there is none yet")
    for name, text in (("shell", "an interactive shell in a fresh guest"), ("run", "one command in one")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--kernel", type=Kernel, choices=list(Kernel), default=Kernel.NEWEST)
        command.add_argument("--topology", type=Topology, choices=list(Topology), default=Topology.IGB)
        command.add_argument("--memory", type=int, default=2048, help="MiB (%(default)s)")
        command.add_argument("--cpus", type=int, default=2)
        command.add_argument("--own-time", action="store_true", help="its clock goes by its instructions")
        if name == "run":
            command.add_argument("--timeout", type=float, default=600.0, help="seconds (%(default)g)")
            command.add_argument("argv", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("making a root file system needs root")
    # As an interrupt: a guest, or a half-made image, is put away on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _build() if arguments.command == "build" else _in_guest(arguments)
    except (BuildFailed, BootFailed, NoPackages, TimeoutError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _build() -> int:
    progress = Progress("guest")
    made = image(progress=progress)
    if progress.phases:
        print(progress.table(), file=sys.stderr)
    for kernel, name in made.names.items():
        print(f"{kernel:<10} {name}")
    return 0


def _in_guest(arguments: argparse.Namespace) -> int:
    progress = Progress("guest")
    made = image(progress=progress)
    terminal = _terminal() if arguments.command == "shell" else None
    with guest(
        kernel=arguments.kernel,
        topology=arguments.topology,
        memory=arguments.memory,
        cpus=arguments.cpus,
        own_time=arguments.own_time,
        terminal=terminal,
        made=made,
    ) as vm:
        if terminal:
            return _shell(vm)
        done = vm.run(arguments.argv, check=False, timeout=arguments.timeout)
    sys.stdout.write(done.out)
    sys.stderr.write(done.err)
    return done.code


def _terminal() -> Terminal:
    if not sys.stdin.isatty():
        raise ValueError("a shell needs a terminal; for one command there is `run`")
    size = shutil.get_terminal_size()
    return Terminal(os.environ.get("TERM", "vt100"), size.lines, size.columns)


def _shell(vm: Guest) -> int:
    print("A fresh guest; the checkout is in /srv/knd, `exit` starts the shell anew, Ctrl-] ends the guest.")
    with socket.socket(socket.AF_UNIX) as console, _raw(sys.stdin.fileno()):
        console.connect(str(vm.console_socket))
        console.sendall(b"\n")
        while True:
            ready, _, _ = select.select([sys.stdin, console], [], [])
            if console in ready:
                data = console.recv(1 << 16)
                if not data:
                    return 0
                os.write(sys.stdout.fileno(), data)
            if sys.stdin in ready:
                typed = os.read(sys.stdin.fileno(), 1 << 16)
                if not typed or _LEAVE in typed:
                    return 0
                console.sendall(typed)


@contextmanager
def _raw(fd: int) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        print()


if __name__ == "__main__":
    raise SystemExit(main())
