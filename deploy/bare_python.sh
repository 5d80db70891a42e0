# Sourced by scripts for a machine that has torch already, and neither a virtual environment nor a network.
#
# In: `needed`, the modules that must be there; the arguments, which may begin with --wheels FOLDER. PYTHON names the
# Python (python3). Missing modules are installed from wheels in FOLDER (.whl), for the script's lifetime.
# Out: the checkout's root as working directory, `python`, and `lacks`, the modules still missing (already printed).
# shellcheck shell=sh

wheels=
if [ "${1:-}" = --wheels ]; then
    wheels=$(cd "${2:?--wheels needs a folder}" && pwd)
    shift 2
fi
cd "$(dirname "$0")/.."
wheels=${wheels:-$PWD/.whl}
python=${PYTHON:-python3}

missing() {
    # shellcheck disable=SC2086,SC2154
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
    # One wheel that does not fit this Python stops all; one by one it is left out, and reported below if needed.
    install "$wheels"/*.whl || for wheel in "$wheels"/*.whl; do install "$wheel" || echo "left out: $wheel" >&2; done
    PYTHONPATH=$target${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
fi
lacks=$(missing)
if [ -n "$lacks" ]; then
    echo "$("$python" -c 'import sys; print(sys.executable)') lacks: $lacks" >&2
    echo "On a machine with a network \`make gpu-wheels\` puts wheels for Python 3.12 into .whl; torch, triton and numpy" >&2
    echo "must be there already (docs/gpu.md)." >&2
fi
