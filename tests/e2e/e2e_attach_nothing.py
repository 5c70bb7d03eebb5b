"""An agent that is broken on purpose: it attaches nothing, and is sure that it did.

Loaded into the agent's container as `sitecustomize`; the product has no switch for it.
"""

from __future__ import annotations

from bpf.layout import Hook
from driver import plan
from driver.model import Attachment, Preparation, attachment_owner


def _nothing(attachment: Attachment, preparation: Preparation, hook: Hook) -> plan.Plan:
    del preparation, hook
    return plan.Plan(owner=attachment_owner(attachment.id), generation=attachment.generation, steps=())


plan.attach = _nothing
