"""What the runtime reads is whole, in its place only while it should be, and under no other name."""

from __future__ import annotations

import json
import stat
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driver.cdi import CdiEntry, CdiProjection, LiveFiles, cdi_id, library_environment
from driver.errors import NotNow, Refusal
from driver.model import ClaimUid, DeviceName, PoolName, PreparationKey, ShareId
from driver.paths import Paths
from driver.rdma import DeviceFile, RdmaConfig, RdmaInPod, SysfsProof
from hw.model import IfName, NetnsCookie, RdmaIndex, RdmaName

UID = ClaimUid("0a1b2c3d-0000-4000-8000-000000000001")
OTHER = ClaimUid("ffffffff-0000-4000-8000-000000000002")
BAD_NAMES = ["", ".", "..", "../../etc/passwd", "a/b", "a b", "a\n", "-a", "a\0b", "é", "a" * 200, "a.json"]


def entry(uid: ClaimUid = UID, device: str = "pci-0000-3b-00-2", ifname: str = "net1") -> CdiEntry:
    return CdiEntry(key=PreparationKey(uid, PoolName("node"), DeviceName(device)), ifname=IfName(ifname))


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(root=tmp_path)


@pytest.fixture
def specs(paths: Paths) -> CdiProjection:
    return CdiProjection(paths)


@pytest.fixture
def live(paths: Paths) -> LiveFiles:
    return LiveFiles(paths)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- CDI specs --------------------------------------------------------------------------------------


def test_the_id_for_kubelet_names_the_device_in_the_spec(paths: Paths, specs: CdiProjection) -> None:
    shared = replace(entry().key, share_id=ShareId(str(uuid.UUID(int=5))))
    specs.write(UID, [entry(), CdiEntry(key=shared, ifname=IfName("net2"))])
    spec = json.loads((paths.cdi / f"knd.internal-nic-{UID}.json").read_text())
    ids = [f"{spec['kind']}={device['name']}" for device in spec["devices"]]
    assert ids == [cdi_id(paths.driver, entry().key), cdi_id(paths.driver, shared)]
    assert ids[0] == f"knd.internal/nic={UID}-pci-0000-3b-00-2"
    assert ids[1] == f"knd.internal/nic={UID}-pci-0000-3b-00-2_00000000-0000-0000-0000-000000000005"


def test_a_container_of_the_claim_runs_the_check_of_its_live_file_once(
    paths: Paths, specs: CdiProjection
) -> None:
    specs.write(UID, [entry(), entry(device="veth-5", ifname="net2")])
    spec = json.loads((paths.cdi / f"knd.internal-nic-{UID}.json").read_text())
    (hook,) = spec["containerEdits"]["hooks"]
    assert hook["hookName"] == "createRuntime"
    assert hook["path"] == str(paths.netns_check)
    assert hook["args"] == ["knd-netns-check", str(paths.live / UID)]
    assert all("hooks" not in device["containerEdits"] for device in spec["devices"])


def test_a_container_learns_the_interface_of_each_device(paths: Paths, specs: CdiProjection) -> None:
    shared = replace(entry().key, share_id=ShareId("5-6"))
    specs.write(UID, [entry(), CdiEntry(key=shared, ifname=IfName("net2"))])
    spec = json.loads((paths.cdi / f"knd.internal-nic-{UID}.json").read_text())
    assert [device["containerEdits"]["env"] for device in spec["devices"]] == [
        ["KND_INTERFACE_PCI_0000_3B_00_2=net1"],
        ["KND_INTERFACE_PCI_0000_3B_00_2_5_6=net2"],
    ]


def with_rdma(number: int, gid_index: int | None = 5, *, nccl: bool = True, ucx: bool = True) -> CdiEntry:
    given = RdmaInPod(
        name=RdmaName(f"mlx5_{number}"),
        index=RdmaIndex(number),
        port=1,
        files=(DeviceFile(f"uverbs{number}", 231, 192 + number), DeviceFile("rdma_cm", 10, 260)),
        gid_index=gid_index,
    )
    made = entry(device=f"pci-{number}", ifname=f"net{number}")
    return replace(made, rdma=given, wishes=RdmaConfig(nccl=nccl, ucx=ucx))


