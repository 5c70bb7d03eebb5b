"""What can be asked of and done to the links of one network namespace.

Invariant: a Links is bound to one namespace for its whole life. Every ifindex given to it is one of
that namespace. The one implementation is hw.netlink.LinkSocket; consumers and tests see this only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hw.model import Direction, IfIndex, IfName, InterfaceAddress, LinkFlags, LinkInfo, MacAddress
from hw.netns import NetnsHandle
from hw.wire import BpfFilter

NO_FLAGS = LinkFlags(0)


class Links(Protocol):
    """All methods raise hw.errors: NotFound where the link is gone, else Refused and its kin."""

    def dump(self) -> tuple[LinkInfo, ...]: ...

    def by_index(self, ifindex: IfIndex) -> LinkInfo | None: ...

    def addresses(self, ifindex: IfIndex) -> tuple[InterfaceAddress, ...]: ...

    def all_addresses(self) -> tuple[tuple[IfIndex, InterfaceAddress], ...]: ...

    def default_route_links(self) -> frozenset[IfIndex]: ...

    def set_up(self, ifindex: IfIndex) -> None: ...

    def set_down(self, ifindex: IfIndex) -> None: ...

    def move(
        self,
        ifindex: IfIndex,
        target: NetnsHandle,
        *,
        name: IfName,
        mtu: int | None = None,
        mac: MacAddress | None = None,
        new_ifindex: IfIndex | None = None,
    ) -> None: ...

    def change(
        self,
        ifindex: IfIndex,
        *,
        name: IfName | None = None,
        mtu: int | None = None,
        mac: MacAddress | None = None,
        alias: str | None = None,
        txqlen: int | None = None,
        group: int | None = None,
        gso_max_size: int | None = None,
        gro_max_size: int | None = None,
        gso_max_segs: int | None = None,
        gso_ipv4_max_size: int | None = None,
        gro_ipv4_max_size: int | None = None,
        broadcast: MacAddress | None = None,
        link_mode: int | None = None,
        set_flags: LinkFlags = NO_FLAGS,
        clear_flags: LinkFlags = NO_FLAGS,
    ) -> None: ...

    def delete(self, ifindex: IfIndex) -> None: ...

    def add_address(self, ifindex: IfIndex, address: InterfaceAddress) -> None: ...

    def add_altnames(self, ifindex: IfIndex, names: Sequence[str]) -> None: ...

    def remove_altnames(self, ifindex: IfIndex, names: Sequence[str]) -> None: ...

    def clear_xdp(self, ifindex: IfIndex) -> None: ...

    def add_clsact(self, ifindex: IfIndex) -> None: ...

    def del_clsact(self, ifindex: IfIndex) -> None: ...

    def add_bpf_filter(self, ifindex: IfIndex, direction: Direction, prog_fd: int, name: str) -> None: ...

    def bpf_filters(self, ifindex: IfIndex) -> tuple[BpfFilter, ...]: ...

    def qdiscs(self, ifindex: IfIndex) -> tuple[str, ...]: ...
