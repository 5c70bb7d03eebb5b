"""What a kernel must have for some of the tests.

Invariant: on a kernel that has it nothing is left out.
"""

from __future__ import annotations

import pytest

from bpf.attach import probe_tcx
from bpf.layout import Hook


@pytest.fixture(scope="session")
def tcx_kernel() -> None:
    """For tests of tcx itself; what is counted is tested on every kernel."""
    if probe_tcx() is not Hook.TCX:
        pytest.skip("this kernel has no tcx, which came with 6.6")