def test_a_container_gets_the_files_of_its_rdma_device_by_their_numbers(
    paths: Paths, specs: CdiProjection
) -> None:
    specs.write(UID, [with_rdma(2, nccl=False, ucx=False), entry()])
    spec = json.loads((paths.cdi / f"knd.internal-nic-{UID}.json").read_text())
    first, second = (device["containerEdits"] for device in spec["devices"])
    common = {"type": "c", "fileMode": 0o666, "permissions": "rw"}
    assert first["deviceNodes"] == [
        {"path": "/dev/infiniband/uverbs2", "major": 231, "minor": 194, **common},
        {"path": "/dev/infiniband/rdma_cm", "major": 10, "minor": 260, **common},
    ]
    assert first["env"] == [
        "KND_INTERFACE_PCI_2=net2",
        "KND_RDMA_DEVICE_PCI_2=mlx5_2",
        "KND_RDMA_PORT_PCI_2=1",
        "KND_RDMA_GID_INDEX_PCI_2=5",
    ]
    assert "deviceNodes" not in second
    assert "env" not in spec["containerEdits"]


def in_partition(number: int, index: int, partition: int = 1) -> CdiEntry:
    made = with_rdma(number, None)
    assert made.rdma is not None
    given, wishes = replace(made.rdma, pkey_index=index), replace(made.wishes, partition=partition)
    return replace(made, rdma=given, wishes=wishes)


def test_a_container_is_told_where_its_partition_is(paths: Paths, specs: CdiProjection) -> None:
    """NCCL takes the index, which ports may differ in, and UCX the key."""
    specs.write(UID, [in_partition(2, 0)])
    spec = json.loads((paths.cdi / f"knd.internal-nic-{UID}.json").read_text())
    assert "KND_RDMA_PKEY_INDEX_PCI_2=0" in spec["devices"][0]["containerEdits"]["env"]
    for entries, told in (
        ([in_partition(2, 0), in_partition(3, 0)], {"NCCL_IB_PKEY=0", "UCX_IB_PKEY=0x0001"}),
        ([in_partition(2, 0), in_partition(3, 4)], {"UCX_IB_PKEY=0x0001"}),
        ([in_partition(2, 0), in_partition(3, 0, 2)], {"NCCL_IB_PKEY=0"}),
        ([in_partition(2, 0), with_rdma(3)], set()),
    ):
        assert {each for each in library_environment(entries) if "PKEY" in each} == told


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (
            [with_rdma(2), with_rdma(3)],
            [
                "NCCL_IB_HCA==mlx5_2:1,mlx5_3:1",
                "NCCL_SOCKET_IFNAME==net2,net3",
                "NCCL_IB_GID_INDEX=5",
                "UCX_NET_DEVICES=mlx5_2:1,mlx5_3:1",
            ],
        ),
        (
            [with_rdma(2, ucx=False), with_rdma(3, 7, ucx=False)],
            ["NCCL_IB_HCA==mlx5_2:1,mlx5_3:1", "NCCL_SOCKET_IFNAME==net2,net3"],
        ),
        ([with_rdma(2, None, nccl=False)], ["UCX_NET_DEVICES=mlx5_2:1"]),
        ([with_rdma(2, nccl=False, ucx=False), entry()], []),
    ],
)
def test_the_libraries_are_told_of_all_devices_of_the_claim_where_that_was_asked(
    paths: Paths, specs: CdiProjection, entries: list[CdiEntry], told: list[str]
) -> None:
    specs.write(UID, entries)
    spec = json.loads((paths.cdi / f"knd.internal-nic-{UID}.json").read_text())
    assert spec["containerEdits"].get("env", []) == told


