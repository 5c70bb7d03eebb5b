"""A guest that runs: started, used through kndsim.place.Place, gone at the end.

Invariant: when guest() is left, its qemu, sockets and files are gone; qemu ends with whoever started it,
also when that one is killed, and the next guest removes the files. Nothing a guest does changes its image,
the checkout or the host.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from kndsim.agent import dying_with_parent
from kndsim.guest import programs
from kndsim.guest.cable import set_link
from kndsim.guest.channel import Channel, Refused
from kndsim.guest.image import REPOSITORY, Image, image
from kndsim.guest.inside.agent import LOGS, PIECE
from kndsim.guest.kernels import Kernel
from kndsim.guest.machine import (
    MONITOR,
    Disk,
    Forward,
    Request,
    Share,
    Terminal,
    Topology,
    boot_files,
    command,
)
from kndsim.place import CommandFailed, Done

BOOT_SECONDS = 60.0
"""A guest is up after 10 to 15 s on a quiet machine. The second try has twice as long."""

_CHECKOUT = PurePosixPath("/srv/knd")
_PREFIX = "knd-vm-"
_NEW_SECONDS = 30.0

_tokens = itertools.count()


class BootFailed(Exception):
    """The guest did not come up; with the end of its console. slow: it may yet, given more time."""

    def __init__(self, text: str, *, slow: bool) -> None:
        super().__init__(text)
        self.slow = slow


class Guest:
    """A running guest: a Place. As long as it is used its machine must live: GuestGone otherwise."""

    def __init__(self, request: Request, channel: Channel, folder: Path) -> None:
        self._channel = channel
        self._folder = folder
        self.request = request

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def console(self) -> str:
        """What the kernel and init said so far."""
        return _console(self._folder)

    @property
    def console_socket(self) -> Path:
        """The serial console, if a terminal was asked for."""
        return self._folder / "console.sock"

    def set_cable(self, port: int, *, plugged: bool) -> None:
        """Pull the cable of an igb port, or plug it in: ports are numbered as machine.Topology lists them."""
        set_link(self._folder / MONITOR, f"wire{port}", up=plugged)

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 60.0,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> Done:
        given = base64.b64encode(stdin.encode()).decode()
        told = {"argv": list(argv), "timeout": timeout, "stdin": given, "env": dict(env or {})}
        try:
            answer = self._channel.call(timeout, do="run", **told)
        except Refused as refused:
            done = Done(argv=tuple(argv), code=127, out="", err=str(refused), seconds=0.0)
        else:
            out, err = (data.decode(errors="replace") for data in (answer.out, answer.err))
            if answer.end["late"]:
                said = (err.strip() or out.strip())[-2000:]
                raise TimeoutError(f"{' '.join(argv)} on {self.name}: not done after {timeout:g} s: {said}")
            code, seconds = answer.end["code"], answer.end["seconds"]
            done = Done(argv=tuple(argv), code=code, out=out, err=err, seconds=seconds)
        if check and done.code != 0:
            raise CommandFailed(done, self.name)
        return done

    def start(self, service: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        self._channel.call(10, do="start", service=service, argv=list(argv), env=dict(env or {}))

    def signal(self, service: str, number: int) -> None:
        self._channel.call(10, do="signal", service=service, number=number)

    def alive(self, service: str) -> bool:
        return bool(self._channel.call(10, do="alive", service=service).end)

    def log(self, service: str) -> str:
        try:
            return self.read(PurePosixPath(LOGS, service)).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def write(self, path: PurePosixPath, data: bytes, mode: int = 0o644) -> None:
        token = f"{os.getpid()}-{next(_tokens)}"
        told = {"path": str(path), "token": token}
        for at in range(0, len(data) or 1, PIECE):
            piece = base64.b64encode(data[at : at + PIECE]).decode()
            self._channel.call(60, do="append", first=at == 0, data=piece, **told)
        self._channel.call(60, do="write", mode=mode, **told)

    def read(self, path: PurePosixPath) -> bytes:
        try:
            return self._channel.call(60, do="read", path=str(path)).out
        except Refused as refused:
            if refused.number is not None:
                # The subclass follows from the number: FileNotFoundError and the like.
                raise OSError(
                    refused.number, f"{self.name}: {os.strerror(refused.number)}", str(path)
                ) from None
            raise


@contextlib.contextmanager
def guest(
    *,
    kernel: Kernel = Kernel.NEWEST,
    topology: Topology = Topology.IGB,
    name: str = "guest",
    memory: int = 2048,
    cpus: int = 2,
    shares: Sequence[Share] = (),
    forwards: Sequence[Forward] = (),
    disks: Sequence[Disk] = (),
    append: str = "",
    terminal: Terminal | None = None,
    made: Image | None = None,
    boot_seconds: float = BOOT_SECONDS,
    own_time: bool = False,
) -> Iterator[Guest]:
    """A fresh guest with this checkout below /srv/knd (its own changes stay in it) and its BPF programs ready
    to load, Python and pytest of the project's lock in PATH. memory in MiB. append: more kernel parameters.
    own_time: see Request.

    Its end is that of a machine whose power is cut: nothing in it is told.
    made: the image; else the one for this checkout, built if need be.

    Enter it in a thread that outlives it: the kernel ends qemu with the thread that started it.
    """
    request = Request(
        kernel=kernel,
        topology=topology,
        name=name,
        memory=memory,
        cpus=cpus,
        shares=tuple(shares),
        forwards=tuple(forwards),
        disks=tuple(disks),
        append=append,
        terminal=terminal,
        own_time=own_time,
    )
    found = made or image()
    with contextlib.ExitStack() as stack:
        running = _up(stack, request, found, boot_seconds)
        place = _CHECKOUT / programs.PLACE
        running.run(["mkdir", "-p", str(place.parent)])
        running.write(place, programs.compiled(REPOSITORY))
        yield running


def _up(stack: contextlib.ExitStack, request: Request, found: Image, seconds: float) -> Guest:
    """A busy machine may starve a guest at its start: one more try, with more time."""
    try:
        return stack.enter_context(_machine(request, found, seconds))
    except BootFailed as error:
        if not error.slow:
            raise
    return stack.enter_context(_machine(request, found, 2 * seconds))


@contextlib.contextmanager
def _machine(request: Request, found: Image, seconds: float) -> Iterator[Guest]:
    with _private_folder() as folder:
        first = found.initrd(request.kernel).read_bytes() + boot_files(request)
        (folder / "initrd").write_bytes(first)
        argv = dying_with_parent(command(request, found, folder, REPOSITORY))
        with (
            _process(argv, folder) as qemu,
            contextlib.closing(_connected(qemu, folder, seconds)) as channel,
        ):
            if not channel.wait_hello(time.monotonic() + seconds, lambda: qemu.poll() is None):
                raise _failure(qemu, folder, seconds)
            yield Guest(request, channel, folder)


@contextlib.contextmanager
def _private_folder(below: Path = Path("/tmp")) -> Iterator[Path]:
    """With a short path, for sockets. Locked while it is used, so that others can tell what was left."""
    remove_left(below)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=below))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder)


def remove_left(below: Path) -> None:
    """The folders of guests whose users were killed."""
    for folder in below.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # A new one is not locked yet.
                if time.time() - os.fstat(lock).st_mtime > _NEW_SECONDS:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _process(argv: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "qemu.log").open("wb") as log:
        # What the guest writes to its disk goes to a file that qemu makes in TMPDIR and unlinks at once.
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(folder)},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # A guest has nothing to put in order.
        process.kill()
        process.wait()


def _connected(qemu: subprocess.Popen[bytes], folder: Path, seconds: float) -> Channel:
    until = time.monotonic() + seconds
    while qemu.poll() is None and time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return Channel(folder / "agent.sock")
        time.sleep(0.02)
    raise _failure(qemu, folder, seconds)


def _failure(qemu: subprocess.Popen[bytes], folder: Path, seconds: float) -> BootFailed:
    code = qemu.poll()
    said = (folder / "qemu.log").read_text(errors="replace").strip()[-1000:]
    end = "\n".join(_console(folder).splitlines()[-25:])
    if code is None:
        how = f"the guest's agent did not answer within {seconds:g} s"
    else:
        how = f"the guest's machine ended with {code}, so its kernel gave up or qemu did not start"
    return BootFailed(
        f"{how}. qemu: {said or 'silent'}. The console's end:\n{end or '(empty)'}", slow=code is None
    )


def _console(folder: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "console.log").read_text(errors="replace").replace("\r", "")
    return ""
