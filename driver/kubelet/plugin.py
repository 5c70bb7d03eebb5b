"""The driver as kubelet sees it: two sockets, up in the right order and gone in the right order.

Invariant: the registration socket exists only while the DRA socket answers. Kubelet calls as soon as
it has seen the first, and takes its absence as the plugin's farewell.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType

from driver.errors import DriverError
from driver.kubelet.dra import DraService
from driver.kubelet.health import SERVICES, HealthService
from driver.kubelet.observer import CallObserver, Unobserved
from driver.kubelet.registration import Registration
from driver.kubelet.server import SocketServer
from driver.kubelet.wire import DIALECTS
from driver.lifecycle.ports import ClaimHandler, Clock, HealthSource
from driver.paths import Paths

__all__ = ["CallObserver", "KubeletPlugin", "make_plugin_dir"]

CALL_GRACE = 5.0
"""Seconds that calls in flight get at exit."""
INFO_GRACE = 0.5
WORK_GRACE = 2.0
"""Seconds that work whose call is over gets at exit, and once more after it was cancelled."""


class KubeletPlugin:
    """`async with KubeletPlugin(...)`: offered to kubelet inside, withdrawn after.

    DriverError if a socket's path is too long or its directory cannot be used. The caller holds the
    TakeoverLock: two plugins with the same paths take each other's sockets away.
    """

    def __init__(
        self,
        *,
        paths: Paths,
        handler: ClaimHandler,
        health: HealthSource,
        clock: Clock,
        observer: CallObserver | None = None,
    ) -> None:
        seen = observer or Unobserved()
        self._paths = paths
        self._dra = DraService(handler=handler, clock=clock, observer=seen)
        self._health = HealthService(health)
        self._registration = Registration(
            driver=paths.driver,
            endpoint=paths.dra_socket.absolute(),
            # A kubelet takes the first that it knows for the service itself, so those come first.
            versions=[*(dialect.version for dialect in DIALECTS), *SERVICES],
            observer=seen,
        )
        self._door: SocketServer | None = None
        self._stack = AsyncExitStack()

    @property
    def registered(self) -> bool:
        """Whether kubelet, since this start, said that it uses the driver and can still reach it."""
        return not self.registration_error

    @property
    def registration_error(self) -> str:
        """Why registered is false, one line, or ""."""
        if self._door is None:
            return "the driver is not offered to kubelet now"
        if not self._door.in_place:
            return (
                f"{self._paths.registration_socket} was removed or replaced by another process: "
                "restart the agent"
            )
        return self._registration.error

    @property
    def busy(self) -> int:
        """Calls of kubelet's that are worked on, those that it gave up on included."""
        return self._dra.busy

    async def __aenter__(self) -> KubeletPlugin:
        try:
            self._paths.check_sockets()
        except ValueError as error:
            raise DriverError(str(error)) from error
        make_plugin_dir(self._paths)
        _make_dir(self._paths.kubelet_registry, 0o755)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._dra.drain, WORK_GRACE)
            handlers = (*self._dra.handlers(), *self._health.handlers())
            await stack.enter_async_context(SocketServer(self._paths.dra_socket, handlers, grace=CALL_GRACE))
            stack.callback(self._health.close)
            self._door = await stack.enter_async_context(
                SocketServer(self._paths.registration_socket, self._registration.handlers(), grace=INFO_GRACE)
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._door = None
        await self._stack.aclose()


def make_plugin_dir(paths: Paths) -> None:
    """Make the driver's own folder below kubelet's, for root only. DriverError if that fails."""
    _make_dir(paths.plugin_dir, 0o750)
    try:
        # A pod's hostPath mount makes it 0755; what is in it is for root only.
        paths.plugin_dir.chmod(0o750)
    except OSError as error:
        raise DriverError(
            f"the directory {paths.plugin_dir} cannot be closed to others ({error.strerror}): "
            "it must belong to the agent's user"
        ) from error


def _make_dir(path: Path, mode: int) -> None:
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise DriverError(
            f"the directory {path} cannot be made ({error.strerror}): "
            "check that kubelet's root is mounted there and writable"
        ) from error
