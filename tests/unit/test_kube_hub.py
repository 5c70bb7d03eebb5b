"""The Kubernetes side as the agent sees it: never in the way, quiet when idle, gone when told to go."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from driver.errors import NotNow
from driver.kube.hub import KubeHub
from driver.model import (
    ClaimRef,
    ClaimUid,
    DeviceName,
    DeviceStatus,
    DriverEvent,
    EventKind,
    PodRef,
    PodUid,
    PoolName,
)
from kndsim.api import SimApi
from tests.conftest import WaitUntilAsync
from tests.unit.kube_support import DRIVER, FAST, FAST_PACE, NODE, QUICK, RealClock, offered, offered_many


@pytest.fixture
def api() -> Iterator[SimApi]:
    with SimApi() as api:
        api.add_node(NODE)
        yield api


def hub_of(kubeconfig: Path | None, changes: list[str] | None = None) -> KubeHub:
    told = [] if changes is None else changes
    return KubeHub(
        driver=DRIVER,
        node=NODE,
        kubeconfig=kubeconfig,
        clock=RealClock(),
        on_pods_changed=lambda: told.append(threading.current_thread().name),
        limits=QUICK,
        back_off=FAST,
        pace=FAST_PACE,
    )


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    before = {thread.name for thread in threading.enumerate()}
    asyncio.run(coroutine)
    left = {thread.name for thread in threading.enumerate() if thread.name.startswith("knd-")} - before
    assert not {name for name in left if not name.startswith("knd-kube-read")}


def status_of(claim: ClaimRef, device: str) -> DeviceStatus:
    return DeviceStatus(
        claim=claim,
        pool=PoolName(NODE),
        device=DeviceName(device),
        share_id=None,
        ready=True,
        reason="Attached",
        message="",
    )


def test_an_attached_pod_costs_one_read_and_one_apply(
    api: SimApi, tmp_path: Path, wait_until_async: WaitUntilAsync
) -> None:
    async def main() -> None:
        async with hub_of(api.kubeconfig(tmp_path / "k")) as hub:
            hub.slices.offer(offered_many(10))
            await wait_until_async(lambda: hub.slices_published)
            await wait_until_async(lambda: len(api.requests("watch")) == 2)
            api.clear_log()
            for index in range(5):
                uid = api.add_claim("d", f"c{index}")
                claim = ClaimRef("d", f"c{index}", ClaimUid(uid))
                (chosen,) = api.allocate("d", claim.name, DRIVER, NODE, {"net": lambda _: True})
                pod = PodUid(api.add_pod("d", f"p{index}", node=NODE, claims={"net": claim.name}))
                api.reserve("d", claim.name, [pod])
                read = await hub.claims.read_claim(claim)
                assert read.devices[0].device == chosen[2]
                await wait_until_async(lambda: hub.pods.claims_of(pod))  # noqa: B023 - awaited here
                hub.statuses.write_status(claim, [status_of(claim, chosen[2])])
                await wait_until_async(lambda: api.claim("d", claim.name)["status"].get("devices"))  # noqa: B023 - awaited here
            asked = Counter((request.verb, request.resource) for request in api.requests())
            assert asked == {("get", "resourceclaims"): 5, ("patch", "resourceclaims/status"): 5}

    run(main())


def test_idle_it_asks_nothing(api: SimApi, tmp_path: Path, wait_until_async: WaitUntilAsync) -> None:
    async def main() -> None:
        async with hub_of(api.kubeconfig(tmp_path / "k")) as hub:
            hub.slices.offer(offered_many(10))
            await wait_until_async(lambda: hub.slices_published and len(api.requests("watch")) == 2)
            api.clear_log()
            hub.slices.offer(offered_many(10))
            uids = [PodUid(api.add_pod("d", f"p{index}", node=NODE)) for index in range(20)]
            await wait_until_async(lambda: all(hub.pods.claims_of(uid) is not None for uid in uids))
            assert api.requests() == []
            assert hub.api_error == ""

    run(main())


def test_everything_may_be_called_before_there_is_a_server(
    tmp_path: Path, wait_until_async: WaitUntilAsync
) -> None:
    claim = ClaimRef("d", "c", ClaimUid("u"))

    async def main() -> None:
        kubeconfig = tmp_path / "late"
        hub = hub_of(kubeconfig)
        hub.slices.offer(offered_many(1))
        event = DriverEvent(subject=claim, kind=EventKind.NORMAL, reason="Early", message="m")
        hub.events.emit(event)
        assert hub.pods.claims_of(PodUid("p")) is None
        assert not hub.slices_published
        async with hub:
            with pytest.raises(NotNow, match="kubeconfig"):
                await hub.claims.read_claim(claim)
            await hub.pods.look_up(PodRef("d", "p", PodUid("p")), time.monotonic() + 1)
            hub.statuses.write_status(claim, [status_of(claim, "vf-0")])
            await wait_until_async(lambda: "kubeconfig" in hub.api_error)
            assert dict(hub.requests) == {}
            with SimApi() as api:
                api.add_node(NODE)
                api.kubeconfig(kubeconfig)
                await wait_until_async(lambda: hub.slices_published)
                await wait_until_async(lambda: api.events())
                await wait_until_async(lambda: hub.api_error == "")

    run(main())


def test_many_pod_changes_are_told_in_the_loops_thread_a_few_times(
    api: SimApi, tmp_path: Path, wait_until_async: WaitUntilAsync
) -> None:
    changes: list[str] = []

    async def main() -> None:
        async with hub_of(api.kubeconfig(tmp_path / "k"), changes) as hub:
            await wait_until_async(lambda: len(api.requests("watch")) == 2)
            uids = [PodUid(api.add_pod("d", f"p{index}", node=NODE)) for index in range(100)]
            await wait_until_async(lambda: all(hub.pods.claims_of(uid) is not None for uid in uids))
            await wait_until_async(lambda: changes)

    run(main())
    assert set(changes) == {threading.main_thread().name}
    assert len(changes) <= 100


def test_leaving_is_quick_whatever_the_server_does(api: SimApi, tmp_path: Path) -> None:
    async def main() -> None:
        async with hub_of(api.kubeconfig(tmp_path / "k")) as hub:
            hub.slices.offer(offered_many(1))
            await asyncio.to_thread(_until, lambda: len(api.requests("watch")) == 2)
            api.hang_watches()
            start = time.monotonic()
        assert time.monotonic() - start < 2.0

    run(main())


def test_the_loop_is_never_held_up(api: SimApi, tmp_path: Path, wait_until_async: WaitUntilAsync) -> None:
    """The longest time the loop was not its own, while a thousand devices are offered and published."""
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.005)
            worst = max(worst, time.monotonic() - start)

    async def main() -> None:
        attributes = {f"a{index}": "x" * 40 for index in range(20)}
        devices = [offered(f"vf-{index}", attributes) for index in range(1000)]
        async with hub_of(api.kubeconfig(tmp_path / "k")) as hub:
            await wait_until_async(lambda: len(api.requests("watch")) == 2)
            ticking = asyncio.create_task(tick())
            start = time.monotonic()
            hub.slices.offer(devices)
            assert time.monotonic() - start < 0.05
            await wait_until_async(lambda: hub.slices_published, within=20)
            ticking.cancel()

    run(main())
    assert worst < 0.5


def test_importing_it_does_not_import_the_client_package() -> None:
    """Registration with kubelet must not wait for it."""
    check = "import driver.kube.hub, sys; sys.exit('kubernetes' in sys.modules or 'urllib3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_client_package_costs_no_models() -> None:
    """The generated models cost 25 MiB: nothing may import them by the way."""
    check = (
        "import sys, pathlib, driver.kube.client as c\n"
        "try: c.connect(pathlib.Path('/nonexistent'))\n"
        "except c.failures.Unavailable: pass\n"
        "sys.exit(sum(m.startswith('kubernetes.client.models.') for m in sys.modules) > 5)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)
