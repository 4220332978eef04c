"""Kill a small run 100 times at random moments, go on each time, and compare with a run never killed.

    python experiments/soak.py --kills 100          # about 45 minutes; interrupted, it goes on from soak.csv

A life of the process ends by SIGKILL after a third to all of the time of the run never killed, or by itself
when the run is finished. Then the two are compared, metrics.jsonl (without the seconds) and the last state
bit for bit, and the next one begins. Every life is a line of experiments/soak.csv, which tables.py sums up.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from experiments.run import read, write  # noqa: E402

CSV = HERE / "soak.csv"
SETTINGS = (
    "--model tiny-sd3 --groups 2 --group_size 8 --micro_batch 8 --steps 3 --eval_steps 2 --eval_prompts 8 "
    "--gold none --epochs 6 --save_every 2 --eval_every 2 --lora_rank 8 --lora_alpha 16"
).split()
PHASES = {"sample": "sampling", "update": "updating", "evaluate": "evaluating"}  # by the name of the bar
LONGEST = 600  # seconds of a life


def live(folder, log, seconds):
    """Begin the run or go on with it, for so long at most. Returns whether it was finished."""
    resumed = (folder / "config.json").exists()
    flags = ["--resume", folder] if resumed else ["--run_dir", folder, *SETTINGS]
    with open(log, "w") as file:
        command = [sys.executable, HERE.parent / "guard.py", *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:  # also when this process is told to end
        process.kill()
        process.wait()
    assert code == 0, log.read_text(errors="replace")[-2000:]
    return True


def phase_of(folder, log, born):
    """What a process, born at that time, was doing when it was killed: by its folder and its last bar.

    A bar is drawn when its loop begins. What follows it, up to the next bar, counts as its phase.
    """
    if any(path.stat().st_mtime >= born for path in folder.glob("checkpoint-*.partial")):
        return "saving"
    drawn = log.read_text(errors="replace")
    last = max(PHASES, key=lambda name: drawn.rfind(f"{name}:"))
    return PHASES[last] if f"{last}:" in drawn else "starting"


def result_of(folder):
    """All that must not differ: the lines of metrics.jsonl without their seconds, and the last state."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    last = max(folder.glob("checkpoint-??????"))
    return lines, last.name, (last / "state.safetensors").read_bytes()


def epochs_lost(folder):
    """Finished epochs that the last checkpoint does not have."""
    metrics = folder / "metrics.jsonl"
    logged = metrics.read_text().count('"kind": "rollout"') if metrics.exists() else 0
    return logged - max((int(path.name[-6:]) // 2 for path in folder.glob("checkpoint-??????")), default=0)


def soak(kills, seed, work):
    """Lives until so many were killed and the run of the last one is finished."""
    log, whole, folder = work / "log.txt", work / "whole", work / "run"
    born = time.time()
    assert live(whole, log, LONGEST), f"not finished in {LONGEST} s"
    longest, expected = time.time() - born, result_of(whole)
    while True:
        lives = read(CSV) if CSV.exists() else []
        left = kills - sum("finished" not in life["phase"] for life in lives)
        if left <= 0 and not folder.exists():
            return
        born, moment = time.time(), random.Random(f"{seed} {len(lives)}").uniform(longest / 3, longest)
        lost = 0
        if live(folder, log, moment if left > 0 else LONGEST):
            phase = "finished, equal" if result_of(folder) == expected else "finished, different"
            shutil.rmtree(folder)
        else:
            phase = phase_of(folder, log, born)
            # While starting, epochs of an earlier life may still be logged, and were counted then.
            lost = 0 if phase == "starting" else epochs_lost(folder)
        line = dict(life=len(lives), seconds=f"{time.time() - born:.2f}", phase=phase)
        write(CSV, [line | {"epochs lost": lost}], append=True)
        print(f"{left} kills left: {line}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100, help="in all, those in the file counted")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that `live` ends its process
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also, so that a life computes what another does
    with tempfile.TemporaryDirectory() as work:
        soak(args.kills, args.seed, Path(work))


if __name__ == "__main__":
    main()
