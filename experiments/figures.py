"""Every figure of experiments/README.md and every table, from the CSVs in git alone.

    python experiments/figures.py              # writes experiments/figures/*.png, prints the tables

Seconds on a CPU. A figure whose numbers are not there yet is not drawn. The two figures that are made of
pictures, fig11 and samples, are those of predictions.py.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from experiments import study, tables  # noqa: E402
from experiments.run import BASELINE, CLIPS, GUARD, MODELS, RESULTS, TASKS  # noqa: E402
from experiments.study import PRINTED  # noqa: E402
from experiments.tables import about, columns, runs_of  # noqa: E402

COLOURS = {"guard": "tab:blue", "flow-grpo": "tab:red", "rationorm": "tab:green"}
COLOURS[PRINTED] = "tab:gray"


def save(figure, name, dpi=80):
    figure.tight_layout()
    figure.savefig(HERE / "figures" / f"{name}.png", dpi=dpi, bbox_inches="tight")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------
# The ratio


def ratio_and_clip():
    """The main README's figure: rho of single samples at the first and at the last trained step."""
    names = {BASELINE: "Flow-GRPO", GUARD: "GRPO-Guard"}
    if not all((RESULTS / name / "run.json").exists() for name in names):
        return
    figure, axes = plt.subplots(2, 2, figsize=(7.6, 5.4))
    for name, row in zip(names, axes, strict=True):
        folder = RESULTS / name
        for step, axis in zip((0, 8), row, strict=True):
            rho = columns(folder / "rho.csv", lambda row, t=str(step): row["step"] == t)
            one_panel(axis, rho["rho"], rho["advantage"], about(folder)["settings"]["clip"])
            which = "first step (noisiest)" if step == 0 else "last trained step"
            axis.set_title(f"{names[name]}, {which}", fontsize=10)
    axes[0, 0].set_ylabel("samples")
    axes[1, 0].set_ylabel("samples")
    for axis in axes[1]:
        axis.set_xlabel("ratio - 1, in clip ranges")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8.5, bbox_to_anchor=(0.5, -0.05))
    save(figure, "ratio", dpi=150)


def one_panel(axis, rho, advantage, clip):
    """A histogram stacked by the sign of the advantage, and the shares of samples outside the clip range."""
    rho, good = rho[advantage != 0] / clip, advantage[advantage != 0] > 0
    limit = max(2, np.quantile(abs(rho), 0.99))
    axis.axvspan(-limit, -1, color="tab:red", alpha=0.13, lw=0, label="outside the clip range")
    axis.axvspan(1, limit, color="tab:red", alpha=0.13, lw=0)
    axis.hist([rho[good], rho[~good]], np.linspace(-limit, limit, 36), stacked=True,
              color=("tab:blue", "tab:orange"), label=("better than its group (A > 0)", "worse (A < 0)"))
    axis.axvline(rho.mean(), color="black", lw=1.5, label="mean")
    axis.set(xlim=(-limit, limit), yticks=[], ylim=(0, axis.get_ylim()[1] * 1.3))
    axis.locator_params(axis="x", nbins=5)
    write(axis, 0.02, "left", f"{np.mean(rho < -1):.0%} below")
    write(axis, 0.5, "center", f"mean {rho.mean():.1f}")
    write(axis, 0.98, "right", f"{np.mean(rho > 1):.0%} above")


def write(axis, x, side, text):
    box = dict(facecolor="white", edgecolor="none", alpha=0.7, pad=1)
    axis.text(x, 0.96, text, ha=side, va="top", transform=axis.transAxes, fontsize=9, bbox=box)


def gradient_norms():
    """Figure 3: the gradient of an on-policy update by step; mean and range over seeds, two samplers."""
    found = study.gradients()
    if not found:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for sde, axis in zip(("flow", "dance"), axes, strict=True):
        for method in (method for sampler, method in found if sampler == sde):
            norms = found[sde, method]  # (seeds, steps)
            relative, steps = norms / norms.mean(1, keepdims=True), range(norms.shape[1])
            ratio = study.unevenness(norms).mean()
            axis.semilogy(steps, relative.mean(0), "o-", color=COLOURS[method],
                          label=f"{method}: largest / smallest {ratio:.1f}")
            axis.fill_between(steps, relative.min(0), relative.max(0), color=COLOURS[method], alpha=0.2)
        axis.set(xlabel="denoising step, noisiest first", title=f"sampler: {sde}")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("gradient norm / its mean over steps")
    save(figure, "fig3")


# ------------------------------------------------------------------------------------------------------------
# The default runs


def default_runs():
    """What is trained on and what is only watched, over the updates of a run."""
    figure, axes = plt.subplots(len(MODELS), len(TASKS), figsize=(13, 6.4), squeeze=False)
    for row, model in zip(axes, MODELS, strict=True):
        for axis, task in zip(row, TASKS, strict=True):
            axis.set(title=f"{task}, {model}", xlabel="updates")
            runs = [columns(folder / "evals.csv") for folder in runs_of(f"{task}-{model}").values()]
            if runs:
                curve(axis, runs, "proxy", "reward", "tab:blue")
                curve(axis, runs, "cards", "gold, only watched", "tab:orange")
                if task == "geneval":
                    curve(axis, runs, tables.STRICT, "strict reward, only watched", "tab:green")
                axis.legend(fontsize=8)
    save(figure, "default")


