"""Another release of the agent takes over while traffic passes at full speed: counted is what was sent, to
the byte, wherever the taking over was cut off; and what cannot be read is named."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys as python
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bpf import loaded, sys
from bpf.accounting import Accounting
from bpf.attach import TcxPrograms
from bpf.cache import ProgramCache
from bpf.layout import Slot, TrafficKind
from bpf.maps import COUNTS, LINKS, RECORD
from bpf.record import OURS
from kndsim.links import SimNetns, netns, private_host, veth_pair
from kndsim.waiting import wait_until
from tests.bpf.bpffs import mounted_bpffs
from tests.kernel import flood, upgraded
from tests.kernel.counted_wire import NOBODY, PEER, PEER6, POD, POD6, has_queue, set_up, udp_socket
from tests.kernel.other_release import UNREADABLE, Release, make_release

SLOT, OTHER = Slot(2), Slot(3)
FRAME = 14 + 20 + 8 + len(flood.PAYLOAD)
CLASSES = (1, 3, 5, 7)
"""Not 0, in which the kernel's own packets are."""
LEAST_CALLS = 50
"""Of the kernel, in one taking over; with more programs on the machine there are more."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    ProgramCache(folder).ensure()
    return folder


@pytest.fixture(scope="module")
def ours() -> Release:
    return Release(Path(__file__).resolve().parents[2])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(tmp_path_factory.mktemp("other") / "release")


@dataclass(frozen=True, slots=True)
class Ground:
    """A device on a private host, wired to a peer in a netns of its own."""

    host: SimNetns
    peer: SimNetns
    device: int
    pins: Path
    cache: Path

    def live(
        self, release: Release, hook: str, *, dying_at: int = 0, traffic_class: int | None = None
    ) -> str:
        """One life of a release; "" if it was cut off."""
        arguments = [self.pins, self.cache, hook, self.device, SLOT, dying_at]
        if traffic_class is not None:
            arguments.append(traffic_class)
        command = release.command(upgraded.__file__, *map(str, arguments))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if dying_at and done.returncode == -9:
            return ""
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def opened(self) -> Iterator[Accounting]:
        with Accounting.open(self.pins, ProgramCache(self.cache).ensure(), slots=4) as accounting:
            yield accounting

    def folders(self) -> set[str]:
        return {path.name for path in self.pins.iterdir()} - {LINKS}


@pytest.fixture
def ground(cache: Path) -> Iterator[Ground]:
    with (
        private_host() as host,
        netns() as peer,
        mounted_bpffs() as bpffs,
        veth_pair("kdev", "kwire", peer_where=peer) as (device, peer_device),
    ):
        set_up(host, device, POD, POD6)
        set_up(peer, peer_device, PEER, PEER6)
        wait_until(
            lambda: has_queue(host, device) and has_queue(peer, peer_device), within=20.0, what="a carrier"
        )
        (bpffs / "knd").mkdir(mode=0o700)
        yield Ground(host, peer, device, bpffs / "knd", cache)


class Flood:
    """Both ways at once, a process each. sent: datagrams by direction and class, once it has ended."""

    def __init__(self, ground: Ground) -> None:
        self.sent: dict[tuple[int, int], int] = {}
        self._processes = []
        for where in (ground.host, ground.peer):
            sockets = where.run(lambda: [udp_socket(NOBODY, 9, each << 3) for each in CLASSES])
            fds = [each.fileno() for each in sockets]
            command = ["nice", "-n19", python.executable, flood.__file__, *map(str, fds)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds)
            self._processes.append(process)
            for each in sockets:
                each.close()

        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"under way\n"

    def end(self) -> None:
        for direction, process in enumerate(self._processes):
            told = json.loads(process.communicate(b"\n", timeout=30)[0])
            self.sent |= {(direction, each): count for each, count in zip(CLASSES, told, strict=True)}

    def __enter__(self) -> Flood:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def counted(accounting: Accounting) -> dict[tuple[int, int], tuple[int, int]]:
    return {
        (cell.direction, cell.traffic_class): (cell.bytes, cell.packets)
        for cell in accounting.read(SLOT)
        if cell.kind is TrafficKind.IP and cell.traffic_class in CLASSES
    }


def assert_counted(ground: Ground, sent: dict[tuple[int, int], int]) -> None:
    expected = {key: (FRAME * count, count) for key, count in sent.items()}
    assert min(sent.values()) > 1000, "it was no flood"
    with ground.opened() as accounting:
        assert counted(accounting) == expected


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("hook", "step"), [("tcx", 13), ("clsact", 29)])
def test_counted_is_what_was_sent_over_upgrades_and_ways_back_cut_off_anywhere(
    ground: Ground, ours: Release, other: Release, hook: str, step: int, request: pytest.FixtureRequest
) -> None:
    if hook == "tcx":
        request.getfixturevalue("tcx_kernel")
    ground.live(other, hook)
    with Flood(ground) as running:
        dying_at, whole = 2, False
        while not whole:
            lives = []
            for release in (ours, other):
                lives.append(ground.live(release, hook, dying_at=dying_at))
                # Whoever was cut off is started again.
                ground.live(release, hook)
            dying_at, whole = dying_at + step, all(lives)
        running.end()
    assert dying_at > LEAST_CALLS
    assert_counted(ground, running.sent)


@pytest.mark.usefixtures("tcx_kernel")
def test_each_release_reads_what_the_other_counted_and_one_of_them_has_the_links(
    ground: Ground, ours: Release, other: Release
) -> None:
    ground.live(other, "tcx")
    with Flood(ground) as running:
        running.end()
    told = json.loads(ground.live(ours, "tcx"))
    assert told["gone"] == []
    cells = {(c[0], c[1]): (c[3], c[4]) for c in told["cells"] if c[2] == TrafficKind.IP and c[1] in CLASSES}
    assert cells == {key: (FRAME * count, count) for key, count in running.sent.items()}
    back = json.loads(ground.live(other, "tcx"))
    assert [cell for cell in back["cells"] if cell[1] in CLASSES] == [
        c for c in told["cells"] if c[1] in CLASSES
    ]
    for hook in (sys.AttachType.TCX_EGRESS, sys.AttachType.TCX_INGRESS):
        assert len(sys.prog_query(ground.device, hook)) == 1


@pytest.mark.usefixtures("tcx_kernel")
def test_another_releases_maps_shrink_once_nothing_counts_into_them_and_go_with_their_last_holder(
    ground: Ground, ours: Release, other: Release
) -> None:
    ground.live(other, "tcx")
    with Flood(ground) as running:
        running.end()
    with ground.opened() as accounting:
        (folder,) = accounting.others.folders
        assert accounting.others.settle({SLOT}) == ()
        with sys.obj_get_map(folder / COUNTS) as counts:
            assert sys.map_info(counts).type == sys.MapType.PERCPU_ARRAY, "its programs still count there"
        assert not TcxPrograms(ground.pins, accounting).repoint_all({upgraded.NAME: SLOT})
        assert accounting.others.settle({SLOT}) == ()
        with sys.obj_get_map(folder / COUNTS) as counts:
            assert sys.map_info(counts).type == sys.MapType.ARRAY
        assert counted(accounting)
        assert accounting.others.settle({SLOT, OTHER}) == ()
        accounting.zero(SLOT)
        assert not counted(accounting)
        assert accounting.others.settle({SLOT, OTHER}) == (folder,)
        assert ground.folders() == {OURS.folder}
        assert accounting.others.folders == ()


@pytest.mark.usefixtures("tcx_kernel")
def test_counts_of_a_slot_that_nobody_has_are_swept(ground: Ground, other: Release) -> None:
    ground.live(other, "tcx")
    with Flood(ground) as running:
        running.end()
    with ground.opened() as accounting:
        TcxPrograms(ground.pins, accounting).repoint_all({upgraded.NAME: SLOT})
        assert len(accounting.others.settle({OTHER})) == 1
        assert not counted(accounting)


@pytest.mark.usefixtures("tcx_kernel")
def test_what_was_counted_in_classes_that_are_not_known_here_is_told_and_in_no_cell(
    ground: Ground, other: Release
) -> None:
    ground.live(other, "tcx", traffic_class=9)
    with Flood(ground) as running:
        running.end()
    with ground.opened() as accounting:
        lost = accounting.others.unplaced(SLOT)
        assert lost is not None
        # The kernel's own packets are among them.
        assert lost.packets >= sum(running.sent.values())
        assert lost.bytes >= FRAME * sum(running.sent.values())
        assert all(cell.traffic_class == 0 for cell in accounting.read(SLOT))
        assert accounting.others.unplaced(OTHER) is None


@pytest.mark.usefixtures("tcx_kernel")
def test_counts_that_cannot_be_read_are_named_kept_and_counted_in_nothing(
    ground: Ground, tmp_path: Path
) -> None:
    ground.live(make_release(tmp_path / "release", UNREADABLE), "tcx")
    with Flood(ground) as running:
        running.end()
    before = ground.folders()
    with ground.opened() as accounting:
        (unreadable,) = accounting.others.unreadable
        assert "format 2, and 1 is known here" in unreadable.why
        assert accounting.read(SLOT) == ()
        assert not TcxPrograms(ground.pins, accounting).repoint_all({upgraded.NAME: SLOT})
        assert ground.folders() == before | {OURS.folder}, "until it is on record"
        accounting.others.forget_unreadable()
        assert ground.folders() == {OURS.folder}


@pytest.mark.parametrize("spoil", ["no record", "another map"])
@pytest.mark.usefixtures("tcx_kernel")
def test_counts_that_are_not_as_they_say_of_themselves_are_not_read(
    ground: Ground, other: Release, spoil: str
) -> None:
    ground.live(other, "tcx")
    (folder,) = (path for path in ground.pins.iterdir() if path.name != LINKS)
    (folder / (RECORD if spoil == "no record" else COUNTS)).unlink()
    if spoil == "another map":
        with sys.map_create(sys.MapType.ARRAY, value_size=8, max_entries=4, name="odd") as odd:
            sys.obj_pin(odd, folder / COUNTS)
    with ground.opened() as accounting:
        assert [each.path for each in accounting.others.unreadable] == [folder]
        assert accounting.others.folders == ()


@pytest.mark.usefixtures("tcx_kernel")
def test_maps_of_the_same_shape_are_used_on_and_links_are_where_every_release_has_them(
    ground: Ground,
) -> None:
    """What the release left that wrote no record: folder v1, with the links in it."""
    with ground.opened() as accounting:
        TcxPrograms(ground.pins, accounting).attach(upgraded.NAME, ground.device, SLOT)
    old = ground.pins / "v1"
    (ground.pins / OURS.folder).rename(old)
    (old / RECORD).unlink()
    (ground.pins / LINKS).rename(old / LINKS)
    with Flood(ground) as running, ground.opened() as accounting:
        assert ground.folders() == {OURS.folder}
        programs = TcxPrograms(ground.pins, accounting)
        assert programs.names() == {upgraded.NAME}
        running.end()
        assert accounting.others.folders == ()
        with sys.obj_get_map(ground.pins / OURS.folder / COUNTS) as counts:
            using = [
                place for place, each in loaded.programs() if sys.map_info(counts).id in sys.prog_maps(each)
            ]
        assert {place.direction for place in using} == {0, 1}, (
            "the old programs count into the map of the new"
        )
    assert_counted(ground, running.sent)


def test_folders_and_files_of_others_are_left_alone(ground: Ground) -> None:
    names = ("layout-", "layout-xyz", "v2", "somebody")
    for name in names:
        (ground.pins / name).mkdir()
    with ground.opened() as accounting:
        assert accounting.others.folders == accounting.others.unreadable == ()
        accounting.others.settle(())
    assert ground.folders() == {*names, OURS.folder}


def test_a_folder_without_counts_is_what_a_crash_left_and_goes(ground: Ground) -> None:
    empty = ground.pins / "layout-00000000"
    empty.mkdir()
    with ground.opened():
        assert ground.folders() == {OURS.folder}
