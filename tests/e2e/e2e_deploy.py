"""The agents in the cluster: from deploy/, whole or broken on purpose.

Invariant: what is deployed is what a user would apply, with the overlay for tests; a sabotage is a file laid
over the image and named in this run's environment, or in the case that wants it.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kndsim.cluster import Cluster
from tests.e2e.e2e_agents import CONTAINER, DAEMONSET, NAMESPACE
from tests.e2e.e2e_api import Api
from tests.e2e.e2e_ground import DeviceKind, Ground
from tests.e2e.e2e_objects import Json

VARIABLE = "KND_E2E_SABOTAGE"
_FOLDER = "/sabotage"
_NAME = "e2e-sabotage"


class Sabotage(enum.StrEnum):
    ATTACH_NOTHING = "attach-nothing"

    @property
    def source(self) -> str:
        return (Path(__file__).parent / f"e2e_{self.replace('-', '_')}.py").read_text()


def asked_for() -> Sabotage | None:
    """UsageError where the environment asks for one that there is not."""
    name = os.environ.get(VARIABLE, "")
    if name and name not in set(Sabotage):
        raise pytest.UsageError(f"{VARIABLE}={name}: choose from {', '.join(Sabotage)}")
    return Sabotage(name) if name else None


@contextlib.contextmanager
def deployed(cluster: Cluster, ground: Ground, api: Api) -> Iterator[None]:
    """The cluster's agents; they are gone with the cluster."""
    from kndsim.deployed import GUEST_OVERLAY, OVERLAY, READY_WITHIN, deploy_agent

    how = asked_for()
    overlay = GUEST_OVERLAY if ground.kind is DeviceKind.VF else OVERLAY
    deploy_agent(cluster, overlay, within=READY_WITHIN * ground.pace)
    with sabotaged(api, how) if how else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def sabotaged(api: Api, how: Sabotage) -> Iterator[None]:
    """Every agent is rolled out broken so, and whole again afterwards; who needs them ready waits for it."""
    api.create(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": _NAME},
            "data": {"sitecustomize.py": how.source},
        },
        NAMESPACE,
    )
    before = api.get("DaemonSet", DAEMONSET, NAMESPACE)["spec"]["template"]["spec"]
    _replace(api, _broken(before))
    try:
        yield
    finally:
        _replace(api, before)
        api.delete("ConfigMap", _NAME, NAMESPACE)


def _broken(spec: Json) -> Json:
    containers = [
        {
            **each,
            "env": [*each.get("env", []), {"name": "PYTHONPATH", "value": _FOLDER}],
            "volumeMounts": [*each.get("volumeMounts", []), {"name": _NAME, "mountPath": _FOLDER}],
        }
        if each["name"] == CONTAINER
        else each
        for each in spec["containers"]
    ]
    volumes = [*spec.get("volumes", []), {"name": _NAME, "configMap": {"name": _NAME}}]
    return {**spec, "containers": containers, "volumes": volumes}


def _replace(api: Api, spec: Json) -> None:
    """A merge patch replaces lists whole."""
    patch = {"spec": {"template": {"spec": spec}}}
    api.merge("DaemonSet", DAEMONSET, patch, NAMESPACE)
