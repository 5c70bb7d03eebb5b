"""`knd doctor` says what keeps pods from using RDMA, and what to do; a node without RDMA is fine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from driver.doctor import Place, Verdict, rdma
from driver.doctor.rdma import Rdma
from driver.paths import Paths
from driver.policy.rdma import DEFAULT_RDMA, ModeChoice, RdmaRules, SoftChoice
from driver.rdma import RdmaMode
from hw.devlink_codec import DevlinkHandle, DevlinkParam, ParamMode
from tests.unit.rdma_world import GUID, HCA, Kernel

MODULES = frozenset({"ib_uverbs", "rdma_ucm", "rdma_rxe"})
FINE = Rdma(DEFAULT_RDMA, RdmaMode.SHARED, (HCA,), MODULES, (("containerd", None),))
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max locked memory         {}              {}              bytes
"""


def told(facts: Rdma) -> dict[str, tuple[Verdict, str]]:
    return {each.check: (each.verdict, f"{each.said}; {each.todo}") for each in rdma.judge(facts)}


def test_a_node_that_can_is_told_so_and_one_without_rdma_is_asked_for_nothing() -> None:
    assert {verdict for verdict, _ in told(FINE).values()} == {Verdict.OK}
    nothing = replace(FINE, mode=None, devices=(), modules=frozenset(), locked=(("containerd", 8192),))
    assert list(told(nothing)) == ["rdma"]
    assert told(nothing)["rdma"][0] is Verdict.OK


@pytest.mark.parametrize(
    ("facts", "check", "words"),
    [
        (replace(FINE, rules=RdmaRules(mode=ModeChoice.EXCLUSIVE)), "rdma-mode", "ib_core.netns_mode=0"),
        (replace(FINE, modules=MODULES - {"rdma_ucm"}), "rdma-modules", "modprobe -a rdma_ucm,"),
        (
            replace(FINE, devices=(), modules=frozenset(), rules=RdmaRules(software=SoftChoice.RXE)),
            "rdma-modules",
            "modprobe -a ib_uverbs rdma_ucm rdma_rxe,",
        ),
        (replace(FINE, no_verbs="pyverbs is not installed"), "libibverbs", "install python3-pyverbs"),
        (replace(FINE, locked=(("crio", 8 << 20),)), "memlock", "LimitMEMLOCK=infinity for crio's service"),
    ],
)
def test_what_would_defeat_a_job_is_a_warning_with_what_to_do(facts: Rdma, check: str, words: str) -> None:
    verdict, said = told(facts)[check]
    assert verdict is Verdict.WARN
    assert words in said


def test_the_limit_looked_at_is_the_runtimes_and_garbage_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    paths = Paths(root=tmp_path, sysfs=tmp_path / "sys", proc=tmp_path / "proc")
    kernel.register(HCA, GUID)
    monkeypatch.setattr(rdma, "RdmaSocket", lambda netns, proc: kernel.open(netns))
    processes = [
        (1, "systemd", "8388608"),
        (20, "containerd", "65536"),
        (21, "containerd-shim", "1"),
        (30, "crio", "unlimited"),
        (40, "containerd", "garbage"),
    ]
    for pid, name, limit in processes:
        folder = tmp_path / f"proc/{pid}"
        folder.mkdir(parents=True)
        (folder / "comm").write_text(f"{name}\n")
        (folder / "limits").write_text(LIMITS.format(limit, limit))
    (tmp_path / "proc/50").mkdir()
    (tmp_path / "sys/module/ib_uverbs").mkdir(parents=True)
    found = rdma.look(Place(paths=paths))
    assert sorted(found.locked) == [("containerd", 65536), ("crio", None)]
    assert (found.mode, found.devices, found.modules) == (RdmaMode.EXCLUSIVE, (HCA,), {"ib_uverbs"})
    kernel.has_rdma = False
    found = rdma.look(Place(paths=paths))
    assert (found.mode, found.devices) == (None, ())


def test_devices_whose_rdma_is_turned_off_are_named() -> None:
    def param(name: str, *values: bool) -> DevlinkParam:
        handle = DevlinkHandle("pci", "0000:3b:00.0")
        return DevlinkParam(handle=handle, name=name, values=dict(zip(ParamMode, values, strict=False)))

    params = [param("enable_rdma", False), param("enable_roce", True), param("enable_sriov", False)]
    off = rdma.turned_off(params)
    assert off == ("pci/0000:3b:00.0 enable_rdma",)
    for facts in (replace(FINE, off=off), replace(FINE, devices=(), off=off)):
        verdict, said = told(facts)["rdma-off"]
        assert verdict is Verdict.WARN
        assert "pci/0000:3b:00.0 enable_rdma" in said
