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

try() { # CLUSTER PYTEST ARGUMENT...
    local cluster=$1 started=$SECONDS status=0 verdict=ok
    shift
    printf '=== %s: %s\n' "$cluster" "$*"
    KND_CLUSTER=$cluster .venv/bin/pytest "$@" || status=$?
    [ "$failed" != 0 ] || failed=$status
    [ "$status" = 0 ] || verdict="failed with status $status"
    summary+=("$(printf '%-14s %5s s  %s: %s' "$cluster" "$((SECONDS - started))" "$1" "$verdict")")
}

for cluster in "${clusters[@]}"; do
    case $cluster in
        machine-*)
            try "$cluster" tests/e2e "$@"
            # On a cluster of its own, with no agents in it. Its probes listen where this machine's processes
            # are, so it is not for guests.
            try "$cluster" tests/contract "$@"
            ;;
        guest)
            # Emulated processors take minutes where this machine takes seconds: what only hardware shows.
            if [ -n "${WHOLE:-}" ]; then
                try "$cluster" tests/e2e "$@"
            else
                try "$cluster" tests/e2e/test_e2e_hardware.py \
                    tests/e2e/test_e2e_core.py::test_a_nic_comes_home_as_it_was_and_its_account_stays "$@"
            fi
            ;;
        *) try "$cluster" tests/e2e "$@" ;;
    esac
done
printf '=== what ran where\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
