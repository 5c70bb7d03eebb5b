"""What `python -m kndsim.kind` says to a person whose machine cannot do it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kndsim.kind import __main__ as command
from kndsim.kind.__main__ import main


def test_without_an_engine_it_is_one_sentence_with_another_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KND_ENGINE", "knd-no-engine")
    assert main(["up"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(
        "python -m kndsim.kind up: a kind cluster needs a container engine: knd-no-engine is not installed."
    )


def test_a_cluster_that_cannot_be_is_told_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KND_ENGINE", "knd-no-engine")
    assert main(["up", "--workers", "99"]) == 1
    assert "99 workers: choose from 1 to 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["up", "--kubernetes", "1.12"], ["up", "--rdma", "roce"], ["sideways"]]
)
def test_wrong_usage_is_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage:" in capsys.readouterr().err


def test_down_where_nothing_is_up_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "FOLDER", tmp_path / "none")
    monkeypatch.setenv("KND_ENGINE", "knd-no-engine")
    assert main(["down"]) == 0
    assert "there is no kind cluster of ours" in capsys.readouterr().out


def test_a_keeper_without_a_plan_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keep", str(tmp_path)]) == 1
    assert f"{tmp_path}/plan.json is not there" in capsys.readouterr().err
