#!/usr/bin/env bash
# Train on the OCR reward with what this machine has.
#   several GPUs   SD3.5-M, one process per GPU
#   one GPU        tiny-sd3; --model sd3.5-medium for the real one
#   none           tiny-sd3, one single-threaded process per core, 4 at most: they share the prompts of an update
# Arguments go on to guard.py, for example: ./run_ocr.sh --method flow-grpo --seed 1
set -euo pipefail
cd "$(dirname "$0")"
processes=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$processes" -eq 1 ]; then
    exec python guard.py --task ocr "$@"
elif [ "$processes" -eq 0 ]; then
    cores=$(python -c 'import rewards; print(rewards.usable_cores())')
    processes=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
    export OMP_NUM_THREADS=1
fi
exec torchrun --standalone --nproc_per_node="$processes" guard.py --task ocr "$@"
