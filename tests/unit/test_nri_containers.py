"""A container that the runtime is about to make: refused with words, or given what the handler says of it."""

from __future__ import annotations

from pathlib import Path

from driver.errors import Refusal
from driver.model import AS_IT_IS, Adjustment, Container, Sandbox
from driver.pb.nri.v1 import api_pb2 as pb
from kndsim.runtime import HookOutcome
from tests.unit.nri_support import run
from tests.unit.nri_world import sandbox, sim_sandbox, world


def test_create_container_is_refused_with_the_handlers_words(short_tmp: Path) -> None:
    async def refuse(sandbox: Sandbox, deadline: float) -> None:
        raise Refusal("NotAttached", "the device is held by pod other/p")

    async def test() -> None:
        async with world(short_tmp) as w:
            w.handler.behaviours["claimed"] = refuse
            record = await w.runtime.send_event(pb.CREATE_CONTAINER, sim_sandbox("claimed"), container="init")
            assert record.outcome is HookOutcome.ERROR
            assert record.detail == "the device is held by pod other/p"
            record = await w.runtime.send_event(pb.CREATE_CONTAINER, sim_sandbox("plain"), container="main")
            assert record.outcome is HookOutcome.OK
        assert w.handler.calls[2:4] == [
            ("create", sandbox("claimed"), "init"),
            ("create", sandbox("plain"), "main"),
        ]

    run(test())


def test_what_a_container_is_given_of_its_cgroup_reaches_the_runtime(short_tmp: Path) -> None:
    def limited(container: Container) -> Adjustment:
        return (
            Adjustment(cgroup={"rdma.max": "mlx5_2 hca_object=5"}) if container.name == "main" else AS_IT_IS
        )

    async def test() -> None:
        async with world(short_tmp) as w:
            w.handler.adjust = limited
            for name, found in (("main", {"rdma.max": "mlx5_2 hca_object=5"}), ("sidecar", {})):
                record = await w.runtime.send_event(pb.CREATE_CONTAINER, sim_sandbox("p"), container=name)
                assert (record.outcome, record.cgroup) == (HookOutcome.OK, found)
            assert w.runtime.violations == ()

    run(test())
