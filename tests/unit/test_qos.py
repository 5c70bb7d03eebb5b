"""Every DSCP and every PCP is in exactly one class, and a class map that is not so is not made."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpf.layout import CLASSES
from driver.errors import ConfigError
from driver.qos import DEFAULT_CLASSES, DSCPS, PCPS, QosClass, class_maps


def problems(*classes: QosClass) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        class_maps(classes)
    return [str(problem) for problem in caught.value.problems]


REST = QosClass(name="rest", index=0)
GOLD = QosClass(name="gold", index=1, dscp=frozenset({46}), pcp=frozenset({5}))


def test_what_no_class_names_is_in_class_0() -> None:
    maps = class_maps([GOLD, REST])
    assert maps.names == ("rest", "gold")
    assert [mark for mark, index in enumerate(maps.dscp) if index == 1] == [46]
    assert [mark for mark, index in enumerate(maps.pcp) if index == 1] == [5]
    assert len(maps.dscp) == 64
    assert len(maps.pcp) == 8


def test_class_0_may_name_marks_too() -> None:
    assert class_maps([replace(REST, dscp=frozenset({1}))]).dscp == (0,) * 64


@pytest.mark.parametrize(
    ("dscp", "name"),
    [
        (0, "best-effort"),  # DF, RFC 2474
        (1, "bulk"),  # LE, RFC 8622
        (8, "bulk"),  # CS1, RFC 4594
        (10, "bulk"),  # AF11, RFC 2597
        (18, "low-latency"),  # AF21, RFC 2597
        (24, "roce-data"),
        (26, "roce-data"),
        (34, "media"),  # AF41, RFC 2597
        (44, "real-time"),  # VOICE-ADMIT, RFC 5865
        (46, "real-time"),  # EF, RFC 3246
        (48, "cnp"),
        (56, "control"),  # CS7, RFC 4594
        (63, "best-effort"),
    ],
)
def test_the_built_in_classes_follow_the_rfcs_and_common_lossless_fabrics(dscp: int, name: str) -> None:
    maps = class_maps(DEFAULT_CLASSES)
    assert maps.names[maps.dscp[dscp]] == name
    assert maps.pcp == tuple(range(8))


def test_overlaps_and_gaps_are_refused_with_their_fields() -> None:
    assert problems(REST, GOLD, replace(GOLD, index=3)) == [
        "qosClasses[2].name: 'gold' is already in class gold",
        "qosClasses[2].dscp: 46 is already in class gold",
        "qosClasses[2].pcp: 5 is already in class gold",
        "qosClasses: index 2 is missing: indices go from 0 without a gap",
    ]
    assert problems(REST, replace(REST, name="b")) == ["qosClasses[1].index: 0 is already in class rest"]
    assert problems(GOLD) == ["qosClasses: index 0 is missing: indices go from 0 without a gap"]
    assert problems() == ["qosClasses: needs at least the class with index 0"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "is not a class name"),
        ({"name": "Gold"}, "is not a class name"),
        ({"name": "a" * 33}, "is not a class name"),
        ({"name": "a\n"}, "is not a class name"),
        ({"index": 8}, "index 8 is not 0 to 7"),
        ({"index": -1}, "index -1 is not 0 to 7"),
        ({"dscp": frozenset({64})}, "are not all 0 to 63"),
        ({"pcp": frozenset({-1})}, "are not all 0 to 7"),
    ],
)
def test_a_class_that_cannot_be_is_not_made(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(GOLD, **changes)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(st.integers(0, CLASSES - 1), min_size=DSCPS + PCPS, max_size=DSCPS + PCPS))
def test_any_partition_of_the_marks_comes_back_as_its_map(owners: list[int]) -> None:
    dscp, pcp = owners[:DSCPS], owners[DSCPS:]
    classes = [
        QosClass(
            name=f"c{index}",
            index=index,
            dscp=frozenset(mark for mark, owner in enumerate(dscp) if owner == index),
            pcp=frozenset(mark for mark, owner in enumerate(pcp) if owner == index),
        )
        for index in range(CLASSES)
    ]
    maps = class_maps(classes)
    assert maps.dscp == tuple(dscp)
    assert maps.pcp == tuple(pcp)
