"""Values for the journal's and the ledger's tests."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpf.layout import Slot
from driver.journal.ledger import UsageOwner
from driver.model import (
    Attachment,
    AttachmentId,
    AttachmentState,
    BootId,
    ClaimRef,
    ClaimUid,
    DeviceName,
    InterfaceConfig,
    NicConfig,
    PodRef,
    PodUid,
    PoolName,
    Preparation,
    PreparationKey,
    PreparationState,
    SandboxId,
    ShareId,
)
from hw.model import (
    DeviceKind,
    Identity,
    IfIndex,
    IfName,
    LinkSettings,
    MacAddress,
    NetdevsimIdentity,
    NetnsCookie,
    PciIdentity,
    SoftwareIdentity,
    parse_pci_address,
)


class Records:
    """What can be read of a Book, over records that change under it: it never has the state that it had."""

    def __init__(
        self, attachments: Mapping[Any, Attachment], preparations: Mapping[Any, Preparation]
    ) -> None:
        self.attachments = lambda: tuple(attachments.values())
        self.attachment = attachments.get
        self.preparation = preparations.get

    @property
    def state(self) -> object:
        return object()


BOOT = BootId("11111111-1111-1111-1111-111111111111")
OTHER_BOOT = BootId("22222222-2222-2222-2222-222222222222")

IDENTITIES: tuple[Identity, ...] = (
    PciIdentity(parse_pci_address("0000:3b:00.2"), parse_pci_address("0000:3b:00.0"), 0),
    NetdevsimIdentity(1, 0, 3),
    SoftwareIdentity("veth", IfIndex(57), IfIndex(58), None),
)


def key(number: int, share: str | None = None) -> PreparationKey:
    return PreparationKey(
        ClaimUid(f"claim-{number}"),
        PoolName("node-a"),
        DeviceName(f"dev-{number}"),
        None if share is None else ShareId(share),
    )


def preparation(
    number: int,
    *,
    generation: int = 1,
    share: str | None = None,
    state: PreparationState = PreparationState.PREPARED,
    alias: str = "",
) -> Preparation:
    return Preparation(
        key=key(number, share),
        claim=ClaimRef("ml", f"nic-{number}", ClaimUid(f"claim-{number}")),
        request="nic",
        identity=IDENTITIES[number % len(IDENTITIES)],
        kind=DeviceKind.VF,
        dies_with_netns=bool(number % 2),
        config=NicConfig(
            interface=InterfaceConfig(
                name=IfName("net0"),
                mtu=9000,
                addresses=(
                    ipaddress.ip_interface("10.0.0.1/24"),
                    ipaddress.ip_interface("fd00::1/64"),
                ),
            )
        ),
        baseline=LinkSettings(
            name=IfName(f"ens{number}"),
            mtu=1500,
            mac=MacAddress("02:00:00:00:00:01"),
            txqlen=1000,
            group=0,
            alias=alias,
            altnames=("enp59s0f0v0",),
            gso_max_size=65536,
            gro_max_size=None,
            noarp=False,
            promisc=False,
            allmulti=False,
            multicast=True,
        ),
        attributes={"ebpf": True, "numaNode": 1, "resource.kubernetes.io/pcieRoot": "pci0000:3a"},
        capacities={"bandwidth": "100G"},
        reserved_for=frozenset({PodUid("pod-2"), PodUid("pod-1")}),
        slot=Slot(number),
        state=state,
        generation=generation,
    )


def attachment(
    number: int, *, generation: int = 1, state: AttachmentState = AttachmentState.ATTACHED
) -> Attachment:
    return Attachment(
        id=AttachmentId(f"attachment-{number}"),
        preparation=key(number),
        pod=PodRef("ml", f"train-{number}", PodUid(f"pod-{number}")),
        sandbox=SandboxId(f"sandbox-{number}"),
        netns_path=Path(f"/run/netns/pod-{number}"),
        netns_cookie=NetnsCookie(2**63 + number),
        boot_id=BOOT,
        state=state,
        generation=generation,
    )


def owner(number: int, started: float = 0.0, labels: tuple[tuple[str, str], ...] = ()) -> UsageOwner:
    """Of the account of attachment(number)."""
    held, made = attachment(number), preparation(number)
    return UsageOwner(
        attachment=held.id,
        pod=held.pod,
        claim=made.claim,
        device=made.key.device,
        interface=made.ifname,
        sandbox=held.sandbox,
        started=started,
        labels=labels,
    )
