"""The container runtime: NRI, CDI, and the helper that it runs before each container of a claim."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driver.doctor.looking import existing, listening, listens, read_if_there
from driver.doctor.model import Finding, Place, Subject, fail, ok, warn

NRI_ON = (
    "switch NRI on and restart the runtime: containerd 1.7 in [plugins.'io.containerd.nri.v1.nri'] with "
    "disable = false, CRI-O in [crio.nri] with enable_nri = true"
)
CDI_ON = "set enable_cdi = true among the CRI plugin's settings of containerd, and restart it"
_DEFAULT_ON = 3
"""The version of containerd's configuration (2.0) from which on CDI is on where nothing is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Containerd:
    """What its configuration file says. None: nothing."""

    version: int
    nri_disabled: bool | None
    cdi_enabled: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """containerd None: its configuration is not to be seen from here."""

    nri_socket: Path
    nri_listens: bool
    cdi: Path
    cdi_writable: bool
    helper: Path
    helper_there: bool
    helper_runs: bool
    containerd: Containerd | None


def look(place: Place) -> Runtime:
    paths = place.paths
    return Runtime(
        nri_socket=paths.nri_socket,
        nri_listens=listens(paths.nri_socket, listening(paths.proc)),
        cdi=paths.cdi,
        cdi_writable=os.access(existing(paths.cdi), os.W_OK),
        helper=paths.netns_check,
        helper_there=paths.netns_check.is_file(),
        helper_runs=os.access(paths.netns_check, os.X_OK)
        and not os.statvfs(paths.netns_check).f_flag & os.ST_NOEXEC,
        containerd=parse(read_if_there(paths.containerd_config()) or ""),
    )


def parse(text: str) -> Containerd | None:
    """None for nothing, and for what is no configuration."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
    if not tree:
        return None
    version, plugins = tree.get("version", 1), tree.get("plugins")
    named = plugins if isinstance(plugins, dict) else {}
    tables = {name: each for name, each in named.items() if isinstance(each, dict)}
    said = [value for each in tables.values() if (value := _switch(each, "enable_cdi")) is not None]
    return Containerd(
        version=version if isinstance(version, int) else 1,
        nri_disabled=_switch(tables.get("io.containerd.nri.v1.nri", {}), "disable"),
        cdi_enabled=said[0] if said else None,
    )


def _switch(table: Mapping[str, Any], name: str) -> bool | None:
    value = table.get(name)
    return value if isinstance(value, bool) else None


def judge(runtime: Runtime) -> Iterator[Finding]:
    containerd = runtime.containerd
    if runtime.nri_listens:
        yield ok("nri", f"the runtime listens at {runtime.nri_socket}")
    elif containerd is not None and containerd.nri_disabled:
        yield fail("nri", "containerd's configuration switches it off", NRI_ON)
    else:
        yield fail("nri", f"nobody listens at {runtime.nri_socket}", NRI_ON)
    if not runtime.cdi_writable:
        yield fail("cdi", f"{runtime.cdi} cannot be written", "mount it writable, as deploy/manifests does")
    elif containerd is not None and containerd.cdi_enabled is False:
        yield fail("cdi", "containerd's configuration switches it off", CDI_ON)
    elif containerd is not None and containerd.cdi_enabled is None and containerd.version < _DEFAULT_ON:
        yield warn("cdi", "containerd before 2.0 has it off, and its configuration does not say", CDI_ON)
    else:
        yield ok("cdi", f"specs go to {runtime.cdi}")
    yield _helper(runtime)


def _helper(runtime: Runtime) -> Finding:
    install = "start the agent's pod, whose first container installs it, or run make in deploy/netns-check"
    helper = runtime.helper
    if not runtime.helper_there:
        return fail("netns-check", f"{helper} is missing: containers with a claim do not start", install)
    if not runtime.helper_runs:
        return fail("netns-check", f"{helper} may not be run, by its mode or its file system", install)
    return ok("netns-check", f"{helper} is there")


SUBJECT = Subject("runtime", look, judge)
