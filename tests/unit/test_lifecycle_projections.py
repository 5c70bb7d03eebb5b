"""Projections: at no moment does a CDI spec stand whose live file lets too few or the wrong netns through,
and what a slice says of a device in use does not change with its comings and goings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from driver.cdi import CdiProjection, LiveFiles
from driver.execute.engine import Engine, Point
from driver.journal import Journal
from driver.lifecycle.book import Book
from driver.lifecycle.context import Context
from driver.lifecycle.projections import Projections
from driver.model import (
    Attachment,
    AttachmentId,
    AttachmentState,
    CapacityRequest,
    ClaimUid,
    Device,
    DeviceName,
    DeviceStatus,
    DriverEvent,
    NicConfig,
    OfferedDevice,
    Preparation,
    PreparationState,
    Share,
    ShareId,
    VfConfig,
    VfDriver,
)
from driver.paths import Paths
from driver.policy import NodePolicy
from driver.rdma import IpoibConfig, RdmaConfig, SysfsProof
from driver.traffic import Amounts, Sharable
from hw.model import DeviceKind, IfIndex, IfName, NetnsCookie, PciAddress, PciIdentity, RatesBy, VfSettings
from hw.subinterface import Subinterface, SubinterfaceKind
from tests.unit.journal_values import BOOT, IDENTITIES, attachment, preparation

UID = ClaimUid("claim-0")


class World:
    """Projections over a real book and real files; at every point the files are compared with each other."""

    def __init__(self, root: Path, journal: Journal) -> None:
        self.paths = Paths(root=root)
        self.book = Book(journal, slots=8)
        self.points: list[tuple[str, str]] = []
        self.offers: list[tuple[OfferedDevice, ...]] = []
        self.statuses: list[Sequence[DeviceStatus]] = []
        self.events: list[DriverEvent] = []
        self.devices: dict[DeviceName, Device] = {}
        self.policy = NodePolicy()
        self.proofs: tuple[SysfsProof, ...] = ()
        engine: Engine[object] = Engine(
            journal=journal, acts={}, clock=SimpleNamespace(monotonic=lambda: 0.0), observer=self
        )
        context = SimpleNamespace(
            book=self.book,
            engine=engine,
            cdi=CdiProjection(self.paths),
            live=LiveFiles(self.paths),
            driver=self.paths.driver,
            hook="tcx",
            pool="node-a",
            policy=lambda: self.policy,
            accounting=SimpleNamespace(
                limits=SimpleNamespace(detour=lambda slot: 0, departs=lambda slot: False)
            ),
            devices=SimpleNamespace(
                current=lambda: self.devices,
                vfio_files=lambda address: (Path("/dev/vfio/vfio"), Path("/dev/vfio/15")),
            ),
            rdma=SimpleNamespace(proofs=lambda made, of: self.proofs if made.rdma is not None else ()),
            slices=SimpleNamespace(offer=self.offers.append),
            statuses=SimpleNamespace(write_status=lambda ref, rows: self.statuses.append(rows)),
            events=SimpleNamespace(emit=self.events.append),
        )
        self.projections = Projections(cast(Context, context))

    def at(self, point: Point, owner: str, act: str) -> None:
        self.points.append((act, point))
        named = self.spec()
        if named:
            wanted = {a.netns_cookie for a in self.book.attachments() if a.state is AttachmentState.ATTACHED}
            assert self.live(), "a spec stands and nobody may start: a hook that fails for nothing"
            if point is Point.BEFORE_INTENT and act == "write-cdi-spec":
                assert self.live() == wanted

    def step_done(self, step: str, seconds: float, outcome: str) -> None: ...

    def spec(self) -> list[str]:
        found = list(self.paths.cdi.glob("*.json"))
        return [device["name"] for file in found for device in json.loads(file.read_text())["devices"]]

    def live(self) -> set[int]:
        files = [file for file in self.paths.live.glob("*") if not file.name.startswith(".")]
        return {int(line) for file in files for line in file.read_text().split()}

    def prepare(self, *made: Preparation) -> tuple[Preparation, ...]:
        opened = self.book.open_preparations(
            [replace(each, state=PreparationState.PREPARING) for each in made]
        )
        return self.book.advance_preparations(opened, PreparationState.PREPARED)

    def attach(self, number: int, cookie: int, id: str = "") -> Attachment:
        made = replace(
            attachment(number, state=AttachmentState.ATTACHING),
            id=AttachmentId(id or f"attachment-{number}"),
            netns_cookie=NetnsCookie(cookie),
        )
        self.book.open_attachment(made)
        (attached,) = self.book.advance_attachments([made], AttachmentState.ATTACHED)
        return attached

    def leave(self, made: Attachment) -> Attachment:
        (leaving,) = self.book.advance_attachments([made], AttachmentState.DETACHING)
        return leaving


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    root = tmp_path / "root"
    with Journal.open(tmp_path / "j.sqlite", mirror=tmp_path / "mirror", boot_id=BOOT) as journal:
        yield World(root, journal)


def test_the_live_file_is_there_before_the_spec_and_goes_after_it(world: World) -> None:
    world.prepare(preparation(0))
    attached = world.attach(0, 77)
    world.projections.publish_claim(UID)
    assert [act for act, _ in world.points] == ["write-live-file"] * 2 + ["write-cdi-spec"] * 2
    assert world.live() == {77}
    assert len(world.spec()) == 1
    world.points.clear()
    world.leave(attached)
    world.projections.publish_claim(UID)
    assert [act for act, _ in world.points] == ["remove-cdi-spec"] * 2 + ["remove-live-file"] * 2
    assert world.spec() == []
    assert world.live() == set()


def test_a_device_given_by_its_files_is_told_by_files_and_address_and_not_as_an_interface(
    world: World,
) -> None:
    vf = PciIdentity(PciAddress("0000:21:10.0"), PciAddress("0000:21:00.0"), 0)
    config = NicConfig(vf=VfConfig(driver=VfDriver.VFIO))
    (made,) = world.prepare(replace(preparation(0), identity=vf, config=config))
    world.attach(0, 77)
    world.projections.publish_claim(UID)
    (file,) = world.paths.cdi.glob("*.json")
    (device,) = json.loads(file.read_text())["devices"]
    nodes = device["containerEdits"]["deviceNodes"]
    assert [node["path"] for node in nodes] == ["/dev/vfio/vfio", "/dev/vfio/15"]
    suffix = re.sub("[^A-Z0-9]", "_", made.key.device.upper())
    assert device["containerEdits"]["env"] == [f"KND_PCI_ADDRESS_{suffix}=0000:21:10.0"]
    world.projections.report_claim(UID)
    ((status,),) = world.statuses
    assert (status.ready, status.interface, status.mac) == (True, None, None)
    assert "0000:21:10.0" in status.message


@pytest.mark.parametrize("state", [AttachmentState.ATTACHING, AttachmentState.DETACHING])
def test_what_is_not_attached_starts_no_container(world: World, state: AttachmentState) -> None:
    world.prepare(preparation(0))
    made = replace(attachment(0), state=AttachmentState.ATTACHING)
    world.book.open_attachment(made)
    world.book.advance_attachments([made], state)
    world.projections.publish_claim(UID)
    assert (world.spec(), world.live()) == ([], set())


def test_a_claim_in_two_pods_lets_both_netns_through_and_then_the_one_that_is_left(world: World) -> None:
    world.prepare(preparation(0))
    first, _ = world.attach(0, 77), world.attach(0, 88, "second")
    world.projections.publish_claim(UID)
    assert world.live() == {77, 88}
    assert len(world.spec()) == 1
    world.leave(first)
    world.projections.publish_claim(UID)
    assert world.live() == {88}
    assert len(world.spec()) == 1


def test_a_sweep_removes_what_is_attached_nowhere_and_nothing_else(world: World) -> None:
    world.prepare(preparation(0), preparation(1))
    world.attach(0, 77)
    leaving = world.attach(1, 88)
    for number in (0, 1):
        world.projections.publish_claim(ClaimUid(f"claim-{number}"))
    world.leave(leaving)
    (world.paths.live / "claim-9").write_text("99\n")
    sweep(world)
    assert world.live() == {77}
    assert world.spec() == ["claim-0-dev-0"]


def sweep(world: World) -> None:
    world.projections.sweep(frozenset())


def device(number: int, **fields: object) -> Device:
    made = preparation(number)
    return replace(
        Device(
            name=made.key.device,
            kind=DeviceKind.VF,
            identity=IDENTITIES[0],
            ifindex=IfIndex(5),
            settings=made.baseline,
            attributes={"now": number},
        ),
        **fields,  # type: ignore[arg-type]
    )


def test_an_offer_is_what_is_free_and_what_is_held_as_it_was_when_it_was_prepared(world: World) -> None:
    world.devices = {each.name: each for each in (device(0), device(1), device(2, withheld="in use"))}
    world.projections.offer()
    (held,) = world.prepare(preparation(0))
    world.projections.offer()
    attached = world.attach(0, 77)
    world.devices.pop(held.key.device)
    world.projections.offer()
    world.leave(attached)
    world.devices[held.key.device] = device(0, withheld="its netdev is in another network namespace")
    world.projections.offer()
    names = [[each.name for each in offer] for offer in world.offers]
    assert names == [["dev-0", "dev-1"]] * 4
    free, *while_held = [offer[0].attributes for offer in world.offers]
    assert free == {"now": 0}
    assert while_held == [held.attributes] * 3


def shared(number: int, **fields: object) -> Device:
    amounts = Amounts(default=500, least=100, most=4_000, step=100)
    sharable = Sharable(kind=SubinterfaceKind.VLAN, mode=None, bandwidth=10_000, amounts=amounts, shares=16)
    capacities = {"bandwidth": "10G", "shares": "16"}
    return device(number, kind=DeviceKind.SHARED, sharable=sharable, capacities=capacities, **fields)


def test_a_shared_device_is_offered_with_what_claims_can_ask_of_it_and_behind_the_whole_ones(
    world: World,
) -> None:
    world.devices = {each.name: each for each in (shared(0), device(1))}
    world.projections.offer()
    (whole, parted) = world.offers[-1]
    assert (whole.name, whole.requests) == ("dev-1", {})
    assert (parted.name, parted.capacities) == ("dev-0", {"bandwidth": "10G", "shares": "16"})
    assert parted.requests == {
        "bandwidth": CapacityRequest(default="500M", least="100M", most="4G", step="100M"),
        "shares": CapacityRequest(default="1", values=("1",)),
    }
    any_amount = Amounts(default=500, least=100, most=4_000)
    made = world.devices[DeviceName("dev-0")]
    assert made.sharable is not None
    made = replace(made, sharable=replace(made.sharable, amounts=any_amount))
    world.devices[made.name] = made
    world.projections.offer()
    assert world.offers[-1][1].requests["bandwidth"].step is None


def test_claims_that_have_shares_change_nothing_of_what_is_offered(world: World) -> None:
    world.devices = {each.name: each for each in (shared(0), device(1))}
    world.projections.offer()
    interface = Subinterface(kind=SubinterfaceKind.VLAN, vlan=100)
    made = [
        replace(
            each,
            key=replace(each.key, device=DeviceName("dev-0"), share_id=ShareId(f"share-{number}")),
            share=Share(interface=interface, ifname=IfName("bond0")),
        )
        for number, each in enumerate((preparation(0), preparation(1)))
    ]
    world.prepare(*made)
    world.projections.offer()
    assert world.offers[0] == world.offers[1]
    world.devices.pop(DeviceName("dev-0"))
    world.projections.offer()
    assert [each.name for each in world.offers[-1]] == ["dev-1"]


def test_a_quarantined_device_is_offered_with_a_taint_until_it_is_released(world: World) -> None:
    world.devices = {each.name: each for each in (device(0), device(1))}
    world.book.quarantine(DeviceName("dev-0"), "dirty", 1.0)
    world.book.quarantine(DeviceName("not-here"), "dirty", 1.0)
    world.projections.offer()
    (tainted, other) = world.offers[-1]
    assert [(taint.key, taint.effect) for taint in tainted.taints] == [
        ("knd.internal/quarantined", "NoSchedule")
    ]
    assert other.taints == ()
    world.book.release(DeviceName("dev-0"))
    world.projections.offer()
    assert world.offers[-1][0].taints == ()


def test_a_status_is_the_whole_claim_and_none_is_written_where_nothing_is_attached(world: World) -> None:
    world.prepare(preparation(0))
    world.projections.report_claim(UID)
    assert world.statuses == []
    world.attach(0, 77)
    world.projections.report_claim(UID)
    ((status,),) = world.statuses
    assert (status.device, status.interface, status.ready, status.hook) == ("dev-0", "net0", True, "tcx")
    assert status.addresses == preparation(0).config.interface.addresses


def test_a_status_says_which_ipoib_interface_of_which_partition_a_pod_has(world: World) -> None:
    made = preparation(0)
    wish = IpoibConfig(name=IfName("ib1"))
    config = replace(made.config, rdma=RdmaConfig(partition=0x0001, ipoib=wish))
    world.prepare(replace(made, config=config))
    world.attach(0, 77)
    world.projections.report_claim(UID)
    ((status,),) = world.statuses
    assert (status.interface, status.ipoib, status.partition) == ("net0", wish, 0x8001)
    assert status.message.endswith(", beside it ib1 of partition 0x8001")


def test_a_status_says_what_a_pod_is_held_to_and_by_what(world: World) -> None:
    made = preparation(0)
    asked = replace(made.config, vf=VfConfig(min_rate=10, max_rate=100))
    world.prepare(replace(made, config=asked, vf_baseline=VfSettings(rates_by=RatesBy.DEVLINK)))
    world.attach(0, 77)
    world.projections.report_claim(UID)
    ((status,),) = world.statuses
    assert status.message.endswith(", sends at least 10 Mb/s and at most 100 Mb/s by devlink rate")
