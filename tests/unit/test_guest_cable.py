"""A guest's cable is pulled by what QEMU's monitor understands, and a refusal is not taken for done."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kndsim.guest.cable import MonitorRefused, set_link

GREETING = {"QMP": {"version": {}}}
DONE: dict[str, Any] = {"return": {}}


@contextmanager
def monitor(path: Path, answers: Sequence[Sequence[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    """Answers each command by some lines; what it was told is in the list."""
    told: list[dict[str, Any]] = []

    def serve() -> None:
        connection, _ = server.accept()
        with connection, connection.makefile("rw", encoding="utf-8") as stream:
            for lines in ((GREETING,), *answers):
                for line in lines:
                    stream.write(json.dumps(line) + "\n")
                stream.flush()
                if len(told) < len(answers):
                    told.append(json.loads(stream.readline()))

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield told
        thread.join()


@pytest.mark.parametrize("up", [True, False])
def test_the_link_is_set_whatever_events_come_in_between(short_tmp: Path, up: bool) -> None:
    event = {"event": "NIC_RX_FILTER_CHANGED", "data": {}}
    with monitor(short_tmp / "m", [[DONE], [event, DONE]]) as told:
        set_link(short_tmp / "m", "wire2", up=up)
    assert [each["execute"] for each in told] == ["qmp_capabilities", "set_link"]
    assert told[1]["arguments"] == {"name": "wire2", "up": up}


def test_a_refusal_is_told_with_its_reason(short_tmp: Path) -> None:
    refused = {"error": {"class": "DeviceNotFound", "desc": "Device 'wire9' not found"}}
    with (
        monitor(short_tmp / "m", [[DONE], [refused]]),
        pytest.raises(MonitorRefused, match="'wire9' not found"),
    ):
        set_link(short_tmp / "m", "wire9", up=True)


def test_a_machine_that_ends_has_not_done_it(short_tmp: Path) -> None:
    with monitor(short_tmp / "m", [[DONE], []]), pytest.raises(MonitorRefused, match="was closed"):
        set_link(short_tmp / "m", "wire0", up=True)
