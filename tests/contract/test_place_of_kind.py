"""A kind node keeps the Place contract, with a stand-in for the container engine.

Invariant: the stand-in runs commands on this machine as the engine would in a container; the scripts that
reach it are those that reach a node.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from kndsim.kind.engine import EngineFailed, NoEngine, find_engine
from kndsim.kind.place import EnginePlace
from kndsim.place import CommandFailed, Place
from kndsim.waiting import wait_until
from tests.contract.fake_engine import FakeEngine


@pytest.fixture
def fake(short_tmp: Path) -> FakeEngine:
    return FakeEngine(short_tmp, node=os.getpid(), ended=0)


@pytest.fixture
def place(fake: FakeEngine, short_tmp: Path) -> Iterator[EnginePlace]:
    with EnginePlace(fake.engine, "node", folder=PurePosixPath(short_tmp / "place")) as made:
        yield made


def test_it_is_a_place(place: EnginePlace) -> None:
    as_place: Place = place
    assert as_place.name == "node"


def test_a_command_gives_its_output_its_status_and_its_time(place: EnginePlace) -> None:
    done = place.run(["sh", "-c", "cat; echo out; echo err >&2; exit 7"], stdin="in\n", check=False)
    assert (done.code, done.out, done.err) == (7, "in\nout\n", "err\n")
    assert 0 < done.seconds < 10


def test_words_reach_a_command_as_they_are(place: EnginePlace) -> None:
    words = ["a b", "$HOME", "'", '"', "", "*", "ä\n"]
    assert place.run(["printf", "[%s]", *words]).out == "".join(f"[{word}]" for word in words)


def test_a_command_gets_its_environment(place: EnginePlace) -> None:
    assert place.run(["sh", "-c", 'echo "$GREETING"'], env={"GREETING": "a=b c"}).out == "a=b c\n"


def test_a_command_that_fails_is_told_with_what_it_said(place: EnginePlace) -> None:
    with pytest.raises(CommandFailed, match="on node ended with 3: no such luck"):
        place.run(["sh", "-c", "echo no such luck >&2; exit 3"])


def test_a_command_that_is_not_there_is_a_status_and_no_fault_of_the_engine(place: EnginePlace) -> None:
    assert place.run(["knd-no-such-command"], check=False).code == 127


def test_a_command_that_takes_too_long_is_killed_with_its_children(
    place: EnginePlace, short_tmp: Path
) -> None:
    pid = short_tmp / "pid"
    with pytest.raises(TimeoutError, match=r"took longer than 0\.5 s: killed"):
        place.run(["sh", "-c", f"sleep 600 & echo $! >{pid}; wait"], timeout=0.5)
    wait_until(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists(), what="the child is gone")


def test_an_early_status_of_a_killed_command_is_no_timeout(place: EnginePlace) -> None:
    assert place.run(["sh", "-c", "kill -KILL $$"], check=False).code == 137


def test_a_node_that_is_gone_is_the_engines_fault_and_not_the_commands(fake: FakeEngine) -> None:
    with pytest.raises(EngineFailed, match="container ended is not running"):
        EnginePlace(fake.engine, "ended").run(["true"], check=False)


def test_files_go_there_and_back_whole(place: EnginePlace, short_tmp: Path) -> None:
    path = PurePosixPath(short_tmp / "new/folder/file")
    data = bytes(range(256)) * 1000
    place.write(path, data, mode=0o750)
    assert place.read(path) == data
    assert Path(path).stat().st_mode & 0o777 == 0o750
    place.write(path, b"")
    assert (place.read(path), os.listdir(path.parent)) == (b"", ["file"])


def test_a_file_that_is_not_there_is_told_as_such(place: EnginePlace, short_tmp: Path) -> None:
    with pytest.raises(FileNotFoundError, match="on node"):
        place.read(PurePosixPath(short_tmp / "none"))


def test_a_service_lives_and_its_log_keeps_all_its_lives(place: EnginePlace) -> None:
    for life in ("one", "two"):
        place.start("greeter", ["sh", "-c", 'echo "$LIFE"; sleep 600'], env={"LIFE": life})
        wait_until(lambda life=life: life in place.log("greeter"), what=f"life {life} has spoken")
        assert place.alive("greeter")
        place.signal("greeter", signal.SIGKILL)
        wait_until(lambda: not place.alive("greeter"), what="it has ended")
    assert place.log("greeter") == "one\ntwo\n"
    place.signal("greeter", signal.SIGKILL)


def test_a_service_that_runs_is_not_started_twice(place: EnginePlace) -> None:
    place.start("one", ["sleep", "600"])
    with pytest.raises(EngineFailed, match="it runs already"):
        place.start("one", ["sleep", "600"])


def test_an_unknown_service_is_not_alive_and_has_said_nothing(place: EnginePlace) -> None:
    assert (place.alive("never"), place.log("never")) == (False, "")
    place.signal("never", signal.SIGTERM)


def test_a_process_that_got_a_dead_services_number_is_left_alone(place: EnginePlace, short_tmp: Path) -> None:
    place.start("old", ["sleep", "600"])
    record = short_tmp / "place/old/pid"
    pid, born = record.read_text().split()
    record.write_text(f"{pid} {int(born) - 1}\n")
    assert not place.alive("old")
    place.signal("old", signal.SIGKILL)
    assert Path(f"/proc/{pid}").exists()
    record.write_text(f"{pid} {born}\n")


def test_closing_ends_what_was_started_with_its_children(place: EnginePlace, short_tmp: Path) -> None:
    pid = short_tmp / "pid"
    place.start("parent", ["sh", "-c", f"sleep 600 & echo $! >{pid}; wait"])
    wait_until(lambda: pid.exists() and pid.read_text(), what="the child is there")
    place.close()
    wait_until(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists(), what="the child is gone")
    assert not (short_tmp / "place/parent").exists()


# --- the engine ---------------------------------------------------------------------------------------


def test_a_containers_process_is_asked_anew_each_time(fake: FakeEngine) -> None:
    assert fake.engine.pid("node") == os.getpid()
    fake.set(node=1)
    assert fake.engine.pid("node") == 1


@pytest.mark.parametrize(("name", "said"), [("ended", "is not running"), ("other", "No such container")])
def test_a_container_without_a_process_is_told(fake: FakeEngine, name: str, said: str) -> None:
    with pytest.raises(EngineFailed, match=said):
        fake.engine.pid(name)


def test_an_engine_that_does_not_answer_is_not_taken(fake: FakeEngine) -> None:
    assert find_engine(str(fake.program)) == fake.engine
    fake.set(answers=False)
    with pytest.raises(NoEngine, match=r"Cannot connect to the daemon.*KND_ENGINE.*kndsim\.cluster up"):
        find_engine(str(fake.program))
    with pytest.raises(NoEngine, match="knd-no-engine is not installed"):
        find_engine("knd-no-engine")
