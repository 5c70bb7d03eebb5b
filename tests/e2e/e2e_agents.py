"""The agents of the cluster, as their operators see them: readiness, `knd`, metrics, logs, and their ends.

Invariant: an agent is only ever asked in its own pod or ended as a node ends a process; whatever an agent
that is ended on purpose has said is kept, so that the end of the run can look for tracebacks in all of it.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.e2e.e2e_api import Api, ApiRefused, Ran
from tests.e2e.e2e_ground import Ground
from tests.e2e.e2e_objects import Json
from tests.e2e.e2e_space import Waiting

if TYPE_CHECKING:
    from kndsim.cluster import Cluster
    from kndsim.place import Place

NAMESPACE = "knd-system"
DAEMONSET = "knd-agent"
CONTAINER = "agent"
METRICS_PORT = 9467
_READ_METRICS = (
    "import urllib.request as r; "
    f"print(r.urlopen('http://127.0.0.1:{METRICS_PORT}/metrics', timeout=10).read().decode())"
)
_SERIES = re.compile(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')
_AWAY = {"e2e.knd.internal/nowhere": "true"}
"""No node has this label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """One line of `knd usage`, or the two series of metrics that say the same."""

    pod: str
    device: str
    interface: str
    direction: str
    traffic_class: str
    kind: str
    bytes: int
    packets: int


