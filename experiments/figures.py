"""The figures and the tables of runs of experiments/README.md, from the CSVs in experiments/results alone.

    python experiments/figures.py    # writes figures/*.png but before.png and after.png, prints the tables

results/third is of the third edition of the small models, made by run.py; the rest is of November 2026.
"""

import csv
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
MAIN = {  # label in runs.csv -> name in the tables and figures; the first four are drawn
    "main-guard": "Guard, lr 6.7e-4",
    "main-flow-grpo": "Flow-GRPO, lr 6.7e-4",
    "main-guard-3lr": "Guard, lr 2e-3",
    "main-flow-grpo-3lr": "Flow-GRPO, lr 2e-3",
    "best-guard": "Guard, lr 2.2e-4, clip 7e-5",
    "best-flow-grpo": "Flow-GRPO, lr 6.7e-4, clip 2.2e-4",
}
VARIANTS = {
    "temp-reweight": "`temp-reweight`",
    "mean-revised": "`mean-revised`",
    "rationorm": "`rationorm`",
    "noclip-guard": "Guard, no clip",
    "noclip-flow-grpo": "Flow-GRPO, no clip",
    "cps-guard": "Guard, CPS",
    "cps-flow-grpo": "Flow-GRPO, CPS",
    "dance-guard": "Guard, DanceGRPO",
    "dance-flow-grpo": "Flow-GRPO, DanceGRPO",
}


def read(name):
    with open(HERE / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def runs_of(label):
    return [row["run"] for row in read("runs") if row["label"] == label]


def curve(run):
    """(updates, gain in reward, change in gold) at each evaluation of a run: three arrays."""
    rows = [row for row in read("evals") if row["run"] == run]
    update, reward, gold = (np.array([float(row[x]) for row in rows]) for x in ("update", "reward", "gold"))
    return update, reward - reward[0], gold - gold[0]


def at(level, x, y):
    """y where x first reaches a level, by a straight line between two evaluations; None if it never does."""
    reached = np.flatnonzero(x >= level)
    if not len(reached):
        return None
    i = reached[0]
    return y[i - 1] + (level - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])


# ------------------------------------------------------------------------------------------------------------
# Tables


def mean_and_error(values):
    """Mean ± standard error (number); the value itself if there is one; nothing if there is none."""
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4f} ± {error:.4f} ({len(values)})"


