"""Namespaces are opened safely, and the process never goes into one."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hw import netns as netns_module
from hw.errors import BadNetns, HwError, NotFound
from hw.netns import host_netns, netns_of_pid, open_netns, run_in, socket_cookie, socket_in, travelling
from kndsim.links import SimNetns, netns, private_host


@pytest.fixture(autouse=True)
def host() -> Iterator[SimNetns]:
    with private_host() as made:
        yield made


@pytest.fixture
def pod() -> Iterator[SimNetns]:
    with netns() as made:
        yield made


def own_inode() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def test_a_pods_namespace_opens_and_has_a_cookie_of_its_own(pod: SimNetns) -> None:
    with open_netns(pod.path) as handle, host_netns() as mine:
        assert handle.inode == os.fstat(pod.fd).st_ino
        assert handle.cookie not in (0, mine.cookie)
        with socket_in(handle, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            assert socket_cookie(sock) == handle.cookie


def test_the_handle_keeps_the_namespace_after_its_path_is_gone() -> None:
    with netns() as made:
        handle = open_netns(made.path)
    with handle:
        assert run_in(handle, socket.if_nameindex) == [(1, "lo")]
    with pytest.raises(NotFound):
        open_netns(made.path)


def test_a_namespace_that_reuses_an_inode_has_another_cookie() -> None:
    seen: dict[int, set[int]] = {}
    for _ in range(6):
        with netns() as made, open_netns(made.path) as handle:
            seen.setdefault(handle.inode, set()).add(handle.cookie)
    assert sum(map(len, seen.values())) == 6


@pytest.mark.parametrize("what", ["file", "directory", "fifo", "socket"])
def test_what_is_no_namespace_is_refused_at_once(tmp_path: Path, what: str) -> None:
    path = tmp_path / "netns"
    if what == "file":
        path.write_text("")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    with pytest.raises(BadNetns, match=str(path)):
        open_netns(path)


@pytest.mark.parametrize("path", ["/proc/self/ns/uts", "/proc/self/ns/mnt"])
def test_another_kind_of_namespace_is_refused(path: str) -> None:
    with pytest.raises(BadNetns, match="not a network namespace"):
        open_netns(Path(path))


@pytest.mark.parametrize("path", ["", "/nowhere/netns", "/proc/self/status/ns", "/proc/999999999/ns/net"])
def test_an_absent_namespace_is_not_found(path: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_netns(Path(path) if path else tmp_path / "gone")


def test_a_path_with_a_null_byte_is_refused() -> None:
    with pytest.raises(BadNetns):
        open_netns(Path("/run/netns/a\0b"))


def test_our_own_namespace_is_refused_under_every_path() -> None:
    for path in ("/proc/self/ns/net", "/proc/thread-self/ns/net", f"/proc/{os.getpid()}/ns/net"):
        with pytest.raises(BadNetns, match="own network namespace"):
            open_netns(Path(path))


def test_the_hosts_namespace_is_refused_by_an_agent_elsewhere(tmp_path: Path, pod: SimNetns) -> None:
    for name, target in (("1", pod.path), ("self", Path("/proc/self/ns/net"))):
        (tmp_path / name / "ns").mkdir(parents=True)
        (tmp_path / name / "ns/net").symlink_to(target)
    with pytest.raises(BadNetns, match="the host's"):
        open_netns(pod.path, proc=tmp_path)


def test_a_process_without_a_namespace_of_its_own_gives_none() -> None:
    for pid in (0, -1):
        with pytest.raises(NotFound):
            netns_of_pid(pid)
    with pytest.raises(NotFound):
        netns_of_pid(2**22 + 7)
    with pytest.raises(BadNetns):
        netns_of_pid(os.getpid())


def test_the_process_and_its_threads_stay_where_they_are(pod: SimNetns) -> None:
    before, threads = own_inode(), threading.active_count()
    with open_netns(pod.path) as handle:
        for _ in range(20):
            socket_in(handle, socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
            inside = run_in(handle, lambda: os.stat("/proc/thread-self/ns/net").st_ino)
            assert inside == handle.inode != before
        assert own_inode() == before
        assert os.stat("/proc/thread-self/ns/net").st_ino == before
        assert threading.active_count() == threads


def test_what_the_function_raises_comes_out(pod: SimNetns) -> None:
    with open_netns(pod.path) as handle, pytest.raises(ZeroDivisionError):
        run_in(handle, lambda: 1 // 0)


def test_nothing_runs_where_the_namespace_cannot_be_entered(pod: SimNetns) -> None:
    called: list[int] = []
    with open_netns(pod.path) as handle:
        # The worst case: the number of the descriptor has become another file.
        with open("/dev/null") as other:
            os.dup2(other.fileno(), handle.fd, inheritable=False)
        with pytest.raises(BadNetns, match="cannot enter"):
            run_in(handle, lambda: called.append(1))
        with pytest.raises(BadNetns):
            socket_in(handle, socket.AF_INET, socket.SOCK_DGRAM)
    with pytest.raises(BadNetns, match="closed"):
        run_in(handle, lambda: called.append(1))
    assert called == []


def test_a_handle_leaves_no_descriptor_behind(pod: SimNetns, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(os.listdir("/proc/self/fd"))
    with open_netns(pod.path) as handle:
        handle.close()
    for bad in (tmp_path / "file", Path("/proc/self/ns/net"), Path("/proc/self/ns/uts")):
        with pytest.raises(BadNetns):
            open_netns(bad)
    assert sorted(os.listdir("/proc/self/fd")) == before


def here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_a_traveller_is_in_each_namespace_for_one_call_and_at_home_between_them(pod: SimNetns) -> None:
    def visit() -> list[tuple[int, int]]:
        found = []
        for path in (pod.path, other.path, pod.path):
            with open_netns(path) as handle:
                found.append((run_in(handle, here), threading.get_ident()))
                found.append((here(), run_in(handle, threading.get_ident)))
        return found

    with netns() as other:
        seen = travelling(visit)
        there = [os.fstat(each.fd).st_ino for each in (pod, other, pod)]
    assert [inode for inode, _ in seen] == [each for inode in there for each in (inode, own_inode())]
    assert len({thread for _, thread in seen} | {threading.get_ident()}) == 2
    assert here() == own_inode()


def test_a_traveller_comes_back_from_what_fails_there_and_from_where_it_cannot_go(pod: SimNetns) -> None:
    def fails() -> None:
        raise NotFound("nothing there")

    def visit() -> list[int]:
        with open_netns(pod.path) as handle, pytest.raises(NotFound, match="nothing there"):
            run_in(handle, fails)
        found = [here()]
        with pytest.raises(BadNetns, match="was closed"):
            run_in(handle, fails)
        with open_netns(pod.path) as handle:
            return [*found, here(), run_in(handle, here), here()]

    assert travelling(visit) == [own_inode(), own_inode(), os.fstat(pod.fd).st_ino, own_inode()]


def test_what_is_done_in_a_namespace_may_visit_another_and_comes_back_to_it(pod: SimNetns) -> None:
    with netns() as other, open_netns(pod.path) as outer, open_netns(other.path) as inner:
        seen = travelling(lambda: run_in(outer, lambda: (run_in(inner, here), here())))
        assert seen == (inner.inode, outer.inode)


def test_a_traveller_that_does_not_come_back_ends_at_once(
    pod: SimNetns, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on = []
    known = netns_module._enter

    def visit(handle: netns_module.NetnsHandle) -> None:
        try:
            run_in(handle, lambda: None)
        except Exception:  # noqa: BLE001 - as the agent's own, of each pod
            went_on.append(here())
        went_on.append(here())

    def lose_home(handle: netns_module.NetnsHandle) -> None:
        known(handle)
        # As another kind of namespace than a descriptor is of, setns refuses it.
        monkeypatch.setattr(netns_module, "_CLONE_NEWNET", 0x10000000)

    with open_netns(pod.path) as handle:
        monkeypatch.setattr(netns_module, "_enter", lose_home)
        with pytest.raises(HwError, match="could not leave"):
            travelling(lambda: visit(handle))
    assert went_on == []


def test_a_traveller_leaves_no_descriptor_and_no_thread(pod: SimNetns) -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    with open_netns(pod.path) as handle:
        travelling(lambda: [run_in(handle, here) for _ in range(5)])
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before