class Agents(Waiting):
    def __init__(self, api: Api, cluster: Cluster, ground: Ground) -> None:
        super().__init__(ground.pace)
        self.api = api
        self.cluster = cluster
        self.kept: dict[str, str] = {}
        """Logs of agents that were ended on purpose, by pod and what was done."""

    # --- which --------------------------------------------------------------------------------------

    def pods(self) -> Sequence[Json]:
        owned = self.api.list("Pod", NAMESPACE)
        return [
            pod
            for pod in owned
            if any(owner["name"] == DAEMONSET for owner in pod["metadata"].get("ownerReferences", []))
        ]

    def pod_on(self, node: str) -> str:
        """The one that is not on its way out."""
        names = [
            pod["metadata"]["name"]
            for pod in self.pods()
            if pod["spec"].get("nodeName") == node and "deletionTimestamp" not in pod["metadata"]
        ]
        assert len(names) == 1, f"agents on {node}: {names}"
        return str(names[0])

    def ready(self, within: float = 60) -> None:
        """One on each node, ready, and none besides."""

        def all_ready() -> bool:
            pods = self.pods()
            return len(pods) == len(self.cluster.nodes) and all(map(_is_ready, pods))

        self.until(all_ready, within, self.describe)

    def describe(self) -> str:
        lines = ["agents:"]
        for pod in self.pods():
            status = pod["status"]
            states = [
                f"{each['name']} {each.get('state')} restarts {each.get('restartCount')}"
                for each in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", []))
            ]
            lines.append(f"{pod['metadata']['name']} on {pod['spec'].get('nodeName')}: {'; '.join(states)}")
            lines += self.log_of(pod["metadata"]["name"]).splitlines()[-8:]
        return "\n  ".join(lines)

    # --- what they say ------------------------------------------------------------------------------

    def knd(self, node: str, *argv: str) -> Ran:
        return self.api.exec(NAMESPACE, self.pod_on(node), CONTAINER, ["knd", *argv], 30 * self.pace)

    def _rows(self, node: str, *argv: str) -> Sequence[Json]:
        ran = self.knd(node, *argv, "-o", "json")
        assert ran.code == 0, f"knd {' '.join(argv)} on {node}: {ran.code} {ran.err}"
        rows: Sequence[Json] = json.loads(ran.out)["rows"]
        return rows

    def prepared(self, node: str, namespace: str) -> Sequence[Json]:
        """`knd pods` of one namespace."""
        rows = self._rows(node, "pods")
        return [row for row in rows if row["namespace"] == namespace]

    def usage(self, node: str, namespace: str) -> Sequence[Count]:
        rows = self._rows(node, "usage", "--namespace", namespace)
        return sorted((_count(row, row["bytes"], row["packets"]) for row in rows), key=_order)

    def metrics(self, node: str) -> Sequence[tuple[str, dict[str, str], float]]:
        ran = self.api.exec(
            NAMESPACE, self.pod_on(node), CONTAINER, ["python", "-c", _READ_METRICS], 30 * self.pace
        )
        assert ran.code == 0, f"metrics of {node}: {ran.err}"
        matches = filter(None, map(_SERIES.match, ran.out.splitlines()))
        return [(match[1], dict(_LABEL.findall(match[2] or "")), float(match[3])) for match in matches]

    def counted(self, node: str, namespace: str) -> Sequence[Count]:
        """The metrics endpoint's word on the pods of one namespace."""
        bytes_of, packets_of = {}, {}
        for name, labels, value in self.metrics(node):
            if labels.get("namespace") != namespace:
                continue
            key = tuple(sorted(labels.items()))
            if name == "knd_pod_network_bytes_total":
                bytes_of[key] = int(value)
            elif name == "knd_pod_network_packets_total":
                packets_of[key] = int(value)
        found = [_count(dict(key), size, packets_of[key]) for key, size in bytes_of.items()]
        return sorted(found, key=_order)

    def metric(self, node: str, name: str) -> float:
        """The sum of its series."""
        return sum(value for found, _, value in self.metrics(node) if found == name)

    def slice_devices(self, node: str) -> dict[str, Json]:
        """What the cluster is offered of the node, by device."""
        slices = self.api.list("ResourceSlice", fieldSelector=f"spec.nodeName={node}")
        return {device["name"]: device for each in slices for device in each["spec"].get("devices", [])}

    def events_of_claim(self, namespace: str, claim: str) -> Sequence[Json]:
        return self.api.events(namespace, claim)

    # --- their ends ---------------------------------------------------------------------------------

    def place(self, node: str) -> Place:
        return self.cluster.nodes[node].place

    def pid(self, node: str) -> int:
        """As the node sees it."""
        found = self.place(node).run(["pgrep", "-o", "-f", "bin/knd agent"]).out.split()
        assert len(found) == 1, found
        return int(found[0])

    def kill(self, node: str) -> None:
        """SIGKILL, as the kernel's OOM killer would; kubelet starts it again. Returns when it is ready."""
        pod = self.pod_on(node)
        before = self._restarts(pod)
        with self._listening(pod, "killed"):
            self.place(node).run(["kill", "-9", str(self.pid(node))])
        self.until(lambda: self._restarts(pod) > before, 60, self.describe)
        self.ready()

    def _restarts(self, pod: str) -> int:
        statuses = self.api.get("Pod", pod, NAMESPACE)["status"].get("containerStatuses", [])
        return sum(each["restartCount"] for each in statuses)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """No agent on any node, as long as the body runs; all ready again afterwards."""
        with contextlib.ExitStack() as listening:
            for pod in self.pods():
                listening.enter_context(self._listening(pod["metadata"]["name"], "sent away"))
            self._select(_AWAY)
            self.until(lambda: not self.pods(), 60, self.describe)
        try:
            yield
        finally:
            self._select(dict.fromkeys(_AWAY))
            self.ready()

    def _select(self, labels: dict[str, Any]) -> None:
        patch = {"spec": {"template": {"spec": {"nodeSelector": labels}}}}
        self.api.merge("DaemonSet", DAEMONSET, patch, NAMESPACE)

    def upgrade(self) -> None:
        """A rolling restart of all; returns when every pod is a new one and ready."""
        with self.being_replaced():
            self.cluster.kubectl("-n", NAMESPACE, "rollout", "restart", f"daemonset/{DAEMONSET}")

    @contextlib.contextmanager
    def being_replaced(self) -> Iterator[None]:
        """The body has the DaemonSet roll; afterwards every pod is a new one and ready."""
        old = {pod["metadata"]["uid"] for pod in self.pods()}
        with contextlib.ExitStack() as listening:
            for pod in self.pods():
                listening.enter_context(self._listening(pod["metadata"]["name"], "replaced"))
            yield
            self.until(lambda: not old & {pod["metadata"]["uid"] for pod in self.pods()}, 90, self.describe)
        self.ready(90)

    # --- what they have said ------------------------------------------------------------------------

    def log_of(self, pod: str, *, previous: bool = False) -> str:
        """ "" where there is none."""
        try:
            return self.api.logs(NAMESPACE, pod, CONTAINER, previous=previous)
        except ApiRefused:
            return ""

    @contextlib.contextmanager
    def _listening(self, pod: str, why: str) -> Iterator[None]:
        """Keeps the log of an agent that the body ends, to its last word."""
        parts: list[bytes] = []

        def listen() -> None:
            # The stream breaks off where kubelet or the pod goes first; what came until then is kept.
            with contextlib.suppress(ApiRefused):
                parts.extend(self.api.follow(NAMESPACE, pod, CONTAINER, 60 * self.pace))

        listener = threading.Thread(target=listen, name=f"log of {pod}", daemon=True)
        listener.start()
        try:
            yield
        finally:
            listener.join(90 * self.pace)
            self.kept[f"{pod} {why} {len(self.kept)}"] = b"".join(parts).decode(errors="replace")

    def tracebacks(self) -> Sequence[str]:
        """From everything that any agent of this run has said."""
        said = dict(self.kept)
        for pod in self.pods():
            name = pod["metadata"]["name"]
            said[name] = self.log_of(name)
            said[f"{name} before its restart"] = self.log_of(name, previous=True)
        return [f"{who}:\n{_around(log)}" for who, log in said.items() if "Traceback (most recent" in log]


def _is_ready(pod: Json) -> bool:
    conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions", [])}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


def _count(row: Json, size: int, packets: int) -> Count:
    return Count(
        pod=row["pod"],
        device=row["device"],
        interface=row["interface"],
        direction=row["direction"],
        traffic_class=row["class"],
        kind=row["kind"],
        bytes=size,
        packets=packets,
    )


def _order(count: Count) -> tuple[str, ...]:
    return (count.pod, count.device, count.direction, count.traffic_class, count.kind)


def _around(log: str) -> str:
    lines = log.splitlines()
    first = next(number for number, line in enumerate(lines) if "Traceback (most recent" in line)
    return "\n".join(lines[max(0, first - 3) : first + 40])
