#!/usr/bin/env bash
# Train with what this machine has. Without an active environment it makes .venv from requirements.txt first.
#   several GPUs   SD3.5-M, one process per GPU
#   one GPU        the small tiny/sd3; --model sd3.5-medium for the real one
#   none           tiny/sd3, a single-threaded process per core, 4 at most
# Arguments go on to guard.py, for example: ./run_ocr.sh --task geneval --seed 1
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -e .venv/complete ]; then
        echo "making .venv from requirements.txt, once"
        python3 -m venv .venv
        .venv/bin/pip install --quiet -r requirements.txt
        touch .venv/complete
    fi
    export PATH="$PWD/.venv/bin:$PATH"
fi
processes=$(python -c 'import torch; print(torch.cuda.device_count())')
model=()
if [ "$processes" -le 1 ]; then
    model=(--model tiny/sd3)
fi
if [ "$processes" -eq 0 ]; then
    cores=$(nproc)
    processes=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
    export OMP_NUM_THREADS=1
fi
exec torchrun --standalone --nproc_per_node="$processes" guard.py --task ocr "${model[@]}" "$@"
