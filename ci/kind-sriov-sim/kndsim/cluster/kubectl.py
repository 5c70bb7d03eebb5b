"""kubectl as the administrator of a cluster, whatever made that cluster.

Invariant: it runs on the driving machine, so the files it is given are this machine's.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from kndsim.place import CommandFailed, Done


def run(
    program: str, kubeconfig: Path, args: Sequence[str], *, stdin: str, check: bool, timeout: float
) -> Done:
    """CommandFailed unless check is false; subprocess.TimeoutExpired after timeout seconds."""
    argv = [program, f"--kubeconfig={kubeconfig}", *args]
    started = time.monotonic()
    ran = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    seconds = time.monotonic() - started
    done = Done(argv=tuple(argv), code=ran.returncode, out=ran.stdout, err=ran.stderr, seconds=seconds)
    if check and done.code != 0:
        raise CommandFailed(done, "this machine")
    return done
