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

from experiments import tables  # noqa: E402
from experiments.run import BASELINE, GUARD, MODELS, RESULTS, TASKS, read  # noqa: E402
from experiments.tables import about, columns, runs_of, spread  # noqa: E402

COLOURS = {"guard": "tab:blue", "flow-grpo": "tab:red", "rationorm": "tab:green"}


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
    """Figure 3: the gradient of an on-policy update by step; mean and range over seeds."""
    path = RESULTS / "gradients.csv"
    if not path.exists():
        return
    rows = read(path)
    figure, axis = plt.subplots(figsize=(6, 4))
    for method in dict.fromkeys(row["method"] for row in rows):
        norms = np.array([float(row["grad_norm"]) for row in rows if row["method"] == method])
        norms = norms.reshape(len({row["seed"] for row in rows}), -1)  # (seeds, steps)
        relative = norms / norms.mean(1, keepdims=True)
        steps = range(norms.shape[1])
        label = f"{method}: largest / smallest {spread((norms.max(1) / norms.min(1)).tolist(), 1)}"
        axis.semilogy(steps, relative.mean(0), "o-", color=COLOURS[method], label=label)
        axis.fill_between(steps, relative.min(0), relative.max(0), color=COLOURS[method], alpha=0.2)
    axis.set(xlabel="denoising step, noisiest first", ylabel="gradient norm / its mean over steps")
    axis.legend(fontsize=8)
    save(figure, "fig3")


# ------------------------------------------------------------------------------------------------------------
# The default runs


def default_runs():
    """What is trained on and what is only watched, over the updates of a run."""
    figure, axes = plt.subplots(len(MODELS), len(TASKS), figsize=(13, 6.4), squeeze=False)
    for row, model in zip(axes, MODELS, strict=True):
        for axis, task in zip(row, TASKS, strict=True):
            axis.set(title=f"{task}, {model}", xlabel="updates")
            runs = [columns(folder / "evals.csv") for folder in runs_of(task, model)]
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


def main():
    default_runs()
    ratio_and_clip()
    gradient_norms()
    tables.main()


if __name__ == "__main__":
    main()
