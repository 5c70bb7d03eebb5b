"""`python -m kndsim.demo`: exit 0 if every number and every device is right, 1 if anything is off."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from kndsim.demo.choice import Backend, CannotUse, Choice, choose
from kndsim.demo.devices import Devices, make_veths
from kndsim.demo.host import seen_links
from kndsim.demo.netdevsim import make_ports
from kndsim.demo.play import DEVICES_NEEDED, play
from kndsim.demo.report import as_json, as_table, problems
from kndsim.demo.sabotage import Sabotage
from kndsim.demo.sriov import make_vfs
from kndsim.node import private_mounts
from kndsim.runtime import RuntimeMode


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.add_argument(
        "--backend",
        choices=["auto", *Backend],
        default="auto",
        help="what to give away; auto: the best that is idle",
    )
    parser.add_argument(
        "--hook-seconds",
        type=float,
        default=2.0,
        help="what the runtime allows for an answer (2, as containerd; more where processors are emulated)",
    )
    parser.add_argument("--hook", choices=["auto", "tcx", "clsact"], default="auto")
    parser.add_argument("--runtime", type=RuntimeMode, choices=list(RuntimeMode), default=RuntimeMode.POD_RPC)
    parser.add_argument(
        "--sabotage", type=Sabotage, choices=list(Sabotage), default=None, help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("moving network devices needs root")
    private_mounts()
    # As an interrupt: devices are put back on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wanted = None if arguments.backend == "auto" else Backend(arguments.backend)
    try:
        with contextlib.ExitStack() as stack:
            choice, devices = _open_devices(stack, wanted)
            return _run(arguments, choice, devices)
    except CannotUse as error:
        print(f"{parser.prog}: cannot use {arguments.backend}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the devices are put back", file=sys.stderr)
        return 130


def _open_devices(stack: contextlib.ExitStack, wanted: Backend | None) -> tuple[Choice, Devices]:
    """The best devices, made ready; whatever turns out not to serve is put back before the next is tried."""
    failed: dict[str, str] = {}
    while True:
        choice = choose(Path("/sys"), seen_links(), needed=DEVICES_NEEDED, wanted=wanted, failed=failed)
        try:
            return choice, stack.enter_context(_made(choice))
        except CannotUse as error:
            failed[choice.key] = str(error)


def _made(choice: Choice) -> contextlib.AbstractContextManager[Devices]:
    if choice.pf is not None:
        return make_vfs(choice.pf, DEVICES_NEEDED)
    return make_ports(DEVICES_NEEDED) if choice.backend is Backend.NETDEVSIM else make_veths(DEVICES_NEEDED)


def _run(arguments: argparse.Namespace, choice: Choice, devices: Devices) -> int:
    as_text = arguments.output == "table"
    print(
        f"devices: {choice.backend}: {choice.reason}", file=sys.stdout if as_text else sys.stderr, flush=True
    )
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", file=sys.stderr, flush=True)

    entry = None
    if arguments.sabotage in (Sabotage.SKIP_RESTORE, Sabotage.FIXED_COUNTER):
        entry = (sys.executable, "-m", "kndsim.demo.sabotage", arguments.sabotage, "agent")
    result = asyncio.run(
        play(
            devices,
            mode=arguments.runtime,
            hook=arguments.hook,
            entry=entry,
            hook_seconds=arguments.hook_seconds,
            unsent=1 if arguments.sabotage is Sabotage.DROP_ONE else 0,
            say=say,
        )
    )
    print(as_table(result) if as_text else as_json(result, choice), flush=True)
    return 1 if problems(result) else 0


if __name__ == "__main__":
    raise SystemExit(main())
