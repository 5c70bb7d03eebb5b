"""What traffic control messages say is read; whatever else is in them is an HwError and nothing worse."""

from __future__ import annotations

import contextlib
import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw import wire
from hw.errors import HwError, Refused
from hw.model import IfIndex
from hw.qdisc import ROOT_HANDLE, TOP, FqQueue, HtbClass, HtbTree, Minor, NoDepartures, Qdiscs

ROOT = 0xFFFFFFFF
LEAF = HtbClass(minor=Minor(16), rate=1_000, ceil=12_500_000, priority=3, queue=100_000)
TREE = HtbTree(rate=12_500_000, burst=25_000, quantum=25_000, default=Minor(16), classes=(LEAF,))


class Kernel:
    """Answers dumps, and takes note of what is to be changed."""

    def __init__(self, *dumps: list[bytes]) -> None:
        self.dumps = list(dumps)
        self.sent: list[bytes] = []

    def dump(self, what: str, encode: object, kind: int) -> list[bytes]:
        del what, encode, kind
        return self.dumps.pop(0)

    def change(self, what: str, encode: object, flags: int = 0) -> None:
        del what
        self.sent.append(encode(flags, 1))  # type: ignore[operator]


def asked(*dumps: list[bytes]) -> Qdiscs:
    return Qdiscs(Kernel(*dumps), "a pod")  # type: ignore[arg-type]


def tc(index: int, handle: int, parent: int, kind: bytes, *attributes: bytes) -> bytes:
    return (
        struct.pack("=BxxxiIII", 0, index, handle, parent, 2) + wire.attribute(1, kind) + b"".join(attributes)
    )


def htb(default: int = 16) -> bytes:
    options = wire.attribute(2, wire.attribute(2, struct.pack("=IIIII", 0x30011, 10, default, 0, 0)))
    stats = wire.attribute(7, wire.attribute(3, struct.pack("=IIIII", 2, 3000, 7, 0, 9)))
    return tc(5, ROOT_HANDLE, ROOT, b"htb\0", options, stats)


def a_class(minor: int, parent: int, rate: int, ceil: int, *wide: bytes) -> bytes:
    packed = struct.pack("=BBHhHIBBHhHIIIIII", *(0, 1, 0, 0, 0, rate), *(0, 1, 0, 0, 0, ceil), 1, 1, 1, 0, 3)
    return tc(
        5,
        ROOT_HANDLE | minor,
        parent,
        b"htb\0",
        wire.attribute(2, wire.attribute(1, packed) + b"".join(wide)),
    )


CLASSES = [a_class(TOP, ROOT, 12_500_000, 12_500_000), a_class(16, ROOT_HANDLE | TOP, 1_000, 12_500_000)]


def test_the_root_is_read_with_what_waits_and_what_was_dropped() -> None:
    found = asked([tc(4, 0x80010000, ROOT, b"tbf\0"), htb()]).root(IfIndex(5))
    assert found is not None
    assert (found.kind, found.handle, found.backlog, found.drops) == ("htb", ROOT_HANDLE, 3000, 7)


def test_a_leaf_is_not_taken_for_the_root_and_another_link_is_not_looked_at() -> None:
    leaf = tc(5, 0x80010000, ROOT_HANDLE | 16, b"bfifo\0")
    assert asked([leaf, tc(6, ROOT_HANDLE, ROOT, b"htb\0")]).root(IfIndex(5)) is None


def test_a_tree_is_known_by_all_of_its_rates() -> None:
    assert asked([htb()], CLASSES, CLASSES).is_shaped(IfIndex(5), TREE)
    slower = [CLASSES[0], a_class(16, ROOT_HANDLE | TOP, 1_000, 12_400_000)]
    assert not asked([htb()], slower, slower).is_shaped(IfIndex(5), TREE)


@pytest.mark.parametrize(
    "dumps",
    [
        ([],),
        ([tc(5, 0x80010000, ROOT, b"pfifo_fast\0")],),
        ([tc(5, ROOT_HANDLE, ROOT, b"tbf\0")],),
        ([tc(5, ROOT_HANDLE, ROOT, b"pfifo\0", wire.attribute(2, struct.pack("=I", 1000)))],),
        ([htb(default=17)], CLASSES),
        ([htb()], CLASSES[:1]),
        ([htb()], [*CLASSES, a_class(17, ROOT_HANDLE | TOP, 1, 1)]),
        ([htb()], [CLASSES[0], a_class(16, ROOT, 1_000, 12_500_000)]),
    ],
    ids=[
        "none",
        "another",
        "same-handle",
        "options-of-its-own",
        "default",
        "class-gone",
        "class-more",
        "beside-the-limit",
    ],
)
def test_what_a_tenant_put_in_its_place_is_not_taken_for_ours(dumps: tuple[list[bytes], ...]) -> None:
    assert not asked(*dumps).is_shaped(IfIndex(5), TREE)


