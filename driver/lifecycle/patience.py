"""How often a pod's RunPodSandbox may fail before its sandboxes are let through unattached.

Invariant: bounded in both ways: a pod is let through after so many failures in a row, and only so many pods
are remembered. Each failed call leaves a record in the runtime, and containerd 2.1 does not start again over
200 of them (seen: "failed to reserve sandbox name").
"""

from __future__ import annotations

from collections import OrderedDict

from driver.model import PodUid

FAILURES_MAX = 20
"""kubelet asks again with a back-off of up to minutes: what lasts that long is not over in a moment."""
PODS_MAX = 1024


class Patience:
    """Counts failures by pod."""

    def __init__(self) -> None:
        self._failures: OrderedDict[PodUid, int] = OrderedDict()

    def exhausted(self, pod: PodUid) -> bool:
        """One more failure of this pod: whether that is one too many."""
        count = self._failures.pop(pod, 0) + 1
        self._failures[pod] = count
        while len(self._failures) > PODS_MAX:
            self._failures.popitem(last=False)
        return count > FAILURES_MAX

    def restored(self, pod: PodUid) -> None:
        """It went well: what comes next counts anew."""
        self._failures.pop(pod, None)
