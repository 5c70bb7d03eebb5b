"""A strict simulated kubelet: plugin registration, prepare and unprepare, as the real one does them.

Invariant: what it does, a real kubelet may do; what a real kubelet never does is refused
(ImpossibleUse). What it is told is checked more strictly than a real kubelet would (ContractBroken).
Deadlines are absolute, in seconds of time.monotonic().
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

from kndsim.kubelet_check import check_devices, check_error, check_keys
from kndsim.kubelet_claims import ClaimCache, ClaimRecord
from kndsim.kubelet_health import SERVICES as HEALTH_SERVICES
from kndsim.kubelet_health import Health
from kndsim.kubelet_model import (
    Answer,
    ClaimLike,
    ContractBroken,
    ImpossibleUse,
    KubeletError,
    KubeletEvent,
    KubeletTiming,
    LogEntry,
    PluginInfo,
    PrepareFailed,
    SimClaim,
    SimDevice,
    SliceWiper,
    UnprepareFailed,
    Version,
)
from kndsim.kubelet_plugins import PluginStore
from kndsim.kubelet_watch import PluginWatcher, Registry
from kndsim.kubelet_wire import PREPARE, UNPREPARE, CallFailed

__all__ = [
    "ContractBroken",
    "ImpossibleUse",
    "KubeletError",
    "KubeletEvent",
    "KubeletTiming",
    "LogEntry",
    "PrepareFailed",
    "SimClaim",
    "SimDevice",
    "SimKubelet",
    "UnprepareFailed",
    "Version",
]

_POLL = 0.01
_WAIT = 15.0


class SimKubelet:
    """`async with SimKubelet(root, node=...) as kubelet:` runs a kubelet whose root is
    root/var/lib/kubelet.

    prefer: the only version it knows, for an old kubelet; None: v1 and v1beta1. slices: where it deletes
    ResourceSlices, as kubelet does at its start and when a driver is away too long. health: the health
    services it knows, best first.
    """

    def __init__(
        self,
        root: Path,
        *,
        node: str,
        prefer: Literal["v1", "v1beta1"] | None = None,
        timing: KubeletTiming | None = None,
        slices: SliceWiper | None = None,
        health: Sequence[str] = HEALTH_SERVICES,
    ) -> None:
        self.root = root / "var/lib/kubelet"
        self.node = node
        self.log: list[LogEntry] = []
        self._timing = timing or KubeletTiming()
        self._known = (Version(f"{prefer}.DRAPlugin"),) if prefer else tuple(Version)
        self._slices = slices
        self._health = tuple(health)
        self._claims = ClaimCache(self.root / "dra_manager_state")
        self._plugins: PluginStore
        self._watcher: PluginWatcher
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> SimKubelet:
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def restart(self) -> None:
        """Stop and start: plugins are registered anew, what was prepared is no longer known."""
        await self._stop()
        await self._start()

    async def _start(self) -> None:
        self.registry.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._claims.load()
        self._plugins = PluginStore(self._timing, self._record, self._wipe, self._health)
        registry = Registry(self._known, self._plugins.add, self._plugins.remove, self._record)
        self._watcher = PluginWatcher(self.registry, registry, self._timing)
        self._record(KubeletEvent.STARTED, self.node, "")
        self._wipe(None)
        self._watching = asyncio.create_task(self._watcher.run(), name="plugin watcher")

    async def _stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        await self._watcher.stop()
        await self._plugins.close()

    # --- registration -------------------------------------------------------------------------------

    @property
    def registry(self) -> Path:
        return self.root / "plugins_registry"

    def plugin(self, driver: str) -> PluginInfo | None:
        """The registered plugin that a call would go to now."""
        entry = self._plugins.pick(driver)
        return entry.info if entry else None

    async def wait_registered(self, driver: str, deadline: float | None = None) -> PluginInfo:
        """Until the driver is registered and connected. TimeoutError with the log's last words."""
        await self._wait(
            lambda: (entry := self._plugins.pick(driver)) is not None and entry.connected,
            f"{driver} is not registered with the simulated kubelet",
            deadline,
        )
        entry = self._plugins.pick(driver)
        assert entry is not None
        return entry.info

    async def wait_deregistered(self, driver: str, deadline: float | None = None) -> None:
        """Until no plugin of the driver is registered. TimeoutError with the log's last words."""
        text = f"{driver} is still registered with the simulated kubelet"
        await self._wait(lambda: self._plugins.pick(driver) is None, text, deadline)

    def health(self, driver: str) -> Mapping[tuple[str, str], Health]:
        """What it knows now of the health of a driver's devices, by pool and device."""
        entry = self._plugins.pick(driver)
        return entry.health.now() if entry is not None and entry.health is not None else {}

    def health_messages(self, driver: str) -> int:
        """Lists that have come since the driver was registered."""
        entry = self._plugins.pick(driver)
        return entry.health.messages if entry is not None and entry.health is not None else 0

    # --- claims -------------------------------------------------------------------------------------

    async def prepare(
        self, driver: str, claims: Sequence[ClaimLike], *, pod: str = "pod", force: bool = False
    ) -> dict[str, tuple[SimDevice, ...]]:
        """Prepare the claims for a pod (its UID); every claim's devices by claim UID.

        Claims that this run of kubelet holds as prepared are not asked for again, unless force. An empty
        sequence is asked for (liveness probes do). PrepareFailed with the text of the pod's event.
        """
        plugin = self._plugins.pick(driver)
        if plugin is None:
            raise self._failed(driver, claims, PrepareFailed(f"DRA driver {driver} is not registered"))
        try:
            records = self._claims.reference(driver, claims, pod)
            asked = [record.claim for record in records if force or driver not in record.prepared]
            if asked or not claims:
                answers = await plugin.client.prepare(asked, self._timing.call)
                self._take(driver, asked, answers)
            else:
                self._record(KubeletEvent.PREPARE_SKIPPED, driver, "held as prepared", claims)
        except CallFailed as error:
            raise self._failed(driver, claims, PrepareFailed(f"{PREPARE}: {error}")) from error
        except PrepareFailed as error:
            raise self._failed(driver, claims, error) from None
        if asked:
            self._record(KubeletEvent.PREPARED, driver, plugin.info.version, asked)
        return {record.claim.uid: record.drivers[driver] for record in records}

    async def prepare_with_retries(
        self,
        driver: str,
        claims: Sequence[ClaimLike],
        *,
        pod: str = "pod",
        every: float,
        deadline: float,
    ) -> dict[str, tuple[SimDevice, ...]]:
        """As prepare, again every so many seconds (kubelet: 60..90) until it works or the deadline has
        passed. A broken contract is not tried again."""
        while True:
            try:
                return await self.prepare(driver, claims, pod=pod)
            except ContractBroken:
                raise
            except PrepareFailed:
                if time.monotonic() + every >= deadline:
                    raise
            await asyncio.sleep(every)

    async def unprepare(
        self, driver: str, claims: Sequence[ClaimLike], *, pod: str = "pod", force: bool = False
    ) -> tuple[str, ...]:
        """A pod lets go of its claims; the UIDs of those that the driver was asked to unprepare: the
        ones no other pod uses.

        ImpossibleUse if the pod does not use them. force asks for exactly these claims, whatever kubelet
        holds. UnprepareFailed if the driver did not do it; the claims are then still held.
        """
        last: list[ClaimRecord] = [] if force else self._claims.dereference(driver, claims, pod)
        asked: list[ClaimLike] = list(claims) if force else [record.claim for record in last]
        uids = tuple(claim.uid for claim in asked)
        if not asked and claims:
            self._record(KubeletEvent.UNPREPARE_SKIPPED, driver, "other pods use the claims", claims)
            return ()
        plugin = self._plugins.pick(driver)
        try:
            if plugin is None:
                raise UnprepareFailed(f"DRA driver {driver} is not registered")
            answers = await plugin.client.unprepare(asked, self._timing.call)
            self._check(UNPREPARE, uids, answers, UnprepareFailed)
        except CallFailed as error:
            self._record(KubeletEvent.UNPREPARE_FAILED, driver, str(error), asked)
            raise UnprepareFailed(f"{UNPREPARE}: {error}") from error
        except UnprepareFailed as error:
            self._record(KubeletEvent.UNPREPARE_FAILED, driver, str(error), asked)
            raise
        for uid in uids:
            self._claims.drop(driver, uid)
        self._record(KubeletEvent.UNPREPARED, driver, "", asked)
        return uids

    def holds(self, uid: str) -> bool:
        """Whether the claim is in kubelet's checkpoint."""
        return self._claims.get(uid) is not None

    # --- within -------------------------------------------------------------------------------------

    def _take(self, driver: str, asked: Sequence[SimClaim], answers: dict[str, Answer]) -> None:
        """Check a whole response, then hold what it gives: all of it or, like kubelet, none prepared."""
        uids = [claim.uid for claim in asked]
        self._check(PREPARE, uids, answers, PrepareFailed)
        taken = self._claims.cdi_ids_of_others(driver, uids)
        for uid in uids:
            check_devices(uid, answers[uid].devices, taken)
            taken |= {cdi_id: uid for device in answers[uid].devices for cdi_id in device.cdi_ids}
        for uid in uids:
            record = self._claims.get(uid)
            if record is not None:
                record.drivers[driver] = answers[uid].devices
                record.prepared.add(driver)
        self._claims.save()

    def _check(
        self,
        method: str,
        uids: Sequence[str],
        answers: dict[str, Answer],
        failed: type[PrepareFailed] | type[UnprepareFailed],
    ) -> None:
        check_keys(method, uids, answers)
        for uid in uids:
            check_error(method, answers[uid])
        for uid in uids:
            if answers[uid].error:
                raise failed(f"{method} failed for claim {uid}: {answers[uid].error}")

    def _failed(self, driver: str, claims: Sequence[ClaimLike], error: PrepareFailed) -> PrepareFailed:
        self._record(KubeletEvent.PREPARE_FAILED, driver, str(error), claims)
        return error

    def _wipe(self, driver: str | None) -> None:
        self._record(KubeletEvent.SLICES_WIPED, driver or "", "" if driver else "kubelet started")
        if self._slices is not None:
            self._slices.wipe_slices(self.node, driver)

    def _record(
        self, event: KubeletEvent, subject: str, detail: str, claims: Sequence[ClaimLike] = ()
    ) -> None:
        uids = tuple(claim.uid for claim in claims)
        self.log.append(
            LogEntry(at=time.monotonic(), event=event, subject=subject, detail=detail, claims=uids)
        )

    async def _wait(self, done: Callable[[], bool], text: str, deadline: float | None) -> None:
        until = time.monotonic() + _WAIT if deadline is None else deadline
        while not done():
            if time.monotonic() >= until:
                last = "; ".join(f"{entry.event} {entry.subject} {entry.detail}" for entry in self.log[-5:])
                raise TimeoutError(f"{text}; its log ends: {last}")
            await asyncio.sleep(_POLL)
