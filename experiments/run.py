"""Make the runs of the study that are missing, two at a time: `python experiments/run.py GROUP [SEED ...]`.

A run is in runs/study/NAME. One that was stopped goes on where it was. `python experiments/run.py collect`
writes experiments/results: evals.csv, a row an evaluation, and updates.csv, a row a denoising step with its
means over the updates that are not an epoch's first. Clip ranges are those at D = 65,536.

What is planned, and what was added later, is in LOG.md. The runs of the plan at its top were made at commit
df04a19, which takes clip ranges at D = 512. It also has the methods of eight-flow-mask and of the settings in
-shift, which are not here. weights-snr was made at 4244ec3. Those commits evaluated on the first held-out
prompts of a file; guard.py now takes as many from all of it, so the levels of new runs differ a little.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image

HERE = Path(__file__).resolve().parent
RUNS, RESULTS = HERE.parent / "runs" / "study", HERE / "results"
TASKS = ("ocr", "geneval", "pickscore")
OCR = "--task ocr --model tiny/sd3 --eval_every 5 --eval_prompts 128"
LONG = f"{OCR} --epochs 50"
SHORT = f"{OCR} --epochs 20"
TWO = f"{SHORT} --eval_every 2 --lr 2e-3"  # 40 updates
DEFAULT = {"ocr": "--task ocr --lr 6.7e-4 --epochs 10 --eval_every 5",  # guard.json has other numbers now
           "geneval": "--task geneval", "pickscore": "--task pickscore"}  # fmt: skip
EIGHT = f"{OCR} --epochs 12 --eval_every 1 --updates_per_epoch 8 --lr 2e-3"  # 96 updates
FLUX = "--task ocr --model tiny/flux --sde flow --epochs 20 --eval_every 2 --eval_prompts 128 --lr 2e-3"
PICKSCORE = "--task pickscore --model tiny/sd3 --epochs 10 --eval_every 1 --eval_prompts 128 --lr 2e-3"
DANCE = f"{DEFAULT['ocr']} --model tiny/flux --sde dance --eval_prompts 128"
TABLE = {task: f"--task {task} --epochs {epochs} --eval_every {every} --eval_prompts 128"  # 40 updates each
         for task, epochs, every in (("ocr", 20, 5), ("geneval", 10, 2), ("pickscore", 10, 2))}
FLAGS = {f"{method}-{lr}": f"--method {method} --lr {lr}"
         for method in ("flow-grpo", "guard", "mean-revised") for lr in ("2e-3", "6.7e-4")}
FLAGS |= {f"{name}-noclip": f"{flags} --clip 1e9" for name, flags in FLAGS.items()}
FLAGS |= {
    "guard": "--method guard --clip 2e-6",
    "guard-mask": "--method guard-mask",
    "guard-5e-7": "--method guard --clip 5e-7",
    "guard-noclip": "--method guard --clip 1e9",
    "flow-grpo-1e-4": "--method flow-grpo --clip 1e-4",
    "flow-grpo-1e-5": "--method flow-grpo --clip 1e-5",
    "flow-grpo-2e-3-1e-5": "--method flow-grpo --lr 2e-3 --clip 1e-5",
    "flow-grpo-1.4e-3-1e-5": "--method flow-grpo --lr 1.4e-3 --clip 1e-5",
    "mean-revised-1e-5": "--method mean-revised --clip 1e-5",
}
GUARD_LR = {"ocr": "6.7e-4", "geneval": "1e-3", "pickscore": "1e-3"}
RIVALS = ("flow-grpo-1e-4", "flow-grpo-1e-5", "guard")


def settings(prefix, flags, *names):
    return {f"{prefix}-{name}": f"{flags} {FLAGS[name]}" for name in names}


GROUPS = {  # group -> seeds, and name of a setting -> flags
    "default": ((0, 1, 2), {f"{task}-{model}": f"{DEFAULT[task]} --model tiny/{model}"
                            for task in TASKS for model in ("sd3", "flux")}),
    "dance": ((21, 22, 23), {f"dance-{method}-{noise}": f"{DANCE} --method {method} --same_noise {same}"
                             for method in ("guard", "flow-grpo")
                             for noise, same in (("shared", True), ("own", False))}),
    "weights": ((21, 22, 23, 24, 25), {"weights-guard": f"{OCR} --epochs 10 --lr 6.7e-4"}),
    "clip": ((21,), {f"clip-{name}": f"{SHORT} --lr 6.7e-4 --clip {clip}"  # named by ranges at D = 512
                     for name, clip in (("7e-5", "5.4687e-7"), ("2.56e-5", "2e-7"))}),
    "ablation": ((21, 22, 23), {f"ablation-{method}": f"{SHORT} --lr 6.7e-4 --method {method}"
                                for method in ("temp-reweight", "mean-revised", "rationorm")}),
    "shift": ((21, 22, 23), settings("shift", SHORT, "mean-revised-2e-3")),
    "table": ((21, 22, 23), {f"table-{task}-{model}-{method}":
                             f"{TABLE[task]} --model tiny/{model} --sde {sde} --method {method} --lr {lr}"
                             for task in TASKS for model, sde in (("sd3", "flow"), ("flux", "dance"))
                             for method, lr in (("flow-grpo", "2e-3"), ("guard", GUARD_LR[task]))
                             if (task, model) != ("ocr", "sd3")}),
    "kl": ((21, 22, 23), settings("kl", f"{SHORT} --kl_beta 0.1", "guard-6.7e-4", "flow-grpo-2e-3")),
    "long": ((21, 22, 23), settings("long", LONG, "flow-grpo-2e-3", "guard-6.7e-4", "flow-grpo-6.7e-4",
                                    "guard-2e-3", "guard-6.7e-4-noclip", "flow-grpo-2e-3-noclip",
                                    "guard-2e-3-noclip")),
    "two": (range(31, 37), settings("two", TWO, *RIVALS)),
    "two-variants": ((31, 32, 33), settings("two", TWO, "guard-noclip", "mean-revised-1e-5", "guard-mask")),
    "eight": (range(31, 39), settings("eight", EIGHT, "flow-grpo-1e-5", "guard", "guard-mask")),
    "eight-shift": (range(31, 36), settings("eight", EIGHT, "mean-revised-1e-5")),
    "eight-variants": ((31, 32, 33), settings("eight", EIGHT, "flow-grpo-1e-4", "guard-5e-7")),
    "eight-wide": (range(34, 39), settings("eight", EIGHT, "flow-grpo-1e-4")),  # added later
    "long-narrow": ((21, 22, 23), settings("long", LONG, "flow-grpo-2e-3-1e-5")),
    "long-noclip": ((22, 23), settings("long", LONG, "guard-2e-3-noclip")),
    "long-pictures": ((22,), settings("pictures", LONG, "flow-grpo-2e-3", "guard-2e-3")),
    "low": ((31, 32, 33), settings("low", f"{SHORT} --eval_every 2",
                                   "guard-6.7e-4", "flow-grpo-1.4e-3-1e-5")),
    "others": ((31, 32, 33), settings("flux", FLUX, *RIVALS) | settings("pickscore", PICKSCORE, *RIVALS)),
}  # fmt: skip


def make(name, flags):
    """Start the run, or go on with it; what it prints goes to runs/study/NAME.log."""
    folder = RUNS / name
    begun = (folder / "config.json").exists()
    where = ["--resume", folder] if begun else ["--run_dir", folder, *flags.split()]
    with open(RUNS / f"{name}.log", "a") as log:
        command = [sys.executable, HERE.parent / "guard.py", *where]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=HERE.parent, env=environment, stdout=log, stderr=log)
    print(name, "done" if done.returncode == 0 else f"failed, see {log.name}", flush=True)


def read_run(name):
    """(settings, lines of metrics.jsonl), or nothing for a run that has not begun."""
    folder = RUNS / name
    if not (folder / "metrics.jsonl").exists():
        return {}, []
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "config.json").read_text()), [json.loads(line) for line in lines]


def is_done(name):
    """Whether it has been evaluated after its last update."""
    config, lines = read_run(name)
    evaluated = [line["update"] for line in lines if line["kind"] == "eval"]
    return bool(lines) and config["epochs"] * config["updates_per_epoch"] in evaluated


def evaluations_of(name):
    """The rows of evals.csv. `dead` is the share of dead groups since the last evaluation."""
    config, lines = read_run(name)
    about = {key: config[key] for key in ("task", "model", "method", "sde", "lr", "clip", "seed")}
    seconds = [sum(line["seconds"].values()) for line in lines if line["kind"] == "rollout"]
    rows, since = [], []
    for line in lines:
        if line["kind"] == "rollout":
            since.append(line["dead_groups"] / config["groups"])
        elif line["kind"] == "eval":
            row = {"run": name} | about | {key: line[key] for key in ("update", "reward")} | line["gold"]
            row["epoch_seconds"] = sum(seconds) / len(seconds)
            rows.append(row | {"dead": sum(since) / len(since) if since else ""})
            since = []
    return rows


def updates_of(name):
    """The rows of updates.csv, a denoising step each. excess_* is as logged, at the run's own D."""
    later = [line for line in read_run(name)[1] if line["kind"] == "update" and not line["first"]]
    later = [line for line in later if line["excess_mean"]]
    columns = ("excess_mean", "excess_std", "clip_high", "clip_low", "blocked")
    means = {key: [sum(of_step) / len(later) for of_step in zip(*(line[key] for line in later), strict=True)]
             for key in columns}
    return [{"run": name, "step": step, "updates": len(later)} | {key: means[key][step] for key in columns}
            for step in range(len(means["blocked"]))]


