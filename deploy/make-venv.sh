#!/bin/bash
# Usage: deploy/make-venv.sh
# Have .venv hold exactly what requirements/lock.txt says; do nothing when it does already.
#
# .venv is a link to a folder below .cache named by what went into it (lock, interpreter, this
# checkout's path), and is switched only when that folder is complete: an interrupted run leaves nothing
# that looks finished. A .venv that is a folder was made by hand and is used as it is.
# PYTHON chooses the interpreter, WHEELHOUSE a folder of wheels to install from without a network.
# All output goes to stderr.
set -euo pipefail
exec >&2
cd "$(dirname "$0")/.."

# The distribution's own: only that one sees Debian's bcc and pyverbs.
python=${PYTHON:-/usr/bin/python3}
wheelhouse=${WHEELHOUSE:-}
if [ -z "$wheelhouse" ] && [ -d wheelhouse ]; then wheelhouse=wheelhouse; fi

if [ -d .venv ] && [ ! -L .venv ]; then
    echo "using the .venv folder as it is (made by hand; remove it to have one made from the lock)"
    exit 0
fi

digest() { sha256sum | cut -c1-16; }
key=$({ "$python" -VV; pwd -P; cat requirements/lock.txt "$0"; } | digest)
project=$(digest <pyproject.toml)
home=.cache/venv-$key

finished() { [ "$(readlink .venv)" = "$home" ] && [ "$(cat "$home/project" 2>/dev/null)" = "$project" ]; }

mkdir -p .cache
exec 9>.cache/venv.lock
flock 9
if finished; then exit 0; fi

source=()
if [ -n "$wheelhouse" ]; then source=(--no-index --find-links "$wheelhouse"); fi
pip=("$home/bin/python" -m pip --disable-pip-version-check --no-input)

if [ ! -e "$home/installed" ]; then
    echo "making a virtual environment from requirements/lock.txt ($("$python" -V))"
    rm -rf "$home"
    "$python" -m venv --system-site-packages "$home"
    # --force-reinstall: a pin that Debian happens to have as well must still be installed here, since
    # only the copy in the venv is the one whose hash was checked.
    "${pip[@]}" install --quiet --force-reinstall --require-hashes --only-binary :all: \
        "${source[@]}" -r requirements/lock.txt
    touch "$home/installed"
fi
"${pip[@]}" install -qq --no-deps --no-index --no-build-isolation --force-reinstall -e .
echo "$project" >"$home/project"

ln -sfn "$home" .cache/venv.new
mv -T .cache/venv.new .venv
find .cache -maxdepth 1 -name 'venv-*' ! -path "$home" -exec rm -rf {} +
