"""The public runner's workflow: it may do little, and what it runs is there.

Invariant: nothing in it is trusted to the runner alone: every step that is ours is a make target that works
on a machine of one's own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kndsim.cluster.conf import GATES

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / ".github/workflows").glob("*"))


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def workflow(request: pytest.FixtureRequest) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(request.param.read_text())
    return loaded


def jobs(workflow: dict[Any, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = workflow["jobs"]
    return found


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in jobs(workflow).values() for step in job["steps"]]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_there_is_a_workflow() -> None:
    assert FILES


def test_it_may_read_the_repository_and_nothing_else(workflow: dict[Any, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    assert not [name for name, job in jobs(workflow).items() if "permissions" in job]
    # The event in which a stranger's change would run with the repository's own rights. YAML 1.1's `on`.
    assert "pull_request_target" not in workflow[True]
    assert "secrets." not in str(workflow)


def test_no_later_step_finds_the_token_that_fetched_the_sources(workflow: dict[Any, Any]) -> None:
    for job in jobs(workflow).values():
        (checkout,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
        assert checkout["with"] == {"persist-credentials": False}


def test_actions_are_the_platforms_own_and_pinned(workflow: dict[Any, Any]) -> None:
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert [name for name in used if not re.fullmatch(r"actions/[a-z-]+@(v\d+|[0-9a-f]{40})", name)] == []


def test_every_make_target_is_there(workflow: dict[Any, Any]) -> None:
    lines = [line for step in steps(workflow) for line in str(step.get("run", "")).splitlines()]
    called = [
        word
        for line in lines
        for words in re.findall(r"\bmake((?: [^&|;]+)*)$", line)
        for word in re.sub(r'"[^"]*"|\'[^\']*\'', "", words).split()
        if "=" not in word and not word.startswith("-") and "install" not in line
    ]
    assert set(called) >= {"test", "check", "kind-up", "kind-test", "kind-down", "test-vm", "test-e2e"}
    assert set(called) - make_targets() == set()


def test_every_job_ends(workflow: dict[Any, Any]) -> None:
    assert [name for name, job in jobs(workflow).items() if not 0 < job.get("timeout-minutes", 0) <= 90] == []


def test_the_cluster_is_taken_down_whatever_happened(workflow: dict[Any, Any]) -> None:
    (last,) = [step for step in jobs(workflow)["kind"]["steps"] if "kind-down" in step.get("run", "")]
    assert last is jobs(workflow)["kind"]["steps"][-1]
    assert last["if"] == "always()"


def test_kind_runs_with_every_kubernetes_that_the_machines_cluster_has(workflow: dict[Any, Any]) -> None:
    assert jobs(workflow)["kind"]["strategy"]["matrix"]["kubernetes"] == sorted(GATES)


def test_files_that_a_cache_is_keyed_by_are_there(workflow: dict[Any, Any]) -> None:
    keys = [step["with"]["key"] for step in steps(workflow) if "actions/cache" in step.get("uses", "")]
    patterns = [each for key in keys for each in re.findall(r"'([^']+)'", key)]
    assert patterns
    assert [each for each in patterns if not list(ROOT.glob(each))] == []


def test_every_target_that_the_grounds_page_names_is_there() -> None:
    named = set(
        re.findall(r"(?:`|    )make ([a-z][a-z0-9-]+)", (ROOT / "ci/kind-sriov-sim/README.md").read_text())
    )
    assert named >= {"kind-up", "kind-down", "test-vm", "test-e2e"}
    assert named - make_targets() == set()
