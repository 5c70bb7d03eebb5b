"""What a cluster started ends, also when the process that drives it is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kndsim.cluster import machine
from kndsim.cluster.machine import Keeper, MachineFailed
from kndsim.waiting import wait_until


def test_leaving_the_context_ends_processes_and_removes_folders(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text("")
    with subprocess.Popen(["sleep", "60"]) as process:
        with Keeper() as keeper:
            keeper.keep("process", process.pid)
            keeper.keep("folder", folder)
            assert process.poll() is None
        assert process.wait(5) == -9
    assert not folder.exists()


DRIVER = """
import sys, time
from kndsim.cluster.machine import Keeper
with Keeper() as keeper:
    keeper.keep("process", sys.argv[1])
    keeper.keep("folder", sys.argv[2])
    print("kept", flush=True)
    sys.stdin.read()
"""


def test_a_killed_driver_leaves_neither_process_nor_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    path = str(Path(machine.__file__).parents[2])
    with subprocess.Popen(["sleep", "60"]) as process:
        with subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(process.pid), str(folder)],
            env={"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as driver:
            assert driver.stdout is not None
            assert driver.stdout.readline() == b"kept\n"
            driver.kill()
        assert process.wait(5) == -9
    wait_until(lambda: not folder.exists(), what="the folder is removed")


def test_a_process_that_is_gone_already_and_a_folder_that_never_was_do_no_harm(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with Keeper() as keeper:
        keeper.keep("process", process.pid)
        keeper.keep("folder", tmp_path / "other")


def test_a_keeper_that_died_is_noticed_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_HERE", Path("/nowhere"))
    with pytest.raises(MachineFailed, match="keeper of this cluster ended"), Keeper() as keeper:
        keeper.keep("folder", "/nowhere")
