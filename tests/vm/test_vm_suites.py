"""The repository's own tests of programs and kernel calls, on kernels other than this machine's.

Invariant: a test that fails in a guest, or is left out there, is named here with its words.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from xml.etree import ElementTree

import pytest

from kndsim.guest import Guest, Kernel

NO_TCX = "this kernel has no tcx, which came with 6.6"
REPORT = PurePosixPath("/tmp/report.xml")
SECONDS = 840.0

# tests/kernel/test_kind_*: need nothing of a kernel that the others do not, and take long here.
# tests/kernel/test_limits_hold*: as much traffic as goes, which an emulated CPU is minutes about; what a
# kernel has to have for limits is in test_limits_made.
CHOSEN = ("tests/bpf", "tests/kernel", "--ignore-glob=*/test_kind_*", "--ignore-glob=*/test_limits_hold*")


@pytest.mark.parametrize("vm", [Kernel.DEBIAN12, Kernel.NEWEST], indirect=True, ids=str)
def test_the_suites_of_programs_and_kernel_calls_pass(vm: Guest) -> None:
    command = ["python", "-m", "pytest", "-q", "-o", "timeout=300", f"--junit-xml={REPORT}", *CHOSEN]
    done = vm.run(command, check=False, timeout=SECONDS)
    assert done.code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), done.out + done.err
    cases = list(ElementTree.fromstring(vm.read(REPORT)).iter("testcase"))
    assert len(cases) > 300
    wrong = [line for case in cases for line in _complaints(case, vm.request.kernel)]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def _complaints(case: ElementTree.Element, kernel: Kernel) -> list[str]:
    name = f"{case.get('classname')}::{case.get('name')}"
    found = [part for part in case if part.tag in ("failure", "error", "skipped")]
    if kernel is Kernel.DEBIAN12:
        # Older than tcx: what is about tcx alone says so and is not tried.
        found = [part for part in found if part.tag != "skipped" or part.get("message") != NO_TCX]
    return [f"{name}: {part.tag}: {part.get('message', '')}\n{(part.text or '')[-3000:]}" for part in found]
