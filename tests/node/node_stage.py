"""A stage for whole-agent tests: a namespace that plays the host, wired devices, and a simulated node.

Everything happens in network namespaces of the test's own; the machine's is never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from kndsim.demo.devices import Devices, make_veths
from kndsim.node import ClaimSpec, SimNode, SimPod, interface
from kndsim.runtime import RuntimeMode

T = TypeVar("T")


@contextlib.contextmanager
def devices(count: int) -> Iterator[Devices]:
    """count veths at home in a private host, their peers in a netns of their own."""
    with make_veths(count) as made:
        yield made


@contextlib.asynccontextmanager
async def node(
    made: Devices,
    *,
    mode: RuntimeMode = RuntimeMode.POD_RPC,
    hook: str = "auto",
    entry: Sequence[str] | None = None,
    start: bool = True,
    request_timeout: float = 2.0,
    agent_flags: Sequence[str] = (),
) -> AsyncIterator[SimNode]:
    """A simulated node whose agent offers these devices, ready unless start is False. request_timeout in
    seconds is the runtime's for an event."""
    async with SimNode(
        mode=mode,
        policy=made.policy,
        hook=hook,
        entry=entry,
        request_timeout=request_timeout,
        agent_flags=agent_flags,
        udev=made.udev,
    ) as sim:
        if start:
            await sim.start_agent()
        yield sim


def play(count: int, story: Callable[[SimNode, Devices], Awaitable[T]], **options: object) -> T:
    """Run one story on a node with so many devices, and make sure the peers saw nothing illegal."""

    async def run() -> T:
        async with node(made, **options) as sim:  # type: ignore[arg-type]
            result = await story(sim, made)
            assert list(sim.runtime.violations) == []
            return result

    with devices(count) as made:
        return asyncio.run(run())


def claim(claim_name: str, *requests: str, **fields: object) -> ClaimSpec:
    """A claim of one device per request name, with an interface config for all of them."""
    return ClaimSpec(
        name=claim_name,
        requests={request: lambda device: True for request in requests or ("net",)},
        parameters={"": interface(**fields)} if fields else {},
    )


async def running(sim: SimNode, pod: str, **fields: object) -> SimPod:
    """A pod with one device, started as kubelet starts it."""
    return await sim.start_pod(sim.schedule(pod, [claim(f"{pod}-nic", **fields)]))
