"""Make the runs of the study that are missing, two at a time: `python experiments/run.py GROUP [SEED ...]`.

A run is in runs/study/NAME. One that was stopped goes on where it was. `python experiments/run.py collect`
writes experiments/results: evals.csv, a row an evaluation, and updates.csv, a row a denoising step with its
means over the updates that are not an epoch's first. What is planned, and what was added later, is in LOG.md.
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
OCR = "--task ocr --model tiny/sd3 --eval_prompts 128"
LONG = f"{OCR} --epochs 50"
DANCE = "--task ocr --model tiny/flux --sde dance --lr 6.7e-4 --epochs 10 --eval_prompts 128"
SHORT = f"{OCR} --lr 6.7e-4"
TABLE = {task: f"--task {task} --epochs {epochs} --eval_every {every} --eval_prompts 128"  # 40 updates each
         for task, epochs, every in (("ocr", 20, 5), ("geneval", 10, 2), ("pickscore", 10, 2))}
KL = f"{OCR} --epochs 20 --kl_beta 0.1"
ABLATION = ("temp-reweight", "mean-revised", "rationorm")
# Clip ranges are those at D = 512, 128 times the ranges at 65,536 by which the plan in LOG.md names them.
TWO = f"{OCR} --lr 2e-3 --epochs 20 --eval_every 2"  # 40 updates
EIGHT = f"{OCR} --lr 2e-3 --epochs 12 --eval_every 1 --updates_per_epoch 8"  # 96 updates
WIDE, NARROW, GUARDS = 1.28e-2, 1.28e-3, 2.56e-4  # 1e-4, 1e-5, 2e-6
RIVALS = {
    "flow-grpo-1e-4": f"--method flow-grpo --clip {WIDE}",
    "flow-grpo-1e-5": f"--method flow-grpo --clip {NARROW}",
    "guard": f"--method guard --clip {GUARDS}",
}
GROUPS = {  # group -> seeds, and name of a setting -> flags
    "default": (
        (0, 1, 2),
        {f"{task}-{model}": f"--task {task} --model tiny/{model}"
         for task in ("ocr", "geneval", "pickscore") for model in ("sd3", "flux")},
    ),
    "dance": (
        (21, 22, 23),
        {f"dance-{method}-{noise}": f"{DANCE} --method {method} --same_noise {noise == 'shared'}"
         for method in ("guard", "flow-grpo") for noise in ("shared", "own")},
    ),
    "weights": (
        (21, 22, 23, 24, 25),
        {"weights-guard": f"{SHORT} --epochs 10"},  # and weights-snr, whose method is in commit 4244ec3
    ),
    "clip": (
        (21,),
        {f"clip-{clip}": f"{SHORT} --epochs 20 --clip {clip}" for clip in ("7e-5", "2.56e-5")},
    ),
    "ablation": (
        (21, 22, 23),
        {f"ablation-{method}": f"{SHORT} --epochs 20 --method {method}" for method in ABLATION},
    ),
    "two": (range(31, 37), {f"two-{name}": f"{TWO} {flags}" for name, flags in RIVALS.items()}),
    "two-variants": (
        (31, 32, 33),
        {
            "two-guard-noclip": f"{TWO} --method guard --clip 1e9",
            "two-mean-revised-1e-5": f"{TWO} --method mean-revised --clip {NARROW}",
            "two-guard-shift": f"{TWO} --method guard-shift --clip {GUARDS}",
            "two-guard-mask": f"{TWO} --method guard-mask",
        },
    ),
    "eight": (
        range(31, 39),
        {
            "eight-flow-grpo-1e-5": f"{EIGHT} --method flow-grpo --clip {NARROW}",
            "eight-guard": f"{EIGHT} --method guard --clip {GUARDS}",
            "eight-guard-shift": f"{EIGHT} --method guard-shift --clip {GUARDS}",
            "eight-guard-mask": f"{EIGHT} --method guard-mask",
        },
    ),
    "eight-shift": (
        range(31, 36),
        {"eight-mean-revised-1e-5": f"{EIGHT} --method mean-revised --clip {NARROW}"},
    ),
    "eight-variants": (
        (31, 32, 33),
        {
            "eight-flow-mask": f"{EIGHT} --method flow-mask",
            "eight-flow-grpo-1e-4": f"{EIGHT} --method flow-grpo --clip {WIDE}",
            "eight-guard-5e-7": f"{EIGHT} --method guard --clip 6.4e-5",
        },
    ),
    "long-narrow": (
        (21, 22, 23),
        {"long-flow-grpo-2e-3-1e-5": f"{LONG} --method flow-grpo --lr 2e-3 --clip {NARROW}"},
    ),
    "long-noclip": ((22, 23), {"long-guard-2e-3-noclip": f"{LONG} --method guard --lr 2e-3 --clip 1e9"}),
    "long-pictures": (
        (22,),
        {f"long-{method}-2e-3": f"{LONG} --method {method} --lr 2e-3" for method in ("flow-grpo", "guard")},
    ),
    "low": (
        (31, 32, 33),
        {
            "low-guard-6.7e-4": f"{OCR} --epochs 20 --eval_every 2 --method guard --lr 6.7e-4",
            "low-flow-grpo-1.4e-3-1e-5": f"{OCR} --epochs 20 --eval_every 2 --method flow-grpo --lr 1.4e-3"
                                         f" --clip {NARROW}",
        },
    ),
    "others": (
        (31, 32, 33),
        {
            f"{where}-{name}": f"--task {task} --model tiny/{model} --sde flow --lr 2e-3 --epochs {epochs}"
                               f" --eval_every {every} --eval_prompts 128 {flags}"
            for where, task, model, epochs, every in (("flux", "ocr", "flux", 20, 2),
                                                      ("pickscore", "pickscore", "sd3", 10, 1))
            for name, flags in RIVALS.items()
        },
    ),
    "shift": (  # added later
        (21, 22, 23),
        {"shift-mean-revised-2e-3": f"{OCR} --epochs 20 --method mean-revised --lr 2e-3"},
    ),
    "table": (
        (21, 22, 23),
        {f"table-{task}-{model}-{method}": f"{flags} --model tiny/{model} --sde {sde} --method {method}"
         for task, flags in TABLE.items() for model, sde in (("sd3", "flow"), ("flux", "dance"))
         for method in ("flow-grpo", "guard") if (task, model) != ("ocr", "sd3")},
    ),
    "kl": (
        (21, 22, 23),
        {
            "kl-guard-6.7e-4": f"{KL} --method guard --lr 6.7e-4",
            "kl-flow-grpo-2e-3": f"{KL} --method flow-grpo --lr 2e-3",
        },
    ),
    "long": (
        (21, 22, 23),
        {
            "long-flow-grpo-2e-3": f"{LONG} --method flow-grpo --lr 2e-3",
            "long-guard-6.7e-4": f"{LONG} --method guard --lr 6.7e-4",
            "long-flow-grpo-6.7e-4": f"{LONG} --method flow-grpo --lr 6.7e-4",
            "long-guard-2e-3": f"{LONG} --method guard --lr 2e-3",
            "long-guard-6.7e-4-noclip": f"{LONG} --method guard --lr 6.7e-4 --clip 1e9",
            "long-flow-grpo-2e-3-noclip": f"{LONG} --method flow-grpo --lr 2e-3 --clip 1e9",
            "long-guard-2e-3-noclip": f"{LONG} --method guard --lr 2e-3 --clip 1e9",  # added later
        },
    ),
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


def is_done(name):
    lines = lines_of(name)
    rollouts = [line for line in lines if line["kind"] == "rollout"]
    if not rollouts:
        return False
    epochs = json.loads((RUNS / name / "config.json").read_text())["epochs"]
    updates = [line["update"] for line in lines if line["kind"] == "update"]
    return len(rollouts) == epochs and lines[-1]["kind"] == "eval" and lines[-1]["update"] == updates[-1]


def lines_of(name):
    path = RUNS / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect():
    """Add the whole runs that are here to the CSVs, and draw their pages of samples before and after."""
    evaluations, updates = [], []
    for path in sorted(RUNS.glob("*/config.json")):
        name, config = path.parent.name, json.loads(path.read_text())
        if not is_done(name):
            continue
        about = {key: config[key] for key in ("task", "model", "method", "sde", "lr", "clip", "seed")}
        lines = lines_of(name)
        rollouts = [line for line in lines if line["kind"] == "rollout"]
        seconds = [sum(line["seconds"].values()) for line in rollouts]
        since = []  # the last evaluation: shares of dead groups
        later = []  # updates that are not an epoch's first
        for line in lines:
            if line["kind"] == "rollout":
                since.append(line["dead_groups"] / config["groups"])
            elif line["kind"] == "update" and not line["first"] and line["rho_mean"]:
                later.append(line)
            elif line["kind"] == "eval":
                row = {"run": name} | about | {key: line[key] for key in ("update", "reward")} | line["gold"]
                row["epoch_seconds"] = sum(seconds) / len(seconds)
                evaluations.append(row | {"dead": sum(since) / len(since) if since else ""})
                since = []
        for step in range(len(later[0]["rho_mean"])):
            row = {"run": name, "step": step, "updates": len(later)}
            for key in ("rho_mean", "rho_std", "clip_high", "clip_low", "blocked", "moved"):
                found = [line[key][step] for line in later if key in line]
                row[key] = sum(found) / len(found) if found else ""
            updates.append(row)
    RESULTS.mkdir(exist_ok=True)
    write(RESULTS / "evals.csv", evaluations)
    write(RESULTS / "updates.csv", updates)
    for task in ("ocr", "geneval", "pickscore"):
        pages = sorted((RUNS / f"{task}-sd3-s0" / "samples").glob("*.png"))
        if pages:
            ends = [Image.open(page).reduce(2) for page in (pages[0], pages[-1])]
            make_image_grid(ends, 1, 2).save(HERE / "figures" / f"{task}.png")
    pages = [RUNS / f"long-{run}.png" for run in CARDS]
    if all(page.exists() for page in pages):
        rows = [first_cards(page) for page in pages]
        make_image_grid([card for row in rows for card in row], len(rows), 8).save(RESULTS / "cards.png")


# Rows of eight cards: before training, and after 100 updates in four settings.
CARDS = ["guard-6.7e-4-s21/samples/000000"] + [
    f"{setting}-s21/samples/000100"
    for setting in ("guard-6.7e-4", "flow-grpo-2e-3", "guard-2e-3", "flow-grpo-6.7e-4")
]


def first_cards(page, count=8):
    """The first cards of a page of samples, at their own size of 64 x 32 pixels."""
    page, cards = Image.open(page), []
    for i in range(count):
        x, y = 256 * (i % 4), 128 * (i // 4)
        cards.append(page.crop((x, y, x + 256, y + 128)).resize((64, 32), Image.Resampling.BOX))
    return cards


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
    own_seeds, settings = GROUPS[group]
    runs = {f"{name}-s{seed}": f"{flags} --seed {seed}"
            for seed in map(int, seeds or own_seeds) for name, flags in settings.items()}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: make(*run), [run for run in runs.items() if not is_done(run[0])]))
    return collect()


if __name__ == "__main__":
    main()
