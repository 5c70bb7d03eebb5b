"""The netns check lets a container start only in a namespace that its claim's live file names.

Everything else, whatever is wrong, ends in exit status 1 with one sentence for the user.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from driver.cdi import CdiEntry, CdiProjection, LiveFiles
from driver.model import ClaimUid, DeviceName, PoolName, PreparationKey
from driver.paths import Paths
from hw.model import IfName, NetnsCookie

SOURCE = Path(__file__).parents[2] / "deploy/netns-check"
READ_COOKIE = (
    "import socket; "
    "print(int.from_bytes(socket.socket().getsockopt(socket.SOL_SOCKET, 71, 8), sys.byteorder))"
)


def build(out: Path, *settings: str) -> Path:
    subprocess.run(["make", "-s", "-C", SOURCE, f"OUT={out}", *settings], check=True, timeout=60)
    return out


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("helper") / "deep/knd-netns-check")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same source with every access and every overflow checked."""
    out = tmp_path_factory.mktemp("sanitized") / "knd-netns-check"
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    compiler = ["gcc", "-std=c11", *flags.split(), "-o", str(out), str(SOURCE / "knd-netns-check.c")]
    subprocess.run(compiler, check=True, timeout=60)
    return out


class Container:
    """A process in a network namespace of its own, as a container's first one is when hooks run."""

    def __init__(self) -> None:
        # It ends when its input does, also when this process is killed.
        command = ["unshare", "--net", "sh", "-c", "echo ready; exec cat"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        self.pid = self._process.pid
        enter = [
            "nsenter",
            "-t",
            str(self.pid),
            "-n",
            sys.executable,
            "-I",
            "-c",
            f"import sys; {READ_COOKIE}",
        ]
        self.cookie = int(subprocess.check_output(enter, timeout=30))

    def close(self) -> None:
        self._process.communicate(timeout=10)


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    made = Container()
    yield made
    made.close()


@pytest.fixture
def live(tmp_path: Path, container: Container) -> Path:
    """A live file that names the container's namespace among others."""
    path = tmp_path / "live"
    path.write_text(f"4\n{container.cookie}\n18446744073709551615\n")
    path.chmod(0o600)
    return path


def state(pid: object, **more: object) -> bytes:
    """What a runtime gives its hooks."""
    return json.dumps(
        {
            "ociVersion": "1.2.0",
            "id": '0f"},"pid":1,\\',
            "annotations": {"pid": "1", "a": "\u20ac{[", "nested": {"pid": 1, "list": [{"pid": 1}, [], {}]}},
            "none": None,
            "numbers": [1, -2.5e3, True, False],
            "pid": pid,
            "bundle": "/run/x",
            **more,
        }
    ).encode()


def check(helper: Path, given: bytes, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [helper, *map(str, arguments)], input=given, capture_output=True, timeout=30, check=False
    )


def refusal(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one sentence of a refusal."""
    assert done.returncode == 1
    assert done.stdout == b""
    (sentence,) = done.stderr.decode().splitlines()
    assert sentence.startswith("knd-netns-check: ")
    return sentence.removeprefix("knd-netns-check: ")


# --- the verdict ------------------------------------------------------------------------------------


def test_a_container_in_a_live_namespace_starts(helper: Path, container: Container, live: Path) -> None:
    done = check(helper, state(container.pid), live)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_white_space_and_order_in_the_state_do_not_matter(
    helper: Path, container: Container, live: Path
) -> None:
    for text in (f' \n{{ "pid" :\t{container.pid}\r\n}} \n', f'{{"pid":{container.pid},"a":{{"pid":1}}}}'):
        assert check(helper, text.encode(), live).returncode == 0


def test_a_state_with_large_annotations_is_read(helper: Path, container: Container, live: Path) -> None:
    large = state(container.pid, annotations={"a": "\x01" * (256 << 10)})
    assert len(large) > 1 << 20
    assert check(helper, large, live).returncode == 0


def test_a_container_in_another_namespace_does_not_start(
    helper: Path, container: Container, live: Path
) -> None:
    other = Container()
    try:
        sentence = refusal(check(helper, state(other.pid), live))
    finally:
        other.close()
    assert f"cookie {other.cookie} is not in {live}" in sentence
    assert "are not attached in its network namespace" in sentence


def test_a_container_in_the_hosts_namespace_does_not_start(helper: Path, live: Path) -> None:
    assert "are not attached" in refusal(check(helper, state(os.getpid()), live))


@pytest.mark.parametrize("other", ["1{c}", "{c}0", "{c}{c}"])
def test_a_cookie_that_only_begins_or_ends_alike_is_another(
    helper: Path, container: Container, live: Path, other: str
) -> None:
    live.write_text(other.format(c=container.cookie) + "\n")
    assert "are not attached" in refusal(check(helper, state(container.pid), live))


def test_the_hook_in_a_claims_spec_lets_the_container_of_its_live_file_start(
    helper: Path, container: Container, tmp_path: Path
) -> None:
    paths = Paths(root=tmp_path)
    uid = ClaimUid("0a1b2c3d-0000-4000-8000-000000000001")
    key = PreparationKey(uid, PoolName("node"), DeviceName("veth-5"))
    LiveFiles(paths).write(uid, [NetnsCookie(container.cookie)])
    CdiProjection(paths).write(uid, [CdiEntry(key=key, ifname=IfName("net1"))])
    (spec,) = paths.cdi.iterdir()
    (hook,) = json.loads(spec.read_text())["containerEdits"]["hooks"]
    assert hook["path"] == str(paths.netns_check)

    def run_hook() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            hook["args"],
            executable=helper,
            input=state(container.pid),
            capture_output=True,
            timeout=30,
            check=False,
        )

    assert run_hook().returncode == 0
    LiveFiles(paths).write(uid, [NetnsCookie(container.cookie + 1)])
    assert "are not attached" in refusal(run_hook())
    LiveFiles(paths).remove(uid)
    assert "are not attached" in refusal(run_hook())


# --- the live file ----------------------------------------------------------------------------------


def test_without_a_live_file_nothing_starts(helper: Path, container: Container, tmp_path: Path) -> None:
    sentence = refusal(check(helper, state(container.pid), tmp_path / "absent"))
    assert "are not attached" in sentence
    assert "once the knd agent has attached them" in sentence


def test_an_empty_live_file_names_nothing(helper: Path, container: Container, live: Path) -> None:
    live.write_text("")
    assert "are not attached" in refusal(check(helper, state(container.pid), live))


@pytest.mark.parametrize(
    "spoil",
    [
        "{c}",
        "{c}\n\n",
        "\n{c}\n",
        "{c} \n",
        " {c}\n",
        "+{c}\n",
        "0{c}\n",
        "{c}\nx\n",
        "x\n{c}\n",
        "{c}\n5",
        "{c}\r\n",
        "{c}\n123456789012345678901\n",
        "{c}\0\n",
        "{c}\n\0",
        "-1\n{c}\n",
    ],
)
def test_a_damaged_live_file_is_not_believed(
    helper: Path, container: Container, live: Path, spoil: str
) -> None:
    live.write_text(spoil.format(c=container.cookie))
    assert "is damaged" in refusal(check(helper, state(container.pid), live))


def test_a_huge_live_file_is_not_read_to_its_end(helper: Path, container: Container, live: Path) -> None:
    live.write_text(f"{container.cookie}\n" * 100_000)
    assert "is larger than 65536 bytes" in refusal(check(helper, state(container.pid), live))


def test_a_live_file_of_the_greatest_size_is_read(helper: Path, container: Container, live: Path) -> None:
    live.write_text("1000000\n" * 8000 + f"{container.cookie}\n")
    assert check(helper, state(container.pid), live).returncode == 0


def test_a_live_file_that_others_can_write_is_not_believed(
    helper: Path, container: Container, live: Path
) -> None:
    for mode in (0o620, 0o602):
        live.chmod(mode)
        assert "written by others" in refusal(check(helper, state(container.pid), live))
    live.chmod(0o600)
    os.chown(live, 1, -1)
    assert "written by others" in refusal(check(helper, state(container.pid), live))


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_what_is_not_a_plain_file_is_not_believed(
    helper: Path, container: Container, live: Path, kind: str
) -> None:
    odd = live.with_name("odd")
    if kind == "folder":
        odd.mkdir(mode=0o700)
    elif kind == "fifo":
        os.mkfifo(odd, 0o600)
    else:
        odd.symlink_to(live)
    sentence = refusal(check(helper, state(container.pid), odd))
    assert "is not a regular file" in sentence or "cannot be opened" in sentence


# --- what must hold in /sys --------------------------------------------------------------------------


def test_a_container_starts_while_its_device_files_are_its_devices(
    helper: Path, container: Container, live: Path
) -> None:
    live.write_text(f"{container.cookie}\nis class/net/lo/ifindex 1\nat class/net/lo/subsystem net\n")
    assert check(helper, state(container.pid), live).returncode == 0


@pytest.mark.parametrize(
    "line",
    [
        "is class/net/lo/ifindex 2",
        "is class/net/lo/ifindex 11",
        "is class/net/none/ifindex 1",
        "at class/net/lo/subsystem ne",
        "at class/net/lo/ifindex 1",
        "at class/net/lo/none net",
    ],
)
def test_a_device_file_whose_number_is_anothers_by_now_holds_the_container_back(
    helper: Path, container: Container, live: Path, line: str
) -> None:
    for text in (f"{container.cookie}\n{line}\n", f"{line}\n{container.cookie}\n"):
        live.write_text(text)
        sentence = refusal(check(helper, state(container.pid), live))
        assert "are not its devices' any more" in sentence
        assert "delete the pod" in sentence


@pytest.mark.parametrize(
    "line",
    [
        "is",
        "is ",
        "is class/net/lo/ifindex",
        "is class/net/lo/ifindex ",
        "is class/net/lo/ifindex 1 ",
        "is class/net/../net/lo/ifindex 1",
        "is /class/net/lo/ifindex 1",
        "is kernel/notes 1",
        "in class/net/lo/ifindex 1",
        "is class/net/lo/ifindex\0 1",
        "is class/" + "a" * 600 + " 1",
    ],
)
def test_a_line_that_says_nothing_whole_is_damage(
    helper: Path, sanitized: Path, container: Container, live: Path, line: str
) -> None:
    live.write_text(f"{container.cookie}\n{line}\n")
    for program in (helper, sanitized):
        assert "is damaged" in refusal(check(program, state(container.pid), live))


# --- the state --------------------------------------------------------------------------------------


def test_a_process_that_is_gone_is_refused(helper: Path, live: Path) -> None:
    gone = Container()
    gone.close()
    assert "cannot be opened: No such file" in refusal(check(helper, state(gone.pid), live))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "ends too early"),
        ("{", "ends too early"),
        ("null", "is not JSON"),
        ("[]", "is not JSON"),
        ('"pid"', "is not JSON"),
        ("{}", "has no pid"),
        ('{"Pid": P}', "has no pid"),
        ('{"pid ": P}', "has no pid"),
        ('{"a": {"pid": P}}', "has no pid"),
        ('{"a": [{"pid": P}]}', "has no pid"),
        ('{"a": "\\",\\"pid\\": P"}', "has no pid"),
        ('{"a": "pid", "b": P}', "has no pid"),
        ('[{"pid": P}]', "is not JSON"),
        ('{"pid": P, "pid": P}', "has two pids"),
        ('{"pid": "P"}', "has a pid that is none"),
        ('{"pid": 0}', "has a pid that is none"),
        ('{"pid": -P}', "has a pid that is none"),
        ('{"pid": +P}', "has a pid that is none"),
        ('{"pid": 0P}', "has a pid that is none"),
        ('{"pid": P.0}', "has a pid that is none"),
        ('{"pid": Pe0}', "has a pid that is none"),
        ('{"pid": P0000000000000000000000}', "has a pid that is none"),
        ('{"pid": 4294967296}', "has a pid that is none"),
        ('{"pid": null}', "has a pid that is none"),
        ('{"pid": {"pid": P}}', "has a pid that is none"),
        ('{"pid": P', "ends too early"),
        ('{"pid": P,}', "is not JSON"),
        ('{"pid": P]', "has a pid that is none"),
        ('{"pid" P}', "is not JSON"),
        ("{'pid': P}", "is not JSON"),
        ("{pid: P}", "is not JSON"),
        ('{"pid": P} x', "has something after its end"),
        ('{"pid": P}{"pid": P}', "has something after its end"),
        ('{"pid": P}\0', "has something after its end"),
        ('{"a": "\n", "pid": P}', "is not JSON"),
        ('{"a": \0, "pid": P}', "is not JSON"),
        ('{"a": [1 2], "pid": P}', "is not JSON"),
        ('{"a": [1}, "pid": P}', "is not JSON"),
        ('{"a" "b", "pid": P}', "is not JSON"),
        ('{"a": "\\', "ends too early"),
        ('{"a": ' + "[" * 100_000, "is nested too deeply"),
        ('{"a": ' * 100_000, "is nested too deeply"),
        ("\xff\xfe", "is not JSON"),
    ],
)
def test_a_state_that_does_not_say_one_pid_is_refused(
    helper: Path, container: Container, live: Path, text: str, words: str
) -> None:
    given = text.replace("P", str(container.pid)).encode("latin-1")
    assert words in refusal(check(helper, given, live))


def test_a_huge_state_is_not_read_to_its_end(helper: Path, container: Container, live: Path) -> None:
    given = b" " * (5 << 20) + state(container.pid)
    assert "is larger than 4194304 bytes" in refusal(check(helper, given, live))


def test_a_state_that_cannot_be_read_is_refused(helper: Path, live: Path, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        done = subprocess.run([helper, live], stdin=folder, capture_output=True, timeout=30, check=False)
    finally:
        os.close(folder)
    assert "cannot be read: Is a directory" in refusal(done)


@pytest.mark.parametrize("count", [0, 2])
def test_the_wrong_number_of_arguments_is_refused(
    helper: Path, container: Container, live: Path, count: int
) -> None:
    assert "needs one argument" in refusal(check(helper, state(container.pid), *[live] * count))


# --- robustness -------------------------------------------------------------------------------------


def test_no_cut_of_a_good_state_or_live_file_lets_a_container_start(
    helper: Path, container: Container, live: Path
) -> None:
    whole = state(container.pid)
    for length in range(0, len(whole), 3):
        refusal(check(helper, whole[:length], live))
    lines = f"{container.cookie}\n"
    for length in range(len(lines)):
        live.write_text(lines[:length])
        refusal(check(helper, whole, live))


def test_no_state_reads_or_writes_out_of_bounds(sanitized: Path, container: Container, live: Path) -> None:
    whole = state(container.pid)
    chance = random.Random(7)
    assert check(sanitized, whole, live).returncode == 0
    for _ in range(60):
        spoilt = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            spoilt[chance.randrange(len(spoilt))] = chance.choice(b'{}[]",:\\0\x00\xff19')
        done = check(sanitized, bytes(spoilt), live)
        assert done.returncode in (0, 1), done.stderr.decode()
        assert b"Sanitizer" not in done.stderr
        assert b"runtime error" not in done.stderr
    for odd in (b"", b"{", b'{"', b'{"a":"\\', b'{"pid":', b'{"pid":1', b"[" * 70, b'{"a":[' * 40):
        assert check(sanitized, odd, live).returncode == 1


def test_the_helper_needs_no_library_of_the_host(helper: Path) -> None:
    headers = subprocess.check_output(["readelf", "--program-headers", helper], timeout=30)
    assert b"LOAD" in headers
    assert b"INTERP" not in headers
    assert b"DYNAMIC" not in headers
