#!/bin/bash
# Usage: deploy/make-wheelhouse.sh FOLDER
# Download every wheel of requirements/lock.txt for the interpreters of Debian 12 and 13, by hash, so
# that `make` can set itself up without a network. Fails if a pin has no wheel for one of them.
set -euo pipefail
exec >&2
folder=$1
machine=$(uname -m)

# pip takes only the platform tags it is given, so every glibc up to Debian 12's is named.
platforms=(--platform "manylinux2014_$machine")
for minor in $(seq 5 36); do platforms+=(--platform "manylinux_2_${minor}_$machine"); done

for version in 3.11 3.13; do
    abi=cp${version/./}
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
        --only-binary :all: --dest "$folder" --python-version "$version" --implementation cp \
        --abi "$abi" --abi abi3 --abi none "${platforms[@]}" -r requirements/lock.txt
    echo "$folder has the wheels for CPython $version"
done