def test_rates_that_do_not_fit_in_32_bits_are_written_and_read() -> None:
    fast = HtbTree(
        rate=50_000_000_000,
        burst=50_000_000,
        quantum=65536,
        default=Minor(16),
        classes=(HtbClass(minor=Minor(16), rate=50_000_000, ceil=50_000_000_000, priority=0, queue=1 << 20),),
    )
    kernel = Kernel([htb()], CLASSES)
    Qdiscs(kernel, "a pod").shape(IfIndex(5), fast, fair=False)  # type: ignore[arg-type]
    top, leaf, queue = kernel.sent
    told = [each[16:] for each in (top, leaf)]
    full = 0xFFFFFFFF
    wide = struct.pack("=Q", fast.rate)
    dump = [
        a_class(TOP, ROOT, full, full, wire.attribute(6, wide), wire.attribute(7, wide)),
        a_class(16, ROOT_HANDLE | TOP, 50_000_000, full, wire.attribute(7, wide)),
    ]
    assert asked([htb()], told, dump).is_shaped(IfIndex(5), fast)
    assert queue.endswith(struct.pack("=I", 1 << 20))


def test_a_tree_that_the_kernel_could_not_keep_apart_is_not_made() -> None:
    with pytest.raises(ValueError, match="a minor number each"):
        HtbTree(rate=1, burst=1, quantum=1, default=Minor(16), classes=(LEAF, LEAF))
    with pytest.raises(ValueError, match="the default is one of them"):
        HtbTree(rate=1, burst=1, quantum=1, default=TOP, classes=(LEAF,))


@given(st.lists(st.binary(max_size=120), max_size=4), st.lists(st.binary(max_size=120), max_size=4))
def test_whatever_is_in_a_message_is_read_or_refused(first: list[bytes], second: list[bytes]) -> None:
    for ask in (
        lambda: asked(first, second, second).is_shaped(IfIndex(5), TREE),
        lambda: asked(first).root(IfIndex(5)),
    ):
        with contextlib.suppress(HwError):
            ask()


@given(st.binary(max_size=100))
def test_whatever_is_in_the_options_of_our_tree_is_read_or_refused(options: bytes) -> None:
    forged = tc(5, ROOT_HANDLE, ROOT, b"htb\0", wire.attribute(2, options), wire.attribute(7, options))
    of_class = tc(5, ROOT_HANDLE | 16, ROOT, b"htb\0", wire.attribute(2, options))
    with contextlib.suppress(HwError):
        assert not asked([forged], [of_class], [of_class]).is_shaped(IfIndex(5), TREE)
    with contextlib.suppress(HwError):
        asked([forged]).root(IfIndex(5))


def fq(packets: int, of_a_flow: int, handle: int = ROOT_HANDLE, kind: bytes = b"fq\0") -> bytes:
    rooms = ((1, packets), (2, of_a_flow))
    options = b"".join(wire.attribute(number, struct.pack("=I", room)) for number, room in rooms)
    return tc(5, handle, ROOT, kind, wire.attribute(2, options))


QUEUE = FqQueue(packets=4000)


@pytest.mark.parametrize(
    ("there", "ours"),
    [
        ([fq(4000, 4000)], True),
        ([fq(4000, 100)], False),
        ([fq(10, 4000)], False),
        ([fq(4000, 4000, handle=0x80010000)], False),
        ([fq(4000, 4000, kind=b"htb\0")], False),
        ([tc(5, ROOT_HANDLE, ROOT, b"fq\0")], False),
        ([tc(5, ROOT_HANDLE, ROOT, b"fq\0", wire.attribute(2, b"x"))], False),
        ([tc(6, ROOT_HANDLE, ROOT, b"fq\0")], False),
        ([], False),
    ],
)
def test_a_queue_by_departure_is_known_by_its_room(there: list[bytes], ours: bool) -> None:
    found = False
    with contextlib.suppress(HwError):
        found = asked(there).is_queued(IfIndex(5), QUEUE)
    assert found is ours


@pytest.mark.parametrize(("there", "kinds"), [([fq(10, 10)], [36]), ([htb()], [37, 36]), ([], [37, 36])])
def test_a_queue_by_departure_changes_in_place_and_takes_the_place_of_others(
    there: list[bytes], kinds: list[int]
) -> None:
    kernel = Kernel(there)
    Qdiscs(kernel, "a pod").queue(IfIndex(5), QUEUE)  # type: ignore[arg-type]
    assert [struct.unpack_from("=H", sent, 4)[0] for sent in kernel.sent] == kinds
    assert struct.pack("=I", 4000) in kernel.sent[-1]


def test_a_kernel_without_fq_is_told_from_one_that_refuses() -> None:
    class Without(Kernel):
        error = errno.ENOENT

        def change(self, what: str, encode: object, flags: int = 0) -> None:
            super().change(what, encode, flags)
            if len(self.sent) > 1:
                raise Refused(what, self.error)

    with pytest.raises(NoDepartures):
        Qdiscs(Without([]), "a pod").queue(IfIndex(5), QUEUE)  # type: ignore[arg-type]
    Without.error = errno.EPERM
    with pytest.raises(Refused):
        Qdiscs(Without([]), "a pod").queue(IfIndex(5), QUEUE)  # type: ignore[arg-type]
