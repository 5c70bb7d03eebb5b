"""A PF and a VF on InfiniBand as the sources of mlx5 have them: a VF's driver asks for its GUIDs when it
begins, and its port is up when the PF says so and it has one. No such hardware was there to ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from driver.execute.probe import Host
from driver.execute.target import Target
from driver.model import Preparation
from driver.rdma import Infiniband, RdmaBinding, RdmaMode
from hw.model import (
    DeviceKind,
    Guid,
    IfIndex,
    LinkInfo,
    LinkSettings,
    MacAddress,
    RdmaIndex,
    RdmaName,
    VfLinkState,
    VfSettings,
)
from hw.rdma.nldev import PortState
from hw.udev import Udev
from tests.unit.igb_world import FRESH, IDENTITY, PF_LINK, VF, VF_LINK, Igb
from tests.unit.journal_values import preparation
from tests.unit.rdma_world import Kernel

GIVEN = Guid("0211:22ff:fe00:0007")
HCA = RdmaName("mlx5_2")
DOWN = replace(FRESH, link_state=VfLinkState.DISABLE)
_ARPHRD_INFINIBAND = 32


def address(number: int, guid: Guid | None) -> MacAddress:
    """Of an IPoIB interface: the number of its queue pair, and its port's GUID."""
    digits = (guid or "0" * 16).replace(":", "")
    return MacAddress(bytes.fromhex(f"{number:08x}fe80000000000000{digits}").hex(":"))


class Mlx5(Igb):
    """told: whether the PF tells the GUIDs that it was given, which it does since Linux 5.5."""

    def __init__(self, folder: Path, *, held: VfSettings = DOWN, told: bool = True) -> None:
        super().__init__(folder)
        self.kernel = Kernel(exclusive=False, protocol="ib")
        self.host = Host(self, Udev(self.udev), rdma=self.kernel.open)
        self.held = held
        self.told = told
        self.takes_guids = True
        self.managed = True
        """Whether a subnet manager runs."""
        self.pinned = True
        self._begin(VF_LINK.ifindex)

    # --- the driver -----------------------------------------------------------------------------------

    def _begin(self, ifindex: IfIndex) -> None:
        name = self.vf.name if self.vf is not None else VF_LINK.name
        self.live = self.held.node_guid if self.takes_guids else None
        self.vf = replace(
            VF_LINK,
            ifindex=ifindex,
            name=name,
            link_type=_ARPHRD_INFINIBAND,
            mac=address(ifindex, self.held.port_guid),
        )
        self.kernel.register(HCA if not self.probes else f"mlx5_{9 + self.probes}", self.live or "")
        self._port()

    def _port(self) -> None:
        up = self.live is not None and self.held.link_state is not VfLinkState.DISABLE
        state = PortState.DOWN if not up else PortState.ACTIVE if self.managed else PortState.INIT
        self.kernel.port_state = state

    def write(self, path: str, value: str, *, timeout: float = 1.0) -> None:
        before = self.probes
        super().write(path, value, timeout=timeout)
        if path.endswith("/unbind"):
            self.kernel.known.clear()
        elif self.probes > before:
            assert self.vf is not None
            self._begin(self.vf.ifindex)

    def names(self, path: str) -> tuple[str, ...] | None:
        if path.endswith(f"{VF}/infiniband"):
            return tuple(each.name for each in self.kernel.known.values())
        return super().names(path)

    def pkeys(self, *table: str) -> None:
        """What the subnet manager gives the VF's port."""
        folder = self.root / f"class/infiniband/{HCA}/ports/1/pkeys"
        folder.mkdir(parents=True, exist_ok=True)
        for index, key in enumerate(table):
            (folder / str(index)).write_text(f"{key}\n")

    # --- the PF ---------------------------------------------------------------------------------------

    def dump(self) -> tuple[LinkInfo, ...]:
        return (
            replace(PF_LINK, link_type=_ARPHRD_INFINIBAND),
            *((self.vf,) if self.vf is not None else ()),
        )

    def vf_settings(self, pf: IfIndex, vf: int) -> VfSettings:
        found = super().vf_settings(pf, vf)
        return found if self.told else replace(found, node_guid=None, port_guid=None)

    def set_vf(self, pf: IfIndex, vf: int, setting: str, value: object) -> None:
        if setting in self.refused:
            raise self.refused[setting]
        self.held = replace(self.held, **{setting: value})
        self.sent.append((setting, value))
        self._port()


def prepared(card: Mlx5, *, wait: int = 1, **fields: Any) -> Preparation:
    """As a prepare records it. fields: of the Preparation."""
    assert card.vf is not None
    index = next(iter(card.kernel.known), RdmaIndex(0))
    made: Preparation = replace(
        preparation(0),
        identity=IDENTITY,
        kind=DeviceKind.VF,
        baseline=LinkSettings.of(card.vf, kind=DeviceKind.VF),
        home_driver="igbvf",
        vf_baseline=card.vf_settings(PF_LINK.ifindex, 0),
        rdma=RdmaBinding(
            name=HCA, mode=RdmaMode.SHARED, index=index, node_guid=card.kernel.known[index].guid
        ),
        infiniband=Infiniband(guid=GIVEN, active_seconds=wait),
    )
    return replace(made, **fields)


def target(card: Mlx5, made: Preparation) -> Target:
    links: Any = card
    return Target(preparation=made, attachment=None, home=links, home_netns=links)
