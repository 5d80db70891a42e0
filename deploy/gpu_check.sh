#!/bin/sh
# The GPU check with a Python that has torch and triton already: no virtual environment, no network.
#
#   deploy/gpu_check.sh [--wheels FOLDER] [arguments of python -m benchmarks.gpu_check]
#
# PYTHON names the Python (python3). What it lacks beside torch, triton and numpy is taken from wheels in FOLDER (.whl).
set -eu

wheels=
if [ "${1:-}" = --wheels ]; then
    wheels=$(cd "${2:?--wheels needs a folder}" && pwd)
    shift 2
fi
cd "$(dirname "$0")/.."
wheels=${wheels:-$PWD/.whl}
python=${PYTHON:-python3}
needed="torch triton numpy typing_extensions msgspec safetensors pydantic pydantic_core annotated_types typing_inspection"
needed="$needed pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers"

missing() {
    # shellcheck disable=SC2086
    "$python" -c 'import sys
from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name) is None))' $needed
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is too old or not there: Python 3.11 or newer is needed; PYTHON=... names another" >&2
    exit 1
}
if [ -n "$(missing)" ] && [ -d "$wheels" ]; then
    target=$(mktemp -d)
    trap 'rm -rf "$target"' EXIT
    install() {
        "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --upgrade --target "$target" "$@" >&2
    }
    # One that does not fit this Python stops all; one by one it is left out, and what is missing then is said below.
    install "$wheels"/*.whl || for wheel in "$wheels"/*.whl; do install "$wheel" || echo "left out: $wheel" >&2; done
    PYTHONPATH=$target${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
fi
lacks=$(missing)
if [ -n "$lacks" ]; then
    echo "$("$python" -c 'import sys; print(sys.executable)') lacks: $lacks" >&2
    echo "On a machine with a network \`make gpu-wheels\` puts wheels for Python 3.12 into .whl; torch, triton and numpy" >&2
    echo "must be there already (docs/gpu.md)." >&2
    case " $lacks " in
    *" torch "* | *" triton "* | *" numpy "*) exit 1 ;;
    esac
    echo "Only \`handover\` runs, which needs no more." >&2
    set -- "$@" --parts handover
fi
# With it the host plans in half the time. A Python that has no C compiler beside it does without.
if ! ls kernels/native/*.so >/dev/null 2>&1; then
    "$python" hatch_build.py >/dev/null 2>&1 || echo "kernels/native was not compiled: the host plans more slowly" >&2
fi
status=0
"$python" -m benchmarks.gpu_check "$@" || status=$?
exit $status
