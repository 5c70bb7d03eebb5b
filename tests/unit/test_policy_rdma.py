"""The policy's section about RDMA is strict, and without it a node stays as it is."""

from __future__ import annotations

import pytest

from driver.errors import ConfigError
from driver.policy import NodePolicy, load_policy
from driver.rdma import RdmaMode, SoftRdma

HEADER = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"


def load(body: str) -> NodePolicy:
    return load_policy(HEADER + body, "policy.yaml")


def test_without_the_section_nothing_is_changed_made_or_loaded() -> None:
    for body in ("reset: none\n", "rdma: {}\n", "rdma: {mode: asIs, software: none}\n"):
        rules = load(body).rdma
        assert (rules.mode.mode, rules.software.kind, rules.load_modules) == (None, None, False)


def test_a_whole_section_is_read() -> None:
    rules = load("rdma: {mode: exclusive, software: rxe, loadModules: true}\n").rdma
    assert (rules.mode.mode, rules.software.kind, rules.load_modules) == (
        RdmaMode.EXCLUSIVE,
        SoftRdma.RXE,
        True,
    )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{mode: private}", "must be one of shared, exclusive, asIs"),
        ("{software: roce}", "must be one of rxe, siw, none"),
        ("{loadModules: rdma_rxe}", "must be true or false"),
        ("{load_modules: true}", "did you mean loadModules"),
    ],
)
def test_a_wrong_section_is_refused_with_its_line(section: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"rdma: {section}\n")
    assert said in str(caught.value)
    assert "policy.yaml:3" in str(caught.value)
