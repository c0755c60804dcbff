#!/bin/sh
# Create .venv with the first suitable Python and install exactly requirements.lock: `make setup`. A virtual environment
# whose setup was interrupted, or with another lock, is replaced; the copy of the lock in it is written last and marks it
# as complete.
set -eu
cd "$(dirname "$0")/.."
venv=.venv

fail() {
    echo "setup: $*" >&2
    exit 2
}

# Prints why this Python cannot be used; nothing where it can. (Runs on Python 2.6 and later.)
probe='
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    print("version %d.%d.%d" % tuple(sys.version_info[:3]))
else:
    for name in ("venv", "ensurepip"):
        try:
            __import__(name)
        except ImportError:
            print("without %d.%d %s" % (sys.version_info[0], sys.version_info[1], name))
            break
'

explain() { # output of the probe, and the Python
    case "$1" in
        version*) echo "$2: is Python ${1#version }, not 3.11, 3.12 or 3.13; set PYTHON=/path/to/python3" ;;
        without*) set -- "${1#without }" "$2" && echo "$2: has no ${1#* }; install it (Debian, Ubuntu: apt-get install python${1% *}-venv) or set PYTHON=" ;;
        *) echo "$2: cannot be run as Python; set PYTHON=/path/to/python3, of Python 3.11, 3.12 or 3.13" ;;
    esac
}

find_python() { # sets $python, or fails with the error of the first candidate
    python= reason=
    for candidate in "$@"; do
        error=$("$candidate" -c "$probe" 2>/dev/null) || error="nothing"
        if [ -z "$error" ]; then
            python=$candidate
            return
        fi
        [ -n "$reason" ] || reason=$(explain "$error" "$candidate")
    done
    fail "$reason"
}

export PIP_DISABLE_PIP_VERSION_CHECK=1
install="$venv/bin/python -m pip install --quiet --no-compile --require-hashes" # compiled when first imported
if ! cmp -s requirements.lock "$venv/requirements.lock" || ! "$venv/bin/python" -c ""; then
    if [ -n "${PYTHON:-}" ]; then find_python "$PYTHON"; else find_python python3 python3.13 python3.12 python3.11; fi
    echo "setup: $venv with $("$python" --version 2>&1); about 2 GB to fetch and unpack, a minute or three"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    # Two packages are built from source, with the locked setuptools instead of the newest one.
    awk '/^[^ ]/ { keep = /^setuptools==/ } keep' requirements.lock > "$venv/build.lock"
    $install -r "$venv/build.lock"
    $install --no-build-isolation --use-pep517 -r requirements.lock
fi
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
# Compile the modules of a run, even with PYTHONDONTWRITEBYTECODE: otherwise every start compiles them, for 5 s.
env -u PYTHONDONTWRITEBYTECODE TF_CPP_MIN_LOG_LEVEL=3 "$venv/bin/python" -c "import trainer.train, trainer.report.build, trainer.serve" 2>/dev/null || true
cp requirements.lock "$venv/requirements.lock"
echo "setup: $venv is ready"
