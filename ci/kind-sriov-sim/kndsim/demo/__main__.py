"""`python -m kndsim.demo`: exit 0 if every number and every device is right, 1 if anything is off."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time

from kndsim.demo.devices import choose, make_veths
from kndsim.demo.play import DEVICES_NEEDED, play
from kndsim.demo.report import as_json, as_table, problems
from kndsim.demo.sabotage import Sabotage
from kndsim.node import private_mounts
from kndsim.runtime import RuntimeMode


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.add_argument("--hook", choices=["auto", "tcx", "clsact"], default="auto")
    parser.add_argument("--runtime", type=RuntimeMode, choices=list(RuntimeMode), default=RuntimeMode.POD_RPC)
    parser.add_argument(
        "--sabotage", type=Sabotage, choices=list(Sabotage), default=None, help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("moving network devices needs root")
    private_mounts()
    choice = choose()
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
    with make_veths(DEVICES_NEEDED) as devices:
        result = asyncio.run(
            play(
                devices,
                mode=arguments.runtime,
                hook=arguments.hook,
                entry=entry,
                unsent=1 if arguments.sabotage is Sabotage.DROP_ONE else 0,
                say=say,
            )
        )
    print(as_table(result) if as_text else as_json(result, choice), flush=True)
    return 1 if problems(result) else 0


if __name__ == "__main__":
    raise SystemExit(main())
