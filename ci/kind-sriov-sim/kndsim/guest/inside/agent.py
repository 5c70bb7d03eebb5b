"""The program in a guest that runs commands for the host, over a virtio-serial port; JSON, one object a line.

Invariant: a line that is no request changes nothing. Every request is answered, and a command that takes
longer than it may is killed with its process group. Stands alone: the guest's plain Python runs this file.

A request has an "id", and "do": one of Agent's deeds. Answers carry the id: any number of {"out": ...} and
{"err": ...} in base64, then one with "end": the exit code or result, or with "failed": why not.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

PORT = "knd.guest"
LONGEST = 4 << 20
"""Bytes of a line; what is longer is no line of ours."""
PIECE = 1 << 16
"""Bytes of output or of a file in one line."""

LOGS = Path("/var/log/knd-guest")
READY = Path("/run/knd-guest/ready")
CHECKOUT = "/srv/knd"
ENVIRONMENT = {
    "PATH": "/opt/knd/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "KND_CACHE": "/var/cache/knd",
}
LATE_OUTPUT = 1.0
"""Seconds to wait for the output of a command that has ended: what it left running may hold its pipes."""

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Bytes as they come, to messages; what is none is dropped up to the next line."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[Message]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._skipping:
                self._skipping = False
                continue
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message
        if len(self._rest) > LONGEST:
            self._rest, self._skipping = b"", True


def pieces(data: bytes) -> Iterator[str]:
    for at in range(0, len(data), PIECE):
        yield base64.b64encode(data[at : at + PIECE]).decode()


class Agent:
    """Serves one port. fd is read by serve() alone and written under a lock."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._writing = threading.Lock()
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._deeds: dict[str, Callable[[Message], object]] = {
            "run": self._run,
            "start": self._start,
            "signal": self._signal,
            "alive": self._alive,
            "write": self._write,
            "append": self._append,
            "read": self._read,
        }

    def serve(self) -> None:
        self._send({"hello": os.getpid(), "uptime": time.monotonic()})
        lines = Lines()
        while True:
            data = os.read(self._fd, PIECE)
            if not data:
                # Nobody listens on the host yet; the port tells by no event when somebody does.
                time.sleep(0.05)
            for request in lines.feed(data):
                if "id" in request:
                    threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def _send(self, message: Message) -> None:
        data = encode(message)
        with self._writing:
            while data:
                data = data[os.write(self._fd, data) :]

    def _answer(self, request: Message) -> None:
        answer: Message = {"id": request["id"]}
        try:
            deed = self._deeds.get(request.get("do", ""))
            if deed is None:
                raise ValueError(f"no such request: {request.get('do')!r}")
            answer["end"] = deed(request)
        except Exception as error:  # noqa: BLE001 - whatever it was, the host is told and decides
            answer["failed"] = f"{type(error).__name__}: {error}"
            answer["errno"] = getattr(error, "errno", None)
        self._send(answer)

    # --- commands ---------------------------------------------------------------------------------------

    def _run(self, request: Message) -> Message:
        started = time.monotonic()
        process = subprocess.Popen(
            request["argv"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**ENVIRONMENT, **request.get("env", {})},
            cwd=CHECKOUT,
            start_new_session=True,
        )
        given = base64.b64decode(request.get("stdin", ""))
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        pumps = [
            threading.Thread(target=self._pump, args=(process.stdout, request["id"], "out"), daemon=True),
            threading.Thread(target=self._pump, args=(process.stderr, request["id"], "err"), daemon=True),
        ]
        for thread in (*pumps, threading.Thread(target=_feed, args=(process.stdin, given), daemon=True)):
            thread.start()
        late = False
        try:
            process.wait(request["timeout"])
        except subprocess.TimeoutExpired:
            late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        give_up = time.monotonic() + LATE_OUTPUT
        for pump in pumps:
            pump.join(max(0.0, give_up - time.monotonic()))
        return {"code": process.returncode, "seconds": time.monotonic() - started, "late": late}

    def _pump(self, stream: IO[bytes], number: int, kind: str) -> None:
        with stream:
            while data := os.read(stream.fileno(), PIECE):
                self._send({"id": number, kind: base64.b64encode(data).decode()})

    # --- services ---------------------------------------------------------------------------------------

    def _start(self, request: Message) -> None:
        name = request["service"]
        if self._alive(request):
            raise ValueError(f"{name} runs already")
        LOGS.mkdir(exist_ok=True)
        with (LOGS / name).open("ab") as log:
            self._services[name] = subprocess.Popen(
                request["argv"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**ENVIRONMENT, **request.get("env", {})},
                cwd=CHECKOUT,
                start_new_session=True,
            )

    def _alive(self, request: Message) -> bool:
        process = self._services.get(request["service"])
        return process is not None and process.poll() is None

    def _signal(self, request: Message) -> None:
        process = self._services.get(request["service"])
        if process is not None:
            process.send_signal(request["number"])

    # --- files ------------------------------------------------------------------------------------------

    def _append(self, request: Message) -> None:
        """A piece of a file that a write with no more data puts in its place."""
        part = _part(request)
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb" if request["first"] else "ab") as file:
            file.write(base64.b64decode(request["data"]))

    def _write(self, request: Message) -> None:
        part = _part(request)
        part.chmod(request["mode"])
        part.rename(request["path"])

    def _read(self, request: Message) -> None:
        data = Path(request["path"]).read_bytes()
        for piece in pieces(data):
            self._send({"id": request["id"], "out": piece})


def _part(request: Message) -> Path:
    path = Path(request["path"])
    return path.with_name(f".{path.name}.{request['token']}")


def _feed(stream: IO[bytes], data: bytes) -> None:
    """A command that does not read its input to the end is none of our business."""
    with contextlib.suppress(BrokenPipeError), stream:
        stream.write(data)


def _port(within: float = 60.0) -> int:
    """The port by its name, which udev may not have made a link for."""
    give_up = time.monotonic() + within
    while time.monotonic() < give_up:
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == PORT:
                with contextlib.suppress(FileNotFoundError):
                    return os.open(Path("/dev", name.parent.name), os.O_RDWR | os.O_CLOEXEC)
        time.sleep(0.05)
    raise TimeoutError(f"no virtio port {PORT} after {within:g} s")


if __name__ == "__main__":
    fd = _port()
    READY.touch()
    Agent(fd).serve()
