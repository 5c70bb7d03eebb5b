"""What the cases put into the cluster, as small types: claims, their configs, pods.

Invariant: pure; each type has one method that gives the API object, and what is not said is left to the
API server's default. A test pod is gone within a second or two of its deletion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

DRIVER = "knd.internal"
IMAGE = "localhost/knd-tool:1"
FIRST = "first:"
"""Opens the lines that a container writes as its first act: what links it saw then."""
MAIN = "main"
GRACE = 1
"""Seconds of terminationGracePeriodSeconds: the tool ends on TERM at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One NetworkDeviceConfig. interface: keys as users write them; requests: () is all of the claim."""

    interface: Mapping[str, object] = field(default_factory=dict)
    requests: tuple[str, ...] = ()
    more: Mapping[str, object] = field(default_factory=dict)
    """Other sections, and what no config should have."""

    def entry(self) -> Json:
        parameters: Json = {"apiVersion": f"{DRIVER}/v1alpha1", "kind": "NetworkDeviceConfig", **self.more}
        if self.interface:
            parameters["interface"] = dict(self.interface)
        return {
            **({"requests": list(self.requests)} if self.requests else {}),
            "opaque": {"driver": DRIVER, "parameters": parameters},
        }


def nic(name: str = "net1", *addresses: str, requests: Sequence[str] = (), **more: object) -> Config:
    """An interface's name in the pod, its addresses, and what else."""
    interface: Json = {"name": name, **more}
    if addresses:
        interface["addresses"] = list(addresses)
    return Config(interface=interface, requests=tuple(requests))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    device_class: str
    name: str = "nic"
    count: int = 1
    selectors: tuple[str, ...] = ()
    """CEL expressions."""
    amounts: Mapping[str, str] = field(default_factory=dict)
    """Of capacities, of devices that are given out in parts."""

    def entry(self) -> Json:
        exactly: Json = {"deviceClassName": self.device_class}
        if self.amounts:
            exactly["capacity"] = {"requests": dict(self.amounts)}
        if self.count != 1:
            exactly["count"] = self.count
        if self.selectors:
            exactly["selectors"] = [{"cel": {"expression": each}} for each in self.selectors]
        return {"name": self.name, "exactly": exactly}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A ResourceClaim's spec, also what a template makes."""

    requests: tuple[Request, ...]
    configs: tuple[Config, ...] = ()

    def spec(self) -> Json:
        devices: Json = {"requests": [each.entry() for each in self.requests]}
        if self.configs:
            devices["config"] = [each.entry() for each in self.configs]
        return {"devices": devices}

    def claim(self, name: str) -> Json:
        return {**_head("resource.k8s.io/v1", "ResourceClaim", name), "spec": self.spec()}

    def template(self, name: str) -> Json:
        return {
            **_head("resource.k8s.io/v1", "ResourceClaimTemplate", name),
            "spec": {"spec": self.spec()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    name: str
    selectors: tuple[str, ...]
    config: Config | None = None
    extended_resource: str = ""

    def object(self) -> Json:
        spec: Json = {"selectors": [{"cel": {"expression": each}} for each in self.selectors]}
        if self.config is not None:
            spec["config"] = [self.config.entry()]
        if self.extended_resource:
            spec["extendedResourceName"] = self.extended_resource
        return {**_head("resource.k8s.io/v1", "DeviceClass", self.name), "spec": spec}


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """Its first act is to say which links it sees; then it does `then`. claims: names in the pod."""

    name: str = MAIN
    then: str = "exec knd-tool sleep"
    claims: tuple[str, ...] = ()
    always: bool = False
    """Of an init container: it is a sidecar, and restarted."""
    limits: Mapping[str, str] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()

    def object(self) -> Json:
        resources: Json = {}
        if self.claims:
            resources["claims"] = [{"name": each} for each in self.claims]
        if self.limits:
            resources["limits"] = dict(self.limits)
        return {
            "name": self.name,
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "command": ["sh", "-c", f"ip -o link | sed 's/^/{FIRST} /'; {self.then}"],
            **({"resources": resources} if resources else {}),
            **({"restartPolicy": "Always"} if self.always else {}),
            **(
                {"securityContext": {"capabilities": {"add": list(self.capabilities)}}}
                if self.capabilities
                else {}
            ),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """templates and claims: name in the pod to the name of the ResourceClaimTemplate or ResourceClaim."""

    name: str
    templates: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, str] = field(default_factory=dict)
    containers: tuple[Container, ...] = ()
    """Empty: one that names every claim of the pod."""
    init: tuple[Container, ...] = ()
    node: str = ""
    """Chosen by label, so that the scheduler still allocates."""
    more: Mapping[str, object] = field(default_factory=dict)
    """Other fields of the spec."""

    def object(self) -> Json:
        references = [
            *({"name": key, "resourceClaimTemplateName": name} for key, name in self.templates.items()),
            *({"name": key, "resourceClaimName": name} for key, name in self.claims.items()),
        ]
        everything = Container(claims=(*self.templates, *self.claims))
        spec: Json = {
            "terminationGracePeriodSeconds": GRACE,
            "automountServiceAccountToken": False,
            "containers": [each.object() for each in self.containers or (everything,)],
            **self.more,
        }
        if references:
            spec["resourceClaims"] = references
        if self.init:
            spec["initContainers"] = [each.object() for each in self.init]
        if self.node:
            spec["nodeSelector"] = {"kubernetes.io/hostname": self.node}
        return {**_head("v1", "Pod", self.name), "spec": spec}


def namespace(name: str) -> Json:
    return _head("v1", "Namespace", name)


def taint_rule(name: str, api_version: str, *, pool: str, device: str, effect: str) -> Json:
    return {
        **_head(api_version, "DeviceTaintRule", name),
        "spec": {
            "deviceSelector": {"driver": DRIVER, "pool": pool, "device": device},
            "taint": {"key": "e2e.knd.internal/maintenance", "value": "true", "effect": effect},
        },
    }


def _head(api_version: str, kind: str, name: str) -> Json:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name}}
