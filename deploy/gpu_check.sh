#!/bin/sh
# The GPU check with a Python that has torch and triton already: no virtual environment, no network.
#
#   deploy/gpu_check.sh [--wheels FOLDER] [arguments of python -m benchmarks.gpu_check]
#
# PYTHON names the Python (python3). Missing modules other than torch, triton and numpy are taken from wheels in FOLDER
# (.whl).
set -eu

needed="torch triton numpy typing_extensions msgspec safetensors pydantic pydantic_core annotated_types typing_inspection"
needed="$needed llguidance pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers"
# shellcheck source=deploy/bare_python.sh
. "$(dirname "$0")/bare_python.sh"
if [ -n "$lacks" ]; then
    case " $lacks " in
    *" torch "* | *" triton "* | *" numpy "*) exit 1 ;;
    esac
    echo "Only \`handover\` runs, which needs no more." >&2
    set -- "$@" --parts handover
fi
# With it the host plans in half the time. Without a C compiler the check runs without it.
if ! ls kernels/native/*.so >/dev/null 2>&1; then
    "$python" hatch_build.py >/dev/null 2>&1 || echo "kernels/native was not compiled: the host plans more slowly" >&2
fi
status=0
"$python" -m benchmarks.gpu_check "$@" || status=$?
exit $status
