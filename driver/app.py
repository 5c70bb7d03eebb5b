"""The composition root: the one place where real ports are made and plugged in, in order.

Invariant: what is started is stopped in reverse, and a stop leaves nothing half done: sockets gone,
records closed, attached devices in their pods and still counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from bpf.accounting import Accounting
from bpf.attach import TcxPrograms, probe_tcx
from bpf.cache import ProgramCache
from bpf.layout import Hook
from driver.cdi import CdiProjection, LiveFiles
from driver.clock import Clock, SystemClock
from driver.errors import DriverError
from driver.execute.actions import NodeActs
from driver.execute.engine import Engine, Observer, Point
from driver.journal.ledger import Ledger
from driver.journal.store import Journal
from driver.kube.hub import KubeHub
from driver.kubelet.plugin import KubeletPlugin, make_plugin_dir
from driver.kubelet.takeover import TakeoverLock
from driver.lifecycle.book import Book
from driver.lifecycle.context import Context
from driver.lifecycle.core import Lifecycle
from driver.lifecycle.devices import Devices
from driver.lifecycle.usage import Usage
from driver.lifecycle.workers import DeviceWorkers
from driver.metrics import Metrics, MetricsServer
from driver.model import BootId, PoolName
from driver.nri.plugin import NriPlugin
from driver.policy import NodePolicy, PolicyFile
from driver.qos import class_maps
from driver.settings import HookChoice, Settings
from hw.monitor import LinkMonitor
from hw.netns import host_netns
from hw.sysfs import Sysfs

log = logging.getLogger(__name__)

TAKEOVER_PATIENCE = 10.0
"""Seconds to wait for an agent that is stopping."""
STOP_PATIENCE = 20.0
"""Seconds for work in hand at a stop; under a pod's default grace of 30."""
POLICY_EVERY = 5.0
"""Seconds between looks at the policy file's identity: a ConfigMap is swapped at most once a minute."""


