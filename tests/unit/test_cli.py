"""The `knd` command: exit codes, one-sentence errors, JSON that programs can rely on, and nothing in any
output that a terminal would obey."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bpf.layout import Cell, TrafficKind
from driver import running
from driver.cli.main import main
from driver.cli.output import printable
from driver.clock import SystemClock
from driver.journal import Journal, Quarantine
from driver.journal.ledger import Ledger, UsageOwner
from driver.journal.stretches import MeterKey, Reading
from driver.kubelet.plugin import make_plugin_dir
from driver.kubelet.takeover import TakeoverLock
from driver.model import (
    AttachmentState,
    ClaimRef,
    ClaimUid,
    DeviceName,
    PodRef,
    PodUid,
    PreparationState,
    SandboxId,
    Share,
    ShareId,
)
from driver.paths import Paths
from driver.running import Running
from hw.model import IfName
from hw.subinterface import Subinterface, SubinterfaceKind
from tests.unit.journal_values import BOOT, attachment, key, preparation

HOSTILE = "\x1b[31mred\r\n\u202etxt\x07"
EXAMPLES = Path(__file__).resolve().parents[2] / "deploy/examples"


@pytest.fixture
def paths(short_tmp: Path) -> Paths:
    return Paths(root=short_tmp)


@pytest.fixture
def journal(paths: Paths) -> Iterator[Journal]:
    paths.state.mkdir(parents=True, mode=0o700)
    with Journal.open(paths.journal, mirror=paths.run / "mirror", boot_id=BOOT) as opened:
        yield opened


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def rows(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = json.loads(self.out)["rows"]
        return rows


@pytest.fixture
def knd(paths: Paths, capsys: pytest.CaptureFixture[str]) -> object:
    def run(command: str, *flags: str) -> Said:
        place = ["--root", str(paths.root)] if command != "validate" else []
        capsys.readouterr()
        code = main([command, *place, *flags])
        said = capsys.readouterr()
        for text in (said.out, said.err):
            assert all(char.isprintable() or char == "\n" for char in text), ascii(text)
        return Said(code, said.out, said.err)

    return run


def test_no_command_and_unknown_flags_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["nonsense"], ["pods", "--nonsense"], ["pods", "-o", "yaml"]):
        with pytest.raises(SystemExit) as raised:
            main(argv)
        assert raised.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize("command", ["pods", "usage"])
def test_where_no_agent_has_run_is_one_sentence_and_exit_1(knd, command: str) -> None:  # type: ignore[no-untyped-def]
    said = knd(command)
    assert said.code == 1
    assert said.out == ""
    assert said.err.startswith("knd: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err


def test_a_traceback_is_shown_only_when_asked_for(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "pods", "--root", str(paths.root)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_pods_are_listed_for_people_and_for_programs(knd, journal: Journal) -> None:  # type: ignore[no-untyped-def]
    assert knd("pods").out == "no claim is prepared on this node\n"
    assert knd("pods", "-o", "json").rows == []
    journal.put_preparation(preparation(0))
    journal.put_preparation(preparation(1, state=PreparationState.UNPREPARING))
    journal.put_attachment(attachment(0, state=AttachmentState.ATTACHED))
    journal.put_quarantine(Quarantine(device=key(1).device, reason="it is dirty", since_wall=1.0))
    attached, leaving = knd("pods", "-o", "json").rows
    assert attached == {
        "namespace": "ml",
        "pod": "train-0",
        "claim": "nic-0",
        "request": "nic",
        "device": "dev-0",
        "interface": "net0",
        "state": "attached",
        "sandbox": "sandbox-0",
        "quarantine": None,
    }
    assert leaving["pod"] is None
    assert leaving["state"] == "unpreparing"
    assert leaving["quarantine"] == "it is dirty"
    table = knd("pods").out.splitlines()
    assert " ".join(table[0].split()) == "NAMESPACE POD CLAIM REQUEST DEVICE INTERFACE STATE QUARANTINE"
    assert table[1].split() == ["ml", "train-0", "nic-0", "nic", "dev-0", "net0", "attached", "-"]


def test_what_a_tenant_named_does_not_reach_the_terminal(knd, journal: Journal) -> None:  # type: ignore[no-untyped-def]
    odd = replace(preparation(0), request=HOSTILE, claim=ClaimRef("ml", HOSTILE, ClaimUid("claim-0")))
    journal.put_preparation(odd)
    journal.put_quarantine(Quarantine(device=key(0).device, reason=HOSTILE, since_wall=1.0))
    journal.put_attachment(replace(attachment(0), pod=PodRef("ml", HOSTILE, PodUid("pod-0"))))
    said = knd("pods")
    assert "\\x1b[31mred" in said.out
    assert len(said.out.splitlines()) == 2
    assert knd("pods", "-o", "json").rows[0]["pod"] == HOSTILE


def test_a_cell_is_never_empty_and_never_more_than_one_line() -> None:
    assert printable(None) == printable("") == "-"
    assert printable(0) == "0"
    assert printable(False) == "False"
    assert printable("plain näme") == "plain näme"
    assert printable("a\nb\tc\x9b\udcff") == "a\\nb\\tc\\x9b\\udcff"


def owner() -> UsageOwner:
    made = attachment(0)
    return UsageOwner(
        attachment=made.id,
        pod=made.pod,
        claim=preparation(0).claim,
        device=key(0).device,
        interface=IfName("net0"),
        sandbox=SandboxId("sandbox-0"),
        started=1000.0,
    )


def test_usage_tells_totals_and_what_was_not_counted(knd, paths: Paths) -> None:  # type: ignore[no-untyped-def]
    paths.state.mkdir(parents=True, mode=0o700)
    with Ledger.open(paths.ledger) as ledger:
        ledger.begin(owner())
        cell = Cell(0, 1, TrafficKind.ROCE, 4096, 4)
        ledger.fold(owner().attachment, [cell], source="tcx", class_names=("a", "bulk"), ended=2000.0)
        ledger.gap(owner().attachment, 1500.0, 1600.0, f"nobody looked {HOSTILE}")
        said = json.loads(knd("usage", "-o", "json").out)
        assert said["rows"] == [
            {
                "namespace": "ml",
                "pod": "train-0",
                "claim": "nic-0",
                "device": "dev-0",
                "interface": "net0",
                "direction": "egress",
                "class": "bulk",
                "kind": "roce",
                "source": "tcx",
                "bytes": 4096,
                "packets": 4,
            }
        ]
        (gap,) = said["gaps"]
        assert (gap["attachment"], gap["from"], gap["to"]) == (owner().attachment, 1500.0, 1600.0)
        assert "not counted: 1 gaps" in knd("usage").out
        assert knd("usage", "--namespace", "other", "-o", "json").rows == []
        assert knd("usage", "--since", "1s").out.split("\n\n")[1].startswith("nothing was counted")


def test_usage_tells_what_devices_counted_apart_from_the_rest(knd, paths: Paths) -> None:  # type: ignore[no-untyped-def]
    meter = MeterKey("mlx5_2", "rdma-hw", 1)
    with Ledger.open(paths.ledger) as ledger:
        ledger.begin(owner())
        ledger.meters.take(meter, owner().attachment, Reading("boot", {"sent": 5, "idle": 9}), 1000.0)
        ledger.meters.take(meter, None, Reading("boot", {"sent": 8, "idle": 9}), 1100.0)
        ledger.meters.release(meter, Reading("boot", {"sent": 2, "idle": 9}), 1200.0)
        said = json.loads(knd("usage", "--counters", "-o", "json").out)
        assert [(row["pod"], row["counted"], row["counter"], row["total"]) for row in said["rows"]] == [
            (None, "mlx5_2", "sent", 2),
            ("train-0", "mlx5_2", "sent", 3),
        ]
        assert [gap["from"] for gap in said["gaps"]] == [1100.0]
        mine = knd("usage", "--counters", "--pod", "train-0", "-o", "csv").out
        assert mine.splitlines()[1:] == ["ml,train-0,nic-0,dev-0,mlx5_2,1,rdma-hw,sent,3,1000.0,1100.0"]
        table = knd("usage", "--counters").out
        assert "not counted: 1 gaps" in table
        assert "mlx5_2, " in table
        assert knd("usage", "-o", "json").rows == []
        assert "goes without --by" in knd("usage", "--counters", "--by", "pod").err


def test_usage_is_grouped_and_cut_as_asked(knd, paths: Paths) -> None:  # type: ignore[no-untyped-def]
    with Ledger.open(paths.ledger, wall=lambda: 3000.0) as ledger:
        for number, labels in enumerate([(("team", "a"),), (("team", "b"),), (("team", "a"),)]):
            held = replace(owner(), attachment=attachment(number).id, labels=labels)
            ledger.begin(held)
            for hour in (1, 2):
                cells = [Cell(way, 0, TrafficKind.TCP, hour * 1000, hour) for way in (0, 1)]
                ledger.checkpoint(
                    {held.attachment: cells}, source="tcx", class_names=("bulk",), wall=hour * 90000.0
                )
        said = json.loads(knd("usage", "--by", "label:team", "-o", "json").out)
        egress = {row["label:team"]: row["bytes"] for row in said["rows"] if row["direction"] == "egress"}
        assert egress == {"a": 4000, "b": 2000}
        assert [total["bytes"] for total in said["totals"]] == [6000, 6000]
        second = knd("usage", "--from", "1970-01-03T00:00Z", "--by", "namespace", "-o", "csv").out
        assert second.splitlines() == [
            "namespace,direction,source,bytes,packets",
            "ml,egress,tcx,3000,3",
            "ml,ingress,tcx,3000,3",
        ]


@pytest.mark.parametrize(
    "options",
    [
        ["--by", "colour"],
        ["--by", "label:"],
        ["--by", ","],
        ["--from", "yesterday"],
        ["--since", "1h", "--to", "2026-01-01"],
        ["--from", "2026-01-02", "--to", "2026-01-01"],
    ],
)
def test_a_question_that_makes_no_sense_is_wrong_usage(knd, options: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert knd("usage", *options).code == 2


@pytest.mark.parametrize("age", ["12", "h", "-1h", "1y", "1h30m", "\u0661h", "9" * 10 + "h"])
def test_an_age_that_is_none_is_wrong_usage(knd, age: str) -> None:  # type: ignore[no-untyped-def]
    said = knd("usage", f"--since={age}")
    assert said.code == 2
    assert "is not an age like 30m, 12h or 7d" in said.err


def test_a_bad_policy_is_a_failure_with_its_line_and_no_wrong_usage(knd, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    policy = tmp_path / "policy.yaml"
    policy.write_text("apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\nnonsense: 1\n")
    said = knd("devices", "--policy", str(policy))
    assert said.code == 1
    assert f"{policy}:3: nonsense" in said.err
    assert said.err.count("\n") == 1


def test_devices_say_who_holds_one_that_is_away(knd, journal: Journal) -> None:  # type: ignore[no-untyped-def]
    journal.put_preparation(preparation(0))
    journal.put_quarantine(Quarantine(device=key(0).device, reason="it is dirty", since_wall=1.0))
    (row,) = [row for row in knd("devices", "-o", "json").rows if row["device"] == "dev-0"]
    assert row == {
        "device": "dev-0",
        "kind": "vf",
        "interface": "net0",
        "size": None,
        "held_by": "ml/nic-0",
        "offered": True,
        "why_not": "it is dirty",
        "health": "dev-0 is no more: VF 0 of PF 0000:3b:00.0 was removed",
    }


def test_devices_say_who_has_a_share_of_one_and_take_no_share_for_a_device(knd, journal: Journal) -> None:  # type: ignore[no-untyped-def]
    interface = Subinterface(kind=SubinterfaceKind.VLAN, vlan=105)
    for number in (1, 0):
        made = preparation(number)
        mine = replace(made.key, device=DeviceName("bond-7"), share_id=ShareId(f"share-{number}"))
        share = Share(interface=interface, ifname=IfName("bond0"))
        journal.put_preparation(replace(made, key=mine, share=share, size=500))
    said = knd("devices", "-o", "json")
    assert not [row for row in said.rows if str(row["device"]).startswith("bond-7")]
    assert json.loads(said.out)["shares"] == [
        {
            "share_of": "bond-7",
            "subinterface": "vlan 105",
            "interface": "net0",
            "bandwidth": "500M",
            "held_by": f"ml/nic-{number}",
        }
        for number in (0, 1)
    ]
    assert "SHARE OF" in knd("devices").out


def test_devices_ask_the_policy_that_the_agent_has_unless_they_are_given_one(  # type: ignore[no-untyped-def]
    knd, paths: Paths, tmp_path: Path
) -> None:
    def known(*flags: str) -> set[str]:
        said = knd("devices", "-o", "json", *flags)
        assert said.code == 0, said.err
        return {str(row["kind"]) for row in said.rows if row["offered"]}

    paths.run.mkdir(parents=True)
    text = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"
    running.write(
        paths, Running(pid=1, node="n", hook="tcx", policy=f"{text}netdevs: [{{kinds: [veth, dummy]}}]")
    )
    policy = running.policy_in_force(paths, None)
    assert policy.netdevs[0].kinds == ("veth", "dummy")
    everything = tmp_path / "policy.yaml"
    everything.write_text(f"{text}devices: [{{offer: false}}]\n")
    assert known(f"--policy={everything}") == set()
    assert running.policy_in_force(paths, everything).netdevs == ()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": 1}', '{"policy": 5', "\udcff"])
def test_an_agents_word_of_itself_that_cannot_be_read_is_none(paths: Paths, content: str) -> None:
    paths.run.mkdir(parents=True)
    paths.running.write_bytes(content.encode(errors="surrogateescape"))
    assert running.read(paths) is None


def test_an_agents_word_of_itself_is_read_as_it_was_written(paths: Paths) -> None:
    paths.run.mkdir(parents=True)
    told = Running(pid=7, node="n", hook="tcx", policy="{}", policy_problem="bad", has_shares=True)
    running.write(paths, told)
    assert running.read(paths) == told
    running.write(Paths(root=paths.root / "nowhere"), told)


def test_cleanup_is_refused_while_an_agent_lives(knd, paths: Paths) -> None:  # type: ignore[no-untyped-def]
    make_plugin_dir(paths)
    with TakeoverLock(paths, SystemClock()) as lock:
        assert lock.try_acquire()
        for force in ([], ["--force"]):
            said = knd("cleanup", "--node-name", "node-a", *force)
            assert said.code == 1
            assert "an agent is running (process" in said.err
            assert "stop it first" in said.err
        assert not paths.journal.exists()


# --- validate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_are_valid(knd, file: Path) -> None:  # type: ignore[no-untyped-def]
    said = knd("validate", str(file))
    assert said.code == 0, said.out
    assert said.out.startswith(f"{file}: ")
    assert said.out.endswith(", valid\n")


CONFIG = "apiVersion: knd.internal/v1alpha1\nkind: NetworkDeviceConfig\n"
MANIFEST = """\
# a comment
---
apiVersion: v1
kind: Service
---
apiVersion: resource.k8s.io/v1
kind: ResourceClaim
spec:
  devices:
    config:
    - opaque:
        driver: other.example
        parameters: {kind: Nonsense, anything: goes}
    - opaque:
        driver: knd.internal
        parameters:
          apiVersion: knd.internal/v1alpha1
          kind: NetworkDeviceConfig
          interface:
            mtu: 12
            nonsense: 1
