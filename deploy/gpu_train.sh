#!/bin/sh
# Trains a stage with a Python that has torch and triton already: no virtual environment, no network.
#
#   deploy/gpu_train.sh [--wheels FOLDER] [arguments of python -m training.train]
#
# It ends with training.train's code: 0 if the run is finished, 3 if there is more to do.
set -eu

needed="torch triton numpy typing_extensions msgspec safetensors pydantic pydantic_core annotated_types typing_inspection"
# shellcheck source=deploy/bare_python.sh
. "$(dirname "$0")/bare_python.sh"
if [ -n "$lacks" ]; then
    exit 1
fi
status=0
"$python" -m training.train "$@" || status=$?
exit $status
