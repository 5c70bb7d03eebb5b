"""The simulated kubelet holds claims as a real one does, and lets no wrong answer pass."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from pathlib import Path

import pytest

from driver.pb.dra.v1 import api_pb2 as v1
from kndsim.kubelet import (
    ContractBroken,
    ImpossibleUse,
    KubeletEvent,
    KubeletTiming,
    PrepareFailed,
    SimClaim,
    SimKubelet,
    UnprepareFailed,
)
from tests.unit.sim_kubelet_fakes import (
    C1,
    C2,
    DRIVER,
    FAST,
    FakePlugin,
    Respond,
    bad,
    device,
    good,
    kubelet_with,
)


def test_devices_are_given_by_claim(short_tmp: Path) -> None:
    plugin = FakePlugin(respond=lambda uids: {uid: bad(uid, share_id=f"s-{uid}") for uid in uids})

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            given = await kubelet.prepare(DRIVER, [C1, C2])
            assert set(given) == {"u1", "u2"}
            (one,) = given["u1"]
            assert (one.requests, one.pool, one.device) == (("nic",), "node-a", "nic-0")
            assert (one.cdi_ids, one.share_id) == ((f"{DRIVER}/nic=u1-nic-0",), "s-u1")
            assert await kubelet.prepare(DRIVER, []) == {}

    asyncio.run(run())
    assert plugin.prepares == [("v1", ["u1", "u2"]), ("v1", [])]


@pytest.mark.parametrize(
    ("respond", "words"),
    [
        (lambda uids: {}, "skipped 1 ResourceClaims: u1"),
        (lambda uids: {"u1": good("u1"), "u9": good("u9")}, "unknown claim UID u9"),
        (lambda uids: {"u1": bad("u1", pool_name="")}, "is not a pool name"),
        (lambda uids: {"u1": bad("u1", device_name="")}, "is not a device name"),
        (lambda uids: {"u1": bad("u1", device_name="Eth_0")}, "is not a device name"),
        (lambda uids: {"u1": bad("u1", request_names=["nic/fast"])}, "is not a base request name"),
        (lambda uids: {"u1": bad("u1", cdi_device_ids=["nic=u1"])}, "is not a CDI id"),
        (lambda uids: {"u1": bad("u1", cdi_device_ids=["a/b=c=d"])}, "is not a CDI id"),
        (lambda uids: {"u1": bad("u1", cdi_device_ids=["a/b=c\n"])}, "is not a CDI id"),
        (lambda uids: {"u1": bad("u1", cdi_device_ids=["a/b=c", "a/b=c"])}, "names a CDI id twice"),
        (lambda uids: {"u1": bad("u1", share_id="")}, "has an empty share id"),
        (
            lambda uids: {"u1": v1.NodePrepareResourceResponse(devices=[device("u1")] * 2)},
            "was given twice",
        ),
        (lambda uids: {"u1": v1.NodePrepareResourceResponse(error="a\nb")}, "is not one line"),
        (lambda uids: {"u1": v1.NodePrepareResourceResponse(error="é" * 600)}, "more than 1024 bytes"),
    ],
)
def test_an_answer_that_kubelet_or_the_runtime_cannot_use_is_a_broken_contract(
    short_tmp: Path, respond: Respond, words: str
) -> None:
    async def run() -> None:
        async with kubelet_with(short_tmp, FakePlugin(respond=respond)) as kubelet:
            with pytest.raises(ContractBroken, match=words):
                await kubelet.prepare(DRIVER, [C1])
            assert kubelet.log[-1].event is KubeletEvent.PREPARE_FAILED

    asyncio.run(run())


def test_a_share_id_in_v1beta1_is_a_broken_contract(short_tmp: Path) -> None:
    plugin = FakePlugin(respond=lambda uids: {uid: bad(uid, share_id="s") for uid in uids})

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin, prefer="v1beta1") as kubelet:
            with pytest.raises(ContractBroken, match="v1beta1 has no share id"):
                await kubelet.prepare(DRIVER, [C1])

    asyncio.run(run())


def test_a_cdi_id_of_another_claim_is_a_broken_contract_within_and_across_calls(short_tmp: Path) -> None:
    plugin = FakePlugin(respond=lambda uids: {uid: good("same") for uid in uids})

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            with pytest.raises(ContractBroken, match=r"CDI id sim\.example/nic=same-nic-0 is claim u1's"):
                await kubelet.prepare(DRIVER, [C1, C2])
            await kubelet.prepare(DRIVER, [C1])
            with pytest.raises(ContractBroken, match="claim u2: CDI id"):
                await kubelet.prepare(DRIVER, [C2])
            await kubelet.prepare(DRIVER, [C1], force=True)

    asyncio.run(run())


def test_one_claims_error_fails_the_pod_and_nothing_counts_as_prepared(short_tmp: Path) -> None:
    plugin = FakePlugin(
        respond=lambda uids: {"u1": good("u1"), "u2": v1.NodePrepareResourceResponse(error="in use")}
    )

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            with pytest.raises(PrepareFailed, match="failed for claim u2: in use") as failed:
                await kubelet.prepare(DRIVER, [C1, C2])
            assert not isinstance(failed.value, ContractBroken)
            plugin.respond = lambda uids: {uid: good(uid) for uid in uids}
            await kubelet.prepare(DRIVER, [C1, C2])

    asyncio.run(run())
    assert [uids for _, uids in plugin.prepares] == [["u1", "u2"], ["u1", "u2"]]


def test_a_driver_that_is_not_registered_leaves_no_trace_of_the_claim(short_tmp: Path) -> None:
    async def run() -> None:
        async with SimKubelet(short_tmp, node="node-a", timing=FAST) as kubelet:
            with pytest.raises(PrepareFailed, match=r"DRA driver sim\.example is not registered"):
                await kubelet.prepare(DRIVER, [C1])
            assert not kubelet.holds("u1")

    asyncio.run(run())


def test_a_failed_prepare_leaves_the_claim_to_be_unprepared(short_tmp: Path) -> None:
    plugin = FakePlugin(respond=lambda uids: {})

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            with pytest.raises(PrepareFailed):
                await kubelet.prepare(DRIVER, [C1])
            assert kubelet.holds("u1")
            assert await kubelet.unprepare(DRIVER, [C1]) == ("u1",)
            assert not kubelet.holds("u1")

    asyncio.run(run())


def test_a_call_that_takes_too_long_is_given_up(short_tmp: Path) -> None:
    async def run() -> None:
        plugin = FakePlugin(prepare_gate=asyncio.Event())
        timing = KubeletTiming(call=0.2)
        async with kubelet_with(short_tmp, plugin, timing) as kubelet:
            with pytest.raises(PrepareFailed, match="code = DEADLINE_EXCEEDED"):
                await kubelet.prepare(DRIVER, [C1])

    asyncio.run(run())


def test_prepare_is_repeated_until_it_works_but_not_after_a_broken_contract(short_tmp: Path) -> None:
    answers = [v1.NodePrepareResourceResponse(error="not yet")] * 2 + [good("u1")]
    plugin = FakePlugin(respond=lambda uids: {"u1": answers[len(plugin.prepares) - 1]})

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            until = time.monotonic() + 20
            given = await kubelet.prepare_with_retries(DRIVER, [C1], every=0.01, deadline=until)
            assert len(given["u1"]) == 1
            assert len(plugin.prepares) == 3
            plugin.respond = lambda uids: {"u2": v1.NodePrepareResourceResponse(error="never")}
            soon = time.monotonic() + 0.05
            with pytest.raises(PrepareFailed, match="never"):
                await kubelet.prepare_with_retries(DRIVER, [C2], every=0.01, deadline=soon)
            before = len(plugin.prepares)
            plugin.respond = lambda uids: {}
            with pytest.raises(ContractBroken):
                await kubelet.prepare_with_retries(DRIVER, [C2], every=0.01, deadline=until)
            assert len(plugin.prepares) == before + 1

    asyncio.run(run())


def test_a_new_claim_with_a_held_ones_name_waits_until_that_is_gone(short_tmp: Path) -> None:
    async def run() -> None:
        async with kubelet_with(short_tmp, FakePlugin()) as kubelet:
            await kubelet.prepare(DRIVER, [C1])
            with pytest.raises(PrepareFailed, match="same name one and UID u1 still exists"):
                await kubelet.prepare(DRIVER, [SimClaim("ns", "one", "u7")])
            await kubelet.unprepare(DRIVER, [C1])
            await kubelet.prepare(DRIVER, [SimClaim("ns", "one", "u7")])

    asyncio.run(run())


def test_a_prepared_claim_is_not_asked_for_again_in_the_same_run(short_tmp: Path) -> None:
    plugin = FakePlugin()

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            first = await kubelet.prepare(DRIVER, [C1], pod="a")
            assert await kubelet.prepare(DRIVER, [C1], pod="b") == first
            assert len(plugin.prepares) == 1
            assert await kubelet.prepare(DRIVER, [C1], pod="b", force=True) == first
            await kubelet.prepare(DRIVER, [C1, C2], pod="c")

    asyncio.run(run())
    assert [uids for _, uids in plugin.prepares] == [["u1"], ["u1"], ["u2"]]


def test_unprepare_waits_for_the_last_pod(short_tmp: Path) -> None:
    plugin = FakePlugin()

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            await kubelet.prepare(DRIVER, [C1, C2], pod="a")
            await kubelet.prepare(DRIVER, [C1], pod="b")
            assert await kubelet.unprepare(DRIVER, [C1, C2], pod="a") == ("u2",)
            assert await kubelet.unprepare(DRIVER, [C1], pod="b") == ("u1",)
            assert not kubelet.holds("u1")

    asyncio.run(run())
    assert plugin.unprepares == [["u2"], ["u1"]]


def test_a_pod_cannot_unprepare_what_it_does_not_use(short_tmp: Path) -> None:
    plugin = FakePlugin()

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            await kubelet.prepare(DRIVER, [C1], pod="a")
            with pytest.raises(ImpossibleUse, match="not used by pod 'b' but by a"):
                await kubelet.unprepare(DRIVER, [C1], pod="b")
            with pytest.raises(ImpossibleUse, match="claim u2 is not held here"):
                await kubelet.unprepare(DRIVER, [C2], pod="a")
            assert plugin.unprepares == []
            assert await kubelet.unprepare(DRIVER, [C2], force=True) == ("u2",)
            assert await kubelet.unprepare(DRIVER, []) == ()

    asyncio.run(run())
    assert plugin.unprepares == [["u2"], []]


def test_a_failed_unprepare_keeps_the_claim_and_can_be_repeated(short_tmp: Path) -> None:
    plugin = FakePlugin(unprepare_error="the device is not home yet")

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            await kubelet.prepare(DRIVER, [C1])
            with pytest.raises(UnprepareFailed, match="not home yet"):
                await kubelet.unprepare(DRIVER, [C1])
            assert kubelet.holds("u1")
            plugin.unprepare_error = ""
            assert await kubelet.unprepare(DRIVER, [C1]) == ("u1",)

    asyncio.run(run())


def test_a_restart_forgets_what_is_prepared_but_not_who_holds_what(short_tmp: Path) -> None:
    plugin = FakePlugin()

    async def run() -> None:
        async with kubelet_with(short_tmp, plugin) as kubelet:
            await kubelet.prepare(DRIVER, [C1], pod="a")
            await kubelet.restart()
            await kubelet.wait_registered(DRIVER)
            assert plugin.told == [(True, ""), (True, "")]
            assert kubelet.holds("u1")
            await kubelet.prepare(DRIVER, [C1], pod="a")
            assert len(plugin.prepares) == 2
            await kubelet.restart()
            await kubelet.wait_registered(DRIVER)
            assert await kubelet.unprepare(DRIVER, [C1], pod="a") == ("u1",)

    asyncio.run(run())


def test_a_restart_without_checkpoint_knows_no_claim(short_tmp: Path) -> None:
    async def run() -> None:
        async with kubelet_with(short_tmp, FakePlugin()) as kubelet:
            await kubelet.prepare(DRIVER, [C1])
            (kubelet.root / "dra_manager_state").unlink()
            await kubelet.restart()
            assert not kubelet.holds("u1")

    asyncio.run(run())


def test_the_checkpoint_is_kubelets_file(short_tmp: Path) -> None:
    async def run() -> None:
        async with kubelet_with(short_tmp, FakePlugin()) as kubelet:
            await kubelet.prepare(DRIVER, [C1], pod="a")
            document = json.loads((kubelet.root / "dra_manager_state").read_text())
            assert document["Checksum"] == zlib.crc32(document["Data"].encode())
            data = json.loads(document["Data"])
            assert (data["kind"], data["apiVersion"]) == (
                "DRACheckpoint",
                "checkpoint.dra.kubelet.k8s.io/v1",
            )
            (entry,) = data["Entries"]
            assert (entry["ClaimUID"], entry["ClaimName"], entry["Namespace"]) == ("u1", "one", "ns")
            assert entry["PodUIDs"] == {"a": {}}
            (held,) = entry["DriverState"][DRIVER]["Devices"]
            assert held["CDIDeviceIDs"] == [f"{DRIVER}/nic=u1-nic-0"]

    asyncio.run(run())


def test_a_damaged_checkpoint_stops_kubelet_from_starting(short_tmp: Path) -> None:
    state = short_tmp / "var/lib/kubelet/dra_manager_state"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"Data": "{}", "Checksum": 1}))

    async def run() -> None:
        async with SimKubelet(short_tmp, node="node-a"):
            pass

    with pytest.raises(ValueError, match="is corrupt"):
        asyncio.run(run())


def test_stopping_leaves_no_task_behind(short_tmp: Path) -> None:
    async def run() -> None:
        async with kubelet_with(short_tmp, FakePlugin()) as kubelet:
            await kubelet.prepare(DRIVER, [C1])
        left = {task.get_name() for task in asyncio.all_tasks()}
        assert not [name for name in left if "watch" in name or "register" in name]

    asyncio.run(run())
