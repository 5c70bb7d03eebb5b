"""The real agent, which is killed when it is about to change the kernel's devices for the n-th time.

Run as `python -m tests.vm.dying_maker N FLAGS`. Nothing of this is in the product.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from driver.app import App
from driver.settings import parse
from hw.netlink import LinkSocket
from hw.sysfs import Sysfs


class Countdown:
    def __init__(self, changes: int) -> None:
        self._left = changes

    def watch(self, owner: type, name: str) -> None:
        change: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(change)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                logging.getLogger(__name__).warning("killed before %s%r", name, args[1:])
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        setattr(owner, name, wrapped)


def main() -> None:
    number, *flags = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    countdown = Countdown(int(number))
    countdown.watch(Sysfs, "write")
    for name in ("set_up", "set_vf", "change"):
        countdown.watch(LinkSocket, name)
    asyncio.run(App(parse(flags)).run())


if __name__ == "__main__":
    main()
