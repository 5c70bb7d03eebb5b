"""The channel to a guest, with the guest's own agent behind a pair of sockets instead of a virtio port.

Invariant: garbage changes nothing, every call ends, and nothing that a command leaves running holds it up.
"""

from __future__ import annotations

import base64
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kndsim.guest import channel as host_side
from kndsim.guest.channel import Channel, GuestGone, Refused
from kndsim.guest.inside import agent
from kndsim.guest.inside.agent import LONGEST, Agent, Lines, encode


class Peer:
    """A listening socket and what the test says on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.channel = Channel(path)
        self.socket, _ = self.listener.accept()

    def close(self) -> None:
        self.channel.close()
        self.socket.close()
        self.listener.close()


@pytest.fixture
def peer(short_tmp: Path) -> Iterator[Peer]:
    made = Peer(short_tmp / "agent.sock")
    yield made
    made.close()


class Served:
    """A channel whose other end is the real agent, run by a thread of this process."""

    def __init__(self, peer: Peer) -> None:
        self.channel = peer.channel
        fd = os.dup(peer.socket.fileno())
        peer.socket.close()
        self._thread = threading.Thread(target=self._serve, args=(fd,), daemon=True)
        self._thread.start()

    def _serve(self, fd: int) -> None:
        try:
            Agent(fd).serve()
        except ConnectionError:
            pass
        finally:
            os.close(fd)

    def run(self, *argv: str, timeout: float = 10, stdin: bytes = b"", **env: str) -> host_side.Answer:
        given = base64.b64encode(stdin).decode()
        return self.channel.call(timeout, do="run", argv=argv, timeout=timeout, stdin=given, env=env)


@pytest.fixture
def served(peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Served:
    monkeypatch.setattr(agent, "CHECKOUT", "/")
    monkeypatch.setattr(agent, "LOGS", tmp_path / "logs")
    # An unused end is told by a closed socket, and the agent waits a little before it looks again.
    return Served(peer)


# --- lines ------------------------------------------------------------------------------------------


def test_messages_come_out_whole_however_they_were_cut() -> None:
    sent = [{"id": number, "text": "x" * number} for number in range(20)]
    data, lines = b"".join(map(encode, sent)), Lines()
    got = [message for at in range(0, len(data), 7) for message in lines.feed(data[at : at + 7])]
    assert got == sent


@pytest.mark.parametrize(
    "garbage", [b"\0\xff\xfe", b"{", b'"text"', b"[1]", b"", b"\x1b[0m[ 1.0] a kernel's line", b"{" * 9000]
)
def test_what_is_no_message_is_dropped_up_to_the_next_line(garbage: bytes) -> None:
    lines = Lines()
    assert list(lines.feed(encode({"id": 1}) + garbage + b"\n" + encode({"id": 2}))) == [{"id": 1}, {"id": 2}]


def test_a_line_without_end_takes_no_memory() -> None:
    lines = Lines()
    for _ in range(5):
        assert list(lines.feed(b"x" * LONGEST)) == []
    assert len(lines._rest) <= LONGEST
    assert list(lines.feed(b"end\n" + encode({"id": 3}))) == [{"id": 3}]


# --- commands ---------------------------------------------------------------------------------------


def test_a_command_gives_its_code_and_both_outputs(served: Served) -> None:
    answer = served.run(
        "sh", "-c", "cat; echo told >&2; echo $KND_SAID; exit 3", stdin=b"in\n", KND_SAID="said"
    )
    assert (answer.end["code"], answer.out, answer.err) == (3, b"in\nsaid\n", b"told\n")
    assert not answer.end["late"]


def test_output_of_any_size_and_bytes_arrives(served: Served) -> None:
    answer = served.run("head", "-c", "3000000", "/dev/urandom")
    assert len(answer.out) == 3_000_000


def test_a_command_that_reads_none_of_its_input_ends(served: Served) -> None:
    assert served.run("true", stdin=b"x" * 1_000_000).end["code"] == 0


def test_a_command_that_hangs_is_killed_with_its_children_in_time(served: Served) -> None:
    started = time.monotonic()
    answer = served.run("sh", "-c", "echo before; sleep 77 & echo $!; sleep 78", timeout=0.5)
    assert time.monotonic() - started < 5
    assert answer.end["late"]
    said, child = answer.out.decode().split()
    assert said == "before"
    assert not Path(f"/proc/{child}/task").exists() or _is_zombie(child)


def _is_zombie(pid: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_a_command_leaves_running_does_not_hold_its_answer_up(served: Served) -> None:
    started = time.monotonic()
    answer = served.run("sh", "-c", "setsid sleep 79 & echo $!")
    child = int(answer.out)
    try:
        assert time.monotonic() - started < 5
        assert answer.end["code"] == 0
    finally:
        os.kill(child, 9)


def test_commands_run_side_by_side(served: Served, tmp_path: Path) -> None:
    """Each waits for the other to be there."""
    meet = "touch {0}; while [ ! -e {1} ]; do sleep 0.01; done; echo {0}"
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(served.run, "sh", "-c", meet.format(tmp_path / one, tmp_path / other))
            for one, other in (("a", "b"), ("b", "a"))
        ]
        assert [call.result().out.decode().strip() for call in calls] == [
            str(tmp_path / "a"),
            str(tmp_path / "b"),
        ]


@pytest.mark.parametrize("argv", [("/no/such/program",), ("/etc",)])
def test_a_program_that_cannot_be_run_is_told_with_the_reason(served: Served, argv: tuple[str, ...]) -> None:
    with pytest.raises(Refused, match=r"FileNotFoundError|PermissionError"):
        served.run(*argv)


def test_an_unknown_request_is_refused_and_the_next_one_served(served: Served) -> None:
    with pytest.raises(Refused, match="no such request: 'dance'"):
        served.channel.call(5, do="dance")
    with pytest.raises(Refused, match="KeyError"):
        served.channel.call(5, do="run")
    assert served.run("true").end["code"] == 0


# --- services and files -----------------------------------------------------------------------------


def test_a_service_lives_until_it_is_signalled_and_its_log_is_kept(
    served: Served, wait_until, tmp_path
) -> None:
    call = served.channel.call
    call(5, do="start", service="one", argv=["sh", "-c", "echo $WHO; exec sleep 80"], env={"WHO": "me"})
    with pytest.raises(Refused, match="one runs already"):
        call(5, do="start", service="one", argv=["true"])
    wait_until(lambda: (tmp_path / "logs/one").read_text() == "me\n")
    assert call(5, do="alive", service="one").end is True
    call(5, do="signal", service="one", number=15)
    wait_until(lambda: call(5, do="alive", service="one").end is False)
    call(5, do="signal", service="one", number=15)
    call(5, do="start", service="one", argv=["echo", "again"])
    wait_until(lambda: (tmp_path / "logs/one").read_text() == "me\nagain\n")


def test_a_service_nobody_started_is_not_alive(served: Served) -> None:
    assert served.channel.call(5, do="alive", service="other").end is False


def test_a_file_is_whole_or_not_there(served: Served, tmp_path: Path) -> None:
    path, data = tmp_path / "a/b/file", os.urandom(200_000)
    told = {"path": str(path), "token": "7"}
    served.channel.call(5, do="append", first=True, data=base64.b64encode(data[:99_999]).decode(), **told)
    served.channel.call(5, do="append", first=False, data=base64.b64encode(data[99_999:]).decode(), **told)
    assert not path.exists()
    served.channel.call(5, do="write", mode=0o750, **told)
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o750
    assert list(path.parent.iterdir()) == [path]
    assert served.channel.call(5, do="read", path=str(path)).out == data


def test_a_file_that_is_not_there_is_told_with_its_number(served: Served) -> None:
    with pytest.raises(Refused) as caught:
        served.channel.call(5, do="read", path="/no/such/file")
    assert caught.value.number == 2


# --- guests that go away ----------------------------------------------------------------------------


def test_a_guest_that_goes_away_ends_every_call(peer: Peer) -> None:
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(peer.channel.call, 30, do="run") for _ in range(2)]
        got = b""
        while got.count(b"\n") < 2:
            got += peer.socket.recv(4096)
        peer.socket.shutdown(socket.SHUT_RDWR)
        for call in calls:
            with pytest.raises(GuestGone, match="machine is gone"):
                call.result(5)
    with pytest.raises(GuestGone, match="machine is gone"):
        peer.channel.call(5, do="run")


def test_an_agent_that_starts_anew_has_forgotten_what_was_asked(peer: Peer) -> None:
    peer.socket.sendall(encode({"hello": 1}))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(peer.channel.call, 30, do="run")
        peer.socket.recv(4096)
        peer.socket.sendall(encode({"hello": 2}))
        with pytest.raises(GuestGone, match="started anew"):
            call.result(5)


def test_a_request_longer_than_a_line_may_be_is_refused_at_once(served: Served) -> None:
    with pytest.raises(ValueError, match="write it to a file"):
        served.run("cat", stdin=b"x" * LONGEST)


def test_a_guest_that_does_not_answer_is_given_up_at_the_deadline(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_side, "_GRACE", 0.1)
    with pytest.raises(TimeoutError, match=r"no answer from the guest after 0\.2 s"):
        peer.channel.call(0.1, do="run")
    # Its late answer is nobody's.
    peer.socket.sendall(encode({"id": 1, "end": 0}))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(peer.channel.call, 5, do="alive")
        peer.socket.recv(4096)
        peer.socket.sendall(b"noise\n" + encode({"id": 2, "end": True}))
        assert call.result(5).end is True
