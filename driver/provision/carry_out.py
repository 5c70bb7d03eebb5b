"""Doing what the plan says about a PF, with its record before and after.

Invariant: the record is on the disk before the first change, and says done only when every VF is as the rule
wants it. Whoever calls holds every device of the PF.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from driver.errors import DriverError
from driver.model import BootId, DeviceName
from driver.paths import Paths
from driver.policy import NodePolicy
from driver.policy.sriov import MacChoice
from driver.provision import hands_off
from driver.provision.macs import Source, generate
from driver.provision.plan import Maker, PortPlan, Verdict, settings_of
from driver.provision.records import Making, Makings
from driver.provision.survey import Survey, survey
from hw.errors import HwError
from hw.model import EswitchMode, IfIndex, MacAddress, PfAddress
from hw.netlink import LinkSocket
from hw.ports import SriovPort
from hw.sriov import provision
from hw.sriov.discovery import DEVICES
from hw.sysfs import Sysfs

log = logging.getLogger(__name__)

_ETHERNET = 1
Macs = Mapping[PfAddress, tuple[MacAddress, ...]]


class Provision:
    """On one node, in one boot. Its methods block."""

    def __init__(self, sysfs: Sysfs, paths: Paths, boot_id: BootId) -> None:
        self._sysfs = sysfs
        self._paths = paths
        self._boot_id = boot_id
        self._makings = Makings(paths.makings)

    @property
    def has_records(self) -> bool:
        return bool(self._makings.read()[0])

    def survey(self, policy: NodePolicy, held: Mapping[DeviceName, str]) -> Survey:
        with LinkSocket(None) as links:
            return survey(self._sysfs, links, policy, self._makings, self._boot_id, held)

    def keep_hands_off(self, plans: Iterable[PortPlan]) -> float:
        """Have the rules be there for the VFs to come; returns seconds until they are known to be read."""
        ours = [
            plan.port.address for plan in plans if plan.verdict is Verdict.MAKE or plan.maker is Maker.KND
        ]
        new = hands_off.write(self._paths, ours) if ours else False
        return hands_off.NOTICE_SECONDS if new and self._paths.udev_control.exists() else 0.0

    def carry_out(self, plans: Collection[PortPlan], macs: Macs) -> None:
        """The plans of one PF, or of the PFs of one bond: all or none. HwError or DriverError if none."""
        done: list[PfAddress] = []
        try:
            for plan in plans:
                if plan.verdict is Verdict.MAKE:
                    self._make(plan, macs.get(plan.port.address, ()))
                elif plan.verdict is Verdict.REMOVE:
                    self._remove(plan.port, plan.making)
                done.append(plan.port.address)
        except (HwError, DriverError):
            self._take_back([plan.port for plan in plans if plan.port.address in done])
            raise

    def forget(self, address: PfAddress) -> None:
        """There is nothing of ours on it any more."""
        self._makings.forget(address)

    def remove_rules(self) -> None:
        hands_off.remove(self._paths)

    def _make(self, plan: PortPlan, macs: tuple[MacAddress, ...]) -> None:
        port, rule, link = plan.port, plan.rule, plan.port.link
        assert rule is not None, "the plan says so"
        assert link is not None, "the plan says so"
        with LinkSocket(None) as links:
            before = self._before(plan.making) or provision.look(
                self._sysfs, links, port.address, link.ifindex, mode=rule.mode is not None
            )
            if before.mode is None and rule.mode is not None:
                before = replace(before, mode=port.eswitch)
            making = Making(
                address=port.address,
                boot_id=self._boot_id,
                vfs=rule.vfs,
                previous=port.num_vfs,
                settings=settings_of(rule),
                done=False,
                autoprobe=before.autoprobe,
                was_up=before.up,
                mtu=before.mtu,
                mode=before.mode or "",
            )
            self._makings.write(making)
            order = provision.Order(
                pf=port.address,
                ifindex=link.ifindex,
                count=rule.vfs,
                mode=rule.mode,
                pf_driver=port.driver,
                macs=macs,
                vlan=rule.vf.vlan,
                spoof_check=rule.vf.spoof_check,
                trust=rule.vf.trust,
                mtu=rule.mtu,
                driver=rule.vf.driver,
            )
            log.info("making %d VFs on %s", rule.vfs, port.shown)
            try:
                provision.make(self._sysfs, links, order, before)
            except HwError:
                if provision.is_given_back(self._sysfs, port.address, before):
                    self._makings.forget(port.address)
                raise
            first = self._sysfs.instance(f"{DEVICES}/{port.address}/virtfn0")
            self._makings.write(replace(making, done=True, instance=first or 0))
        log.info("%s has its %d VFs", port.shown, rule.vfs)

    def _remove(self, port: SriovPort, making: Making | None) -> None:
        before = self._before(making)
        if making is not None and before is not None:
            self._makings.write(replace(making, vfs=0, previous=port.num_vfs, done=False))
            log.info("removing the %d VFs of %s", port.num_vfs, port.shown)
            with LinkSocket(None) as links:
                provision.give_back(self._sysfs, links, port.address, _own_link(port), before)
        self._makings.forget(port.address)

    def _take_back(self, ports: Iterable[SriovPort]) -> None:
        """Of a bond whose ports were to change together."""
        for port in ports:
            try:
                self._remove(port, self._makings.read()[0].get(port.address))
            except (HwError, DriverError) as error:
                log.error("%s: %s", port.shown, error)

    def _before(self, making: Making | None) -> provision.Before | None:
        """What the PF was like, if this boot's record says."""
        if making is None or making.boot_id != self._boot_id:
            return None
        return provision.Before(
            autoprobe=making.autoprobe,
            up=making.was_up,
            mtu=making.mtu,
            mode=EswitchMode(making.mode) if making.mode else None,
        )


def addresses(found: Survey) -> Macs:
    """For all VFs that are to be made, unlike each other and those that are made already."""
    sources = [
        Source(address=pf, mac=mac, count=plan.rule.vfs)
        for pf, plan in found.plans.items()
        if plan.rule is not None
        and plan.rule.vf.mac is MacChoice.GENERATED
        and (plan.verdict is Verdict.MAKE or plan.maker is Maker.KND)
        and (mac := _card_mac(plan.port)) is not None
    ]
    return generate(sources, found.macs)


def _card_mac(port: SriovPort) -> MacAddress | None:
    """What its maker gave the card. InfiniBand's addresses come from its GUIDs."""
    link = port.link
    if link is None or link.link_type != _ETHERNET:
        return None
    return link.permanent_mac or link.mac


def _own_link(port: SriovPort) -> IfIndex | None:
    """To be put as it was; not where others have taken it into use since."""
    return port.link.ifindex if port.link is not None and not port.in_use else None
