"""The claims of this node's pods are known whole or not at all, from one watch or one look-up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from driver.kube.client import Resource
from driver.kube.pods import LOOKED_UP_MAX, KubePodDirectory, parse_pod
from driver.kube.watch import Change, ListWatch
from driver.model import PodRef, PodUid
from kndsim.api import SimApi
from tests.conftest import WaitUntil
from tests.unit.kube_support import FAST, NODE, RealClock, client_of, running


@dataclass
class Setting:
    api: SimApi
    pods: KubePodDirectory
    watch: ListWatch[object]
    changes: list[int]


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    changes: list[int] = []
    with SimApi() as api, client_of(api, tmp_path) as client, ThreadPoolExecutor(2) as executor:
        pods = KubePodDirectory(lambda: client, executor, RealClock(), lambda: changes.append(1))
        watch: ListWatch[object] = ListWatch(
            lambda: client,
            Resource.PODS,
            f"spec.nodeName={NODE}",
            parse_pod,
            pods,  # type: ignore[arg-type]
            back_off=FAST,
        )
        yield Setting(api, pods, watch, changes)


def test_claims_by_name_by_template_and_for_extended_resources_are_known(
    setting: Setting, wait_until: WaitUntil
) -> None:
    uid = PodUid(
        setting.api.add_pod(
            "d",
            "p",
            node=NODE,
            claims={"a": "claim-a"},
            template_claims={"b": "p-b-x7f2k"},
            extended_claim="p-extended-resources-9qzlk",
        )
    )
    with running(setting.watch):
        known = wait_until(lambda: setting.pods.claims_of(uid))
    assert known == {"claim-a", "p-b-x7f2k", "p-extended-resources-9qzlk"}


def test_a_pod_whose_claims_are_not_all_made_is_not_known_yet(
    setting: Setting, wait_until: WaitUntil
) -> None:
    uid = PodUid(
        setting.api.add_pod("d", "p", node=NODE, claims={"a": "claim-a"}, template_claims={"b": None})
    )
    with running(setting.watch):
        wait_until(lambda: len(setting.pods) == 1)
        assert setting.pods.claims_of(uid) is None
        setting.api.set_template_claim("d", "p", "b", "p-b-made")
        wait_until(lambda: setting.pods.claims_of(uid) == {"claim-a", "p-b-made"})


def test_pods_without_claims_are_known_to_have_none(setting: Setting, wait_until: WaitUntil) -> None:
    uid = PodUid(setting.api.add_pod("d", "p", node=NODE))
    with running(setting.watch):
        wait_until(lambda: setting.pods.claims_of(uid) == frozenset())
    assert setting.pods.claims_of(PodUid("unknown")) is None
    assert setting.pods.labels_of(PodUid("unknown")) == {}


def test_labels_that_are_text_are_known_and_nothing_else_stands_for_one() -> None:
    raw = {"metadata": {"name": "p", "namespace": "d", "uid": "u", "labels": {"app": "train", "odd": 3}}}
    assert parse_pod(raw).labels == {"app": "train"}


def test_only_this_nodes_pods_are_watched(setting: Setting, wait_until: WaitUntil) -> None:
    setting.api.add_pod("d", "elsewhere", node="another")
    setting.api.add_pod("d", "here", node=NODE)
    with running(setting.watch):
        wait_until(lambda: len(setting.pods) == 1)
    assert all(f"spec.nodeName={NODE}" == each.query["fieldSelector"] for each in setting.api.requests())


def test_pods_that_leave_are_forgotten(setting: Setting, wait_until: WaitUntil) -> None:
    uid = PodUid(setting.api.add_pod("d", "p", node=NODE))
    with running(setting.watch):
        wait_until(lambda: setting.pods.claims_of(uid) is not None)
        setting.api.delete("pods", "p", "d")
        wait_until(lambda: setting.pods.claims_of(uid) is None)
    assert len(setting.pods) == 0


def test_only_changes_that_matter_are_told(setting: Setting, wait_until: WaitUntil) -> None:
    setting.api.add_pod("d", "p", node=NODE)
    with running(setting.watch):
        wait_until(lambda: len(setting.changes) == 1)
        for index in range(3):
            setting.api.edit("pods", "p", lambda pod: {**pod, "status": {"phase": f"{index}"}}, "d")  # noqa: B023 - called here
        setting.api.add_pod("d", "q", node=NODE)
        wait_until(lambda: len(setting.pods) == 2)
    assert len(setting.changes) == 2


def test_an_unknown_pod_is_looked_up(setting: Setting) -> None:
    uid = PodUid(setting.api.add_pod("d", "p", node=NODE, claims={"a": "c"}))
    asyncio.run(setting.pods.look_up(PodRef("d", "p", uid), time.monotonic() + 2))
    assert setting.pods.claims_of(uid) == {"c"}
    assert len(setting.api.requests()) == 1
    assert setting.changes


def test_a_look_up_never_raises_and_ends_at_its_deadline(setting: Setting) -> None:
    pod = PodRef("d", "p", PodUid("u"))
    asyncio.run(setting.pods.look_up(pod, time.monotonic() + 2))  # 404
    for code in (403, 429, 500):
        setting.api.fail(code)
        asyncio.run(setting.pods.look_up(pod, time.monotonic() + 2))
    setting.api.answer_raw(b"{}")
    asyncio.run(setting.pods.look_up(pod, time.monotonic() + 2))
    start = time.monotonic()
    asyncio.run(setting.pods.look_up(pod, start - 1))
    assert time.monotonic() - start < 0.5
    assert setting.pods.claims_of(pod.uid) is None


def test_a_newer_pod_of_the_same_name_is_not_taken_for_the_one_asked_for(setting: Setting) -> None:
    newer = PodUid(setting.api.add_pod("d", "p", node=NODE, claims={"a": "secret"}))
    asyncio.run(setting.pods.look_up(PodRef("d", "p", PodUid("older")), time.monotonic() + 2))
    assert setting.pods.claims_of(PodUid("older")) is None
    assert setting.pods.claims_of(newer) is None


def test_a_static_pod_is_known_by_the_uid_the_runtime_has(setting: Setting, wait_until: WaitUntil) -> None:
    setting.api.add_pod("d", "etcd", node=NODE, annotations={"kubernetes.io/config.hash": "static-uid"})
    with running(setting.watch):
        wait_until(lambda: setting.pods.claims_of(PodUid("static-uid")) == frozenset())


def test_look_ups_do_not_pile_up(setting: Setting) -> None:
    uids = [PodUid(setting.api.add_pod("d", f"p{index}", node=NODE)) for index in range(LOOKED_UP_MAX + 10)]

    async def main() -> None:
        for index, uid in enumerate(uids):
            await setting.pods.look_up(PodRef("d", f"p{index}", uid), time.monotonic() + 5)

    asyncio.run(main())
    known = [uid for uid in uids if setting.pods.claims_of(uid) is not None]
    assert known == uids[-LOOKED_UP_MAX:]


def test_what_the_watch_says_replaces_what_was_looked_up(setting: Setting) -> None:
    uid = PodUid(setting.api.add_pod("d", "p", node=NODE, claims={"a": "c"}))
    asyncio.run(setting.pods.look_up(PodRef("d", "p", uid), time.monotonic() + 2))
    known = parse_pod(
        {"metadata": {"name": "p", "namespace": "d", "uid": uid}, "spec": {"nodeName": NODE}, "status": {}}
    )
    setting.pods.changed(Change.DELETED, known)
    assert setting.pods.claims_of(uid) is None
