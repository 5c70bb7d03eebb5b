"""One connection to the runtime, from registration to its end.

Invariant: every call of the Plugin service is answered; the session counts as connected from the answer
to the last part of Synchronize until the connection ends, and the handler is told of both, once each.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from driver.lifecycle.ports import Clock, SandboxHandler
from driver.model import Sandbox
from driver.nri import api
from driver.nri.api import Hook, Inventory
from driver.nri.hooks import DEFAULT_REQUEST_TIMEOUT, HookRunner, Outcome, answer_by
from driver.nri.mux import WireError
from driver.nri.transport import Reply, Trunk
from driver.nri.ttrpc import CallFailed, Code, Request, Response
from driver.pb.nri.v1 import api_pb2 as pb

log = logging.getLogger(__name__)

REGISTER_SECONDS = 30.0
"""The runtime takes plugins one after another and waits up to 5 s for each silent one."""
SYNCHRONIZE_SECONDS = 15.0
"""Old runtimes leave a plugin connected and without events when synchronizing fails."""
DRAIN_SECONDS = 2.0

Method = Callable[[Request, float], Awaitable[Reply]]


class RegistrationRefused(WireError):
    """The runtime does not take this plugin; asking again with the same name and index is pointless."""


class Session:
    """serve() answers the runtime; run() is the connection's whole life."""

    def __init__(self, handler: SandboxHandler, hooks: HookRunner, clock: Clock) -> None:
        self.connected = False
        self.synchronized = False
        """It has been connected at least once."""
        self._handler = handler
        self._hooks = hooks
        self._clock = clock
        self._request_timeout = DEFAULT_REQUEST_TIMEOUT
        self._runtime = ("", "")
        self._inventory = Inventory()
        self._ended = False
        self._watchdog: asyncio.Timeout | None = None
        self._reading: asyncio.Task[None] | None = None
        self._methods: dict[str, Method] = {
            "Configure": self._configure,
            "Synchronize": self._synchronize,
            "Shutdown": self._shutdown,
            "StateChange": self._state_change,
            Hook.CREATE: self._create_container,
            Hook.RUN: functools.partial(self._pod_call, Hook.RUN, pb.RunPodSandboxRequest),
            Hook.STOP: functools.partial(self._pod_call, Hook.STOP, pb.StopPodSandboxRequest),
            Hook.REMOVE: functools.partial(self._pod_call, Hook.REMOVE, pb.RemovePodSandboxRequest),
        }

    async def run(self, socket: Path, name: str, index: str) -> None:
        """Return when the runtime has closed the connection, or asked for it.

        OSError if it cannot be reached, RegistrationRefused, other WireError when it broke. Cancelled: the
        calls being served are still answered.
        """
        async with await Trunk.connect(socket, self.serve, self._clock.monotonic) as trunk:
            try:
                await self._converse(trunk, name, index)
            except asyncio.CancelledError:
                self._end()
                await trunk.drain(DRAIN_SECONDS)
                raise
            finally:
                self._end()

    async def serve(self, request: Request, received: float) -> Reply:
        """Answer one call of the runtime."""
        if request.service != api.PLUGIN_SERVICE:
            return Reply(Response(b"", Code.UNIMPLEMENTED, f"service {request.service}"))
        method = self._methods.get(request.method)
        if method is None:
            if request.method in api.EMPTY_METHODS:
                return Reply(Response())
            return Reply(Response(b"", Code.UNIMPLEMENTED, f"method {request.method}"))
        try:
            return await method(request, received)
        except DecodeError as error:
            return Reply(Response(b"", Code.INTERNAL, f"error unmarshalling payload: {error}"))

    async def _converse(self, trunk: Trunk, name: str, index: str) -> None:
        # Configure may come before the answer to RegisterPlugin, so reading starts first.
        reading = asyncio.create_task(trunk.read_until_closed(), name="nri reader")
        self._reading = reading
        try:
            async with asyncio.timeout(REGISTER_SECONDS) as self._watchdog:
                await self._register(trunk, name, index)
                self._arm_watchdog()
                await asyncio.wait({reading})
        except TimeoutError:
            raise WireError("the runtime took the plugin but did not synchronize it in time") from None
        finally:
            self._ended = True
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if not reading.cancelled():
            reading.result()

    async def _register(self, trunk: Trunk, name: str, index: str) -> None:
        message = pb.RegisterPluginRequest(plugin_name=name, plugin_idx=index)
        try:
            await trunk.call(
                api.RUNTIME_SERVICE, "RegisterPlugin", message.SerializeToString(), REGISTER_SECONDS
            )
        except CallFailed as error:
            raise RegistrationRefused(f"the runtime refused plugin {index}-{name}: {error.text}") from error

    def _arm_watchdog(self) -> None:
        if not self.connected:
            self._set_watchdog(asyncio.get_running_loop().time() + SYNCHRONIZE_SECONDS)

    def _set_watchdog(self, when: float | None) -> None:
        # A call may still be served while the connection is being left.
        if self._watchdog is not None and not self._ended and not self._watchdog.expired():
            self._watchdog.reschedule(when)

    def _end(self) -> None:
        """The connection is over or about to be closed."""
        self._ended = True
        if self.connected:
            self.connected = False
            self._handler.runtime_lost()

    # --- the Plugin service -------------------------------------------------------------------------

    async def _configure(self, request: Request, received: float) -> Reply:
        message = pb.ConfigureRequest.FromString(request.payload)
        self._runtime = (message.runtime_name, message.runtime_version)
        if message.request_timeout > 0:
            self._request_timeout = message.request_timeout / 1000
        self._arm_watchdog()
        return Reply(Response(pb.ConfigureResponse(events=api.EVENT_MASK).SerializeToString()))

    async def _synchronize(self, request: Request, received: float) -> Reply:
        message = pb.SynchronizeRequest.FromString(request.payload)
        self._inventory.add(message)
        if message.more:
            self._arm_watchdog()
            return Reply(Response(pb.SynchronizeResponse(more=True).SerializeToString()))
        inventory, self._inventory = self._inventory, Inventory()
        return Reply(Response(), functools.partial(self._synchronized, inventory))

    def _synchronized(self, inventory: Inventory) -> None:
        if self._ended:
            return
        if not self.connected:
            self._handler.runtime_connected(*self._runtime)
            self.connected = self.synchronized = True
            log.info("connected to %s %s, %d sandboxes", *self._runtime, len(inventory.sandboxes))
        self._set_watchdog(None)
        work = self._handler.synchronize(inventory.sandboxes, inventory.containers)
        self._hooks.background(work, "Synchronize")

    async def _shutdown(self, request: Request, received: float) -> Reply:
        log.warning("the runtime asked the plugin to shut down; closing this connection")

        def stop_reading() -> None:
            if self._reading is not None:
                self._reading.cancel()

        return Reply(Response(), stop_reading)

    async def _state_change(self, request: Request, received: float) -> Reply:
        message = pb.StateChangeEvent.FromString(request.payload)
        hook = api.HOOK_OF_EVENT.get(int(message.event))
        if hook is None:
            return Reply(Response())
        return await self._pod_event(hook, message.pod, request, received)

    async def _pod_call(
        self,
        hook: Hook,
        kind: type[pb.RunPodSandboxRequest | pb.StopPodSandboxRequest | pb.RemovePodSandboxRequest],
        request: Request,
        received: float,
    ) -> Reply:
        return await self._pod_event(hook, kind.FromString(request.payload).pod, request, received)

    async def _pod_event(self, hook: Hook, pod: pb.PodSandbox, request: Request, received: float) -> Reply:
        sandbox = api.sandbox_of(pod)
        if sandbox is None:
            return self._no_id(hook, received)
        act = {
            Hook.RUN: self._handler.run_sandbox,
            Hook.STOP: self._handler.stop_sandbox,
            Hook.REMOVE: self._handler.remove_sandbox,
        }[hook]
        return await self._hooks.run(
            hook,
            _about(sandbox),
            functools.partial(act, sandbox),
            received=received,
            deadline=answer_by(received, request.timeout_nano, self._request_timeout),
            # An error there blocks the pod's deletion on some runtimes and is only logged on others.
            may_fail=hook is Hook.RUN,
        )

    async def _create_container(self, request: Request, received: float) -> Reply:
        message = pb.CreateContainerRequest.FromString(request.payload)
        sandbox = api.sandbox_of(message.pod)
        if sandbox is None:
            return self._no_id(Hook.CREATE, received)
        container = api.container_of(message.container)

        async def create(deadline: float) -> bytes:
            return api.answer_with(await self._handler.create_container(sandbox, container, deadline))

        return await self._hooks.run(
            Hook.CREATE,
            f"{container.name} in {_about(sandbox)}",
            create,
            received=received,
            deadline=answer_by(received, request.timeout_nano, self._request_timeout),
            may_fail=True,
        )

    def _no_id(self, hook: Hook, received: float) -> Reply:
        """A sandbox that no later event could be matched with must not start; its end is nothing to us."""
        log.warning("the runtime sent %s without a sandbox id", hook)
        if hook in (Hook.STOP, Hook.REMOVE):
            return self._hooks.reply(hook, received, Outcome.ERROR, Response())
        text = f"{hook}: the runtime named no sandbox id"
        return self._hooks.reply(hook, received, Outcome.ERROR, Response(b"", Code.INVALID_ARGUMENT, text))


def _about(sandbox: Sandbox) -> str:
    return f"{sandbox.pod.namespace}/{sandbox.pod.name} (sandbox {sandbox.id[:12]})"
