#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command without network, within 9 minutes: bench/gpu.py says what.
#
#     bash bench/gpu.sh FOLDER [--build FOLDER/build.tgz] [--only STAGE ...]
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python}" bench/gpu.py "$@"
