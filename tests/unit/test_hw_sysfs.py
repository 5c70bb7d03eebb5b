"""What is absent is None, what is wrong names its file, and a write cannot hang its caller."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hw.errors import Busy, HwError, NotFound
from hw.sysfs import Sysfs
from kndsim.sysfs_tree import write_tree


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    text = """
        a/number = 12
        a/hex = 0x8086
        a/word = up
        a/link -> ../b/target
        folder a/empty
    """
    return Sysfs(write_tree(tmp_path, text))


def test_typed_reads(sysfs: Sysfs) -> None:
    assert sysfs.text("a/word") == "up"
    assert sysfs.integer("a/number") == 12
    assert sysfs.integer("a/hex", base=16) == 0x8086
    assert sysfs.target("a/link") == "../b/target"
    assert sysfs.target_name("a/link") == "target"
    assert sysfs.names("a") == ("empty", "hex", "link", "number", "word")
    assert sysfs.names("a/empty") == ()


@pytest.mark.parametrize("path", ["nowhere", "a/nowhere", "a/word/below", "a/link"])
def test_what_is_absent_is_none(sysfs: Sysfs, path: str) -> None:
    assert sysfs.text(path) is None
    assert sysfs.integer(path) is None
    assert sysfs.names(path) is None
    assert sysfs.target_name("a/word") is None
    assert sysfs.target("nowhere") is None


def test_what_is_wrong_names_its_file(sysfs: Sysfs) -> None:
    with pytest.raises(HwError, match=r"a/word holds 'up' where a number"):
        sysfs.integer("a/word")
    with pytest.raises(HwError, match=r"a/empty"):
        sysfs.text("a/empty")


def test_bytes_that_are_no_text_are_read_all_the_same(sysfs: Sysfs) -> None:
    (sysfs.root / "a/word").write_bytes(b"\xff\xfe\n")
    assert sysfs.text("a/word") == "\udcff\udcfe"
    with pytest.raises(HwError) as caught:
        sysfs.integer("a/word")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", ".."])
def test_no_path_leads_out(sysfs: Sysfs, path: str) -> None:
    for act in (sysfs.text, sysfs.names, sysfs.target, lambda path: sysfs.write(path, "1")):
        with pytest.raises(ValueError, match="not a path below"):
            act(path)


def test_a_write_goes_through_or_says_why_not(sysfs: Sysfs) -> None:
    sysfs.write("a/number", "34")
    assert sysfs.integer("a/number") == 34
    with pytest.raises(NotFound, match="nowhere"):
        sysfs.write("a/nowhere", "1")
    with pytest.raises(HwError, match="EISDIR"):
        sysfs.write("a/empty", "1")


def test_a_write_that_does_not_end_is_given_up(sysfs: Sysfs) -> None:
    pipe = sysfs.root / "a/pipe"
    os.mkfifo(pipe)
    with pytest.raises(Busy) as caught:
        sysfs.write("a/pipe", "4", timeout=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    assert "a/pipe" in str(caught.value)
    # Let the writer go: no thread of a test outlives it.
    assert pipe.read_bytes() == b"4"


def test_a_read_of_what_never_answers_does_not_hang(sysfs: Sysfs) -> None:
    os.mkfifo(sysfs.root / "a/pipe")
    assert sysfs.text("a/pipe") == ""
