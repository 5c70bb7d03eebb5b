"""The node policy: what this node offers with which attributes, and what users' claims may set.

Invariant: a policy in force was read whole and without a problem; a bad file changes nothing.
"""

from driver.policy.file import PolicyFile
from driver.policy.load import load_policy, policy_schema
from driver.policy.rules import (
    DeviceRule,
    ForeignChoice,
    HookPreference,
    NodePolicy,
    ResetPolicy,
    VfioPolicy,
)
from driver.policy.selectors import DeviceSelector, NetdevSelector
from driver.policy.usage import UsagePolicy

__all__ = [
    "DeviceRule",
    "DeviceSelector",
    "ForeignChoice",
    "HookPreference",
    "NetdevSelector",
    "NodePolicy",
    "PolicyFile",
    "ResetPolicy",
    "UsagePolicy",
    "VfioPolicy",
    "load_policy",
    "policy_schema",
]
