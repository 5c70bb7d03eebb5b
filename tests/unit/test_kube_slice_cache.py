"""Old news never undoes what the agent itself has written or deleted since."""

from __future__ import annotations

import pytest

from driver.kube.slice_cache import DELETED_MAX, SliceCache
from driver.kube.slice_plan import Content, Existing
from driver.kube.watch import Change


def slice_of(name: str, version: str, uid: str = "") -> Existing:
    return Existing(
        name=name,
        uid=uid or f"uid-{name}",
        version=version,
        pool="n",
        generation=1,
        count=1,
        content=Content(),
        raw={},
    )


def seen(cache: SliceCache) -> dict[str, str]:
    return {each.name: each.version for each in cache.snapshot()}


@pytest.fixture
def cache() -> SliceCache:
    cache = SliceCache()
    assert cache.replaced([slice_of("a", "5")], "10")
    return cache


def test_the_echo_of_a_write_is_no_news(cache: SliceCache) -> None:
    cache.wrote(slice_of("a", "12"))
    assert not cache.changed(Change.MODIFIED, slice_of("a", "12"))
    assert not cache.changed(Change.MODIFIED, slice_of("a", "11"))
    assert seen(cache) == {"a": "12"}
    assert cache.changed(Change.MODIFIED, slice_of("a", "13"))


def test_versions_are_compared_as_numbers(cache: SliceCache) -> None:
    cache.wrote(slice_of("a", "100"))
    assert not cache.changed(Change.MODIFIED, slice_of("a", "99"))
    assert seen(cache) == {"a": "100"}


def test_versions_that_are_no_numbers_are_news_unless_equal(cache: SliceCache) -> None:
    assert cache.changed(Change.MODIFIED, slice_of("a", "x"))
    assert not cache.changed(Change.MODIFIED, slice_of("a", "x"))


def test_a_list_older_than_a_create_does_not_hide_it(cache: SliceCache) -> None:
    cache.wrote(slice_of("b", "12"))
    assert not cache.replaced([slice_of("a", "5")], "11")
    assert seen(cache) == {"a": "5", "b": "12"}
    assert cache.replaced([slice_of("a", "5")], "13")
    assert seen(cache) == {"a": "5"}


def test_a_list_older_than_a_delete_does_not_bring_it_back(cache: SliceCache) -> None:
    cache.removed(slice_of("a", "5"))
    assert not cache.replaced([slice_of("a", "5")], "11")
    assert not cache.changed(Change.MODIFIED, slice_of("a", "6"))
    assert seen(cache) == {}


def test_the_echo_of_a_delete_is_no_news_and_one_by_others_is(cache: SliceCache) -> None:
    cache.removed(slice_of("a", "5"))
    assert not cache.changed(Change.DELETED, slice_of("a", "12"))
    cache.wrote(slice_of("b", "13"))
    assert cache.changed(Change.DELETED, slice_of("b", "14"))
    assert seen(cache) == {}


def test_the_end_of_an_older_object_of_the_name_is_not_the_end_of_this_one(cache: SliceCache) -> None:
    assert not cache.changed(Change.DELETED, slice_of("a", "12", uid="older"))
    assert seen(cache) == {"a": "5"}


def test_a_list_that_says_what_is_known_is_no_news(cache: SliceCache) -> None:
    assert not cache.replaced([slice_of("a", "5")], "20")


def test_what_is_remembered_of_deletes_is_bounded(cache: SliceCache) -> None:
    for index in range(DELETED_MAX + 100):
        cache.removed(slice_of(f"x{index}", "1"))
    assert len(cache._deleted) == DELETED_MAX
