"""The simulated runtime gives containers what their CDI ids say, and lets hooks keep them from starting.

Invariant: every test compares the machine's mounts, processes and own namespace before and after.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from driver.errors import Refusal
from driver.model import Adjustment
from kndsim.runtime import (
    ContainerFailed,
    RuntimeMode,
)
from kndsim.waiting import wait_until
from tests.kernel.sim_support import (
    POD,
    alive,
    machine_unchanged,
    network_id,
    node,
)
from tests.unit.nri_support import run


@pytest.fixture
def root(short_tmp: Path) -> Iterator[Path]:
    with machine_unchanged(short_tmp):
        yield short_tmp


def environment_of(pid: int) -> list[bytes]:
    """A program is known to have started before the kernel has put its environment into its memory: until
    then it reads as empty."""
    return wait_until(Path(f"/proc/{pid}/environ").read_bytes).split(b"\0")


def write_spec(root: Path, name: str, spec: object) -> None:
    folder = root / "var/run/cdi"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(spec if isinstance(spec, str) else json.dumps(spec))


def spec_of(device: str, edits: object, kind: str = "knd.internal/claim") -> dict[str, object]:
    return {
        "cdiVersion": "0.8.0",
        "kind": kind,
        "devices": [{"name": device, "containerEdits": edits}],
        "containerEdits": {"env": ["SPEC=1"]},
    }


def test_a_container_gets_what_its_cdi_ids_say(root: Path) -> None:
    edits = {
        "env": ["A=b=c"],
        "deviceNodes": [{"path": "/dev/x", "hostPath": "/dev/null"}, {"path": "/dev/zero"}],
    }
    write_spec(root, "a.json", spec_of("one", edits))
    write_spec(root, "broken.json", "{")

    async def test() -> None:
        async with node(root, RuntimeMode.POD_RPC) as (runtime, _):
            sandbox = await runtime.run_pod(POD)
            made = await runtime.create_container(sandbox, "main", ["knd.internal/claim=one"])
            assert made.env == {"SPEC": "1", "A": "b=c"}
            assert made.devices == ("/dev/x", "/dev/zero")
            assert b"A=b=c" in environment_of(made.pid)
            plain = await runtime.create_container(sandbox, "plain")
            assert (plain.env, plain.devices) == ({}, ())

    run(test())


def test_a_container_has_what_plugins_set_of_its_cgroup(root: Path) -> None:
    async def test() -> None:
        async with node(root, RuntimeMode.POD_RPC) as (runtime, handler):
            handler.adjustments["main"] = Adjustment(cgroup={"rdma.max": "mlx5_0 hca_handle=1"})
            sandbox = await runtime.run_pod(POD)
            main = await runtime.create_container(sandbox, "main")
            assert main.cgroup == {"rdma.max": "mlx5_0 hca_handle=1"}
            assert (await runtime.create_container(sandbox, "plain")).cgroup == {}

    run(test())


@pytest.mark.parametrize(
    ("specs", "id_"),
    [
        ({}, "knd.internal/claim=one"),
        ({"a.json": "{"}, "knd.internal/claim=one"),
        ({"a.json": spec_of("two", {})}, "knd.internal/claim=one"),
        ({"a.json": spec_of("one", {}, "other/claim")}, "knd.internal/claim=one"),
        ({"a.json": spec_of("one", {}), "b.json": spec_of("one", {})}, "knd.internal/claim=one"),
        ({"a.json": spec_of("one", {})}, "no id"),
        ({"a.json": spec_of("one", {"deviceNodes": [{"path": "/dev/absent"}]})}, "knd.internal/claim=one"),
    ],
)
def test_an_unresolvable_id_is_a_create_container_error_that_a_later_spec_mends(
    root: Path, specs: dict[str, object], id_: str
) -> None:
    for name, spec in specs.items():
        write_spec(root, name, spec)

    async def test() -> None:
        async with node(root, RuntimeMode.POD_RPC) as (runtime, _):
            sandbox = await runtime.run_pod(POD)
            with pytest.raises(ContainerFailed, match="CDI device injection failed") as caught:
                await runtime.create_container(sandbox, "main", [id_])
            assert caught.value.reason == "CreateContainerError"
            for name in specs:
                (root / "var/run/cdi" / name).unlink()
            write_spec(root, "late.json", spec_of("one", {}))
            await runtime.create_container(sandbox, "main", ["knd.internal/claim=one"])

    run(test())


def hook_script(root: Path, text: str) -> str:
    path = root / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(stat.S_IRWXU)
    return str(path)


def test_create_runtime_hooks_see_the_container_in_its_netns(root: Path) -> None:
    state = root / "state.json"
    hook = {
        "hookName": "createRuntime",
        "path": hook_script(root, f'cat >{state}; echo "$0 $1 $B" >{root}/args'),
        "args": ["name", "first"],
        "env": ["B=c", "PATH=/usr/bin:/bin"],
        "timeout": 5,
    }
    other = {"hookName": "poststop", "path": "/does/not/exist"}
    write_spec(root, "a.json", spec_of("one", {"hooks": [other, hook]}))

    async def test() -> None:
        async with node(root, RuntimeMode.POD_RPC) as (runtime, _):
            sandbox = await runtime.run_pod(POD)
            made = await runtime.create_container(sandbox, "main", ["knd.internal/claim=one"])
            told = json.loads(state.read_text())
            assert (told["id"], told["pid"], told["status"]) == (made.id, made.pid, "creating")
            assert network_id(f"/proc/{told['pid']}/ns/net") == network_id(str(sandbox.netns_path))
            assert (root / "args").read_text().split()[1:] == ["first", "c"]

    run(test())


@pytest.mark.parametrize(
    ("script", "text"), [("echo not this netns >&2; exit 3", "not this netns"), (None, "No such file")]
)
def test_a_hook_that_says_no_is_a_start_error_and_the_container_is_ended(
    root: Path, script: str | None, text: str
) -> None:
    state = root / "state"
    path = str(root / "absent") if script is None else hook_script(root, f"cat >{state}; {script}")
    edits = {"hooks": [{"hookName": "createRuntime", "path": path}]}
    write_spec(root, "a.json", spec_of("one", edits))

    async def test() -> None:
        async with node(root, RuntimeMode.POD_RPC) as (runtime, _):
            sandbox = await runtime.run_pod(POD)
            with pytest.raises(ContainerFailed, match=text) as caught:
                await runtime.create_container(sandbox, "main", ["knd.internal/claim=one"])
            assert caught.value.reason == "StartError"
            if script is not None:
                assert not alive(json.loads(state.read_text())["pid"])

    run(test())


def test_a_container_that_a_plugin_refuses_is_not_made(root: Path) -> None:
    async def test() -> None:
        async with node(root, RuntimeMode.POD_RPC) as (runtime, handler):
            sandbox = await runtime.run_pod(POD)
            handler.refuse["create init"] = Refusal("NotAttached", "its device is held by another pod")
            with pytest.raises(ContainerFailed, match="held by another pod") as caught:
                await runtime.create_container(sandbox, "init")
            assert caught.value.reason == "CreateContainerError"
            await runtime.create_container(sandbox, "main")

    run(test())
