"""The demo takes the best devices that nothing uses, and says why not better ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kndsim.demo.choice import Backend, CannotUse, Choice, SeenLink, choose
from kndsim.demo.host import written
from kndsim.sysfs_tree import write_tree

NEEDED = 4
PORT = "pci pci0000:20/0000:20:00.0/"
IGB = "0x020000 0x8086 0x10c9"
ADDRESS = "0000:21:00.0"
LO = SeenLink(index=1, name="lo", addresses=("127.0.0.1",), routes=("127.0.0.0/8",))
PF = SeenLink(index=4, name="ens1f0")


def function(address: str = ADDRESS, name: str = "ens1f0", *, total: int = 7, made: int = 0) -> str:
    return (
        f"{PORT}{address} = {IGB} sriov_totalvfs={total} sriov_numvfs={made}\n"
        f"netdev {address} {name} dev_port=0"
    )


def chosen(tmp_path: Path, tree: str, *links: SeenLink, **more: object) -> Choice:
    sysfs = write_tree(tmp_path / "sys", tree)
    return choose(sysfs, (LO, *links), needed=NEEDED, **more)  # type: ignore[arg-type]


def test_an_idle_pf_is_taken_and_named(tmp_path: Path) -> None:
    choice = chosen(tmp_path, function(), PF)
    assert choice.backend is Backend.SRIOV
    assert choice.pf is not None
    assert (choice.pf.address, choice.pf.name, choice.pf.total_vfs) == (ADDRESS, "ens1f0", 7)
    assert choice.reason.startswith("PF ens1f0 (0000:21:00.0) is idle: down, no address, master, route")


USED = {
    "global address": (function(), [replace(PF, addresses=("192.0.2.1",))], "has the address 192.0.2.1"),
    "link-local address": (function(), [replace(PF, addresses=("fe80::1",))], "has the address fe80::1"),
    "default route": (function(), [replace(PF, routes=("10.0.0.0/8", "default"))], "has the default route"),
    "route": (function(), [replace(PF, routes=("10.0.0.0/8",))], "has a route to 10.0.0.0/8"),
    "master": (
        function(),
        [replace(PF, master=9), SeenLink(index=9, name="bond0")],
        "belongs to 'bond0'",
    ),
    "carries a VLAN": (function(), [PF, SeenLink(index=9, name="ens1f0.7", lower=4)], "in use by 'ens1f0.7'"),
    "is a master": (function(), [PF, SeenLink(index=9, name="slave0", master=4)], "in use by 'slave0'"),
    "upper device that no dump shows": (
        f"{function()}\ndevices/pci0000:20/0000:20:00.0/{ADDRESS}/net/ens1f0/upper_mv0 -> ../mv0",
        [PF],
        "in use by 'mv0'",
    ),
    "up": (function(), [replace(PF, up=True)], "is up, so others may use it"),
    "listened on": (function(), [replace(PF, listeners=1)], "is listened on"),
    "XDP": (function(), [replace(PF, xdp=True)], "has an XDP program"),
    "VFs already": (function(made=2), [PF], "has 2 VFs already"),
    "too few VFs": (function(total=NEEDED), [PF], "can have 4 VFs and 5 are needed"),
    "switchdev": (
        f"{function()}\ndevices/pci0000:20/0000:20:00.0/{ADDRESS}/net/ens1f0/phys_switch_id = 1234",
        [PF],
        "is a switch",
    ),
    "storage": (
        f"{function()}\nfolder devices/pci0000:20/0000:20:00.0/{ADDRESS}/host3",
        [PF],
        "carries storage",
    ),
    "odd name": (
        function(name="ens1[f0]"),
        [replace(PF, name="ens1[f0]")],
        "has a name that a node policy cannot select",
    ),
    "elsewhere": (function(), [], "has no netdev in this network namespace"),
    "no number of VFs": (
        f"{PORT}{ADDRESS} = {IGB} sriov_totalvfs=7\nnetdev {ADDRESS} ens1f0 dev_port=0",
        [PF],
        "does not say how many VFs it has",
    ),
}


@pytest.mark.parametrize("case", USED.values(), ids=USED.keys())
def test_a_pf_that_anything_uses_is_let_be(tmp_path: Path, case: tuple[str, list[SeenLink], str]) -> None:
    tree, links, why = case
    choice = chosen(tmp_path, tree, *links)
    assert choice.backend is Backend.VETH
    assert choice.pf is None
    assert why in choice.reason


def test_the_first_idle_pf_is_taken_where_others_are_in_use(tmp_path: Path) -> None:
    tree = f"{function()}\n{function('0000:21:00.1', 'ens1f1')}"
    choice = chosen(tmp_path, tree, replace(PF, routes=("default",)), SeenLink(index=5, name="ens1f1"))
    assert choice.pf is not None
    assert choice.pf.name == "ens1f1"


def test_what_did_not_work_is_not_tried_again_and_is_said(tmp_path: Path) -> None:
    choice = chosen(tmp_path, function(), PF, failed={ADDRESS: "has no link"})
    assert choice.backend is Backend.VETH
    assert "PF ens1f0 (0000:21:00.0) has no link" in choice.reason


def test_other_pci_functions_with_vfs_are_no_nics(tmp_path: Path) -> None:
    disk = "pci pci0000:00/0000:00:05.0 = 0x010802 0x144d 0xa824 sriov_totalvfs=32 sriov_numvfs=0"
    choice = chosen(tmp_path, disk)
    assert choice.backend is Backend.VETH
    assert "no SR-IOV PF" in choice.reason


NETDEVSIM = "bus/netdevsim/new_device = \nbus/netdevsim/link_device = "


def test_netdevsim_is_taken_where_no_pf_is_idle(tmp_path: Path) -> None:
    choice = chosen(tmp_path, f"{function(made=3)}\n{NETDEVSIM}", PF)
    assert choice.backend is Backend.NETDEVSIM
    assert "has 3 VFs already" in choice.reason


def test_netdevsim_that_carries_no_traffic_is_not(tmp_path: Path) -> None:
    choice = chosen(tmp_path, "bus/netdevsim/new_device = ")
    assert choice.backend is Backend.VETH
    assert "cannot link ports" in choice.reason


def test_a_machine_with_nothing_says_so(tmp_path: Path) -> None:
    choice = chosen(tmp_path, "folder bus/pci/devices")
    assert choice.reason == "no SR-IOV PF; no netdevsim (module not loaded, or not in this kernel)"


def test_a_backend_that_was_asked_for_is_taken_or_refused_with_the_reason(tmp_path: Path) -> None:
    tree = f"{function(made=3)}\n{NETDEVSIM}"
    assert chosen(tmp_path, tree, PF, wanted=Backend.VETH).backend is Backend.VETH
    with pytest.raises(CannotUse, match="has 3 VFs already"):
        choose(tmp_path / "sys", (LO, PF), needed=NEEDED, wanted=Backend.SRIOV)
    with pytest.raises(CannotUse, match="it broke"):
        choose(
            tmp_path / "sys",
            (LO, PF),
            needed=NEEDED,
            wanted=Backend.NETDEVSIM,
            failed={"netdevsim": "it broke"},
        )


def test_a_kernel_file_is_put_back_whatever_happens(tmp_path: Path) -> None:
    file = tmp_path / "disable_ipv6"
    file.write_text("0\n")

    def interrupted() -> None:
        with written(file, "1"):
            assert file.read_text() == "1"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text().strip() == "0"
    with written(tmp_path / "absent", "1"):
        assert not (tmp_path / "absent").exists()
