"""The composition root: the one place where real ports are made and plugged in, in order.

Invariant: what is started is stopped in reverse, and a stop leaves nothing half done: sockets gone,
records closed, attached devices in their pods and still counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from driver import running
from driver.assembly import Outside, assemble, make_folders, set_rdma_mode
from driver.clock import Clock, SystemClock, beat
from driver.execute.engine import EXPECTED, Observer, Point
from driver.kube.hub import KubeHub
from driver.kubelet.plugin import KubeletPlugin, make_plugin_dir
from driver.kubelet.takeover import TakeoverLock
from driver.lifecycle.core import Lifecycle
from driver.lifecycle.ports import EventSink
from driver.metrics import Metrics, MetricsServer
from driver.model import DriverEvent
from driver.nri.plugin import NriPlugin
from driver.paths import Paths
from driver.policy import PolicyFile
from driver.running import Running
from driver.settings import Settings
from hw.model import LinkInfo
from hw.monitor import LinkMonitor

log = logging.getLogger(__name__)

TAKEOVER_PATIENCE = 10.0
"""Seconds to wait for an agent that is stopping."""
STOP_PATIENCE = 20.0
"""Seconds for work in hand at a stop; under a pod's default grace of 30."""
POLICY_EVERY = 1.0
"""Seconds between looks at the policy file's identity, which cost nothing: limits change with it."""


