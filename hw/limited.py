"""A call into the kernel that nothing can interrupt, and a caller that goes on without it.

Invariant: whoever calls has its answer in time, or Busy with ETIMEDOUT: then the kernel may still be at it,
so what is has to be looked at before anything is tried again.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from hw.errors import Busy


def in_time(what: str, body: Callable[[], None], seconds: float) -> None:
    """Run body in a thread of its own, with its error if it has one. what begins the error's text."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - raised again, in the thread that waits for it
            errors.append(error)

    thread = threading.Thread(target=run, name="knd-limited", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Busy(f"{what} did not end in {seconds:g} s", errno.ETIMEDOUT)
    if errors:
        raise errors[0]
