"""Every training run behind the figures, two side by side on 2 cores.

    python experiments/run.py               # what is not in experiments/results yet, in the table's order
    python experiments/run.py --only ratio  # a group, a label or a run, by name

A run is one single-threaded process of guard.py as it stands, in experiments/runs/NAME. When it is done, its
numbers are written to experiments/results/NAME/ as CSV. Stop this at any time: started again it goes on from
every run's last checkpoint. Two things are recorded beside metrics.jsonl, by wrapping functions of guard.py:
the scores of each held-out prompt at every evaluation, and rho of each sample in the runs and epochs of the
main README's figure of the ratio.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS, RESULTS = HERE / "runs", HERE / "results"
sys.path.insert(0, str(HERE.parent))

TASKS, MODELS = ("ocr", "geneval", "pickscore"), ("tiny-sd3", "tiny-flux")
OCR = "--task ocr --model tiny-sd3"
SHORT, LONG = "--epochs 10 --eval_every 2", "--epochs 15 --eval_every 3"
LRS = (6.7e-4, 2e-3, 2.2e-4)
CLIPS = {"guard": (2.3e-5, 7e-5, 2.1e-4), "flow-grpo": (1.1e-3, 2.2e-4, 4.4e-5)}  # each method's preset first
# Group -> label -> flags. All else is what guard.py's presets say. LOG.md says what the groups are for.
TABLE = {
    "default": {f"{task}-{model}": f"--task {task} --model {model}" for model in MODELS for task in TASKS},
    "ratio": {"flow-grpo": f"{OCR} --method flow-grpo"},
    "frontier": {
        f"{method}-lr{lr:g}-clip{CLIPS[method][i]:g}":
            f"{OCR} --method {method} --lr {lr:g} --clip {CLIPS[method][i]:g} {SHORT}"
        for lr in LRS for i in range(3) for method in CLIPS},
    "main": {
        "main-guard": f"{OCR} --lr 6.7e-4 {LONG}",
        "main-flow-grpo": f"{OCR} --method flow-grpo --lr 6.7e-4 {LONG}",
        "main-flow-grpo-3lr": f"{OCR} --method flow-grpo --lr 2e-3 {SHORT}"},
    "best": {  # of the frontier, by the rule in LOG.md
        "best-guard": f"{OCR} --lr 2.2e-4 --clip 7e-5 {LONG}",
        "best-flow-grpo": f"{OCR} --method flow-grpo --lr 6.7e-4 --clip 2.2e-4 {LONG}"},
    "preset": {"main-guard-3lr": f"{OCR} --lr 2e-3 {SHORT}"},  # added when the frontier was known
    "cost": {
        "window-3": f"{OCR} --lr 6.7e-4 --sde_window 3 {LONG}",
        "steps-6": f"{OCR} --lr 6.7e-4 --steps 6 {LONG}",
        "window-3-3lr": f"{OCR} --lr 2e-3 --sde_window 3 {SHORT}"},  # added: the window at the preset's rate
    "time": {  # seconds an epoch: to be run with --side_by_side 1, on an idle machine
        f"time-{label}": f"{OCR} --lr 6.7e-4{flags} --epochs 4 --eval_every 4 --eval_prompts 16"
        for label, flags in (("main-guard", ""), ("window-3", " --sde_window 3"), ("steps-6", " --steps 6"))},
    "dance": {  # 2e-3 was added: at 6.7e-4 Guard hardly learns in 20 updates
        f"dance-{method}{end}":
            f"--task ocr --model tiny-flux --sde dance --method {method} --lr {lr} {SHORT}"
        for end, lr in (("", "6.7e-4"), ("-3lr", "2e-3")) for method in ("flow-grpo", "guard")},
    "ablation": {
        method: f"{OCR} --method {method} --lr 6.7e-4 {SHORT}"
        for method in ("temp-reweight", "mean-revised", "rationorm")},
    "noclip": {  # added: what is left of the methods' difference when no sample is blocked
        f"noclip-{method}": f"{OCR} --method {method} --lr 6.7e-4 --clip 1 {SHORT}" for method in CLIPS},
    "shift": {  # added: the left shift alone, with a clip range and a rate at which the clip acts
        f"shift-{method}": f"{OCR} --method {method} --lr 2e-3 --clip 2.2e-4 {SHORT}"
        for method in ("flow-grpo", "mean-revised")},
    "kl": {f"kl-{method}": f"{OCR} --method {method} --kl_beta 0.04 --lr 6.7e-4 {SHORT}" for method in CLIPS},
    "cps": {f"cps-{method}": f"{OCR} --sde cps --method {method} --lr 6.7e-4 {SHORT}" for method in CLIPS},
} | {  # what Table 1 of the paper has and the default runs do not
    task: {
        f"{task}-flow-grpo": f"--task {task} --model tiny-sd3 --method flow-grpo",
        f"{task}-dance-flow-grpo": f"--task {task} --model tiny-flux --sde dance --method flow-grpo",
        f"{task}-dance-guard": f"--task {task} --model tiny-flux --sde dance"}
    for task in ("pickscore", "geneval")
}
SEEDS = dict.fromkeys(TABLE, (21, 22, 23)) | dict(
    default=(0, 1, 2), ratio=(0,), frontier=(20,), time=(21,), pickscore=(0, 1, 2), geneval=(0, 1, 2))
SEEDS |= dict.fromkeys(("main", "best", "preset"), (21, 22, 23, 24, 25))
GUARD, BASELINE = "ocr-tiny-sd3-s0", "flow-grpo-s0"  # the two runs whose samples' rho is kept
RATIO_EPOCHS = range(3, 100)  # of these, once the runs are under way


def all_runs():
    """Name -> (group, label, flags), in the order of running: a seed of all labels, then the next."""
    return {
        f"{label}-s{seed}": (group, label, f"{given} --keep {20 if group == 'main' else 1} --seed {seed}")
        for group, rows in TABLE.items()
        for seed in SEEDS[group]
        for label, given in rows.items()
    }


# ------------------------------------------------------------------------------------------------------------
# One run, in a process of its own


def record(guard, folder, with_rho):
    """Wrap guard's functions, so that they leave scores.csv and perhaps rho.csv in the run's folder."""
    load, evaluate, slice_loss, train_epoch = (
        guard.rewards.load, guard.evaluate, guard.slice_loss, guard.train_epoch)
    noted, now = {}, {}  # prompt -> its row of scores.csv, with its place in the held-out set; the epoch

    def noting_load(name, *rest):
        scorer = load(name, *rest)

        def score(images, prompts, metadata):
            values = scorer(images, prompts, metadata)
            for prompt, value in zip(prompts, values, strict=True):
                noted.setdefault(prompt, dict(prompt=len(noted)))[name] = f"{value:.4f}"
            return values

        return score

    def noting_evaluate(backbone, policy, args, scorers, updates):
        noted.clear()  # what the epochs before have noted
        evaluate(backbone, policy, args, scorers, updates)
        parts = {f"cards-{part}" for part in guard.rewards.CARD_PARTS} - {args.reward}  # see evals.csv
        rows = [{k: v for k, v in row.items() if k not in parts} for row in noted.values()]
        rows = [dict(update=updates) | row for row in rows]
        write(folder / "scores.csv", rows, append=updates > 0)

    def noting_epoch(backbone, policy, args, epoch, *rest):
        now["epoch"] = epoch
        return train_epoch(backbone, policy, args, epoch, *rest)

    def noting_loss(backbone, args, step, t, piece, A):
        answer = slice_loss(backbone, args, step, t, piece, A)
        slot = piece.numbers[0] // args.group_size
        off_policy = slot >= args.groups // args.updates_per_epoch
        if with_rho and now["epoch"] in RATIO_EPOCHS and off_policy:
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
    record(guard, folder, with_rho=name in (GUARD, BASELINE))
    started = time.time()
    begun = (folder / "config.json").exists()
    sys.argv[1:] = ["--resume", str(folder)] if begun else f"{all_runs()[name][2]} --run_dir {folder}".split()
    guard.main()
    args = json.loads((folder / "config.json").read_text())["args"]
    last = f"checkpoint-{args['epochs'] * args['updates_per_epoch']:06d}"
    if (folder / last).exists():
        collect(name, None if begun else round(time.time() - started))


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
    """experiments/results/NAME: evals, updates (a row per denoising step), scores, rho, and run.json.

    seconds: of the whole run with its evaluations; None if it was stopped in between. epoch_seconds: the
    median of its epochs, without evaluations.
    """
    folder, results = RUNS / name, RESULTS / name
    results.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals, updates = [], []
    for line in lines:
        if line["kind"] == "eval":
            row = dict(update=line["update"], proxy=line["proxy"]) | line["gold"] | line["looks"]
            evals.append(row | dict(kl_to_base=line["kl_to_base"]))
        if line["kind"] == "update":
            whole = {key: line[key] for key in ("update", "first", "live", "grad_norm")}
            for t in range(len(line["ratio_mean"] or [])):
                keys = ("ratio_mean", "ratio_std", "clip_high", "clip_low", "blocked")
                updates.append(whole | dict(step=t) | {key: f"{line[key][t]:.4e}" for key in keys})
    write(results / "evals.csv", evals)
    write(results / "updates.csv", updates)
    # What was done again after a stop has left the same rows again: an epoch's, the last evaluation's.
    write(results / "scores.csv", once(folder / "scores.csv", "update", "prompt"))
    if (folder / "rho.csv").exists():
        write(results / "rho.csv", once(folder / "rho.csv", "epoch", "slot", "member", "step"))
    config = json.loads((folder / "config.json").read_text())
    kept = ("method", "lr", "clip", "epochs", "updates_per_epoch")
    about = dict(command=f"guard.py {all_runs()[name][2]}", commit=config["commit"], seconds=seconds)
    epochs = [sum(line["seconds"].values()) for line in lines if line["kind"] == "rollout"]
    about["epoch_seconds"] = round(statistics.median(epochs), 1) if epochs else None
    about["settings"] = {key: config["args"][key] for key in kept}
    (results / "run.json").write_text(json.dumps(about, indent=2) + "\n")


def once(path, *names):
    """Rows of a CSV, one for every value of these columns."""
    return list({tuple(row[name] for name in names): row for row in read(path)}.values())


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
    parser.add_argument("--only", nargs="*", help="groups, labels or runs")
    parser.add_argument("--side_by_side", type=int, default=2, help="processes at a time")
    parser.add_argument("--one", help="a run, in this process")
    args = parser.parse_args()
    if args.one:
        run_one(args.one)
        return
    RUNS.mkdir(exist_ok=True)
    only = set(args.only or TABLE)
    wanted = [name for name, (group, label, _) in all_runs().items() if {group, label, name} & only]
    wanted = [name for name in wanted if not (RESULTS / name / "run.json").exists()]
    with ThreadPoolExecutor(args.side_by_side) as pool:
        sys.exit(any(list(pool.map(child, wanted))))


if __name__ == "__main__":
    main()
