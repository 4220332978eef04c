#!/usr/bin/env bash
# Train with what this machine has. If the active environment lacks torch, .venv is made from requirements.txt.
#   several GPUs   SD3.5-M, one process per GPU
#   one GPU        the small tiny/sd3; --model stabilityai/stable-diffusion-3.5-medium for the real one
#   none           tiny/sd3, a single-threaded process per core, 4 at most
# Arguments go on to guard.py, for example: ./run_ocr.sh --task geneval --seed 1
set -euo pipefail

for python in python3 python3.13 python3.12 python3.11 none; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
if [ "$python" = none ]; then
    echo "run_ocr.sh: found no Python 3.11 or later; python3 is: $(python3 --version 2>&1)" >&2
    exit 1
fi
cd "$("$python" -c 'import os, sys; print(os.path.dirname(os.path.realpath(sys.argv[1])))' "$0")"

needs='import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, ("torch", "diffusers", "peft"))))'
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! python -c "$needs" 2>/dev/null; then
    if ! cmp -s requirements.txt .venv/requirements.txt; then
        echo "installing requirements.txt into .venv, once"
        "$python" -m venv .venv
        .venv/bin/python -m pip install -r requirements.txt
        cp requirements.txt .venv/requirements.txt
    fi
    export PATH="$PWD/.venv/bin:$PATH"
fi

folder='' resumed='' before=''
for argument in "$@"; do  # --run_dir FOLDER or --run_dir=FOLDER, and --resume alike
    case "$argument" in
        --*=*) setting=$argument ;;
        *) setting=$before=$argument ;;
    esac
    case "$setting" in
        --run_dir=*) folder=${setting#*=} ;;
        --resume=*) folder=${setting#*=} resumed=yes ;;
    esac
    before=$argument
done
processes=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ -z "$folder" ]; then
    folder=runs/$(date +%Y%m%d-%H%M%S)
    set -- --run_dir "$folder" "$@"
fi
if [ -z "$resumed" ]; then
    [ "$processes" -gt 1 ] || set -- --model tiny/sd3 "$@"
    set -- --task ocr "$@"
fi
if [ "$processes" -eq 0 ]; then
    cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    processes=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
    export OMP_NUM_THREADS=1
fi
if [ "$processes" -le 1 ]; then
    python guard.py "$@"
else
    # torchrun, without the forty lines that it prints after the one of a process that ends with an error
    python -c 'import logging, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
logging.disable(logging.CRITICAL)
try:
    main()
except ChildFailedError as error:
    sys.exit(error.get_first_failure()[1].exitcode)
except SignalException:
    sys.exit(130)' --standalone --nproc_per_node="$processes" guard.py "$@"
fi
if [ -e "$folder/metrics.jsonl" ]; then  # not after --help
    python experiments/plot.py "$folder"
fi
