"""Kubelet's folders and the agent's socket in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from driver.doctor.looking import is_locked
from driver.doctor.model import Finding, Place, Subject, fail, ok, warn


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubelet:
    """socket_problem: of the paths of the agent's sockets, "" if they fit."""

    registry: Path
    registry_there: bool
    plugins: Path
    plugins_writable: bool
    socket: Path
    socket_there: bool
    agent_runs: bool
    socket_problem: str


def look(place: Place) -> Kubelet:
    paths = place.paths
    plugins = paths.plugin_dir.parent
    problem = ""
    try:
        paths.check_sockets()
    except ValueError as error:
        problem = str(error)
    return Kubelet(
        registry=paths.kubelet_registry,
        registry_there=paths.kubelet_registry.is_dir(),
        plugins=plugins,
        plugins_writable=plugins.is_dir() and os.access(plugins, os.W_OK),
        socket=paths.registration_socket,
        socket_there=paths.registration_socket.exists(),
        agent_runs=is_locked(paths.proc, paths.takeover_lock),
        socket_problem=problem,
    )


def judge(kubelet: Kubelet) -> Iterator[Finding]:
    if not kubelet.registry_there:
        yield fail(
            "folders",
            f"kubelet's {kubelet.registry} is not there",
            "start kubelet, or mount its folder; one with another root folder needs --root",
        )
    elif not kubelet.plugins_writable:
        yield fail(
            "folders", f"{kubelet.plugins} cannot be written", "mount it writable, as deploy/manifests does"
        )
    else:
        yield ok("folders", f"{kubelet.registry} and {kubelet.plugins} are there")
    if kubelet.socket_problem:
        yield fail("agent", kubelet.socket_problem, "use a shorter --driver")
    elif kubelet.agent_runs and kubelet.socket_there:
        yield ok("agent", f"runs, and kubelet finds it at {kubelet.socket}")
    elif kubelet.agent_runs:
        yield warn("agent", "runs, and has no socket for kubelet yet", "look at its log if that stays so")
    elif kubelet.socket_there:
        yield warn(
            "agent",
            f"{kubelet.socket} is left over: nobody listens there",
            "start the agent, which replaces it",
        )
    else:
        yield warn("agent", "does not run here", "start it, and look at its log if it ends")


SUBJECT = Subject("kubelet", look, judge)
