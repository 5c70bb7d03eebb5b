"""A namespace of a case's own, and the pods in it as they are seen from outside.

Invariant: a wait ends in time with what was waited for, or with a sentence that shows the object as it
is and what was said about it; at the end nothing of the namespace holds a device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tests.e2e.e2e_api import Api, ApiRefused, Ran
from tests.e2e.e2e_links import Link, parse_links
from tests.e2e.e2e_objects import FIRST, GRACE, MAIN, Claim, Config, Json, Pod, Request, namespace

T = TypeVar("T")


class Waiting:
    """Deadlines on this ground: seconds as on the machine's own cluster, times pace."""

    def __init__(self, pace: float) -> None:
        self.pace = pace

    def until(self, condition: Callable[[], T], within: float, what: str | Callable[[], str]) -> T:
        """What condition gives once that is true. TimeoutError, with `what` of then, after the time."""
        deadline = time.monotonic() + within * self.pace
        while not (value := condition()):
            if time.monotonic() > deadline:
                said = what if isinstance(what, str) else what()
                raise TimeoutError(f"not within {within * self.pace:g} s: {said}")
            time.sleep(0.05)
        return value

    def holds(self, condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
        """AssertionError if condition is not true all the time."""
        deadline = time.monotonic() + seconds * self.pace
        while time.monotonic() < deadline:
            assert condition(), what()
            time.sleep(0.05)


class LivePod:
    """A pod in the cluster, by name."""

    def __init__(self, space: Space, name: str) -> None:
        self.space = space
        self.name = name

    # --- as it is -----------------------------------------------------------------------------------

    def find(self) -> Json | None:
        return self.space.api.find("Pod", self.name, self.space.name)

    def raw(self) -> Json:
        found = self.find()
        assert found is not None, f"pod {self.name} is gone"
        return found

    @property
    def uid(self) -> str:
        return str(self.raw()["metadata"]["uid"])

    @property
    def node(self) -> str:
        return str(self.raw()["spec"].get("nodeName", ""))

    @property
    def phase(self) -> str:
        return str(self.raw()["status"].get("phase", ""))

    def status_of(self, container: str = MAIN) -> Json:
        """Its containerStatus; empty while kubelet has said nothing of it."""
        status = self.raw()["status"]
        every = [*status.get("containerStatuses", []), *status.get("initContainerStatuses", [])]
        return next((each for each in every if each["name"] == container), {})

    def restarts(self, container: str = MAIN) -> int:
        return int(self.status_of(container).get("restartCount", 0))

    def started(self, container: str = MAIN) -> bool:
        """Whether a process of it has ever run, however that ended."""
        status = self.status_of(container)
        state, last = status.get("state", {}), status.get("lastState", {})
        return bool(status.get("containerID")) and bool({"running", "terminated"} & {*state, *last})

    def is_running(self) -> bool:
        status = self.raw()["status"]
        statuses = status.get("containerStatuses", [])
        return status.get("phase") == "Running" and bool(statuses) and all(each["ready"] for each in statuses)

    def claim_of(self, name: str = "net") -> Json:
        """The claim made for the pod's entry of that name, or named by it."""
        pod = self.raw()
        made = {
            each["name"]: each["resourceClaimName"] for each in pod["status"].get("resourceClaimStatuses", [])
        }
        for entry in pod["spec"]["resourceClaims"]:
            if entry["name"] == name:
                wanted = entry.get("resourceClaimName") or made[name]
                return self.space.api.get("ResourceClaim", wanted, self.space.name)
        raise AssertionError(f"pod {self.name} has no claim {name}")

    def devices(self, name: str = "net") -> Sequence[str]:
        """Allocated to the claim."""
        results = self.claim_of(name)["status"]["allocation"]["devices"]["results"]
        return [each["device"] for each in results]

    def events(self, reason: str = "") -> Sequence[Json]:
        found = self.space.api.events(self.space.name, self.name)
        return [each for each in found if not reason or each.get("reason") == reason]

    # --- inside -------------------------------------------------------------------------------------

    def exec(self, *argv: str, container: str = MAIN, within: float = 15.0) -> Ran:
        return self.space.api.exec(self.space.name, self.name, container, argv, within * self.space.pace)

    def out(self, *argv: str, container: str = MAIN, within: float = 15.0) -> str:
        """AssertionError if it fails."""
        ran = self.exec(*argv, container=container, within=within)
        assert ran.code == 0, f"{' '.join(argv)} in {self.name}: {ran.code} {ran.err} {ran.out}"
        return ran.out

    def log(self, container: str = MAIN, *, previous: bool = False) -> str:
        return self.space.api.logs(self.space.name, self.name, container, previous=previous)

    def first_links(self, container: str = MAIN, *, previous: bool = False) -> Mapping[str, Link]:
        """What the container's first act saw. Its log is there a moment after the container runs."""

        def lines() -> str:
            log = self.log(container, previous=previous).splitlines()
            return "\n".join(each.removeprefix(FIRST) for each in log if each.startswith(FIRST))

        return parse_links(self.space.until(lines, 10, f"{self.name} {container} says what it saw first"))

    def links(self, container: str = MAIN) -> Mapping[str, Link]:
        return parse_links(self.out("ip", "-o", "link", container=container))

    def addresses(self, interface: str) -> Sequence[str]:
        """Global ones, with prefix length."""
        out = self.out("ip", "-o", "addr", "show", "dev", interface)
        found = [line.split() for line in out.splitlines()]
        return [words[3] for words in found if words[2] in ("inet", "inet6") and "link" not in words[4:7]]

    # --- until --------------------------------------------------------------------------------------

    def running(self, within: float = 30) -> LivePod:
        self.space.until(self.is_running, within, lambda: f"pod runs: {self.describe()}")
        return self

    def until_event(self, reason: str, text: str = "", within: float = 30) -> Json:
        """The newest event of that reason whose message has the text in it."""

        def found() -> Json | None:
            hits = [each for each in self.events(reason) if text in each.get("message", "")]
            return hits[-1] if hits else None

        event = self.space.until(found, within, lambda: f"event {reason} {text!r}: {self.describe()}")
        assert event is not None
        return event

    def never_started(self, seconds: float, container: str = MAIN) -> None:
        self.space.holds(
            lambda: not self.started(container), seconds, lambda: f"{container} started: {self.describe()}"
        )

    def delete(self, *, grace: int | None = None, wait: bool = True, within: float = 30) -> None:
        uid = self.uid
        self.space.api.delete("Pod", self.name, self.space.name, grace=grace)
        if wait:
            self.space.until(
                lambda: (found := self.find()) is None or found["metadata"]["uid"] != uid,
                within,
                lambda: f"pod gone: {self.describe()}",
            )

    def nudge(self) -> None:
        """Make kubelet look at the pod now instead of at its next round."""
        patch = {"metadata": {"annotations": {"e2e.knd.internal/nudge": f"{time.monotonic_ns()}"}}}
        self.space.api.merge("Pod", self.name, patch, self.space.name)

    def describe(self) -> str:
        """For the reader of a failure."""
        found = self.find()
        if found is None:
            return f"pod {self.name} is gone"
        status = found["status"]
        states = [
            f"{each['name']}: {each.get('state')} restarts {each.get('restartCount')}"
            for each in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", []))
        ]
        unmet = [
            f"{each['type']}: {each.get('message', '')}"
            for each in status.get("conditions", [])
            if each["status"] != "True" and each.get("message")
        ]
        events = [
            f"{each.get('reason')} x{each.get('count', 1)}: {each.get('message')}" for each in self.events()
        ]
        lines = [f"pod {self.name} on {found['spec'].get('nodeName', '-')}: {status.get('phase')}"]
        return "\n  ".join([*lines, *states, *unmet, *events])


class Space(Waiting):
    """Use as a context manager: makes the namespace, and empties it at the end."""

    def __init__(self, api: Api, name: str, pace: float, device_class: str) -> None:
        super().__init__(pace)
        self.api = api
        self.name = name
        self.device_class = device_class
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Space:
        self.api.create(namespace(self.name))
        self._undo.callback(self.api.delete, "Namespace", self.name)
        self._undo.callback(self.empty)
        self.until(
            lambda: self.api.find("ServiceAccount", "default", self.name), 20, "the namespace's account"
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def empty(self) -> None:
        """Pods and claims gone: what the next case wants is free."""
        for pod in self.api.list("Pod", self.name):
            self.api.delete("Pod", pod["metadata"]["name"], self.name)
        left = lambda: [p["metadata"]["name"] for p in self.api.list("Pod", self.name)]  # noqa: E731 - named once
        self.until(lambda: not left(), 60, lambda: f"pods of {self.name} are gone: {left()}")
        for claim in self.api.list("ResourceClaim", self.name):
            self.api.delete("ResourceClaim", claim["metadata"]["name"], self.name)
        self.until(
            lambda: not self.api.list("ResourceClaim", self.name), 60, f"claims of {self.name} are gone"
        )

    # --- making -------------------------------------------------------------------------------------

    def add(self, obj: Mapping[str, Any]) -> Json:
        return self.api.create(obj, self.name)

    def cluster_wide(self, obj: Mapping[str, Any]) -> Json:
        """Deleted with the space."""
        made = self.api.create(obj)
        api_version = obj["apiVersion"]
        self._undo.callback(
            lambda: self.api.delete(obj["kind"], obj["metadata"]["name"], api_version=api_version)
        )
        return made

    def claim(self, *configs: Config, count: int = 1, device_class: str = "", **more: Any) -> Claim:
        """Of one request for devices of the ground's class."""
        request = Request(device_class=device_class or self.device_class, count=count, **more)
        return Claim(requests=(request,), configs=configs)

    def pod(self, pod: Pod) -> LivePod:
        self.add(pod.object())
        return LivePod(self, pod.name)

    def nic_pod(
        self, name: str, *configs: Config, node: str = "", device_class: str = "", **more: Any
    ) -> LivePod:
        """A pod with one device by a template of its own."""
        self.add(self.claim(*configs, device_class=device_class).template(name))
        return self.pod(Pod(name=name, templates={"net": name}, node=node, **more))

    def pods(self) -> Iterator[LivePod]:
        for pod in self.api.list("Pod", self.name):
            yield LivePod(self, pod["metadata"]["name"])

    def describe(self) -> str:
        with contextlib.suppress(ApiRefused):
            return "\n".join(pod.describe() for pod in self.pods())
        return f"{self.name} cannot be looked at"


SETTLED = GRACE + 2
"""Seconds in which a deleted pod is usually gone."""
