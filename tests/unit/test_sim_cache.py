"""The cache of what takes long: whole folders only, made once, told apart by what went into them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kndsim.cache import KEPT, Cache, cache_root, digest

MAKES = """
import sys, time
from pathlib import Path
from kndsim.cache import Cache

root, log, number = sys.argv[1:]

def make(folder):
    with open(log, "a") as file:
        print("begin", number, file=file, flush=True)
        (folder / "half").write_text(number)
        time.sleep(0.3)
        print("end", number, file=file, flush=True)
    (folder / "whole").write_text(number)

print((Cache(Path(root)).folder("thing", "0" * 16, make) / "whole").read_text())
"""


def key(number: int) -> str:
    return digest([str(number)])


def test_a_key_is_of_all_parts_in_order_and_where_one_ends() -> None:
    assert digest(["a", "b"]) == digest(["a", b"b"])
    assert len({digest(parts) for parts in (["a", "b"], ["b", "a"], ["ab"], ["ab", ""], ["", "ab"])}) == 5
    assert len(digest(["a"])) == 16


def test_a_key_knows_files_by_name_and_content_and_folders_by_all_below(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_text("one")
    first = digest([tree])
    (tree / "sub/__pycache__").mkdir()
    (tree / "sub/__pycache__/file.pyc").write_text("made")
    os.utime(tree / "sub/file", (0, 0))
    assert digest([tree]) == first, "what Python makes, and times, are no inputs"
    (tree / "sub/file").write_text("two")
    changed = digest([tree])
    (tree / "sub/file").rename(tree / "sub/renamed")
    assert len({first, changed, digest([tree])}) == 3
    assert digest([tree / "sub/renamed"]) != digest(["two"])


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    made: list[Path] = []
    cache = Cache(tmp_path / "not/yet/there")

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").touch()

    first, second = (cache.folder("thing", key(1), make) for _ in range(2))
    assert first == second == tmp_path / "not/yet/there" / f"thing-{key(1)}"
    assert (first / "file").exists()
    assert len(made) == 1
    assert not made[0].exists(), "it was made elsewhere and put in place when it was whole"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_make_leaves_nothing_and_is_tried_again(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def breaks(folder: Path) -> None:
        (folder / "half").touch()
        raise error("in the middle")

    cache = Cache(tmp_path)
    with pytest.raises(error, match="in the middle"):
        cache.folder("thing", key(1), breaks)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    seen: list[list[Path]] = []
    cache.folder("thing", key(1), lambda folder: seen.append(list(folder.iterdir())))
    assert seen == [[]]


def test_what_a_killed_make_left_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    part = tmp_path / f".thing-{key(1)}.part"
    part.mkdir()
    (part / "half").touch()
    home = Cache(tmp_path).folder("thing", key(1), lambda folder: (folder / "whole").touch())
    assert [path.name for path in home.iterdir()] == ["whole"]


def test_two_processes_that_want_the_same_make_it_once(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    command = [sys.executable, "-c", MAKES, str(root), str(log)]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen([*command, number], stdout=subprocess.PIPE, text=True, env=paths) for number in "12"
    ]
    said = [process.communicate(timeout=30)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert log.read_text().split() == ["begin", said[0], "end", said[0]]


def test_only_the_last_used_of_a_kind_are_kept_and_other_kinds_let_be(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def use(kind: str, number: int) -> Path:
        home = cache.folder(kind, key(number), lambda folder: (folder / "file").touch())
        # Two uses within one tick of the file system's clock would have no order.
        os.utime(home, (1000, 1000 + next(ticks)))
        return home

    ticks = iter(range(100))
    other, near = use("thing-else", 1), use("things", 1)
    homes = [use("thing", number) for number in range(KEPT + 1)]
    assert [home.exists() for home in homes] == [False] + [True] * KEPT
    use("thing", 1)
    use("thing", 99)
    assert homes[1].exists(), "it was used after the other"
    assert not homes[2].exists()
    assert other.exists()
    assert near.exists()


def test_the_root_is_told_or_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("KND_CACHE", raising=False)
    assert cache_root() == tmp_path / "xdg/knd"
    monkeypatch.setenv("KND_CACHE", str(tmp_path / "told"))
    assert cache_root() == tmp_path / "told"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("KND_CACHE")
    assert cache_root() == Path.home() / ".cache/knd"
