"""What `knd doctor` makes of what it finds, subject by subject; and no odd node ends its looking."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf.cost import Trial
from bpf.layout import Hook
from driver import doctor, running
from driver.doctor import (
    Finding,
    Place,
    Verdict,
    foreign,
    kernel,
    kubelet,
    policy,
    programs,
    records,
    runtime,
    sriov,
)
from driver.doctor.looking import is_locked, listening
from driver.journal import Journal, Quarantine
from driver.model import BootId
from driver.paths import Paths
from driver.policy import ForeignChoice
from driver.provision import hands_off
from driver.running import Running
from hw.model import PciAddress
from tests.unit.journal_values import key, preparation

GIB = 1 << 30
KEEP, REPORT, DETACH = ForeignChoice
XDP, QDISC = "a: xdp 'x'", "a: clsact"


def said(findings: Iterable[Finding], check: str) -> Finding:
    (found,) = [each for each in findings if each.check == check]
    return found


def worst(findings: Iterable[Finding]) -> Verdict:
    order = list(Verdict)
    return max((each.verdict for each in findings), key=order.index)


GOOD_KERNEL = kernel.Kernel(
    release="6.12.1",
    cookie_error="",
    hook=Hook.TCX,
    hook_error="",
    fq_error="",
    pci_netdevs=2,
    without_parent=(),
)


@pytest.mark.parametrize(
    ("change", "check", "verdict", "words"),
    [
        ({}, "bpf", Verdict.OK, "tcx"),
        ({}, "fq", Verdict.OK, "shaper: fq"),
        ({"fq_error": "no such qdisc"}, "fq", Verdict.OK, "no such qdisc"),
        ({"hook": Hook.CLSACT}, "bpf", Verdict.WARN, "take them off"),
        ({"hook": None, "hook_error": "EPERM"}, "bpf", Verdict.FAIL, "EPERM"),
        ({"cookie_error": "Protocol not available"}, "netns-cookie", Verdict.FAIL, "6.12.1"),
        ({"without_parent": ("eth7",)}, "parent-device", Verdict.FAIL, "eth7"),
        ({"pci_netdevs": 0}, "parent-device", Verdict.OK, "no netdev"),
    ],
)
def test_kernel(change: dict[str, object], check: str, verdict: Verdict, words: str) -> None:
    found = said(kernel.judge(replace(GOOD_KERNEL, **change)), check)  # type: ignore[arg-type]
    assert found.verdict is verdict
    assert words in found.said


GOOD_PROGRAMS = programs.Programs(
    bpffs=Path("/sys/fs/bpf"),
    there=True,
    is_bpffs=True,
    writable=True,
    compiled=True,
    compiler=None,
    hook="tcx",
    trial=Trial(counting=18.4, empty=8.0, jited=True),
    trial_error="",
    others=(),
    unreadable=(),
)


@pytest.mark.parametrize(
    ("change", "check", "verdict", "words"),
    [
        ({}, "programs", Verdict.OK, "compiled"),
        ({"is_bpffs": False}, "bpffs", Verdict.FAIL, "no BPF file system"),
        ({"is_bpffs": False, "there": False}, "bpffs", Verdict.FAIL, "not there"),
        ({"writable": False}, "bpffs", Verdict.FAIL, "cannot be written"),
        ({"compiled": False, "compiler": "0.26"}, "programs", Verdict.WARN, "when it starts"),
        ({"compiled": False}, "programs", Verdict.FAIL, "no bcc"),
        ({}, "hook", Verdict.OK, "counts at tcx"),
        ({}, "mode", Verdict.OK, "machine code"),
        ({"trial": Trial(counting=200.0, empty=50.0, jited=False)}, "mode", Verdict.WARN, "interprets"),
        ({"trial": None, "trial_error": "EPERM"}, "mode", Verdict.FAIL, "EPERM"),
        ({}, "cost", Verdict.OK, "18 ns"),
        ({"others": ("layout-1",)}, "versions", Verdict.OK, "layout-1"),
        ({"unreadable": ("layout-1: odd",)}, "versions", Verdict.WARN, "layout-1: odd"),
    ],
)
def test_programs(change: dict[str, object], check: str, verdict: Verdict, words: str) -> None:
    found = said(programs.judge(replace(GOOD_PROGRAMS, **change)), check)  # type: ignore[arg-type]
    assert found.verdict is verdict
    assert words in found.said


@pytest.mark.parametrize(
    ("facts", "check", "verdict", "words"),
    [
        (foreign.Foreign(choice=REPORT), "programs", Verdict.OK, "nobody else has any"),
        (
            foreign.Foreign(choice=KEEP, free=(XDP,)),
            "programs",
            Verdict.OK,
            "with it (foreignPrograms: ",
        ),
        (foreign.Foreign(choice=REPORT, free=(XDP,)), "programs", Verdict.OK, "event.*a: xdp 'x'"),
        (
            foreign.Foreign(choice=DETACH, free=(XDP,)),
            "programs",
            Verdict.OK,
            "are off while a pod has",
        ),
        (foreign.Foreign(choice=REPORT, free=("x",) * 10), "programs", Verdict.OK, "x and 2 more$"),
        (
            foreign.Foreign(choice=REPORT, filtered=(QDISC,)),
            "filters",
            Verdict.WARN,
            "end when.*a: clsact",
        ),
        (
            foreign.Foreign(choice=DETACH, filtered=(QDISC,)),
            "filters",
            Verdict.WARN,
            "claims.*are refused",
        ),
        (foreign.Foreign(choice=KEEP, along=(XDP,)), "along", Verdict.OK, "into pods.*a: xdp 'x'"),
        (foreign.Foreign(choice=DETACH, off=(XDP,)), "off", Verdict.OK, "are home: a: xdp 'x'"),
    ],
)
def test_programs_of_others(facts: foreign.Foreign, check: str, verdict: Verdict, words: str) -> None:
    found = said(foreign.judge(facts), check)
    assert found.verdict is verdict
    assert re.search(words.replace("(", r"\("), found.said)


GOOD_RECORDS = records.Records(
    folder=Path("/var/lib/knd"),
    there=True,
    writable=True,
    mode=0o700,
    kind=0xEF53,
    free_bytes=GIB,
    preparations=2,
    quarantined=0,
    recovery="",
    problem="",
    boot_id="b",
    wall=1.8e9,
)


@pytest.mark.parametrize(
    ("change", "check", "verdict", "words"),
    [
        ({}, "journal", Verdict.OK, "2 devices are prepared"),
        ({"writable": False}, "state", Verdict.FAIL, "cannot be written"),
        ({"kind": 0x01021994}, "state", Verdict.WARN, "tmpfs"),
        ({"kind": 0x6969}, "state", Verdict.WARN, "nfs"),
        ({"mode": 0o755}, "state", Verdict.WARN, "open to others"),
        ({"free_bytes": 4096}, "space", Verdict.FAIL, "0 MiB"),
        ({"free_bytes": 5 << 20}, "space", Verdict.WARN, "5 MiB"),
        ({"quarantined": 1}, "journal", Verdict.WARN, "1 withheld"),
        ({"recovery": "it is older than its mirror"}, "journal", Verdict.FAIL, "mirror"),
        ({"preparations": None, "problem": "the journal is damaged"}, "journal", Verdict.FAIL, "damaged"),
        ({"preparations": None}, "journal", Verdict.OK, "no agent"),
        ({"wall": 3.0}, "clock", Verdict.WARN, "never set"),
    ],
)
def test_records(change: dict[str, object], check: str, verdict: Verdict, words: str) -> None:
    found = said(records.judge(replace(GOOD_RECORDS, **change)), check)  # type: ignore[arg-type]
    assert found.verdict is verdict
    assert words in found.said


GOOD_KUBELET = kubelet.Kubelet(
    registry=Path("/r"),
    registry_there=True,
    plugins=Path("/p"),
    plugins_writable=True,
    socket=Path("/r/knd-reg.sock"),
    socket_there=True,
    agent_runs=True,
    socket_problem="",
)


@pytest.mark.parametrize(
    ("change", "check", "verdict"),
    [
        ({}, "agent", Verdict.OK),
        ({"registry_there": False}, "folders", Verdict.FAIL),
        ({"plugins_writable": False}, "folders", Verdict.FAIL),
        ({"agent_runs": False}, "agent", Verdict.WARN),
        ({"agent_runs": False, "socket_there": False}, "agent", Verdict.WARN),
        ({"socket_there": False}, "agent", Verdict.WARN),
        ({"socket_problem": "too long"}, "agent", Verdict.FAIL),
    ],
)
def test_kubelet(change: dict[str, object], check: str, verdict: Verdict) -> None:
    assert said(kubelet.judge(replace(GOOD_KUBELET, **change)), check).verdict is verdict  # type: ignore[arg-type]


GOOD_RUNTIME = runtime.Runtime(
    nri_socket=Path("/nri.sock"),
    nri_listens=True,
    cdi=Path("/cdi"),
    cdi_writable=True,
    helper=Path("/knd-netns-check"),
    helper_there=True,
    helper_runs=True,
    containerd=None,
)


@pytest.mark.parametrize(
    ("change", "check", "verdict", "words"),
    [
        ({}, "nri", Verdict.OK, "listens"),
        ({"nri_listens": False}, "nri", Verdict.FAIL, "nobody listens"),
        ({"cdi_writable": False}, "cdi", Verdict.FAIL, "cannot be written"),
        ({"helper_there": False}, "netns-check", Verdict.FAIL, "missing"),
        ({"helper_runs": False}, "netns-check", Verdict.FAIL, "may not be run"),
    ],
)
def test_runtime(change: dict[str, object], check: str, verdict: Verdict, words: str) -> None:
    found = said(runtime.judge(replace(GOOD_RUNTIME, **change)), check)  # type: ignore[arg-type]
    assert found.verdict is verdict
    assert words in found.said


@pytest.mark.parametrize(
    ("text", "nri", "cdi"),
    [
        ("version = 3", Verdict.FAIL, Verdict.OK),
        ("version = 2", Verdict.FAIL, Verdict.WARN),
        ('[plugins."io.containerd.grpc.v1.cri"]\nenable_cdi = true', Verdict.FAIL, Verdict.OK),
        (
            'version = 3\n[plugins."io.containerd.cri.v1.runtime"]\nenable_cdi = false',
            Verdict.FAIL,
            Verdict.FAIL,
        ),
        ('version = 2\n[plugins."io.containerd.nri.v1.nri"]\ndisable = true', Verdict.FAIL, Verdict.WARN),
        ("", Verdict.FAIL, Verdict.OK),
        ("not = [toml", Verdict.FAIL, Verdict.OK),
        ('version = "x"\nplugins = 5', Verdict.FAIL, Verdict.WARN),
    ],
)
def test_what_containerds_configuration_says(text: str, nri: Verdict, cdi: Verdict) -> None:
    found = list(runtime.judge(replace(GOOD_RUNTIME, nri_listens=False, containerd=runtime.parse(text))))
    assert (said(found, "nri").verdict, said(found, "cdi").verdict) == (nri, cdi)
    assert ("switches it off" in said(found, "nri").said) is ("disable = true" in text)


@given(st.text())
def test_no_configuration_ends_the_look(text: str) -> None:
    runtime.parse(text)


PF = sriov.Pf(shown="PF 0000:3b:00.0 ('ens1')", driver="igb", vfs=4, possible=7, maker="knd", why_not="")
GOOD_SRIOV = sriov.Sriov(
    pfs=(PF,),
    functions=9,
    readonly=(),
    iommu_groups=12,
    vfio_loaded=True,
    no_iommu_allowed=False,
    devlink=2,
    devlink_problem="",
    managers=(),
    unmarked=False,
    problems=(),
)


@pytest.mark.parametrize(
    ("change", "check", "verdict", "words"),
    [
        ({}, "port", Verdict.OK, "4 of 7 VFs, made by knd"),
        ({"pfs": (replace(PF, driver=None),)}, "port", Verdict.WARN, "driver none"),
        ({"pfs": (replace(PF, why_not="others made them"),)}, "port", Verdict.WARN, "others made them"),
        ({"pfs": ()}, "ports", Verdict.OK, "whole interfaces"),
        ({"readonly": ("/sys/devices",)}, "sysfs", Verdict.FAIL, "/sys/devices"),
        ({"iommu_groups": 0}, "vfio", Verdict.OK, "refused"),
        ({"iommu_groups": 0, "no_iommu_allowed": True}, "vfio", Verdict.WARN, "all memory"),
        ({"vfio_loaded": False}, "vfio", Verdict.OK, "modprobe"),
        ({"devlink": None, "devlink_problem": "ENOENT"}, "devlink", Verdict.WARN, "ENOENT"),
        ({"managers": ("NetworkManager",)}, "network-managers", Verdict.OK, "kept off"),
        ({"managers": ("NetworkManager",), "unmarked": True}, "network-managers", Verdict.WARN, "gone"),
    ],
)
def test_sriov(change: dict[str, object], check: str, verdict: Verdict, words: str) -> None:
    found = said(sriov.judge(replace(GOOD_SRIOV, **change)), check)  # type: ignore[arg-type]
    assert found.verdict is verdict
    assert words in found.said


def test_rules_that_keep_managers_off_are_told_from_none(tmp_path: Path) -> None:
    paths, one, two = Paths(root=tmp_path), PciAddress("0000:21:00.0"), PciAddress("0000:41:00.0")
    assert not hands_off.are_there(paths, [one])
    hands_off.write(paths, [one])
    assert hands_off.are_there(paths, [one])
    assert not hands_off.are_there(paths, [one, two])


# --- looking -------------------------------------------------------------------------------------------


@pytest.fixture
def paths(short_tmp: Path) -> Paths:
    """A root in which nothing is there, below the machine's own /sys and /proc."""
    return Paths(root=short_tmp)


