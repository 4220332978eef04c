"""Kill a small run 100 times at random moments, go on each time, and compare with a run never killed.

    python experiments/soak.py --kills 100

A life of the process ends by SIGKILL at a random moment, or by itself when the run is finished. Then the run
is compared with the one never killed, metrics.jsonl (without the seconds) and the last state bit for bit, and
the next one begins. So small a run is mostly its start, and its saves are short: of 5 lives one is killed
while it starts, one within 0.1 s after it began to save, three at any moment after the first progress bar.

Every life is a line of experiments/soak.csv, and told on stderr. Interrupted, it goes on from that file;
remove the file to begin anew. At its end it prints a table, as Markdown, of where the kills fell and of how
many finished epochs had to be done again.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SETTINGS = (
    "--model tiny-sd3 --groups 2 --group_size 8 --micro_batch 8 --steps 3 --eval_steps 2 --eval_prompts 8 "
    "--gold none --epochs 6 --save_every 2 --eval_every 2 --lora_rank 8 --lora_alpha 16"
).split()
PHASES = ("starting", "sampling", "waiting for rewards", "updating", "evaluating", "saving")
EQUAL, DIFFERENT = "finished, equal", "finished, different"  # how else a life can end
FIELDS = ("life", "seconds", "phase", "epochs lost")
LONGEST = 600  # seconds of one life


def start(folder, log):
    command = [sys.executable, str(HERE / "guard.py")]
    resumed = (folder / "config.json").exists()
    command += ["--resume", str(folder)] if resumed else ["--run_dir", str(folder), *SETTINGS]
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)


def wait_for(condition, process):
    """Until it holds or the process has ended."""
    deadline = time.monotonic() + LONGEST
    while process.poll() is None and not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened in {LONGEST} s")
        time.sleep(0.002)


def text_of(log):
    return log.read_text(errors="replace")


def has_bar(log):
    return "%|" in text_of(log)


def saving(folder, born):
    """Whether a checkpoint is half-written, by the process born at that time and not by an earlier one."""
    with contextlib.suppress(FileNotFoundError):  # renamed just now
        return any(path.stat().st_mtime >= born for path in folder.glob("checkpoint-*.partial"))
    return False


def phase_of(folder, log, born):
    """What a process, born at that time, was doing when it was killed: by its folder and its progress bars.

    A bar is drawn at 0 % when its loop begins and blanked when it ends. What follows the last of a kind, up
    to the next bar, counts as its phase, but for sampling: there the rewards are waited for.
    """
    if saving(folder, born):
        return "saving"
    drawn = [part for part in re.split(r"[\r\n]|\x1b\[A", text_of(log)) if part]
    bars = [i for i, part in enumerate(drawn) if re.match("(sample|update|evaluate):", part)]
    if not bars:
        return "starting"
    blanked = any(part.isspace() for part in drawn[bars[-1] :])
    sampling = "waiting for rewards" if blanked else "sampling"
    name = drawn[bars[-1]].split(":")[0]
    return {"sample": sampling, "update": "updating", "evaluate": "evaluating"}[name]


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


def live(folder, log, rng, starting, running):
    """One life, not killed if rng is None: its phase when killed, or None, and the finished epochs lost."""
    born = time.time()
    process = start(folder, log)
    try:
        if rng is None:
            code = process.wait(timeout=LONGEST)
        else:
            aim, moment = rng.randrange(5), running
            if aim == 0:
                moment = starting
            elif aim == 1:
                wait_for(lambda: saving(folder, born), process)
                moment = 0.1
            else:
                wait_for(lambda: has_bar(log), process)
            code = process.wait(timeout=rng.uniform(0, moment))
    except subprocess.TimeoutExpired:
        if rng is None:
            raise
        process.kill()
        process.wait()
        phase = phase_of(folder, log, born)
        # While starting, those of an earlier life may still be logged, and were counted then.
        return phase, 0 if phase == "starting" else epochs_lost(folder)
    finally:
        process.kill()
    assert code == 0, text_of(log)[-2000:]
    return None, 0


def soak(args, work):
    """Lives until as many were killed as asked for, or the time is up."""
    log, whole, folder = work / "log.txt", work / "whole", work / "run"
    began = time.monotonic()
    process = start(whole, log)
    try:
        wait_for(lambda: has_bar(log), process)
        starting = time.monotonic() - began
        assert process.wait(timeout=LONGEST) == 0, text_of(log)[-2000:]
    finally:
        process.kill()
    running = time.monotonic() - began - starting
    expected = result_of(whole)
    print(f"never killed: {starting:.1f} s to start, {running:.1f} s to run", file=sys.stderr)
    while (killed := kills(lives := read(args.csv))) < args.kills or folder.exists():
        life, since = len(lives), time.monotonic()
        if since - began > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over", file=sys.stderr)
            break
        # After the last kill its run is finished.
        rng = random.Random(f"{args.seed} {life}") if killed < args.kills else None
        ended, lost = live(folder, log, rng, starting, running)
        if not ended:
            ended = EQUAL if result_of(folder) == expected else DIFFERENT
            shutil.rmtree(folder)
        line = dict(zip(FIELDS, (life, f"{time.monotonic() - since:.2f}", ended, lost), strict=True))
        append(args.csv, line)
        print(f"kill {killed + (ended in PHASES)} of {args.kills}: {line}", file=sys.stderr)


def read(path):
    """The lives so far."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path, line):
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


def kills(lives):
    return sum(life["phase"] in PHASES for life in lives)


def table(lives):
    lines = ["| killed while | kills | finished epochs done again |", "|-|-|-|"]
    for name, phases in [*((phase, [phase]) for phase in PHASES), ("all", PHASES)]:
        lost = [int(life["epochs lost"]) for life in lives if life["phase"] in phases]
        lines.append(f"| {name} | {len(lost)} | {sum(lost)} |")
    ends = [life["phase"] for life in lives]
    seconds = sum(float(life["seconds"]) for life in lives)
    finished, different = ends.count(EQUAL) + ends.count(DIFFERENT), ends.count(DIFFERENT)
    lines.append(f"\n{finished} runs finished, {different} differed from that never killed; {seconds:.0f} s")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100, help="in all, those in the file counted")
    parser.add_argument("--minutes", type=float, default=120, help="after which no life begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=HERE / "experiments" / "soak.csv")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also, so that a life computes what another does
    with tempfile.TemporaryDirectory() as work:
        soak(args, Path(work))
    print(table(read(args.csv)))


if __name__ == "__main__":
    main()
