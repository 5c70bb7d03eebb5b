"""`knd doctor`: every finding is one line that says what to do; a look that fails is a finding and no end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from driver import doctor
from driver.cli.main import main
from driver.doctor import Place, Subject, Verdict, fail, ok, rights, warn
from driver.doctor.rights import Rights
from driver.paths import Paths


def verdicts(findings: object) -> dict[str, Verdict]:
    return {finding.check: finding.verdict for finding in findings}  # type: ignore[attr-defined]


def test_what_cannot_be_looked_at_is_a_finding_and_the_rest_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: Place) -> None:
        raise OSError("the disk is on fire")

    subjects = (
        Subject("first", broken, lambda _: []),
        Subject("second", lambda place: place, lambda _: [ok("looked", "yes")]),
    )
    monkeypatch.setattr(doctor, "SUBJECTS", subjects)
    found = list(doctor.examine(Place(paths=Paths(root=tmp_path))))
    assert [(subject, finding.verdict) for subject, finding in found] == [
        ("first", Verdict.FAIL),
        ("second", Verdict.OK),
    ]
    assert "the disk is on fire" in found[0][1].said


def test_what_is_not_ok_must_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="what to do"):
        warn("anything", "is missing", "")


@pytest.mark.parametrize(
    ("finding", "code"),
    [(ok("a", "is so"), 0), (warn("a", "is odd", "look"), 0), (fail("a", "no", "mend"), 1)],
)
def test_only_what_failed_fails_the_command(
    finding: doctor.Finding,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(doctor, "SUBJECTS", (Subject("thing", lambda place: place, lambda _: [finding]),))
    assert main(["doctor", "--root", str(tmp_path), "-o", "json"]) == code
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["subject"], row["check"], row["verdict"]) == ("thing", "a", finding.verdict)
    assert main(["doctor", "--root", str(tmp_path)]) == code
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{finding.verdict:<4}  thing a: {finding.said}")
    assert finding.todo in line


def test_each_missing_capability_is_named() -> None:
    every = sum(1 << bit for bit in rights.NEEDED.values())
    assert set(verdicts(rights.judge(Rights(0, every))).values()) == {Verdict.OK}
    (root, capabilities) = rights.judge(Rights(1000, every & ~(1 << rights.NEEDED["SYS_ADMIN"])))
    assert (root.verdict, capabilities.verdict) == (Verdict.FAIL, Verdict.FAIL)
    assert "CAP_SYS_ADMIN" in capabilities.said
    assert "NET_ADMIN" not in capabilities.said
