"""Real ports whose cable is pulled, and real VFs whose driver is taken or that are made anew under a pod.

One guest, one story (tests.vm.health_story); each test below is something that it promises.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import pytest

from kndsim.guest import Guest, Image, Kernel, guest
from kndsim.place import Done
from kndsim.progress import Progress
from tests.vm.health_story import CABLES, FAR_VFS, NEAR_PORT, NEAR_VFS

LIMIT = 1500.0
pytestmark = pytest.mark.timeout(LIMIT)
Seen = dict[str, Any]


@contextmanager
def pulled_as_asked(vm: Guest) -> Iterator[None]:
    """Cables are at the host's end: it reads what the story wants and does it."""
    over = threading.Event()

    def keep() -> None:
        done = 0
        while not over.wait(0.3):
            try:
                lines = vm.read(PurePosixPath(CABLES)).decode().splitlines()
            except FileNotFoundError:
                continue
            for line in lines[done:]:
                port, what = line.split()
                vm.set_cable(int(port), plugged=what == "plug")
            done = len(lines)

    with ThreadPoolExecutor(1) as pool:
        kept: Future[None] = pool.submit(keep)
        try:
            yield
        finally:
            over.set()
            kept.result(60)


@pytest.fixture(scope="module")
def seen(made: Image, progress: Progress) -> Any:
    with (
        progress.phase("cables, drivers and VFs taken away in a guest"),
        guest(kernel=Kernel.NEWEST, name="health", memory=3072, made=made) as vm,
        pulled_as_asked(vm),
    ):
        command = "cd /srv/knd && exec python -m tests.vm.health_story"
        done: Done = vm.run(["sh", "-c", command], check=False, timeout=LIMIT - 300)
    if done.code != 0:
        log = json.loads(done.out)["log"] if done.out.startswith("{") else done.out
        pytest.fail(f"{log[-6000:]}\n{done.err[-12000:]}")
    return json.loads(done.out)


def test_a_pulled_cable_taints_the_ports_vfs_and_no_others(seen: Seen) -> None:
    taints = seen["pulled"]["taints"]
    assert {name for name, keys in taints.items() if keys == ["no-carrier"]} >= set(NEAR_VFS)
    assert [taints[name] for name in FAR_VFS] == [[], []]
    assert "has no carrier: look at its cable" in seen["pulled"]["message"]
    assert NEAR_PORT == 0


def test_pulling_and_plugging_in_is_one_write_of_the_slice_each(seen: Seen) -> None:
    assert seen["slice writes of a flap"] == 2


def test_a_pod_keeps_its_device_and_node_claim_and_pod_are_told(seen: Seen) -> None:
    assert seen["still in the pod"] == ["0000:21:10.0"]
    assert seen["told of the cable"] == {
        "node": ["PortUnhealthy", "PortHealthy"],
        "claim": ["DeviceUnhealthy", "DeviceHealthy"],
        "pod": ["DeviceUnhealthy", "DeviceHealthy"],
    }


def test_the_command_line_says_what_is_wrong(seen: Seen) -> None:
    assert "has no carrier" in seen["devices while pulled"][NEAR_VFS[0]]["health"]
    assert seen["devices while pulled"][FAR_VFS[0]]["health"] == "healthy"


def test_a_health_reporter_that_says_error_is_heard(seen: Seen) -> None:
    assert "health reporter dummy says error" in seen["reporter"]


def test_a_driver_that_was_taken_under_a_claim_is_told_and_its_return_mends_all(seen: Seen) -> None:
    assert "no-driver" in seen["unbound"]["taints"][FAR_VFS[0]]
    assert "bind it to 'igbvf' again" in seen["unbound"]["message"]
    assert {"DeviceUnhealthy", "DeviceHealthy"} <= set(seen["told of the driver"])
    assert seen["in the pod after all"] == ["0000:41:10.0"]


def test_a_vf_that_is_gone_under_a_pod_is_told_and_given_back_when_it_is_there_again(seen: Seen) -> None:
    assert "gone" in seen["gone"]["taints"][FAR_VFS[0]]
    assert "was removed" in seen["gone"]["message"]
    assert seen["nothing is left in the pod"] == []
    assert {"DeviceUnhealthy", "DeviceHealthy"} <= set(seen["told of the loss"])


def test_a_free_vf_without_its_driver_is_tainted_until_it_has_it_again(seen: Seen) -> None:
    assert {"DeviceUnhealthy", "DeviceHealthy"} <= set(seen["told of a free one"])


def test_vfs_that_others_made_anew_are_not_claimed(seen: Seen) -> None:
    assert seen["made by knd"] == "knd"
    number, why = seen["made by others"]
    assert number == 2
    assert "someone has made them anew" in why