def test_a_spec_is_readable_and_alone_in_the_folder(paths: Paths, specs: CdiProjection) -> None:
    specs.write(UID, [entry()])
    specs.write(UID, [entry(ifname="net2")])
    (name,) = files(paths.cdi)
    assert mode(paths.cdi / name) == 0o644
    assert "net2" in (paths.cdi / name).read_text()


def test_a_reader_sees_the_old_spec_or_the_new_one_and_never_half(paths: Paths, specs: CdiProjection) -> None:
    specs.write(UID, [entry()])
    with (paths.cdi / f"knd.internal-nic-{UID}.json").open() as reader:
        specs.write(UID, [entry(ifname="net2")])
        assert json.load(reader)["devices"][0]["containerEdits"]["env"][0].endswith("net1")


def test_a_removed_spec_is_gone_and_removing_again_is_fine(paths: Paths, specs: CdiProjection) -> None:
    specs.write(UID, [entry()])
    specs.write(OTHER, [entry(OTHER)])
    specs.remove(UID)
    specs.remove(UID)
    assert files(paths.cdi) == [f"knd.internal-nic-{OTHER}.json"]


def test_the_remains_of_a_crash_are_no_spec_but_are_found_and_swept(
    paths: Paths, specs: CdiProjection
) -> None:
    paths.cdi.mkdir(parents=True)
    (paths.cdi / f".knd.internal-nic-{UID}.json.new").write_text("{")
    assert not [name for name in files(paths.cdi) if name.endswith((".json", ".yaml"))]
    assert specs.claims() == {UID}
    specs.remove(UID)
    assert files(paths.cdi) == []


def test_the_remains_of_a_crash_do_not_stop_the_next_write(paths: Paths, specs: CdiProjection) -> None:
    paths.cdi.mkdir(parents=True)
    (paths.cdi / f".knd.internal-nic-{UID}.json.new").symlink_to(paths.root / "elsewhere")
    specs.write(UID, [entry()])
    assert not (paths.root / "elsewhere").exists()
    assert files(paths.cdi) == [f"knd.internal-nic-{UID}.json"]


def test_only_our_own_specs_are_ours(paths: Paths, specs: CdiProjection) -> None:
    assert specs.claims() == frozenset()
    specs.write(UID, [entry()])
    for name in (
        "nvidia.com-gpu.json",
        f"knd.internal-nic-{UID}.yaml",
        f"other.internal-nic-{UID}.json",
        "knd.internal-nic-.json",
        "knd.internal-nic-a b.json",
        f".knd.internal-nic-{OTHER}.json",
    ):
        (paths.cdi / name).write_text("{}")
    assert specs.claims() - {OTHER} == {UID}


def test_a_spec_holds_devices_of_its_claim_and_at_least_one(specs: CdiProjection) -> None:
    with pytest.raises(ValueError, match="needs a device"):
        specs.write(UID, [])
    with pytest.raises(ValueError, match="only hold that claim's devices"):
        specs.write(UID, [entry(OTHER)])


# --- live files -------------------------------------------------------------------------------------


def test_a_live_file_has_one_cookie_a_line_for_root_alone(paths: Paths, live: LiveFiles) -> None:
    live.write(UID, [NetnsCookie(7), NetnsCookie(2**64 - 1), NetnsCookie(7)])
    assert (paths.live / UID).read_text() == "7\n18446744073709551615\n"
    assert mode(paths.live / UID) == 0o600
    assert mode(paths.live) == 0o700
    assert mode(paths.run) == 0o700


def test_a_live_folder_that_others_could_enter_is_closed(paths: Paths, live: LiveFiles) -> None:
    paths.live.mkdir(parents=True, mode=0o755)
    live.write(UID, [NetnsCookie(7)])
    assert mode(paths.live) == 0o700