class StepObserver:
    """What the engine tells: nothing is listening but the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def at(self, point: Point, owner: str, act: str) -> None:
        pass

    def step_done(self, step: str, seconds: float, outcome: str) -> None:
        self._metrics.step_done(step, seconds, outcome)


@dataclass(frozen=True, slots=True)
class CountedEvents:
    """A sink whose events are counted by their reason, also those that the cluster never gets."""

    sink: EventSink
    metrics: Metrics

    def emit(self, event: DriverEvent) -> None:
        self.metrics.event(event.reason)
        self.sink.emit(event)


@dataclass(slots=True)
class Parts:
    """What readiness looks at."""

    lifecycle: Lifecycle
    kubelet: KubeletPlugin
    nri: NriPlugin
    hub: KubeHub
    netns_check: Path

    def unready(self) -> tuple[str, ...]:
        """Every reason why a pod could not be given a device now, one sentence each; empty is ready."""
        reasons = []
        if not self.kubelet.registered:
            reasons.append(f"kubelet: {self.kubelet.registration_error or 'not registered yet'}")
        if not self.nri.connected:
            reasons.append("NRI: not connected to the container runtime")
        if not self.hub.slices_published:
            reasons.append(f"API server: slices not published yet {self.hub.api_error}".rstrip())
        gate = self.lifecycle.gate
        if gate.recovery:
            reasons.append(f"journal: {gate.recovery}")
        if not gate.settled:
            reasons.append("the node is being compared with the journal")
        if gate.policy_problem:
            reasons.append(f"policy: {gate.policy_problem}")
        if not os.access(self.netns_check, os.X_OK):
            reasons.append(f"{self.netns_check} is missing: containers with a claim would not start")
        return tuple(reasons)


class App:
    """`await App(settings).run()`: the agent, from start to the signal that ends it."""

    def __init__(
        self, settings: Settings, *, clock: Clock | None = None, observer: Observer | None = None
    ) -> None:
        self._settings = settings
        self._paths = settings.paths
        self._clock = clock or SystemClock()
        self._metrics = Metrics()
        self._observer = observer or StepObserver(self._metrics)
        self._stopping = asyncio.Event()
        self._lifecycle: Lifecycle | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. DriverError, BpfError or OSError if it cannot start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        async with AsyncExitStack() as stack:
            await self._start(stack)
            # What is there by now stays: a full collection, which may come amid a hook or a scrape, would go
            # through all of it each time.
            gc.collect()
            gc.freeze()
            log.info("serving as %s on node %s", self._paths.driver, self._settings.node)
            await self._stopping.wait()
            log.info("stopping: attached devices stay in their pods")

    async def _start(self, stack: AsyncExitStack) -> None:
        make_folders(self._settings)
        make_plugin_dir(self._paths)
        lock = stack.enter_context(TakeoverLock(self._paths, self._clock))
        await lock.acquire(self._clock.monotonic() + TAKEOVER_PATIENCE)
        policy_file = PolicyFile(self._settings.policy)
        hub = await stack.enter_async_context(self._make_hub())
        sync_stack = stack.enter_context(ExitStack())
        outside = Outside(
            claims=hub.claims,
            pods=hub.pods,
            statuses=hub.statuses,
            events=CountedEvents(hub.events, self._metrics),
            slices=hub.slices,
            telemetry=self._metrics,
            observer=self._observer,
        )
        set_rdma_mode(self._paths, policy_file.current)
        made = assemble(sync_stack, self._settings, policy_file, self._clock, outside)
        self._metrics.watch_pods(made.usage.samples)
        self._metrics.watch_meters(made.metering.samples, made.metering.unaccounted)
        self._metrics.watch_rdma_resources(made.lifecycle.resources.of_pods, made.lifecycle.resources.shared)
        self._metrics.watch_recovery(lambda: made.lifecycle.gate.recovery)
        self._metrics.watch_published(lambda: hub.slices_published)
        self._metrics.watch_api_requests(lambda: hub.requests)
        self._metrics.watch_events_dropped(lambda: hub.events_dropped)
        self._metrics.watch_devices(made.lifecycle.device_counts)
        self._metrics.watch_unhealthy(made.lifecycle.unhealthy_counts)
        self._metrics.watch_limits(made.lifecycle.keeping.limits)
        self._metrics.watch_bandwidth(made.lifecycle.port_bandwidth)
        self._metrics.watch_dropped(made.lifecycle.keeping.dropped)
        self._metrics.watch_waiting(made.lifecycle.keeping.waiting)
        monitor = stack.enter_context(LinkMonitor())
        await made.lifecycle.start()
        stack.push_async_callback(self._stop_lifecycle, made.lifecycle)
        self._lifecycle = made.lifecycle
        await stack.enter_async_context(background(watch_links(made.lifecycle, monitor), "links"))
        await self._serve(stack, made.lifecycle, hub, policy_file)

    async def _serve(
        self, stack: AsyncExitStack, lifecycle: Lifecycle, hub: KubeHub, policy_file: PolicyFile
    ) -> None:
        nri = NriPlugin(
            socket=self._paths.nri_socket, handler=lifecycle, clock=self._clock, observer=self._metrics
        )
        kubelet = KubeletPlugin(
            paths=self._paths,
            handler=lifecycle,
            health=lifecycle.health,
            clock=self._clock,
            observer=self._metrics,
        )
        parts = Parts(lifecycle, kubelet, nri, hub, self._paths.netns_check)
        server = stack.enter_context(
            MetricsServer(self._metrics, port=self._settings.metrics_port, unready=parts.unready)
        )
        log.info("metrics on http://127.0.0.1:%d/metrics", server.port)
        await stack.enter_async_context(kubelet)
        await stack.enter_async_context(background(nri.run(), "nri"))

        def now() -> Running:
            return Running(
                pid=os.getpid(),
                node=self._settings.node,
                hook=lifecycle.hook,
                policy_file=str(policy_file.path or ""),
                policy=policy_file.text,
                policy_problem=policy_file.problem,
                has_counters=hub.server.has_counters,
                has_shares=hub.server.has_shares,
            )

        tell = partial(tell_others, self._paths, now)
        await stack.enter_async_context(background(watch_policy(lifecycle, policy_file, tell), "policy"))

    def _make_hub(self) -> KubeHub:
        return KubeHub(
            driver=self._paths.driver,
            node=self._settings.node,
            kubeconfig=self._settings.kubeconfig,
            clock=self._clock,
            on_pods_changed=self._pods_changed,
        )

    def _pods_changed(self) -> None:
        if self._lifecycle is not None:
            self._lifecycle.pods_changed()

    async def _stop_lifecycle(self, lifecycle: Lifecycle) -> None:
        await lifecycle.stop(self._clock.monotonic() + STOP_PATIENCE)


async def watch_links(lifecycle: Lifecycle, monitor: LinkMonitor) -> None:
    """Feed link events to the lifecycle; several that come together are one look. What could not be looked
    at is part of the next look, which is then at everything."""
    missed = False

    def is_nothing(link: LinkInfo) -> bool:
        return not missed and lifecycle.is_strange(link)

    async for changed in monitor.hear(is_nothing):
        try:
            await lifecycle.links_changed(None if missed else changed)
            missed = False
        except EXPECTED as error:
            missed = True
            log.error("links changed and cannot be looked at: %s", error)


async def watch_policy(
    lifecycle: Lifecycle, policy_file: PolicyFile, tell: Callable[[Running | None], Running]
) -> None:
    """Reload the policy when its file changes; a bad one leaves the last good one in force. Others are told
    of it, and of what else of this agent changes."""
    told: Running | None = None
    while True:
        lifecycle.gate.policy_problem = policy_file.problem
        told = tell(told)
        await beat(POLICY_EVERY)
        if policy_file.reload() is not None:
            log.info("the node policy changed")
            try:
                await lifecycle.policy_changed()
            except EXPECTED as error:
                log.error("the new node policy is in force in part only: %s", error)


def tell_others(paths: Paths, now: Callable[[], Running], told: Running | None) -> Running:
    """Keep the file up to date from which other commands know of this agent, and say what is in it."""
    if (current := now()) != told:
        running.write(paths, current)
    return current


@contextlib.asynccontextmanager
async def background(work: Coroutine[object, object, None], name: str) -> AsyncIterator[None]:
    """Run work beside the body and end it after. If it ends by itself, that is a bug and is logged."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(_log_end)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the %s task failed", task.get_name(), exc_info=task.exception())
