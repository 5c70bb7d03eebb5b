"""RDMA counted per pod, on real soft RoCE in a guest whose RDMA devices belong to network namespaces: see
rdma_counts_inside, which is run there once; each of its tests is one here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kndsim.guest import guest

pytestmark = pytest.mark.timeout(1500)

INSIDE = Path(__file__).with_name("rdma_counts_inside.py")
NAMES = re.findall(r"^def (test_\w+)", INSIDE.read_text(), re.MULTILINE)
SECONDS = 1200.0


@pytest.fixture(scope="module")
def outcomes() -> Iterator[tuple[Mapping[str, str], str]]:
    """Test name to how it ended, and all that was said."""
    with guest(name="rdma-counts", append="ib_core.netns_mode=0") as vm:
        vm.run(["modprobe", "-a", "rdma_rxe", "ib_uverbs", "rdma_ucm"])
        argv = ["python", "-m", "pytest", "-v", "-rA", "--tb=long", f"/srv/knd/tests/vm/{INSIDE.name}"]
        done = vm.run(["sh", "-c", f"cd /srv/knd && exec {' '.join(argv)}"], check=False, timeout=SECONDS)
        found = dict(re.findall(r"::(test_\w+)\S* (PASSED|FAILED|ERROR|SKIPPED)", done.out))
        yield found, done.out + done.err + vm.console[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_in_a_guest(outcomes: tuple[Mapping[str, str], str], name: str) -> None:
    ended, said = outcomes
    assert ended.get(name, "NOT RUN") == "PASSED", said
