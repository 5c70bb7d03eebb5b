"""A publisher of slices and the watch that it hears from, on a simulated API server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from driver.kube.client import ApiClient, Resource
from driver.kube.slice_plan import parse_slice
from driver.kube.slices import KubeSlicePublisher, Pace
from driver.kube.watch import ListWatch
from driver.model import OfferedDevice
from kndsim.api import SimApi
from tests.conftest import WaitUntil
from tests.unit.kube_support import DRIVER, FAST, FAST_PACE, NODE, QUICK, client_of, running

PATIENT = replace(QUICK, silence=60.0)
"""So that a watch which hangs does not mend by itself what another part should."""


@dataclass
class Agent:
    publisher: KubeSlicePublisher
    watch: ListWatch[Any]


@dataclass
class Setting:
    api: SimApi
    client: ApiClient
    node_uid: str

    def agent(self, pace: Pace = FAST_PACE) -> Agent:
        publisher = KubeSlicePublisher(DRIVER, NODE, lambda: self.client, pace=pace, back_off=FAST)
        watch = ListWatch(
            lambda: self.client,
            Resource.RESOURCE_SLICES,
            publisher.field_selector,
            parse_slice,
            publisher,
            back_off=FAST,
        )
        return Agent(publisher, watch)

    def published(self) -> list[Any]:
        return self.api.slices(DRIVER, NODE)

    def names(self) -> list[str]:
        return [device["name"] for each in self.published() for device in each["spec"].get("devices", [])]

    def generations(self) -> set[int]:
        return {each["spec"]["pool"]["generation"] for each in self.published()}


@contextmanager
def slices_setting(tmp_path: Path) -> Iterator[Setting]:
    with SimApi() as api, client_of(api, tmp_path, PATIENT) as client:
        yield Setting(api, client, api.add_node(NODE))


def start(agent: Agent) -> Any:
    return running(agent.watch, agent.publisher.worker)


def offer_and_wait(agent: Agent, devices: list[OfferedDevice], wait_until: WaitUntil) -> None:
    agent.publisher.offer(devices)
    wait_until(lambda: agent.publisher.published)