class StepObserver:
    """What the engine tells: nothing is listening but the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def at(self, point: Point, owner: str, act: str) -> None:
        pass

    def step_done(self, step: str, seconds: float, outcome: str) -> None:
        self._metrics.step_done(step, seconds, outcome)


@dataclass(slots=True)
class Parts:
    """What readiness looks at."""

    lifecycle: Lifecycle
    kubelet: KubeletPlugin
    nri: NriPlugin
    hub: KubeHub

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
            log.info("serving as %s on node %s", self._paths.driver, self._settings.node)
            await self._stopping.wait()
            log.info("stopping: attached devices stay in their pods")

    async def _start(self, stack: AsyncExitStack) -> None:
        for folder in (self._paths.state, self._paths.run):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_plugin_dir(self._paths)
        lock = stack.enter_context(TakeoverLock(self._paths, self._clock))
        await lock.acquire(self._clock.monotonic() + TAKEOVER_PATIENCE)

        policy_file = PolicyFile(self._settings.policy)
        boot_id = read_boot_id(self._paths.proc)
        journal = stack.enter_context(
            Journal.open(self._paths.journal, mirror=self._paths.run / "mirror", boot_id=boot_id)
        )
        ledger = stack.enter_context(Ledger.open(self._paths.ledger))
        hub = await stack.enter_async_context(self._make_hub())
        lifecycle = self._make_lifecycle(stack, policy_file, boot_id, journal, ledger, hub)
        await lifecycle.start()
        stack.push_async_callback(self._stop_lifecycle, lifecycle)
        self._lifecycle = lifecycle
        await self._serve(stack, lifecycle, hub, policy_file)

    async def _serve(
        self, stack: AsyncExitStack, lifecycle: Lifecycle, hub: KubeHub, policy_file: PolicyFile
    ) -> None:
        nri = NriPlugin(
            socket=self._paths.nri_socket, handler=lifecycle, clock=self._clock, observer=self._metrics
        )
        kubelet = KubeletPlugin(
            paths=self._paths, handler=lifecycle, clock=self._clock, observer=self._metrics
        )
        parts = Parts(lifecycle, kubelet, nri, hub)
        server = stack.enter_context(
            MetricsServer(self._metrics, port=self._settings.metrics_port, unready=parts.unready)
        )
        log.info("metrics on http://127.0.0.1:%d/metrics", server.port)
        await stack.enter_async_context(kubelet)
        await stack.enter_async_context(background(nri.run(), "nri"))
        await stack.enter_async_context(background(watch_links(lifecycle), "links"))
        await stack.enter_async_context(background(watch_policy(lifecycle, policy_file), "policy"))

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

    def _make_lifecycle(
        self,
        stack: AsyncExitStack,
        policy_file: PolicyFile,
        boot_id: BootId,
        journal: Journal,
        ledger: Ledger,
        hub: KubeHub,
    ) -> Lifecycle:
        def policy() -> NodePolicy:
            return policy_file.current

        programs = ProgramCache(self._paths.program_cache).ensure()
        accounting = stack.enter_context(
            Accounting.open(self._paths.pins, programs, slots=self._settings.slots)
        )
        classes = class_maps(policy().classes)
        accounting.set_classes(classes.dscp, classes.pcp)
        hook = self._choose_hook(policy())
        tcx = TcxPrograms(self._paths.pins, accounting) if hook is Hook.TCX else None
        book = Book(journal, slots=self._settings.slots)
        usage = Usage(
            book=book,
            ledger=ledger,
            accounting=accounting,
            clock=self._clock,
            hook=hook,
            class_names=classes.names,
        )
        acts = NodeActs(hook=hook, accounting=accounting, programs=tcx, fold=usage.fold)
        self._metrics.watch_pods(usage.samples)
        return Lifecycle(
            Context(
                driver=self._paths.driver,
                pool=PoolName(self._settings.node),
                boot_id=boot_id,
                paths=self._paths,
                clock=self._clock,
                hook=hook,
                policy=policy,
                host_netns=stack.enter_context(host_netns(proc=self._paths.proc)),
                book=book,
                ledger=ledger,
                engine=Engine(journal=journal, acts=acts.table(), clock=self._clock, observer=self._observer),
                workers=DeviceWorkers(self._clock),
                devices=Devices(Sysfs(self._paths.sysfs), policy),
                accounting=accounting,
                programs=tcx,
                cdi=CdiProjection(self._paths),
                live=LiveFiles(self._paths),
                claims=hub.claims,
                pods=hub.pods,
                statuses=hub.statuses,
                events=hub.events,
                slices=hub.slices,
                telemetry=self._metrics,
            ),
            journal,
            usage,
        )

    def _choose_hook(self, policy: NodePolicy) -> Hook:
        """The flag wins over the policy; auto asks the kernel by a trial attach."""
        wanted = self._settings.hook if self._settings.hook is not HookChoice.AUTO else policy.hook
        if wanted == HookChoice.CLSACT:
            return Hook.CLSACT
        found = probe_tcx()
        if wanted == HookChoice.TCX and found is not Hook.TCX:
            raise DriverError("tcx was asked for and this kernel has none: use --hook clsact or auto")
        log.info("counting at %s", found)
        return found

    async def _stop_lifecycle(self, lifecycle: Lifecycle) -> None:
        await lifecycle.stop(self._clock.monotonic() + STOP_PATIENCE)


def read_boot_id(proc: Path) -> BootId:
    return BootId((proc / "sys/kernel/random/boot_id").read_text().strip())


async def watch_links(lifecycle: Lifecycle) -> None:
    """Feed link events to the lifecycle; several that come together are one look."""
    with LinkMonitor() as monitor:
        async for changed in monitor:
            await lifecycle.links_changed(changed)


async def watch_policy(lifecycle: Lifecycle, policy_file: PolicyFile) -> None:
    """Reload the policy when its file changes; a bad one leaves the last good one in force."""
    while True:
        lifecycle.gate.policy_problem = policy_file.problem
        await asyncio.sleep(POLICY_EVERY)
        if policy_file.reload() is not None:
            log.info("the node policy changed")
            await lifecycle.links_changed(None)


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