def table(labels, levels):
    """A row a label, means over its seeds, and the gold lost at these gains in reward. Markdown."""
    lost = [f"gold lost at +{level:g}" for level in levels]
    columns = ["run", "seeds", "updates", "blocked", "gain", "gold", *lost]
    lines = ["| " + " | ".join(columns) + " |", "|-" * len(columns) + "|"]
    for label, name in labels.items():
        runs = runs_of(label)
        curves = [curve(run) for run in runs]
        blocked = [float(row["blocked"]) for row in read("updates") if row["run"] in runs]
        cells = [name, str(len(runs)), f"{curves[0][0][-1]:.0f}", f"{statistics.mean(blocked):.0%}"]
        cells.append(f"{statistics.mean(gain[-1] for _, gain, _ in curves):+.3f}")
        cells.append(f"{statistics.mean(gold[-1] for _, _, gold in curves):+.4f}")
        for level in levels:
            lost = [at(level, gain, -gold) for _, gain, gold in curves]
            cells.append(mean_and_error([value for value in lost if value is not None]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main_table():
    return table(MAIN, (0.125, 0.225))


def variants_table():
    return table(VARIANTS, (0.1, 0.15))


# ------------------------------------------------------------------------------------------------------------
# Figures


def draw_ratio(path):
    """rho = ratio - 1 of single samples by denoising step, in clip ranges: median and 10 to 90 % band."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), sharey=True, layout="constrained")
    methods = (("flow-grpo", "Flow-GRPO", "tab:red"), ("guard", "GRPO-Guard", "tab:blue"))
    for axis, (method, name, colour) in zip(axes, methods, strict=True):
        rows = [row for row in read("ratio") if row["method"] == method]
        step = [int(row["step"]) for row in rows]
        low, median, high = ([float(row[x]) for row in rows] for x in ("q10", "median", "q90"))
        axis.axhspan(-1, 1, color="gray", alpha=0.2, lw=0, label="inside the clip range")
        axis.axhline(0, color="black", lw=0.6)
        axis.fill_between(step, low, high, color=colour, alpha=0.3, lw=0, label="10 to 90 % of the samples")
        axis.plot(step, median, "o-", ms=4, color=colour, label="median")
        axis.set_yscale("symlog", linthresh=1, linscale=1)
        axis.set_yticks([-10, -1, 0, 1, 10], ["-10", "-1", "0", "1", "10"])
        axis.set(title=name, xlabel="denoising step, noisiest first", ylim=(-30, 30), xticks=step)
    axes[0].set_ylabel("(ratio - 1) / clip")
    axes[0].legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_study(path):
    """Gold against reward of the main runs and of best of n; below, samples.png as it is in git."""
    figure, (axis, below) = plt.subplots(2, 1, figsize=(9, 6.1), height_ratios=(1.5, 1), layout="tight")
    for label, colour in zip(MAIN, ("tab:blue", "tab:red", "tab:cyan", "tab:orange"), strict=False):
        lines = [curve(run)[1:] for run in runs_of(label)]
        for gain, gold in lines:
            axis.plot(gain, gold, lw=0.8, alpha=0.4, color=colour)
        levels = np.linspace(0.02, 0.999, 40) * min(gain.max() for gain, _ in lines)  # where all seeds came
        means = [np.mean([at(level, gain, gold) for gain, gold in lines]) for level in levels]
        axis.plot([0, *levels], [0, *means], lw=2.5, color=colour, label=MAIN[label])
    reward, gold = (np.array([float(row[x]) for row in read("best_of_n")]) for x in ("reward", "gold"))
    axis.plot(reward - reward[0], gold - gold[0], "k.--", lw=1, label="best of n pictures, no training")
    axis.set(xlabel="gain in reward", ylabel="change in gold")
    axis.legend(fontsize=8)
    below.imshow(plt.imread(HERE / "figures" / "samples.png"))
    below.axis("off")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def third_runs(setting):
    """run -> its rows of third/evals.csv, of all seeds of a setting."""
    runs = {}
    for row in read("third/evals"):
        if row["run"].startswith(f"{setting}-s"):
            runs.setdefault(row["run"], []).append(row)
    return runs


LONG = {  # setting -> name and line in the figure
    "guard-6.7e-4": ("Guard, lr 6.7e-4", "tab:blue", "-"),
    "flow-grpo-2e-3": ("Flow-GRPO, lr 2e-3", "tab:red", "-"),
    "guard-2e-3": ("Guard, lr 2e-3", "tab:blue", ":"),
    "flow-grpo-6.7e-4": ("Flow-GRPO, lr 6.7e-4", "tab:red", ":"),
}


def draw_long(path):
    """100 updates of OCR: reward and gold, thin a seed and thick their mean; below, cards."""
    figure = plt.figure(figsize=(10, 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    axes = upper.subplots(1, 3)
    for setting, (name, colour, line) in LONG.items():
        runs = [
            np.array([[float(row[x]) for x in ("update", "reward", "gold")] for row in rows])
            for rows in third_runs(f"long-{setting}").values()
        ]
        if not runs:
            continue
        for i, curve_of in enumerate([*runs, np.mean(runs, axis=0)]):
            update, reward, gold = curve_of.T
            is_mean = i == len(runs)
            style = dict(lw=2.2, label=name) if is_mean else dict(lw=0.6, alpha=0.5)
            pairs = ((update, reward), (update, gold), (reward, gold))
            for axis, (x, y) in zip(axes, pairs, strict=True):
                axis.plot(x, y, color=colour, ls=line, **style)
    labels = (("updates", "OCR reward, trained on"), ("updates", "gold, only watched"), ("reward", "gold"))
    for axis, (x, y) in zip(axes, labels, strict=True):
        axis.set(xlabel=x, title=y)
    axes[1].legend(fontsize=8, loc="lower left")
    cards = plt.imread(HERE / "results" / "third" / "cards.png")
    rows = lower.subplots(3, 1)
    names = ("before training", "Guard, 100 updates", "Flow-GRPO, 100 updates")
    for axis, name, row in zip(rows, names, np.split(cards, 3), strict=True):
        axis.imshow(row, interpolation="nearest")
        axis.set_title(name, fontsize=10, loc="left")
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def before_and_after(runs, column):
    """Two cells, the means over runs before and after, and one, the mean change ± its standard deviation."""
    before, after = (np.array([float(rows[i][column]) for rows in runs.values()]) for i in (0, -1))
    change = after - before
    spread = change.std(ddof=1) if len(change) > 1 else float("nan")
    return [f"{before.mean():.3f}", f"{after.mean():.3f}", f"{change.mean():+.3f} ± {spread:.3f}"]


def third_table(settings):
    """A row for each (name, setting, column of third/evals.csv) and what became of gold. Markdown."""
    columns = ["run", "seeds", "before", "after", "gain", "gold before", "after", "change"]
    lines = ["| " + " | ".join(columns) + " |", "|-" * len(columns) + "|"]
    for name, setting, column in settings:
        runs = third_runs(setting)
        cells = [name, str(len(runs)), *before_and_after(runs, column), *before_and_after(runs, "gold")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table():
    """The mean change of each part of gold in the default runs. Markdown."""
    columns = ["run", *PARTS]
    lines = ["| " + " | ".join(columns) + " |", "|-" * len(columns) + "|"]
    for name, setting, column in DEFAULT:
        if column == "reward":
            runs = third_runs(setting)
            changes = [before_and_after(runs, part)[2].split(" ")[0] for part in PARTS]
            lines.append("| " + " | ".join([name, *changes]) + " |")
    return "\n".join(lines)


PARTS = ("colour", "frame", "pattern", "content")
DEFAULT = [
    (f"{name}, `tiny/{model}`", f"{task}-{model}", column)
    for name, task, column in (
        ("OCR", "ocr", "reward"),
        ("GenEval, partial", "geneval", "reward"),
        ("GenEval, strict", "geneval", "geneval_strict"),
        ("PickScore", "pickscore", "reward"),
    )
    for model in ("sd3", "flux")
]
DANCE = [
    (f"{name}, {words} noise", f"dance-{method}-{noise}", "reward")
    for name, method in (("Guard", "guard"), ("Flow-GRPO's weights", "flow-grpo"))
    for words, noise in (("shared", "shared"), ("own", "own"))
]


def main(folder=HERE / "figures"):
    if third_runs("long-guard-6.7e-4"):
        draw_long(folder / "long.png")
    draw_ratio(folder / "ratio.png")
    draw_study(folder / "study.png")
    print(third_table(DEFAULT), parts_table(), third_table(DANCE), main_table(), variants_table(), sep="\n\n")


if __name__ == "__main__":
    main()