def test_live_files_are_replaced_listed_and_removed(paths: Paths, live: LiveFiles) -> None:
    assert live.claims() == frozenset()
    live.write(UID, [NetnsCookie(7)])
    live.write(UID, [])
    live.write(OTHER, [NetnsCookie(8)])
    assert live.claims() == {UID, OTHER}
    assert (paths.live / UID).read_text() == ""
    live.remove(UID)
    live.remove(UID)
    assert live.claims() == {OTHER}


@pytest.mark.parametrize("cookie", [0, -1, 2**64])
def test_what_is_no_cookie_is_not_written(live: LiveFiles, cookie: int) -> None:
    with pytest.raises(ValueError, match="not all network namespace cookies"):
        live.write(UID, [NetnsCookie(cookie)])


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_claim_uid_reaches_a_file_outside_its_place(
    paths: Paths, specs: CdiProjection, live: LiveFiles, name: str
) -> None:
    uid = ClaimUid(name)
    for act in (
        lambda: specs.write(uid, [entry(uid)]),
        lambda: specs.remove(uid),
        lambda: live.write(uid, [NetnsCookie(7)]),
        lambda: live.remove(uid),
        lambda: cdi_id("knd.internal", entry(uid).key),
    ):
        with pytest.raises(Refusal, match="is not a claim UID"):
            act()
    assert not paths.cdi.exists()
    assert not paths.live.exists()


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_other_name_reaches_an_id_either(tmp_path: Path, name: str) -> None:
    key = entry().key
    with pytest.raises(Refusal, match="is not a device name"):
        cdi_id("knd.internal", replace(key, device=DeviceName(name)))
    with pytest.raises(Refusal, match="is not a share id"):
        cdi_id("knd.internal", replace(key, share_id=ShareId(name)))
    if name != "a.json":
        with pytest.raises(Refusal, match="is not a driver name"):
            CdiProjection(Paths(driver=name, root=tmp_path))


@pytest.mark.parametrize("ifname", ["", "a b", "a\nX=1", "a" * 16])
def test_no_interface_name_adds_to_the_environment(ifname: str) -> None:
    with pytest.raises(ValueError, match="is not an interface name"):
        entry(ifname=ifname)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_uid_that_is_taken_is_a_plain_file_name(text: str) -> None:
    try:
        made = cdi_id("knd.internal", entry(ClaimUid(text)).key)
    except Refusal:
        return
    assert made.isascii()
    assert "/" not in made.partition("=")[2]
    assert Path(text).name == text


def test_a_folder_that_cannot_be_written_is_worth_a_retry(
    paths: Paths, specs: CdiProjection, live: LiveFiles
) -> None:
    for folder in (paths.cdi, paths.live):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_text("in the way")
    with pytest.raises(NotNow, match=f"the CDI spec of claim {UID} cannot be changed"):
        specs.write(UID, [entry()])
    with pytest.raises(NotNow, match=f"the live file of claim {UID} cannot be changed"):
        live.write(UID, [NetnsCookie(7)])
    with pytest.raises(NotNow, match="cannot be listed"):
        specs.claims()


def test_a_live_file_says_what_must_hold_for_the_files_given_and_nothing_that_could_be_read_otherwise(
    paths: Paths, live: LiveFiles
) -> None:
    base = "class/infiniband_verbs/uverbs2"
    proofs = [SysfsProof(f"{base}/dev", "231:194"), SysfsProof(f"{base}/device", "0000:3b:00.2", link=True)]
    live.write(UID, [NetnsCookie(7)], proofs)
    assert (paths.live / UID).read_text() == f"7\nis {base}/dev 231:194\nat {base}/device 0000:3b:00.2\n"
    for path, value in ((base, "a b"), (base, "a\n8"), ("../etc/passwd", "a"), (f"{base} x", "a")):
        with pytest.raises(Refusal):
            live.write(UID, [NetnsCookie(8)], [SysfsProof(path, value)])
    assert (paths.live / UID).read_text().startswith("7\n")
