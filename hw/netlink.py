"""Links, addresses, routes and filters of one network namespace, by rtnetlink. The only importer of pyroute2.

Invariant: a LinkSocket is one plain socket that was opened in its namespace and stays there, whichever
thread uses it. pyroute2 is used only to encode messages: its own sockets are opened per thread, in the
namespace of the thread that happens to use them, and so would act on the host in a pod's stead.

Of several changes in one message the kernel does one after the other and stops at the first it refuses:
after an error look at what is, do not assume that nothing was done.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Mapping, Sequence
from types import TracebackType

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from hw import wire
from hw.errors import NotFound, Refused, Unsupported
from hw.ipoib import IpoibMode, child_request
from hw.links import NO_FLAGS
from hw.model import (
    Direction,
    IfIndex,
    IfName,
    InterfaceAddress,
    LinkFlags,
    LinkInfo,
    MacAddress,
    VfSettings,
)
from hw.netns import NetnsHandle
from hw.qdisc import Qdiscs
from hw.statistics import link_statistics, vf_statistics
from hw.subinterface import Subinterface, request
from hw.transport import DEFAULT_TIMEOUT, Encode, Transport, header, open_netlink
from hw.vf import VfValue, vf_request, vf_settings
from hw.wire import BpfFilter

_RTM_DELLINK = 17
_RTM_GETLINK = 18
_RTM_SETLINK = 19
_RTM_NEWADDR = 20
_RTM_GETADDR = 22
_RTM_GETROUTE = 26
_RTM_NEWQDISC = 36
_RTM_DELQDISC = 37
_RTM_GETQDISC = 38
_RTM_NEWTFILTER = 44
_RTM_GETTFILTER = 46
_RTM_GETNEXTHOP = 106
_RTM_NEWLINKPROP = 108
_RTM_DELLINKPROP = 109
_NLM_F_EXCL = 0x200
_NLM_F_REPLACE = 0x100
_NLM_F_CREATE = 0x400

_RTEXT_FILTER_VF = 1
"""Left out wherever it can be: reading VF lists costs a firmware query per VF under the rtnl lock."""
_RTEXT_FILTER_SKIP_STATS = 8
_IFLA_ADDRESS = 1
_IFLA_EXT_MASK = 29
_IFLA_BROADCAST = 2
_IFLA_GSO_IPV4_MAX_SIZE = 63
_IFLA_GRO_IPV4_MAX_SIZE = 64
_XDP_FLAGS_SKB = 2
_XDP_FLAGS_DRV = 4
_XDP_FLAGS_HW = 8
_TC_CLSACT_HANDLE = 0xFFFF0000
_TC_CLSACT_PARENT = 0xFFFFFFF1
_FILTER_HANDLE = 1
_FILTER_PRIORITY = 1
_ETH_P_ALL = 3
_BPF_DIRECT_ACTION = 1
_DEFAULT_FAMILIES = (socket.AF_INET, socket.AF_INET6)

Attribute = tuple[str, object]


class LinkSocket:
    """hw.links.Links over one socket. A context manager; threads that share it take turns.

    netns None is the namespace of this process: the host's, for the agent.
    """

    def __init__(self, netns: NetnsHandle | None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """timeout is how long the kernel may take to answer one request, in seconds."""
        self._transport = Transport(open_netlink(netns), timeout=timeout)
        self._where = "the host" if netns is None else str(netns.path)
        self.shaping = Qdiscs(self._transport, self._where)

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> LinkSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- reading ------------------------------------------------------------------------------------

    def dump(self) -> tuple[LinkInfo, ...]:
        """All links of the namespace."""
        encode = _get_link(0)
        what = f"read the links of {self._where}"
        return tuple(map(wire.link, self._transport.dump(what, encode, wire.RTM_NEWLINK)))

    def by_index(self, ifindex: IfIndex) -> LinkInfo | None:
        """The link of that index; None if there is none."""
        encode = _get_link(ifindex)
        try:
            answer = self._transport.get(self._what("read", ifindex), encode)
        except NotFound:
            return None
        return wire.link(answer[0]) if answer else None

    def vf_settings(self, pf: IfIndex, vf: int) -> VfSettings | None:
        """What a PF holds of one of its VFs; None if it does not tell. Asks the hardware for all VFs of the
        PF: not for where time matters."""
        return self.all_vf_settings(pf).get(vf)

    def all_vf_settings(self, pf: IfIndex) -> Mapping[int, VfSettings]:
        """By VF index; empty if the PF tells of none."""
        encode = _get_link(pf, _RTEXT_FILTER_VF | _RTEXT_FILTER_SKIP_STATS)
        answer = self._transport.get(self._what("read the VFs of", pf), encode)
        return vf_settings(answer[0]) if answer else {}

    def statistics(self, ifindex: IfIndex) -> Mapping[str, int]:
        """What the interface counted, by hw.statistics' names. NotFound if it is not there."""
        answer = self._transport.get(self._what("read the counters of", ifindex), _get_link(ifindex, 0))
        return link_statistics(answer[0]) if answer else {}

    def vf_statistics(self, pf: IfIndex) -> Mapping[int, Mapping[str, int]]:
        """What a PF says that its VFs counted, by VF index. Asks the hardware for all of them, as
        vf_settings does. NotFound if the PF is not there."""
        answer = self._transport.get(
            self._what("read the VFs' counters of", pf), _get_link(pf, _RTEXT_FILTER_VF)
        )
        return vf_statistics(answer[0]) if answer else {}

    def set_vf(self, pf: IfIndex, vf: int, setting: str, value: VfValue) -> None:
        """Have a PF set one thing of one of its VFs, as hw.vf.vf_request names it. Drivers may do it later
        than they answer (the address, above all): read it back. Unsupported where the driver cannot."""
        fields = struct.pack("=BxHiII", 0, 0, pf, 0, 0)
        encode = _packed(_RTM_SETLINK, fields + vf_request(vf, setting, value))
        self._transport.change(self._what(f"set {setting} of VF {vf} on", pf), encode)

    def addresses(self, ifindex: IfIndex) -> tuple[InterfaceAddress, ...]:
        """IPv4 and IPv6 addresses of a link, link-local ones included."""
        return tuple(address for index, address in self.all_addresses() if index == ifindex)

    def all_addresses(self) -> tuple[tuple[IfIndex, InterfaceAddress], ...]:
        """The addresses of all links, in one dump."""
        what = f"read the addresses of {self._where}"
        answer = self._transport.dump(what, _encoder(ifaddrmsg, _RTM_GETADDR, {}, []), wire.RTM_NEWADDR)
        return tuple(found for payload in answer if (found := wire.address(payload)) is not None)

    def default_route_links(self) -> frozenset[IfIndex]:
        """Links that carry a default route of the main table, IPv4 or IPv6, each hop of a multipath one."""
        found: set[IfIndex] = set()
        nexthops: set[int] = set()
        for family in _DEFAULT_FAMILIES:
            payload = struct.pack("=BBBBBBBBI", family, 0, 0, 0, wire.RT_TABLE_MAIN, 0, 0, 0, 0)
            what = f"read the routes of {self._where}"
            for answer in self._transport.dump(what, _packed(_RTM_GETROUTE, payload), wire.RTM_NEWROUTE):
                route = wire.route(answer)
                if route is None or not route.default or route.table != wire.RT_TABLE_MAIN:
                    continue
                found.update(route.links)
                if route.nexthop is not None and not route.links:
                    nexthops.add(route.nexthop)
        return frozenset(found | self._nexthop_links(nexthops)) if nexthops else frozenset(found)

    def _nexthop_links(self, ids: set[int]) -> set[IfIndex]:
        """The links behind nexthop objects, where the kernel does not repeat them in the route."""
        encode = _packed(_RTM_GETNEXTHOP, bytes(8))
        answer = self._transport.dump(f"read the nexthops of {self._where}", encode, wire.RTM_NEWNEXTHOP)
        known = {hop.id: hop for hop in map(wire.nexthop, answer)}
        members = {member for number in ids if number in known for member in known[number].group}
        return {link for number in ids | members if number in known and (link := known[number].link)}

    # --- state and settings -------------------------------------------------------------------------

    def set_up(self, ifindex: IfIndex) -> None:
        self.change(ifindex, set_flags=LinkFlags.UP)

    def set_down(self, ifindex: IfIndex) -> None:
        self.change(ifindex, clear_flags=LinkFlags.UP)

    def move(
        self,
        ifindex: IfIndex,
        target: NetnsHandle,
        *,
        name: IfName,
        mtu: int | None = None,
        mac: MacAddress | None = None,
        new_ifindex: IfIndex | None = None,
    ) -> None:
        """Take a link to another namespace under a name there, in one message.

        The kernel takes the link down first, so it arrives down and may be renamed; its addresses,
        routes, qdiscs and neighbours do not come along. It keeps its ifindex where that is free
        (new_ifindex: has this one there, or the move is refused with EBUSY, kernel 5.13). Refused with
        EEXIST where the name is taken. After an error the link is in either namespace: look in both.
        """
        attrs: list[Attribute] = [("IFLA_NET_NS_FD", target.fd), ("IFLA_IFNAME", wire.raw(name))]
        if new_ifindex is not None:
            attrs.append(("IFLA_NEW_IFINDEX", new_ifindex))
        if mtu is not None:
            attrs.append(("IFLA_MTU", mtu))
        what = f"{self._what('move', ifindex)} to {target.path} as {name!a}"
        self._transport.change(
            what, _link(_RTM_SETLINK, ifindex, attrs, packed=_hardware(_IFLA_ADDRESS, mac))
        )

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
    ) -> None:
        """Set what is given, in one message. "" clears the alias.

        A link that is up may refuse a new name or MAC with Busy: set it down first. Flags are applied
        last. Setting and clearing the same flag is a ValueError.
        """
        if set_flags & clear_flags:
            raise ValueError(f"both set and clear {set_flags & clear_flags!r}")
        attrs: list[Attribute] = []
        if name is not None:
            attrs.append(("IFLA_IFNAME", wire.raw(name)))
        if alias is not None:
            attrs.append(("IFLA_IFALIAS", wire.raw(alias)))
        numbers = (
            ("IFLA_MTU", mtu),
            ("IFLA_TXQLEN", txqlen),
            ("IFLA_GROUP", group),
            ("IFLA_GSO_MAX_SIZE", gso_max_size),
            ("IFLA_GRO_MAX_SIZE", gro_max_size),
            ("IFLA_GSO_MAX_SEGS", gso_max_segs),
            ("IFLA_LINKMODE", link_mode),
        )
        attrs += [(key, value) for key, value in numbers if value is not None]
        packed = (
            _hardware(_IFLA_ADDRESS, mac)
            + _hardware(_IFLA_BROADCAST, broadcast)
            + _number(_IFLA_GSO_IPV4_MAX_SIZE, gso_ipv4_max_size)
            + _number(_IFLA_GRO_IPV4_MAX_SIZE, gro_ipv4_max_size)
        )
        if attrs or packed or set_flags or clear_flags:
            mask = set_flags | clear_flags
            encode = _link(_RTM_SETLINK, ifindex, attrs, flags=set_flags, mask=mask, packed=packed)
            self._transport.change(self._what("change", ifindex), encode)

    def delete(self, ifindex: IfIndex) -> None:
        """Remove a software link; one that is gone is no error. Unsupported for hardware."""
        with contextlib.suppress(NotFound):
            self._transport.change(self._what("delete", ifindex), _link(_RTM_DELLINK, ifindex, []))

    def add_ipoib(self, parent: IfIndex, name: IfName, pkey: int, mode: IpoibMode) -> None:
        """Make an InfiniBand partition's interface on a port's own one; delete() takes it away. NotFound if
        parent is gone or no IPoIB interface, Refused with EEXIST if the name is taken and with EINVAL if the
        parent is such an interface itself or its driver has no such mode, ValueError for a key that is none.
        A partition may have several."""
        encode = _packed(wire.RTM_NEWLINK, child_request(parent, name, pkey, mode))
        what = self._what(f"make {name!a} for partition {pkey:#06x} on", parent)
        self._transport.change(what, encode, _NLM_F_CREATE | _NLM_F_EXCL)

    def add_subinterface(
        self,
        made: Subinterface,
        *,
        index: IfIndex,
        parent: IfIndex,
        name: IfName,
        mac: MacAddress | None = None,
    ) -> None:
        """Make an interface on top of parent, with this index; delete() takes it away. NotFound if parent is
        gone, Busy if it is in a bridge, a bond or the like; Refused with EEXIST if index, name or VLAN are
        taken; Unsupported where the kernel knows no such kind."""
        what = self._what(f"make {name!a}, a {made}, on", parent)
        encode = _packed(wire.RTM_NEWLINK, request(made, index=index, parent=parent, name=name, mac=mac))
        self._transport.change(what, encode, _NLM_F_CREATE | _NLM_F_EXCL)

    def add_altnames(self, ifindex: IfIndex, names: Sequence[str]) -> None:
        """Give a link more names; ones it has already are no error: udev gives some as well. Refused with
        EEXIST if another link has one."""
        try:
            self._altnames(
                _RTM_NEWLINKPROP, transport_flags=_NLM_F_CREATE | _NLM_F_EXCL, ifindex=ifindex, names=names
            )
        except Refused as error:
            missing = [name for name in names if not self._has_altname(ifindex, name)]
            if error.errno != errno.EEXIST or len(missing) == len(names):
                raise
            self.add_altnames(ifindex, missing)

    def remove_altnames(self, ifindex: IfIndex, names: Sequence[str]) -> None:
        """Take names, as read, from a link; ones it does not have are no error."""
        for name in names:
            try:
                self._altnames(_RTM_DELLINKPROP, transport_flags=0, ifindex=ifindex, names=(name,))
            except Refused as error:
                if error.errno not in (errno.ENOENT, errno.EINVAL) or self._has_altname(ifindex, name):
                    raise

    def _has_altname(self, ifindex: IfIndex, name: str) -> bool:
        link = self.by_index(ifindex)
        return link is not None and name in link.altnames

    def _altnames(self, kind: int, *, transport_flags: int, ifindex: IfIndex, names: Sequence[str]) -> None:
        if not names:
            return
        nested: list[Attribute] = [("IFLA_ALT_IFNAME", wire.raw(name)) for name in names]
        encode = _link(kind, ifindex, [("IFLA_PROP_LIST", {"attrs": nested})])
        self._transport.change(self._what("change the names of", ifindex), encode, transport_flags)

    def add_address(self, ifindex: IfIndex, address: InterfaceAddress) -> None:
        """Give a link an address; one it has already is no error."""
        fields = {"family": socket.AF_INET6, "prefixlen": address.network.prefixlen, "index": ifindex}
        attrs: list[Attribute] = [("IFA_ADDRESS", str(address.ip))]
        if address.version == 4:
            fields["family"] = socket.AF_INET
            attrs.append(("IFA_LOCAL", str(address.ip)))
            if address.network.prefixlen < 31:
                attrs.append(("IFA_BROADCAST", str(address.network.broadcast_address)))
        what = self._what(f"add address {address} to", ifindex)
        encode = _encoder(ifaddrmsg, _RTM_NEWADDR, fields, attrs)
        self._transport.change(what, encode, _NLM_F_CREATE | _NLM_F_REPLACE)

    # --- programs -----------------------------------------------------------------------------------

    def clear_xdp(self, ifindex: IfIndex) -> None:
        """Take off XDP programs, in every mode. Busy where a bpf_link holds one: its owner must let go."""
        for flag in (_XDP_FLAGS_SKB, _XDP_FLAGS_DRV, _XDP_FLAGS_HW):
            nested = {"attrs": [("IFLA_XDP_FD", -1), ("IFLA_XDP_FLAGS", flag)]}
            with contextlib.suppress(Unsupported):
                try:
                    encode = _link(_RTM_SETLINK, ifindex, [("IFLA_XDP", nested)])
                    self._transport.change(self._what("take the XDP program off", ifindex), encode)
                except Refused as error:
                    # Kernels say EINVAL for a mode that the driver does not have.
                    if error.errno != errno.EINVAL:
                        raise

    def add_clsact(self, ifindex: IfIndex) -> None:
        """Make the qdisc that filters hang on; one that is there already is no error."""
        fields = {"index": ifindex, "handle": _TC_CLSACT_HANDLE, "parent": _TC_CLSACT_PARENT}
        encode = _encoder(tcmsg, _RTM_NEWQDISC, fields, [("TCA_KIND", "clsact")])
        try:
            self._transport.change(self._what("add clsact to", ifindex), encode, _NLM_F_CREATE | _NLM_F_EXCL)
        except Refused as error:
            if error.errno != errno.EEXIST or "clsact" not in self.qdiscs(ifindex):
                raise

    def del_clsact(self, ifindex: IfIndex) -> None:
        """Take the qdisc and all its filters off; none there is no error."""
        fields = {"index": ifindex, "handle": _TC_CLSACT_HANDLE, "parent": _TC_CLSACT_PARENT}
        encode = _encoder(tcmsg, _RTM_DELQDISC, fields, [("TCA_KIND", "clsact")])
        try:
            self._transport.change(self._what("take clsact off", ifindex), encode)
        except Refused as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL) or "clsact" in self.qdiscs(ifindex):
                raise

    def add_bpf_filter(self, ifindex: IfIndex, direction: Direction, prog_fd: int, name: str) -> None:
        """Put a program on a direction's clsact hook, in place of the one this made there before."""
        fields = {
            "index": ifindex,
            "handle": _FILTER_HANDLE,
            "parent": wire.TC_EGRESS if direction is Direction.EGRESS else wire.TC_INGRESS,
            "info": _FILTER_PRIORITY << 16 | socket.htons(_ETH_P_ALL),
        }
        options = {
            "attrs": [
                ("TCA_BPF_FD", prog_fd),
                ("TCA_BPF_NAME", wire.raw(name)),
                ("TCA_BPF_FLAGS", _BPF_DIRECT_ACTION),
            ]
        }
        attrs: list[Attribute] = [("TCA_KIND", "bpf"), ("TCA_OPTIONS", options)]
        what = self._what(f"attach program {name} ({direction.name.lower()}) to", ifindex)
        encode = _encoder(tcmsg, _RTM_NEWTFILTER, fields, attrs)
        self._transport.change(what, encode, _NLM_F_CREATE | _NLM_F_REPLACE)

    def bpf_filters(self, ifindex: IfIndex) -> tuple[BpfFilter, ...]:
        """The programs on a link's clsact hooks, whoever put them there."""
        if "clsact" not in self.qdiscs(ifindex):
            return ()
        found: list[BpfFilter] = []
        for parent in (wire.TC_EGRESS, wire.TC_INGRESS):
            encode = _encoder(tcmsg, _RTM_GETTFILTER, {"index": ifindex, "parent": parent}, [])
            answer = self._transport.dump(self._what("read filters of", ifindex), encode, wire.RTM_NEWTFILTER)
            parsed = (wire.bpf_filter(payload) for payload in answer)
            found += [pair[1] for pair in parsed if pair is not None and pair[0] == ifindex]
        return tuple(found)

    def qdiscs(self, ifindex: IfIndex) -> tuple[str, ...]:
        """Kinds of the link's qdiscs, as listed."""
        encode = _encoder(tcmsg, _RTM_GETQDISC, {"index": ifindex}, [])
        answer = self._transport.dump(self._what("read qdiscs of", ifindex), encode, wire.RTM_NEWQDISC)
        return tuple(found.kind for found in map(wire.qdisc, answer) if found.ifindex == ifindex)

    def _what(self, verb: str, ifindex: IfIndex) -> str:
        return f"{verb} link {ifindex} of {self._where}"