"""


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (CONFIG + "interface:\n  mtu: 12\n  name: a/b\n", [":4: interface.mtu", ":5: interface.name"]),
        (CONFIG + "interface: {mtu: 1500}\ninterface: {}\n", [":4: interface: is given twice"]),
        ('{"kind": "NetworkDeviceConfig", "apiVersion": "v2"}', [":1: apiVersion"]),
        ("kind: NodePolicy\napiVersion: knd.internal/v1alpha1\nx: 1\n", [":3: x"]),
        (MANIFEST, [":20: spec.devices.config[1].opaque.parameters.interface.mtu", ":21: spec."]),
        ("kind: ConfigMap\n", [": holds no NodePolicy, no NetworkDeviceConfig"]),
        ("", [": holds no NodePolicy"]),
        ("a: [1\n", ["is not YAML"]),
        (CONFIG + f'interface: {{name: "{chr(27)}[31m"}}\n', ["is not YAML: character 0x1b"]),
    ],
    ids=["yaml", "duplicate", "json", "policy", "manifest", "foreign", "empty", "broken", "escape"],
)
def test_every_problem_is_told_with_line_and_field(  # type: ignore[no-untyped-def]
    knd, tmp_path: Path, text: str, problems: list[str]
) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(text)
    said = knd("validate", str(file))
    assert said.code == 1
    assert said.err == ""
    lines = said.out.splitlines()
    assert len(lines) == len(problems), said.out
    for line, problem in zip(lines, problems, strict=True):
        assert line.startswith(str(file))
        assert problem in line


def test_manifests_are_checked_for_the_driver_that_is_named(knd, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "given.yaml"
    file.write_text(MANIFEST.replace("mtu: 12", "mtu: 1500").replace("nonsense: 1", "name: net1"))
    assert knd("validate", str(file)).out == f"{file}: 1 NetworkDeviceConfig, valid\n"
    assert knd("validate", str(file), "--driver", "third.example").code == 1
    assert "parameters.anything" in knd("validate", str(file), "--driver", "other.example").out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"\xff\xfe", "is not text in UTF-8"), (None, "No such file or directory")],
    ids=["binary", "absent"],
)
def test_a_file_that_cannot_be_read_is_one_sentence(  # type: ignore[no-untyped-def]
    knd, tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / "given.yaml"
    if content is not None:
        file.write_bytes(content)
    said = knd("validate", str(file))
    assert said.code == 1
    assert said.out == ""
    assert said.err.startswith(f"knd: {file}")
    assert sentence in said.err
    assert "Errno" not in said.err


@pytest.mark.parametrize("seconds", ["0", "-1", "3601", "1.5", "\u0663", "soon"])
def test_a_time_that_cannot_be_measured_for_is_refused(
    paths: Paths, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--root", str(paths.root), f"--measure={seconds}"])
    assert ended.value.code == 2
    assert "from 1 to 3600" in capsys.readouterr().err


def test_measuring_where_no_agent_ran_is_one_sentence(
    paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--root", str(paths.root), "--measure", "1"]) == 1
    assert "no agent has run here yet" in capsys.readouterr().err
