"""Look at a run, or at several beside each other: reward, gold, the ratio and what the clip blocks.

    python experiments/plot.py RUN [RUN ...]

A RUN is a folder that guard.py wrote. The picture is RUN/plot.png for one run and plot.png here for several.
An epoch's first update has a ratio of exactly 1, so the lower panels show later updates only, of the last
five epochs. rho is ratio - 1.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

EPOCHS = 5


def read_run(folder):
    """(settings, lines of metrics.jsonl)"""
    for name in ("metrics.jsonl", "config.json"):
        if not (folder / name).is_file():
            sys.exit(f"{folder}: no {name}, so this is not the folder of a run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "config.json").read_text()), lines


def later_updates(lines, name):
    """An array (updates, steps) of a number that is logged per step. None where no sample was live."""
    updates = [line for line in lines if line["kind"] == "update" and not line["first"]]
    last = max((line["epoch"] for line in updates), default=0)
    rows = [line[name] for line in updates if line["epoch"] > last - EPOCHS and line[name]]
    rows = [row for row in rows if None not in row]
    return np.array(rows) if rows else None


def draw(axes, name, args, lines, colour):
    reward, gold, ratio, blocked = axes.flat
    rollouts = [line for line in lines if line["kind"] == "rollout"]
    evals = [line for line in lines if line["kind"] == "eval"]
    per_epoch = args["updates_per_epoch"]
    at = [line["epoch"] * per_epoch for line in rollouts]
    reward.plot(at, [line["reward_mean"] for line in rollouts], lw=1, alpha=0.5, color=colour)
    at = [line["update"] for line in evals]
    reward.plot(at, [line["reward"] for line in evals], "o-", ms=4, color=colour, label=name)
    styles = ("-", "--", ":", "-.")
    for i, of_gold in enumerate(evals[0]["gold"] if evals else ()):
        values = [line["gold"][of_gold] for line in evals]
        gold.plot(at, values, "o" + styles[i % 4], ms=4, color=colour, label=f"{name}: {of_gold}")
    mean, std, share = (later_updates(lines, what) for what in ("rho_mean", "rho_std", "blocked"))
    if mean is not None:
        steps = np.arange(mean.shape[1])
        middle = mean.mean(0) / args["clip"]
        band = np.sqrt((std**2).mean(0)) / args["clip"]
        ratio.plot(steps, middle, "o-", ms=4, color=colour)
        ratio.fill_between(steps, middle - band, middle + band, color=colour, alpha=0.2, lw=0)
        blocked.plot(steps, 100 * share.mean(0), "o-", ms=4, color=colour)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that guard.py wrote")
    folders = parser.parse_args().runs
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for i, folder in enumerate(folders):
        args, lines = read_run(folder)
        draw(axes, f"{folder.resolve().name} ({args['method']})", args, lines, f"C{i % 10}")
    reward, gold, ratio, blocked = axes.flat
    reward.set(title="reward: evaluations; pale, the training rollouts", xlabel="updates")
    gold.set(title="gold, only watched", xlabel="updates")
    ratio.axhspan(-1, 1, color="gray", alpha=0.15, lw=0)
    ratio.set_yscale("symlog", linthresh=1)
    ratio.yaxis.set_major_formatter("{x:g}")
    ratio.set(title="rho / clip, mean ± one standard deviation; gray: not clipped", xlabel="denoising step")
    blocked.set(title="samples whose gradient the clip blocks, %", xlabel="denoising step", ylim=(0, None))
    for axis in (reward, gold):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    path = folders[0] / "plot.png" if len(folders) == 1 else Path("plot.png")
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
