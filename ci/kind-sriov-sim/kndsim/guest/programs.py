"""The checkout's BPF programs, compiled here for guests: bcc takes a minute on emulated processors, and every
agent with folders of its own would wait for it.

Invariant: they are made from the checkout as it is now, and an agent takes them only if they are of its very
source. That a guest's own bcc compiles them is for tests that leave the prebuilt ones out.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path, PurePosixPath

PLACE = PurePosixPath("bpf/prebuilt/acct.json")
"""Below the checkout; where an image has them too."""


@functools.cache
def compiled(checkout: Path) -> bytes:
    """What belongs at PLACE. RuntimeError with the compiler's words if they cannot be compiled."""
    command = [sys.executable, "-m", "bpf.compile", str(checkout / "bpf/c")]
    done = subprocess.run(command, capture_output=True, cwd=checkout, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout
