"""Of `knd devices`: the PFs that can have VFs, who made theirs, why there are not as many as wanted, and how
much of their bandwidth is given out."""

from __future__ import annotations

from collections.abc import Mapping

from driver.assembly import read_boot_id
from driver.cli.output import Row
from driver.inventory import quantity
from driver.model import DeviceName
from driver.paths import Paths
from driver.policy import NodePolicy
from driver.provision.carry_out import Provision
from driver.sharing import PortBudget
from hw.model import PfAddress
from hw.sysfs import Sysfs

COLUMNS = ("port", "interface", "vfs", "possible", "wanted", "made_by", "bandwidth", "given", "why_not")


def rows(
    paths: Paths,
    policy: NodePolicy,
    held: Mapping[DeviceName, str],
    budgets: Mapping[PfAddress, PortBudget],
) -> list[Row]:
    """bandwidth: what the policy gives out of the port; given: what claims have of that."""
    by_port: Mapping[str, PortBudget] = {str(port): budget for port, budget in budgets.items()}
    found = Provision(Sysfs(paths.sysfs), paths, read_boot_id(paths.proc)).survey(policy, held)
    return [
        {
            "port": address,
            "interface": plan.port.link.name if plan.port.link else None,
            "vfs": plan.port.num_vfs,
            "possible": plan.port.total_vfs,
            "wanted": plan.rule.vfs if plan.rule else None,
            "made_by": plan.maker if plan.port.num_vfs else None,
            "bandwidth": quantity(by_port[address].of) if address in by_port else None,
            "given": quantity(by_port[address].given) if address in by_port else None,
            "why_not": plan.why or ("not done yet" if plan.changes else None),
        }
        for address, plan in found.plans.items()
    ]