def curve(axis, runs, name, label, colour):
    """Mean over seeds, and the range from the lowest to the highest."""
    updates, values = runs[0]["update"], np.stack([run[name] for run in runs])
    axis.plot(updates, values.mean(0), "o-", ms=3, color=colour, label=label)
    axis.fill_between(updates, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)


# ------------------------------------------------------------------------------------------------------------
# The study

MARKS = {2.2e-4: "v", 6.7e-4: "o", 2e-3: "^"}  # by learning rate
MAIN_COLOURS = {"main-guard": "tab:blue", "main-flow-grpo": "tab:red",
                "main-guard-3lr": "tab:cyan", "main-flow-grpo-3lr": "tab:orange"}


def frontier():
    """Every evaluation of the grid of learning rates and clip ranges, and each method's Pareto frontier."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for method, colour in (("flow-grpo", "tab:red"), ("guard", "tab:blue")):
        points = []
        for folder in study.grid_runs(method):
            settings, (_, gain, gold) = about(folder)["settings"], study.curve(folder)
            place = CLIPS[method].index(settings["clip"])  # the preset's range is the darkest
            axes[0].plot(gain, gold, MARKS[settings["lr"]], color=colour, alpha=1 - 0.33 * place, ms=5)
            points += zip(gain, gold, strict=True)
        best = pareto(points)
        axes[0].step(*zip(*best, strict=True), where="pre", color=colour, lw=3, alpha=0.35)
        for lr, mark in MARKS.items():
            found = study.blocked_and_lost(method, lr)
            if found:
                axes[1].plot(*zip(*found, strict=True), mark + "-", color=colour)
    for lr, mark in MARKS.items():
        axes[0].plot([], [], mark, color="gray", label=f"lr {lr:g}")
    axes[0].plot([], [], color="tab:blue", label="Guard")
    axes[0].plot([], [], color="tab:red", label="Flow-GRPO")
    axes[0].set(xlabel="gain in reward", ylabel="change in gold")
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="share of samples blocked", ylabel=f"gold lost at a gain of {study.LEVEL}")
    save(figure, "frontier")


def pareto(points):
    """Those that no other point beats in both numbers, by the first one."""
    best = []
    for point in sorted(points, reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def lines_and_mean(axis, label, lines):
    """lines: (x, y) of every seed, from 0 on. A thin line each, and a thick one, the mean of y over seeds."""
    colour = MAIN_COLOURS[label]
    for x, y in lines:
        axis.plot(x, y, lw=0.8, alpha=0.4, color=colour)
    grid = np.linspace(0.02, 0.999, 40) * min(max(x) for x, _ in lines)  # as far as every seed has come
    means = [np.mean([study.at(level, x, y) for x, y in lines]) for level in grid]
    axis.plot([0, *grid], [0, *means], lw=2.5, color=colour, label=study.NAMES[label])


def gold_against_reward(axis):
    """Gold against reward of the main runs, and of best of n."""
    for label in MAIN_COLOURS:
        lines_and_mean(axis, label, [study.curve(folder)[1:] for folder in runs_of(label).values()])
    best = columns(RESULTS / "best_of_n.csv")
    axis.plot(best["proxy"] - best["proxy"][0], best["gold"] - best["gold"][0], "k.--", lw=1,
              label="best of n pictures, no training")
    axis.set(xlabel="gain in reward", ylabel="change in gold")
    axis.legend(fontsize=8)


def main_comparison():
    """The main README's figure: gold against reward, and the pictures of predictions.py below it."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6.1), height_ratios=(1.5, 1))
    gold_against_reward(above)
    below.imshow(plt.imread(HERE / "figures" / "samples.png"))
    below.axis("off")
    save(figure, "study", dpi=120)


def distance():
    """Reward and gold against the square root of KL, as Gao et al. draw them."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    best = columns(RESULTS / "best_of_n.csv")
    for k, axis, of_best, title in ((1, axes[0], "proxy", "gain in reward"),
                                    (2, axes[1], "gold", "change in gold")):
        for label in MAIN_COLOURS:
            folders = runs_of(label).values()
            lines_and_mean(axis, label, [(study.distance(f), study.curve(f)[k]) for f in folders])
        axis.plot(np.sqrt(best["kl"]), best[of_best] - best[of_best][0], "k.--", lw=1, label="best of n")
        axis.set(xlabel="square root of KL to the base model", ylabel=title)
    axes[0].legend(fontsize=8)
    save(figure, "distance")


def main():
    default_runs()
    ratio_and_clip()
    gradient_norms()
    frontier()
    main_comparison()
    distance()
    tables.main()
    study.main()


if __name__ == "__main__":
    main()
