"""Look at a run of guard.py, or at several beside each other: is it learning, and what does the clip do?

    python experiments/plot.py RUN             # writes RUN/plot.png and RUN/before_after.png
    python experiments/plot.py RUN OTHER ...   # writes RUN/RUN-and-OTHER.png

before_after.png has pictures of the first and of the last evaluation, so it needs two. In an epoch's first
update every ratio is 1, so the ratio is shown of the later ones, over the last epochs that have any.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

EPOCHS = 5
plt.rcParams |= {"text.parse_math": False, "axes.titlesize": 10, "lines.markersize": 4}  # a prompt may have $


def read_run(folder):
    """(settings, kind -> lines of metrics.jsonl of that kind)"""
    for name in ("metrics.jsonl", "config.json"):
        if not (folder / name).is_file():
            sys.exit(f"{folder}: no {name}, so this is not the folder of a run")
    lines = dict(start=[], eval=[], rollout=[], update=[])
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        lines[line["kind"]].append(line)
    return json.loads((folder / "config.json").read_text()), lines


def score_style(i):
    """Line and marker of a gold score: 28 that differ. The first is the thick one."""
    return dict(ls=("-", "--", ":", "-.")[i % 4], marker="osv^DPX"[i % 7], lw=2.5 if i == 0 else 1.2)


def draw_rewards(reward, gold, args, lines, colour, scores):
    at = [line["epoch"] * args["updates_per_epoch"] for line in lines["rollout"]]
    reward.plot(at, [line["reward_mean"] for line in lines["rollout"]], lw=1, alpha=0.4, color=colour)
    at = [line["update"] for line in lines["eval"]]
    reward.plot(at, [line["reward"] for line in lines["eval"]], "o-", color=colour)
    for i, score in enumerate(scores):
        values = [line["gold"].get(score, np.nan) for line in lines["eval"]]
        gold.plot(at, values, color=colour, **score_style(i))


def later_updates(lines):
    """Updates with a sample to learn from, of the last epochs, without each epoch's first."""
    updates = [line for line in lines["update"] if not line["first"] and line["excess_std"]]
    return [line for line in updates if line["epoch"] > updates[-1]["epoch"] - EPOCHS]


def draw_ratios(ratio, blocked, lines, colour):
    updates = later_updates(lines)
    if updates:
        mean, deviation = (  # (updates, T)
            np.array([np.divide(line[name], line["clip"]) for line in updates])
            for name in ("excess_mean", "excess_std")
        )
        middle, band = mean.mean(0), np.sqrt((deviation**2).mean(0))
        steps = np.arange(1, len(middle) + 1)
        ratio.plot(steps, middle, "o-", color=colour)
        ratio.fill_between(steps, middle - band, middle + band, color=colour, alpha=0.25, lw=0)
        blocked.plot(steps, 100 * np.mean([line["blocked"] for line in updates], 0), "o-", color=colour)


def draw_curves(runs):
    """Four panels. runs: name -> as read. A colour is a run; a line style and marker, a gold score."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    reward, gold, ratio, blocked = axes.flat
    evals = [line for _, lines in runs.values() for line in lines["eval"]]
    scores = list(dict.fromkeys(score for line in evals for score in line["gold"]))
    many = plt.get_cmap("turbo")(np.linspace(0, 1, len(runs)))
    colours = plt.get_cmap("tab10").colors if len(runs) <= 10 else many
    for (name, (args, lines)), colour in zip(runs.items(), colours, strict=False):
        draw_rewards(reward, gold, args, lines, colour, scores)
        draw_ratios(ratio, blocked, lines, colour)
        label = f"{name}: {args['method']}, lr {args['lr']:g}, clip {args['clip']:g}"
        reward.plot([], [], "o-", color=colour, label=label)
    reward.plot([], [], lw=1, alpha=0.4, color="black", label="pale: training images")
    reward.legend(fontsize=8)
    for i, score in enumerate(scores):
        gold.plot([], [], color="black" if len(runs) > 1 else colours[0], label=score, **score_style(i))
    if scores:
        gold.legend(fontsize=8)
    reward.set_title("reward on held-out prompts: up is learning")
    gold.set_title("gold, only watched: down while the reward rises is over-optimization")
    ratio.set_title("ratio - 1 in clip ranges, mean ± standard deviation:\noutside of the gray it is clipped")
    ratio.axhspan(-1, 1, color="gray", alpha=0.2, lw=0)
    ratio.set_yscale("symlog", linthresh=1)
    ratio.yaxis.set_major_formatter("{x:g}")
    blocked.set_title("samples that the clip blocks, %:\nthe more, the harder it brakes")
    blocked.set_ylim(bottom=0)
    steps = f"denoising step, noisiest first; last {EPOCHS} epochs without their first update"
    for axis, label in zip(axes.flat, ("updates", "updates", steps, steps), strict=True):
        axis.set_xlabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    prompts = {name: lines["eval"][0]["prompts"] for name, (_, lines) in runs.items() if lines["eval"]}
    if len(set(prompts.values())) > 1:
        counts = ", ".join(f"{count} in {name}" for name, count in prompts.items())
        note = f"held-out prompts: {counts}; so the levels do not compare"
        figure.suptitle(note, color="tab:red", fontsize=10)
    return figure


def draw_before_after(files, most=8):
    """Pairs of pictures of one prompt and noise, of the first and the last evaluation."""
    ends = files[0], files[-1]
    before, now = ([json.loads(line) for line in file.read_text().splitlines()][:most] for file in ends)
    pages = [plt.imread(file.with_name("samples.png")) for file in ends]
    rows, height = -(-len(now) // 2), len(pages[0]) / 256  # of a picture that is 1 wide
    figure, axes = plt.subplots(rows, 2, figsize=(11, 0.3 + rows * (2.6 * height + 0.55)), squeeze=False,
                                layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.05))
    for i, (axis, old, new) in enumerate(zip(axes.flat, before, now, strict=False)):
        left, right = (page[:, 256 * i : 256 * (i + 1)] for page in pages)
        axis.imshow(np.hstack([left, np.ones_like(left[:, :12]), right]))
        prompt = textwrap.fill(old["prompt"], 75, max_lines=2, placeholder=" ...")
        scores = [f"{name} {old[name]:.3f} → {new[name]:.3f}" for name in list(old)[1:3]]  # reward, gold
        axis.set_xlabel(f"{prompt}\n{',  '.join(scores)}", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis in axes[0, : len(now)]:
        for file, when, side in zip(ends, ("before", "now"), ("left", "right"), strict=True):
            axis.set_title(f"{when}: {int(file.parent.name.removeprefix('lora-'))} updates", loc=side)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that guard.py wrote")
    folders = parser.parse_args(argv).runs
    runs, names = [read_run(folder) for folder in folders], [folder.resolve().name for folder in folders]
    file = "-and-".join(names) if len(names) > 1 else "plot"
    if len(file) > 80:
        file = f"{names[0]}-and-{len(names) - 1}-more"
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    figures = {file: draw_curves(dict(zip(names, runs, strict=True)))}
    files = sorted(folders[0].glob("lora-*/samples.jsonl"))
    if len(folders) == 1 and len(files) > 1:
        figures["before_after"] = draw_before_after(files)
    for file, figure in figures.items():
        figure.savefig(folders[0] / f"{file}.png", dpi=100)
        print(folders[0] / f"{file}.png")


if __name__ == "__main__":
    main()
