#!/usr/bin/env bash
# Train on the OCR reward with what this machine has: one process per GPU, or one process on the CPU.
# Arguments go on to guard.py, for example: ./run_ocr.sh --method flow-grpo --seed 1
set -euo pipefail
cd "$(dirname "$0")"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 1 ]; then
    exec torchrun --standalone --nproc_per_node="$gpus" guard.py --task ocr "$@"
fi
exec python guard.py --task ocr "$@"
