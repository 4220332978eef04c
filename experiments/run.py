"""Every training run behind the figures, two side by side on 2 cores.

    python experiments/run.py                 # what is not in experiments/results yet, in the table's order
    python experiments/run.py --only main     # a group, or runs, by name

A run is one single-threaded process of guard.py as it stands, in experiments/runs/NAME. When it is done, its
numbers are written to experiments/results/NAME/ as CSV. Stop this at any time: started again it goes on from
every run's last checkpoint. Two things are recorded beside metrics.jsonl, by wrapping functions of guard.py:
the scores of each held-out prompt at the start and end, and rho of each sample in some epochs.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS, RESULTS = HERE / "runs", HERE / "results"
sys.path.insert(0, str(HERE.parent))

# The setting, decided before any of the seeds below was drawn; LOG.md says how.
EPOCHS = 30
LR = 2e-3
CLIP = dict(guard=2.3e-5, baseline=1.1e-3)  # the paper's times sqrt(65,536 / 512), the ratio of D
EQUAL_CLIP = 4.5e-5  # of flow-grpo, with which it clips the share of samples that guard clips
FIRST_SEED = 10
COMMON = f"--task ocr --model tiny-sd3 --epochs {EPOCHS} --eval_every 6 --eval_prompts 512 --keep 1"
RATIO_EPOCHS = range(5, 15)  # whose samples' rho is kept


def flags(method, lr=LR, clip=None, more=""):
    clip = clip or CLIP["guard" if method in ("guard", "rationorm") else "baseline"]
    return f"--method {method} --lr {lr:.2g} --clip {clip:g} {more}".strip()


# Group -> label -> flags. "main" is run for every seed, the others for the first.
TABLE = {
    "main": {
        "guard": flags("guard"),
        "flow-grpo": flags("flow-grpo"),
        "guard-third": flags("guard", lr=LR / 3),
        "flow-grpo-tight": flags("flow-grpo", clip=EQUAL_CLIP),
        "flow-grpo-third": flags("flow-grpo", lr=LR / 3),
    },
    "ablation": {
        "temp-reweight": flags("temp-reweight"),
        "mean-revised": flags("mean-revised"),
        "rationorm": flags("rationorm"),
    },
    "kl": {
        "guard-kl": flags("guard", more="--kl_beta 0.04"),
        "flow-grpo-kl": flags("flow-grpo", more="--kl_beta 0.04"),
    },
    "dance": {
        "dance": flags("flow-grpo", more="--sde dance --eta 0.3"),
        "dance-guard": flags("guard", more="--sde dance --eta 0.3"),
    },
}
SEEDS = {"main": range(FIRST_SEED, FIRST_SEED + 3)}


def all_runs():
    """Name -> (group, flags), in the order in which they are run: all methods of a seed before the next."""
    return {
        f"{label}-s{seed}": (group, f"{COMMON} {given} --seed {seed}")
        for group, rows in TABLE.items()
        for seed in SEEDS.get(group, [FIRST_SEED])
        for label, given in rows.items()
    }


# ------------------------------------------------------------------------------------------------------------
# One run, in a process of its own


def record(guard, folder):
    """Wrap guard's functions, so that they leave scores.csv and rho.csv in the run's folder."""
    load, evaluate, slice_loss, train_epoch = (
        guard.rewards.load, guard.evaluate, guard.slice_loss, guard.train_epoch)
    noted, now = {}, {}  # prompt -> its row of scores.csv; the epoch

    def noting_load(name, *rest):
        scorer = load(name, *rest)

        def score(images, prompts, metadata):
            values = scorer(images, prompts, metadata)
            for prompt, value in zip(prompts, values, strict=True):
                noted.setdefault(prompt, dict(prompt=prompt))[name] = f"{value:.4f}"
            return values

        return score

    def noting_evaluate(backbone, policy, args, scorers, updates):
        noted.clear()  # what the epochs before have noted
        evaluate(backbone, policy, args, scorers, updates)
        if updates in (0, args.epochs * args.updates_per_epoch):
            rows = [dict(update=updates) | row for row in noted.values()]
            write(folder / "scores.csv", rows, append=updates > 0)

    def noting_epoch(backbone, policy, args, epoch, *rest):
        now["epoch"] = epoch
        return train_epoch(backbone, policy, args, epoch, *rest)

    def noting_loss(backbone, args, step, t, piece, A):
        answer = slice_loss(backbone, args, step, t, piece, A)
        slot = piece.numbers[0] // args.group_size
        off_policy = slot >= args.groups // args.updates_per_epoch
        if now["epoch"] in RATIO_EPOCHS and args.seed == FIRST_SEED and off_policy:
            where = dict(epoch=now["epoch"], slot=slot, step=t)
            samples = zip(piece.numbers, A.tolist(), answer[1].tolist(), strict=True)
            write(folder / "rho.csv", [
                where | dict(member=i % args.group_size, advantage=f"{a:.3f}", rho=f"{rho:.4e}")
                for i, a, rho in samples], append=True)
        return answer

    guard.rewards.load, guard.evaluate = noting_load, noting_evaluate
    guard.slice_loss, guard.train_epoch = noting_loss, noting_epoch


def run_one(name):
    import guard

    folder = RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    record(guard, folder)
    started = time.time()
    begun = (folder / "config.json").exists()
    sys.argv[1:] = ["--resume", str(folder)] if begun else f"{all_runs()[name][1]} --run_dir {folder}".split()
    guard.main()
    if max(guard.checkpoints(guard.Args(run_dir=str(folder)))).name == f"checkpoint-{2 * EPOCHS:06d}":
        collect(name, time.time() - started if not begun else None)


# ------------------------------------------------------------------------------------------------------------
# Its numbers, as CSV


def write(path, rows, append=False):
    fresh = not append or not path.exists()
    with open(path, "a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def collect(name, seconds):
    """experiments/results/NAME: evals, updates (a row per denoising step), scores, rho, and the command."""
    folder, results = RUNS / name, RESULTS / name
    results.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals, updates = [], []
    for line in lines:
        if line["kind"] == "eval":
            row = dict(update=line["update"], ocr=line["proxy"]) | line["gold"]
            evals.append(row | dict(kl_to_base=line["kl_to_base"]))
        if line["kind"] == "update":
            whole = {key: line[key] for key in ("update", "first", "live", "grad_norm")}
            for t in range(len(line["ratio_mean"] or [])):
                keys = ("ratio_mean", "ratio_std", "clip_high", "clip_low", "blocked")
                updates.append(whole | dict(step=t) | {key: f"{line[key][t]:.4e}" for key in keys})
    write(results / "evals.csv", evals)
    write(results / "updates.csv", updates)
    write(results / "scores.csv", read(folder / "scores.csv"))
    if (folder / "rho.csv").exists():  # an epoch done again after a stop gave the same rows again
        rows = {(r["epoch"], r["slot"], r["member"], r["step"]): r for r in read(folder / "rho.csv")}
        write(results / "rho.csv", list(rows.values()))
    config = json.loads((folder / "config.json").read_text())
    about = dict(command=f"guard.py {all_runs()[name][1]}", commit=config["commit"], seconds=seconds)
    (results / "run.json").write_text(json.dumps(about, indent=2) + "\n")


def child(name):
    """The run in a process of one thread. Returns its exit code."""
    with open(RUNS / f"{name}.log", "a") as log:
        command = [sys.executable, __file__, "--one", name]
        code = subprocess.call(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    outcome = "done" if code == 0 else f"failed, see {log.name}"
    print(f"{time.strftime('%H:%M')} {name}: {outcome}", flush=True)
    return code


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", help="groups or runs")
    parser.add_argument("--side_by_side", type=int, default=2, help="processes at a time")
    parser.add_argument("--one", help="a run, in this process")
    args = parser.parse_args()
    if args.one:
        run_one(args.one)
        return
    RUNS.mkdir(exist_ok=True)
    only = set(args.only or TABLE)
    wanted = [name for name, (group, _) in all_runs().items() if {group, name} & only]
    wanted = [name for name in wanted if not (RESULTS / name / "run.json").exists()]
    with ThreadPoolExecutor(args.side_by_side) as pool:
        sys.exit(any(list(pool.map(child, wanted))))


if __name__ == "__main__":
    main()
