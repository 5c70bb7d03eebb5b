"""A device is called hidden only where it has a netdev that is nowhere to be seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from driver.lifecycle import homecoming as module
from driver.lifecycle.homecoming import Homecoming
from hw.model import NetdevsimIdentity
from tests.unit.igb_world import IDENTITY
from tests.unit.journal_values import preparation


@pytest.mark.parametrize(
    ("at_home", "found", "has_netdev", "hidden"),
    [
        pytest.param(True, True, True, False, id="at home"),
        pytest.param(False, True, True, True, id="its netdev is elsewhere"),
        pytest.param(False, True, False, False, id="between two drivers"),
        pytest.param(False, False, False, False, id="no more there"),
    ],
)
def test_a_vf_between_two_drivers_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, at_home: bool, found: bool, has_netdev: bool, hidden: bool
) -> None:
    made = replace(preparation(0), identity=IDENTITY, dies_with_netns=False)
    assert _is_hidden(monkeypatch, made, at_home, found, has_netdev) == hidden


def test_a_device_without_a_pci_address_is_hidden_where_it_is_still_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = replace(preparation(0), identity=NetdevsimIdentity(1, 0, 3), dies_with_netns=False)
    assert _is_hidden(monkeypatch, made, at_home=False, found=True, has_netdev=False)


def _is_hidden(
    monkeypatch: pytest.MonkeyPatch, made: Any, at_home: bool, found: bool, has_netdev: bool
) -> bool:
    @contextlib.contextmanager
    def no_kernel(*args: object) -> Iterator[object]:
        yield SimpleNamespace(find_at_home=lambda: object() if at_home else None)

    monkeypatch.setattr(module, "open_target", no_kernel)
    devices = SimpleNamespace(
        hint=lambda known: None,
        rescan=lambda: None,
        get=lambda name: object() if found else None,
        has_netdev=lambda address: has_netdev,
    )
    context: Any = SimpleNamespace(devices=devices, host_netns=None, programs=None)
    return Homecoming(context, SimpleNamespace()).is_hidden(made)  # type: ignore[arg-type]
