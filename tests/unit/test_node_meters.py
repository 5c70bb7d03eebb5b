"""What a device counts itself is read where it is, and nothing that cannot be read is an error or a zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.execute import meters
from driver.execute.meters import INTERFACE, LIMITS, VF, NodeMeters, PfCounters
from driver.journal.stretches import MeterKey
from driver.model import BootId, NicConfig, VfConfig, VfDriver
from driver.rdma import RdmaBinding, RdmaMode
from hw.errors import HwError, NotFound, Refused, Unsupported
from hw.model import DeviceKind, IfIndex, IfName, LinkFlags, LinkInfo, PciIdentity, RdmaIndex, RdmaName
from hw.sysfs import Sysfs
from tests.unit.journal_values import attachment, preparation

GUID = "0c42:a103:0065:1234"
NAME = RdmaName("mlx5_2")
HW, PORT = MeterKey("mlx5_2", "rdma-hw", 1), MeterKey("mlx5_2", "rdma-port", 1)


class Links:
    """An rtnetlink socket that has one device, or none, and a PF where vfs is not None."""

    def __init__(self, counters: object, vfs: object = None) -> None:
        self._counters, self._vfs = counters, vfs
        self.asked: list[str] = []

    def dump(self) -> tuple[LinkInfo, ...]:
        self.asked.append("links")
        place = {"parent_bus": "pci", "parent_device": "0000:3b:00.0"}
        pf = LinkInfo(
            ifindex=IfIndex(2), name=IfName("ens2"), flags=LinkFlags(0), link_type=1, mtu=1500, **place
        )
        return () if self._vfs is None else (pf,)

    def statistics(self, ifindex: int) -> Any:
        if isinstance(self._counters, Exception):
            raise self._counters
        return self._counters

    def vf_statistics(self, pf: int) -> Any:
        self.asked.append(f"VFs of {pf}")
        if isinstance(self._vfs, Exception):
            raise self._vfs
        return self._vfs


class Rdma:
    """An RDMA socket: devices by namespace."""

    def __init__(self) -> None:
        self.devices_of: dict[str, tuple[Any, ...]] = {"home": (), "pod": ()}
        self.counters: Mapping[str, int] | Exception = {"sent_pkts": 7}
        self.opened: list[str] = []

    @contextmanager
    def open(self, netns: Any) -> Iterator[Any]:
        where = "home" if netns is None else "pod"
        self.opened.append(where)
        yield SimpleNamespace(
            devices=lambda: self.devices_of[where],
            ports=lambda index: (SimpleNamespace(number=1),),
            statistics=self.statistics,
        )

    def statistics(self, index: int, port: int) -> Mapping[str, int]:
        if isinstance(self.counters, Exception):
            raise self.counters
        return self.counters


class Drops:
    """What limits dropped; nothing is known of it until it is said."""

    def __init__(self) -> None:
        self.values: dict[str, int] | HwError = {}

    def __call__(self, target: object) -> dict[str, int]:
        if isinstance(self.values, HwError):
            raise self.values
        return self.values


def device(index: int = 7, name: str = NAME, guid: str = GUID) -> Any:
    return SimpleNamespace(index=RdmaIndex(index), name=RdmaName(name), node_guid=guid)


@pytest.fixture
def rdma() -> Rdma:
    return Rdma()


@pytest.fixture
def drops() -> Drops:
    return Drops()


def vf(index: int) -> PciIdentity:
    known = preparation(0).identity
    assert isinstance(known, PciIdentity)
    return replace(known, vf_index=index)


@pytest.fixture
def reader(tmp_path: Path, rdma: Rdma, drops: Drops, monkeypatch: pytest.MonkeyPatch) -> NodeMeters:
    @contextmanager
    def sysfs_of(netns: object) -> Iterator[Sysfs]:
        yield Sysfs(tmp_path / "pod")

    monkeypatch.setattr(meters, "sysfs_of", sysfs_of)
    host: Any = SimpleNamespace(sysfs=Sysfs(tmp_path / "home"), rdma=rdma.open)
    return NodeMeters(host, BootId("boot"), drops, lambda target: None)


def target(
    *,
    in_pod: Links | None = None,
    at_home: Links | None = None,
    mode: RdmaMode | None = None,
    **changed: Any,
) -> Any:
    binding = RdmaBinding(name=NAME, mode=mode, index=RdmaIndex(7), node_guid=GUID) if mode else None
    known = replace(preparation(0), rdma=binding, **changed)
    link = SimpleNamespace(ifindex=5)
    return SimpleNamespace(
        attachment=attachment(0),
        preparation=known,
        device=known.key.device,
        pod=in_pod,
        home=at_home or Links({}),
        pod_netns=object(),
        find_in_pod=lambda: link if in_pod is not None else None,
        find_at_home=lambda: link if at_home is not None else None,
    )


def shown(reader: NodeMeters, at: Any, pfs: PfCounters | None = None) -> dict[MeterKey, Any]:
    return {
        each.meter: each.reading.values if each.reading is not None else each.reason
        for each in reader.read(at, pfs)
    }


def put(tmp_path: Path, where: str, folder: str, **values: object) -> None:
    path = tmp_path / where / f"class/infiniband/{NAME}/ports/1/{folder}"
    path.mkdir(parents=True)
    for name, value in values.items():
        (path / name).write_text(f"{value}\n")


# --- the interface and the PF -------------------------------------------------------------------------


def test_an_interface_is_read_in_its_pod_and_at_home_once_it_came_back(reader: NodeMeters) -> None:
    meter = MeterKey("dev-0", INTERFACE)
    assert shown(reader, target(in_pod=Links({"tx_bytes": 3}))) == {meter: {"tx_bytes": 3}}
    assert shown(reader, target(at_home=Links({"tx_bytes": 4}))) == {meter: {"tx_bytes": 4}}


def test_an_interface_that_is_gone_or_says_no_is_told_with_the_reason(reader: NodeMeters) -> None:
    meter = MeterKey("dev-0", INTERFACE)
    assert shown(reader, target()) == {meter: "dev-0 is neither at home nor in its pod"}
    assert shown(reader, target(in_pod=Links(NotFound("it left")))) == {meter: "it left"}


def test_what_limits_dropped_is_read_beside_the_interface(reader: NodeMeters, drops: Drops) -> None:
    meter, at = MeterKey("dev-0", LIMITS), target(in_pod=Links({}))
    drops.values = {"tx_policed": 3, "tx_queue_dropped": 4}
    (found,) = (each for each in reader.read(at) if each.meter == meter)
    assert found.reading is not None
    assert found.reading.values == drops.values
    assert found.reading.wraps["tx_queue_dropped"] == 32
    drops.values = HwError("busy")
    assert shown(reader, at)[meter] == "busy"
    by_file = NicConfig(vf=VfConfig(driver=VfDriver.VFIO))
    assert meter not in shown(reader, target(in_pod=Links({}), config=by_file))


def test_a_counter_that_shows_what_none_can_is_left_out(reader: NodeMeters) -> None:
    found = shown(reader, target(in_pod=Links({"tx_bytes": 2**64 - 1, "rx_bytes": 5})))
    assert found == {MeterKey("dev-0", INTERFACE): {"rx_bytes": 5}}


def test_a_pf_is_asked_for_a_vf_given_by_its_files_and_else_where_time_allows(reader: NodeMeters) -> None:
    meter, home = MeterKey("dev-0", VF), Links({}, {0: {"rx_bytes": 9}, 1: {"rx_bytes": 8}})
    by_file = NicConfig(vf=VfConfig(driver=VfDriver.VFIO))
    assert shown(reader, target(at_home=home, config=by_file)) == {meter: {"rx_bytes": 9}}
    assert meter not in shown(reader, target(in_pod=Links({}), at_home=home))
    assert shown(reader, target(in_pod=Links({}), at_home=home), PfCounters())[meter] == {"rx_bytes": 9}
    checks = {e.meter: e.cross_check for e in reader.read(target(at_home=home), PfCounters())}
    assert checks == {meter: True, MeterKey("dev-0", INTERFACE): False}


def test_in_one_pass_a_pf_is_asked_once_for_all_of_its_vfs(reader: NodeMeters) -> None:
    """It tells of all of them at each question: 128 times that would be most of what the agent does."""
    home, pfs = Links({}, {0: {"rx_bytes": 9}, 1: {"rx_bytes": 8}}), PfCounters()
    vfs = [vf(0), vf(1), vf(0), vf(1)]
    told = [shown(reader, target(at_home=home, identity=each), pfs)[MeterKey("dev-0", VF)] for each in vfs]
    assert told == [{"rx_bytes": 9}, {"rx_bytes": 8}] * 2
    assert home.asked == ["links", "VFs of 2"]
    assert MeterKey("dev-0", VF) not in shown(reader, target(at_home=home, identity=vf(7)), pfs)


@pytest.mark.parametrize(
    ("vfs", "expected"),
    [({}, {}), (None, {}), (HwError("busy"), {MeterKey("dev-0", VF): "busy"})],
    ids=["no such VF", "no PF", "refused"],
)
def test_a_pf_that_does_not_tell_has_no_meter(
    reader: NodeMeters, vfs: object, expected: dict[MeterKey, str]
) -> None:
    by_file = NicConfig(vf=VfConfig(driver=VfDriver.VFIO))
    assert shown(reader, target(at_home=Links({}, vfs), config=by_file)) == expected


# --- RDMA ---------------------------------------------------------------------------------------------


def of_rdma(reader: NodeMeters, mode: RdmaMode) -> dict[MeterKey, Any]:
    return shown(reader, target(mode=mode, kind=DeviceKind.RDMA))


def test_a_shared_device_is_read_at_home(reader: NodeMeters, rdma: Rdma, tmp_path: Path) -> None:
    rdma.devices_of["home"] = (device(3, "mlx5_0", ""), device())
    put(tmp_path, "home", "counters", port_xmit_data=25)
    assert of_rdma(reader, RdmaMode.SHARED) == {HW: {"sent_pkts": 7}, PORT: {"port_xmit_data_bytes": 100}}
    assert rdma.opened == ["home"]


def test_a_device_in_a_pod_is_read_there(reader: NodeMeters, rdma: Rdma, tmp_path: Path) -> None:
    rdma.devices_of["pod"] = (device(),)
    put(tmp_path, "pod", "counters", port_rcv_data=1)
    put(tmp_path, "home", "counters", port_rcv_data=9)
    found = of_rdma(reader, RdmaMode.EXCLUSIVE)
    assert found == {HW: {"sent_pkts": 7}, PORT: {"port_rcv_data_bytes": 4}}


def test_a_device_that_came_home_by_itself_is_read_at_home(reader: NodeMeters, rdma: Rdma) -> None:
    rdma.devices_of["home"] = (device(),)
    assert of_rdma(reader, RdmaMode.EXCLUSIVE) == {HW: {"sent_pkts": 7}}
    assert rdma.opened == ["pod", "home"]


def test_a_device_under_another_name_is_the_one_on_record_and_a_new_one_another(
    reader: NodeMeters, rdma: Rdma
) -> None:
    rdma.devices_of["home"] = (device(name="mine"),)
    (first,) = reader.read(target(mode=RdmaMode.SHARED, kind=DeviceKind.RDMA))
    rdma.devices_of["home"] = (device(index=8),)
    (second,) = reader.read(target(mode=RdmaMode.SHARED, kind=DeviceKind.RDMA))
    assert first.meter == second.meter == HW
    assert first.reading is not None
    assert second.reading is not None
    assert first.reading.instance != second.reading.instance


@pytest.mark.parametrize("error", [Unsupported("STAT_GET", 22), Refused("STAT_GET", 90)])
def test_what_netlink_does_not_tell_sysfs_does(
    reader: NodeMeters, rdma: Rdma, tmp_path: Path, error: Exception
) -> None:
    rdma.devices_of["home"], rdma.counters = (device(),), error
    assert of_rdma(reader, RdmaMode.SHARED) == {}
    put(tmp_path, "home", "hw_counters", sent_pkts=5, lifespan=10)
    assert of_rdma(reader, RdmaMode.SHARED) == {HW: {"sent_pkts": 5}}


def test_a_device_that_is_gone_is_told(reader: NodeMeters, rdma: Rdma) -> None:
    gone = "the RDMA device mlx5_2 is neither at home nor in its pod"
    assert of_rdma(reader, RdmaMode.EXCLUSIVE) == {HW: gone}
    rdma.devices_of["home"], rdma.counters = (device(),), NotFound("it went just now")
    assert of_rdma(reader, RdmaMode.SHARED) == {HW: "it went just now"}


def test_a_kernel_without_rdma_costs_the_rdma_meters_only(
    reader: NodeMeters, rdma: Rdma, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def none(netns: object) -> Iterator[Any]:
        raise Unsupported("this kernel has no RDMA netlink", 93)
        yield

    monkeypatch.setattr(reader._host, "rdma", none)
    found = shown(reader, target(in_pod=Links({"tx_bytes": 1}), mode=RdmaMode.EXCLUSIVE))
    assert found[MeterKey("dev-0", INTERFACE)] == {"tx_bytes": 1}
    assert "no RDMA netlink" in found[HW]
