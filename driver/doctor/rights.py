"""Whether this process may do what the agent has to.

Invariant: asks for what the agent's container is given (deploy/manifests/daemonset.yaml) and nothing more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from driver.doctor.model import Finding, Place, Subject, fail, ok

NEEDED: Mapping[str, int] = {"NET_ADMIN": 12, "SYS_ADMIN": 21}
"""Bits of uapi linux/capability.h."""


@dataclass(frozen=True, slots=True)
class Rights:
    uid: int
    capabilities: int
    """CapEff of /proc/self/status."""


def look(place: Place) -> Rights:
    text = (place.paths.proc / "self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{place.paths.proc}/self/status tells no CapEff")
    return Rights(os.geteuid(), int(found[1], 16))


def judge(rights: Rights) -> Iterator[Finding]:
    if rights.uid != 0:
        yield fail("root", f"the user id is {rights.uid}", "run the agent, and this command, as root")
    else:
        yield ok("root", "runs as root")
    missing = [name for name, bit in NEEDED.items() if not rights.capabilities >> bit & 1]
    if missing:
        yield fail(
            "capabilities",
            f"{' and '.join(f'CAP_{name}' for name in missing)} missing",
            "add to the container's securityContext.capabilities, as deploy/manifests does",
        )
    else:
        yield ok("capabilities", "has " + " and ".join(f"CAP_{name}" for name in NEEDED))


SUBJECT = Subject("rights", look, judge)