def _link(
    kind: int,
    ifindex: int,
    attrs: Sequence[Attribute],
    *,
    flags: int = 0,
    mask: int = 0,
    packed: bytes = b"",
) -> Encode:
    fields = {"index": ifindex, "flags": int(flags), "change": int(mask)}
    return _encoder(ifinfmsg, kind, fields, attrs, packed)


def _hardware(kind: int, address: MacAddress | None) -> bytes:
    """pyroute2 takes every hardware address for 6 bytes long; those of IPoIB have 20."""
    return b"" if address is None else wire.attribute(kind, bytes.fromhex(address.replace(":", "")))


def _number(kind: int, value: int | None) -> bytes:
    """For attributes that pyroute2 does not know."""
    return b"" if value is None else wire.attribute(kind, struct.pack("=I", value))


def _encoder(
    form: type, kind: int, fields: Mapping[str, int], attrs: Sequence[Attribute], tail: bytes = b""
) -> Encode:
    """A message of a pyroute2 class; tail is attributes that were packed by hand."""

    def encode(flags: int, sequence: int) -> bytes:
        message = form()
        for key, value in fields.items():
            message[key] = value
        # A fresh list: pyroute2 replaces its entries while encoding, and a dump may be asked for twice.
        message["attrs"] = list(attrs)
        message["header"] = {"type": kind, "flags": flags, "sequence_number": sequence, "pid": 0}
        message.encode()
        return header(kind, flags, sequence, bytes(message.data)[16:] + tail)

    return encode


def _get_link(ifindex: int, extensions: int = _RTEXT_FILTER_SKIP_STATS) -> Encode:
    # By hand: this is asked several times for every pod and for every link event, and what pyroute2
    # makes of it is the same.
    mask = wire.attribute(_IFLA_EXT_MASK, struct.pack("=I", extensions))
    return _packed(_RTM_GETLINK, struct.pack("=BxHiII", 0, 0, ifindex, 0, 0) + mask)


def _packed(kind: int, payload: bytes) -> Encode:
    return lambda flags, sequence: header(kind, flags, sequence, payload)