def collect():
    """Add the whole runs that are here to the CSVs, and draw the pictures before and after of some."""
    names = [path.parent.name for path in sorted(RUNS.glob("*/config.json"))]
    names = [name for name in names if is_done(name)]
    write(RESULTS / "evals.csv", [row for name in names for row in evaluations_of(name)])
    write(RESULTS / "updates.csv", [row for name in names for row in updates_of(name)])
    for task in ("geneval", "pickscore"):
        if f"{task}-sd3-s0" in names:
            pages = [make_image_grid(pictures(f"{task}-sd3-s0", end, 128), 4, 4) for end in (0, -1)]
            make_image_grid(pages, 1, 2).save(HERE / "figures" / f"{task}.png")
    runs = ["pictures-flow-grpo-2e-3-s22", "pictures-guard-2e-3-s22", "long-flow-grpo-2e-3-1e-5-s22"]
    if set(runs) <= set(names):  # rows of eight cards: before training, and after 100 updates
        rows = [pictures(runs[0], 0, 64)[:8], *(pictures(run, -1, 64)[:8] for run in runs)]
        make_image_grid(sum(rows, []), 4, 8).save(RESULTS / "cards.png")


def pictures(name, end, width):
    """Those of a run's first evaluation, 0, or its last, -1, so many pixels wide."""
    row = Image.open(sorted((RUNS / name).glob("lora-*/samples.png"))[end])
    size = width, width * row.height // 256
    return [row.crop((x, 0, x + 256, row.height)).resize(size, Image.Resampling.BOX)
            for x in range(0, row.width, 256)]


def write(path, rows):
    """These rows, and what the file has of runs that are not here any more."""
    here = {row["run"] for row in rows}
    if path.exists():
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["run"] not in here] + rows
    rows = sorted(rows, key=lambda row: row["run"])
    columns = dict.fromkeys(key for row in rows for key in row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()}
            writer.writerow(rounded)


def main():
    group, *seeds = sys.argv[1:] or ["help"]
    if group == "collect":
        return collect()
    if group not in GROUPS:
        sys.exit(f"expected collect or a group of runs: {', '.join(GROUPS)}")
    RUNS.mkdir(parents=True, exist_ok=True)
    own_seeds, of_group = GROUPS[group]
    runs = {f"{name}-s{seed}": f"{flags} --seed {seed}"
            for seed in map(int, seeds or own_seeds) for name, flags in of_group.items()}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: make(*run), [run for run in runs.items() if not is_done(run[0])]))
    return collect()


if __name__ == "__main__":
    main()