def test_an_empty_node_is_told_line_by_line(paths: Paths) -> None:
    found = list(doctor.examine(Place(paths=paths)))
    assert {subject for subject, _ in found} == {each.name for each in doctor.SUBJECTS}
    assert worst(finding for _, finding in found) is Verdict.FAIL
    assert not [finding for _, finding in found if "cannot be looked at" in finding.said]
    assert not list(paths.root.iterdir()), "looking left something behind"


def test_a_journal_is_read_and_a_damaged_one_is_told(paths: Paths) -> None:
    paths.state.mkdir(parents=True, mode=0o700)
    with Journal.open(paths.journal, mirror=paths.run / "mirror", boot_id=BootId("b")) as journal:
        journal.put_preparation(preparation(0))
        journal.put_quarantine(Quarantine(device=key(0).device, reason="dirty", since_wall=1.0))
        facts = records.look(Place(paths=paths))
        assert (facts.preparations, facts.quarantined) == (1, 1)
    paths.journal.write_bytes(b"no database at all" * 100)
    assert said(records.judge(records.look(Place(paths=paths))), "journal").verdict is Verdict.FAIL


def test_the_policy_of_the_agent_and_the_one_on_the_command_line_are_both_judged(paths: Paths) -> None:
    bad = paths.root / "bad.yaml"
    bad.write_text("kind: Nonsense\n")
    paths.run.mkdir(parents=True)
    running.write(
        paths, Running(pid=1, node="n", hook="tcx", policy_file="/etc/p.yaml", policy_problem="line 3")
    )
    found = list(policy.judge(policy.look(Place(paths=paths, policy=bad))))
    assert (said(found, "file").verdict, said(found, "in-force").verdict) == (Verdict.FAIL, Verdict.FAIL)
    assert "line 3" in said(found, "in-force").said
    running.write(paths, Running(pid=1, node="n", hook="tcx", policy_file="/etc/p.yaml"))
    (fine,) = policy.judge(policy.look(Place(paths=paths)))
    assert (fine.verdict, "/etc/p.yaml" in fine.said) == (Verdict.OK, True)


