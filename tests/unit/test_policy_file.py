"""The policy in force is always one that was read whole, whatever happens to the file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from driver.policy import HookPreference, NodePolicy, PolicyFile
from driver.policy import file as policy_file

HEADER = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"


class ConfigMapFolder:
    """Laid out as kubelet does: files are links through ..data, which is renamed over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "policy.yaml"
        self._version = 0

    def put(self, text: str) -> None:
        self._version += 1
        version = self.folder / f"..v{self._version}"
        version.mkdir()
        (version / "policy.yaml").write_text(text)
        (self.folder / "..data_tmp").symlink_to(version.name)
        (self.folder / "..data_tmp").rename(self.folder / "..data")
        if not self.file.is_symlink():
            self.file.symlink_to("..data/policy.yaml")


@pytest.fixture
def config_map(tmp_path: Path) -> ConfigMapFolder:
    made = ConfigMapFolder(tmp_path)
    made.put(HEADER + "hook: tcx\n")
    return made


def test_without_a_file_the_default_policy_is_in_force() -> None:
    file = PolicyFile(None)
    assert file.current == NodePolicy()
    assert file.problem == ""
    assert file.reload() is None
    assert file.watched is None


def test_the_file_is_read_at_once(config_map: ConfigMapFolder) -> None:
    file = PolicyFile(config_map.file)
    assert file.current.hook is HookPreference.TCX
    assert file.problem == ""
    assert file.watched == config_map.folder


def test_a_new_version_of_the_config_map_is_taken(config_map: ConfigMapFolder) -> None:
    file = PolicyFile(config_map.file)
    config_map.put(HEADER + "hook: clsact\n")
    taken = file.reload()
    assert taken is not None
    assert taken is file.current
    assert taken.hook is HookPreference.CLSACT


def test_an_unchanged_file_is_no_news(config_map: ConfigMapFolder) -> None:
    file = PolicyFile(config_map.file)
    config_map.put(HEADER + "hook: tcx\n")
    assert file.reload() is None


def test_a_file_whose_status_is_the_same_is_not_read_again_and_every_change_of_it_is_seen(
    config_map: ConfigMapFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    original = policy_file._read
    monkeypatch.setattr(policy_file, "_read", lambda path: (read.append(path), original(path))[1])
    file = PolicyFile(config_map.file)
    assert file.reload() is None
    assert len(read) == 2, "a change within the grain of the file's times was not looked for"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60.0)
    for _ in range(3):
        assert file.reload() is None
    assert len(read) == 3
    config_map.put(HEADER + "hook: maybe\n")
    for _ in range(3):
        assert file.reload() is None
        assert "hook: must be one of" in file.problem
    assert len(read) == 4
    config_map.file.write_text(HEADER + "hook: clsact\n")
    taken = file.reload()
    assert taken is not None
    assert taken.hook is HookPreference.CLSACT


def test_a_change_of_type_alone_is_a_change(config_map: ConfigMapFolder) -> None:
    config_map.put(HEADER + "devices: [{attributes: {a: 1}}]\n")
    file = PolicyFile(config_map.file)
    config_map.put(HEADER + "devices: [{attributes: {a: true}}]\n")
    assert file.reload() is not None


def test_a_bad_version_leaves_the_last_good_one_in_force_and_says_so(config_map: ConfigMapFolder) -> None:
    file = PolicyFile(config_map.file)
    config_map.put(HEADER + "hook: maybe\n")
    assert file.reload() is None
    assert file.current.hook is HookPreference.TCX
    assert file.problem == f"{config_map.file}:3: hook: must be one of auto, tcx, clsact, not 'maybe'"
    assert file.reload() is None
    assert file.problem


def test_going_back_to_the_last_good_version_ends_the_problem(config_map: ConfigMapFolder) -> None:
    file = PolicyFile(config_map.file)
    config_map.put("nonsense")
    file.reload()
    config_map.put(HEADER + "hook: tcx\n")
    assert file.reload() is None
    assert file.problem == ""


def test_a_file_that_is_bad_from_the_start_leaves_the_default_in_force_with_a_problem(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("nonsense")
    file = PolicyFile(tmp_path / "policy.yaml")
    assert file.current == NodePolicy()
    assert "must be an object" in file.problem


def test_a_file_that_vanishes_leaves_the_last_good_one_in_force(config_map: ConfigMapFolder) -> None:
    file = PolicyFile(config_map.file)
    config_map.file.unlink()
    assert file.reload() is None
    assert file.current.hook is HookPreference.TCX
    assert "No such file" in file.problem


@pytest.mark.parametrize("kind", ["fifo", "folder", "not text", "huge", "loop"])
def test_what_is_not_a_text_file_is_a_problem_and_never_hangs(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "policy.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "not text":
        path.write_bytes(b"\xff\xfe\x00")
    elif kind == "huge":
        with path.open("wb") as stream:
            stream.truncate(1 << 30)
    else:
        path.symlink_to(path)
    file = PolicyFile(path)
    assert file.problem
    assert file.current == NodePolicy()
