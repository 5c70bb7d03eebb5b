#!/bin/bash
# Usage: ci/kind-sriov-sim/test-e2e.sh [PYTEST OPTION...]
# The end-to-end suite on each cluster that CLUSTERS names, one after the other, and beside it on clusters of
# this machine the contracts that the simulated peers are held to. All run; the exit status is that of the
# first that failed. Ends with what ran where and how long. WHOLE=1: on a guest too the suite is whole.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

read -ra clusters <<<"${CLUSTERS:-machine-1.37 machine-1.34 guest}"
failed=0
summary=()
for cluster in "${clusters[@]}"; do
    suites=(tests/e2e)
    case $cluster in
        # A probe of the contracts listens where this machine's processes are; a guest's sockets are its own.
        machine-*) suites+=(tests/contract) ;;
        # Emulated processors take minutes where this machine takes seconds: what only real hardware shows.
        guest) [ -n "${WHOLE:-}" ] || suites=(tests/e2e/test_e2e_hardware.py tests/e2e/test_e2e_core.py) ;;
    esac
    started=$SECONDS
    status=0
    printf '=== %s on %s\n' "${suites[*]}" "$cluster"
    KND_CLUSTER=$cluster .venv/bin/pytest "${suites[@]}" "$@" || status=$?
    [ "$failed" != 0 ] || failed=$status
    verdict=ok
    [ "$status" = 0 ] || verdict="failed with status $status"
    summary+=("$(printf '%-14s %5s s  %s: %s' "$cluster" "$((SECONDS - started))" "${suites[*]}" "$verdict")")
done
printf '=== what ran where\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
