"""Putting the lifecycle together on this node: journal, ledger, maps, programs; for the agent and cleanup.

Invariant: the caller holds the TakeoverLock: two of these on one root would write one journal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bpf.accounting import Accounting
from bpf.attach import TcxPrograms, probe_tcx
from bpf.cache import ProgramCache
from bpf.layout import Hook
from bpf.parked import Parked
from driver.cdi import CdiProjection, LiveFiles
from driver.clock import Clock
from driver.errors import DriverError
from driver.execute.actions import NodeActs
from driver.execute.engine import Engine, Observer
from driver.execute.foreign import Foreign
from driver.execute.glance import Glance
from driver.execute.ipoib import find_child
from driver.execute.meters import NodeMeters
from driver.execute.probe import Host
from driver.execute.shape import Shaper
from driver.journal.ledger import Ledger
from driver.journal.reserve import Reserve
from driver.journal.store import Journal
from driver.lifecycle.book import Book
from driver.lifecycle.context import Context, Telemetry
from driver.lifecycle.core import Lifecycle
from driver.lifecycle.devices import Devices
from driver.lifecycle.metering import Metering
from driver.lifecycle.ports import ClaimReader, EventSink, PodDirectory, SlicePublisher, StatusWriter
from driver.lifecycle.rdma import NodeRdma
from driver.lifecycle.usage import Usage
from driver.lifecycle.workers import DeviceWorkers
from driver.model import BootId, PoolName
from driver.paths import Paths
from driver.policy import NodePolicy, PolicyFile
from driver.provision.carry_out import Provision
from driver.qos import class_maps
from driver.settings import HookChoice, Settings
from hw.netns import host_netns
from hw.sysfs import Sysfs
from hw.udev import Udev

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """The cluster's side of the lifecycle's ports, and who listens."""

    claims: ClaimReader
    pods: PodDirectory
    statuses: StatusWriter
    events: EventSink
    slices: SlicePublisher
    telemetry: Telemetry
    observer: Observer


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What was put together; closed with the stack it was made on."""

    lifecycle: Lifecycle
    context: Context
    usage: Usage
    metering: Metering
    journal: Journal


def _policy_of(file: PolicyFile) -> Callable[[], NodePolicy]:
    """The one in force whenever it is asked for."""
    return lambda: file.current


def assemble(
    stack: ExitStack, settings: Settings, policy_file: PolicyFile, clock: Clock, outside: Outside
) -> Assembly:
    """DriverError, BpfError, HwError or OSError, each a sentence, if this node cannot do it."""
    paths = settings.paths
    boot_id = read_boot_id(paths.proc)
    journal, ledger = open_records(stack, paths, boot_id)
    accounting = _accounting(stack, settings, policy_file)
    hook = choose_hook(settings.hook, policy_file.current)
    tcx = TcxPrograms(paths.pins, accounting) if hook is Hook.TCX else None
    book = Book(journal, slots=settings.slots)
    usage = _usage(book, ledger, accounting, clock, hook, policy_file, outside.pods)
    sysfs, policy = Sysfs(paths.sysfs), _policy_of(policy_file)
    shaper = Shaper(accounting, lambda: policy().qos)
    host = Host(sysfs, Udev(paths.udev))
    foreign = Foreign(Parked(paths.pins), tcx, lambda: policy().foreign_programs)
    meters = NodeMeters(host, boot_id, shaper.dropped, partial(find_child, tcx))
    metering = Metering(book, ledger, clock, meters, Glance(accounting.limits, meters), accounting.read)
    acts = NodeActs(
        hook=hook,
        accounting=accounting,
        programs=tcx,
        fold=usage.fold,
        meters=metering,
        host=host,
        shaper=shaper,
        foreign=foreign,
    )
    context = Context(
        driver=paths.driver,
        pool=PoolName(settings.node),
        boot_id=boot_id,
        paths=paths,
        clock=clock,
        hook=hook,
        policy=policy,
        host_netns=stack.enter_context(host_netns(proc=paths.proc)),
        book=book,
        ledger=ledger,
        engine=Engine(journal=journal, acts=acts.table(), clock=clock, observer=outside.observer),
        shaper=shaper,
        foreign=foreign,
        workers=DeviceWorkers(clock),
        devices=Devices(sysfs, policy),
        rdma=NodeRdma(host),
        provision=Provision(sysfs, paths, boot_id),
        accounting=accounting,
        programs=tcx,
        cdi=CdiProjection(paths),
        live=LiveFiles(paths),
        claims=outside.claims,
        pods=outside.pods,
        statuses=outside.statuses,
        events=outside.events,
        slices=outside.slices,
        telemetry=outside.telemetry,
    )
    lifecycle = Lifecycle(context, journal, usage, metering)
    lifecycle.gate.policy_problem = policy_file.problem
    return Assembly(lifecycle=lifecycle, context=context, usage=usage, metering=metering, journal=journal)