def test_a_helper_that_cannot_be_run_is_told_from_one_that_can(paths: Paths) -> None:
    paths.netns_check.parent.mkdir(parents=True)
    shutil.copy("/bin/true", paths.netns_check)
    paths.netns_check.chmod(0o644)
    assert not runtime.look(Place(paths=paths)).helper_runs
    paths.netns_check.chmod(0o755)
    facts = runtime.look(Place(paths=paths))
    assert facts.helper_runs is not bool(os.statvfs(paths.root).f_flag & os.ST_NOEXEC)


def test_only_sockets_that_someone_listens_on_count(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/unix").write_text(
        "Num       RefCount Protocol Flags    Type St Inode Path\n"
        "0: 00000002 00000000 00010000 0001 01 1 /run/a.sock\n"
        "0: 00000003 00000000 00000000 0001 03 2 /run/b.sock\n"
        "0: 00000002 00000000 00010000 0001 01 3 @abstract\n"
        "garbage\n0: 1 2 zz 4 5 6 /run/c.sock\n"
    )
    assert listening(tmp_path) == {Path("/run/a.sock")}
    assert listening(tmp_path / "nowhere") == frozenset()


def test_a_lock_is_seen_while_it_is_held_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(Path("/proc"), path)
    with path.open("w") as file:
        assert not is_locked(Path("/proc"), path)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(Path("/proc"), path)
    assert not is_locked(Path("/proc"), path)
