#!/bin/sh
# Make .venv from the first suitable Python and fill it with what requirements.lock names, nothing else.
# `make setup` runs this. A virtual environment whose setup was interrupted, or whose lock is another one, is made
# anew; the copy of the lock inside it is written last and says that it is whole.
set -eu
cd "$(dirname "$0")/.."
venv=.venv

fail() {
    echo "setup: $*" >&2
    exit 2
}

# One word on what keeps this Python from being used; nothing when it is fit. (Any Python from 2.6 on can run it.)
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

explain() { # what was found, of which python
    case "$1" in
        version*) echo "$2 is Python ${1#version }, and 3.11, 3.12 or 3.13 is needed: name one with PYTHON=/path/to/python3" ;;
        without*) set -- "${1#without }" "$2" && echo "$2 has no ${1#* }: install it (Debian, Ubuntu: apt-get install python${1% *}-venv) or name another Python with PYTHON=" ;;
        *) echo "$2 is no Python that runs here: name Python 3.11, 3.12 or 3.13 with PYTHON=/path/to/python3" ;;
    esac
}

find_python() { # sets $python, or fails with what is wrong with the first candidate
    python= reason=
    for candidate in "$@"; do
        found=$("$candidate" -c "$probe" 2>/dev/null) || found="nothing"
        if [ -z "$found" ]; then
            python=$candidate
            return
        fi
        [ -n "$reason" ] || reason=$(explain "$found" "$candidate")
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
    # Two packages come as source: the setuptools that builds them is the locked one too, not the newest of the day.
    awk '/^[^ ]/ { keep = /^setuptools==/ } keep' requirements.lock > "$venv/build.lock"
    $install -r "$venv/build.lock"
    $install --no-build-isolation --use-pep517 -r requirements.lock
fi
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
# Compiles what a run imports, even where Python was told to write no bytecode: every start would do it again, for 5 s.
env -u PYTHONDONTWRITEBYTECODE TF_CPP_MIN_LOG_LEVEL=3 "$venv/bin/python" -c "import trainer.train, trainer.report.build, trainer.serve" 2>/dev/null || true
cp requirements.lock "$venv/requirements.lock"
echo "setup: $venv is ready"