def _accounting(stack: ExitStack, settings: Settings, policy_file: PolicyFile) -> Accounting:
    """Open, and counting by the policy's classes."""
    programs = ProgramCache(settings.paths.program_cache).ensure()
    opened = stack.enter_context(Accounting.open(settings.paths.pins, programs, slots=settings.slots))
    classes = class_maps(policy_file.current.classes)
    opened.set_classes(classes.dscp, classes.pcp)
    return opened


def _usage(
    book: Book,
    ledger: Ledger,
    accounting: Accounting,
    clock: Clock,
    hook: Hook,
    policy_file: PolicyFile,
    pods: PodDirectory,
) -> Usage:
    return Usage(
        book=book,
        ledger=ledger,
        accounting=accounting,
        clock=clock,
        hook=hook,
        class_names=class_maps(policy_file.current.classes).names,
        policy=lambda: policy_file.current.usage,
        labels_of=pods.labels_of,
    )


def set_rdma_mode(paths: Paths, policy: NodePolicy) -> None:
    """Before anything here makes a network namespace, if only for a trial: then the kernel refuses."""
    NodeRdma(Host(Sysfs(paths.sysfs), Udev(paths.udev))).apply(policy.rdma)


def open_records(stack: ExitStack, paths: Paths, boot_id: BootId) -> tuple[Journal, Ledger]:
    with Reserve(paths.reserve):
        journal = stack.enter_context(
            Journal.open(
                paths.journal, mirror=paths.run / "mirror", boot_id=boot_id, traces=lambda: traces(paths)
            )
        )
        ledger = stack.enter_context(Ledger.open(paths.ledger, expected=journal.used))
    return journal, ledger


def traces(paths: Paths) -> str:
    """What tells, apart from the records, that an agent has given devices away since the node was booted:
    the end of a sentence, or ""."""
    claims = CdiProjection(paths).claims() | LiveFiles(paths).claims()
    if claims:
        return f"{len(claims)} claims have CDI specs or live files"
    pins = [*paths.pins.glob("links/*"), *paths.pins.glob("*/links/*")]
    return f"programs are pinned for devices ({len(pins)} links)" if pins else ""


def choose_hook(flag: HookChoice, policy: NodePolicy) -> Hook:
    """The flag wins over the policy; auto asks the kernel by a trial attach."""
    wanted = flag if flag is not HookChoice.AUTO else HookChoice(policy.hook.value)
    if wanted is HookChoice.CLSACT:
        return Hook.CLSACT
    found = probe_tcx()
    if wanted is HookChoice.TCX and found is not Hook.TCX:
        raise DriverError("tcx was asked for and this kernel has none: use --hook clsact or auto")
    log.info("counting at %s", found)
    return found


def read_boot_id(proc: Path) -> BootId:
    return BootId((proc / "sys/kernel/random/boot_id").read_text().strip())


def make_folders(settings: Settings) -> None:
    """The root-only folders everything else is in; also where kubelet made them, which lets everyone look."""
    for folder in (settings.paths.state, settings.paths.run):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
