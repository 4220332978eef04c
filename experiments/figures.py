"""Every figure of experiments/README.md and every table, from the CSVs in git alone.

    python experiments/figures.py              # writes experiments/figures/*.png, prints the tables

Seconds on a CPU. The two figures that are made of pictures, fig11 and samples, are those of predictions.py.
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
from experiments.run import CLIP, FIRST_SEED, RESULTS, read  # noqa: E402
from experiments.tables import columns, evals, runs_of, second_updates, spread  # noqa: E402

COLOURS = {
    "guard": "tab:blue",
    "flow-grpo": "tab:red",
    "guard-third": "tab:cyan",
    "flow-grpo-tight": "tab:orange",
    "flow-grpo-third": "salmon",
    "rationorm": "tab:green",
}


def save(figure, name, dpi=80):
    figure.tight_layout()
    figure.savefig(HERE / "figures" / f"{name}.png", dpi=dpi, bbox_inches="tight")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------
# The ratio


def ratio_and_clip():
    """The main README's figure: rho of single samples at the first and at the last trained step."""
    figure, axes = plt.subplots(2, 2, figsize=(7.6, 5.4))
    names = {"flow-grpo": "Flow-GRPO", "guard": "GRPO-Guard"}
    for method, row in zip(names, axes, strict=True):
        rho = columns(RESULTS / f"{method}-s{FIRST_SEED}" / "rho.csv", lambda row: float(row["advantage"]))
        clip = CLIP["guard" if method == "guard" else "baseline"]
        for step, axis in zip((0, 8), row, strict=True):
            here = rho["step"] == step
            one_panel(axis, rho["rho"][here], rho["advantage"][here] > 0, clip)
            which = "first step (noisiest)" if step == 0 else "last trained step"
            axis.set_title(f"{names[method]}, {which}", fontsize=10)
    axes[0, 0].set_ylabel("samples")
    axes[1, 0].set_ylabel("samples")
    for axis in axes[1]:
        axis.set_xlabel("ratio - 1, in clip ranges")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8.5, bbox_to_anchor=(0.5, -0.05))
    save(figure, "ratio", dpi=150)


def one_panel(axis, rho, good, clip):
    """A histogram stacked by the sign of the advantage, and the shares of samples outside the clip range."""
    rho = rho / clip
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


def clip_shares():
    """Figure 12: share of samples clipped above and below, by step and over training; mean over seeds."""
    methods = ("flow-grpo", "flow-grpo-tight", "guard")
    figure, axes = plt.subplots(len(methods), 2, figsize=(11, 2.6 * len(methods)))
    for pair, method in zip(axes, methods, strict=True):
        for axis, name, side in zip(pair, ("clip_high", "clip_low"), ("above", "below"), strict=True):
            runs = [second_updates(folder) for folder in runs_of(method).values()]
            shares = np.mean([run[name].reshape(-1, len(np.unique(run["step"]))) for run in runs], 0)
            image = axis.imshow(shares.T, aspect="auto", vmin=0, vmax=1, origin="lower")
            axis.set(title=f"{method}: share {side} the range", xlabel="epoch", ylabel="step")
            figure.colorbar(image)
    save(figure, "fig12")


def gradient_norms():
    """Figure 3: the gradient of an on-policy update by step; mean and range over seeds."""
    rows = read(RESULTS / "gradients.csv")
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
# Proxy and gold


def over_optimization():
    """Figure 1: proxy and gold over training, and gold against proxy; a column per comparison."""
    figure, axes = plt.subplots(3, len(tables.COMPARISONS), figsize=(17.6, 9), sharex="row", sharey="row")
    for (title, labels), column in zip(tables.COMPARISONS.items(), axes.T, strict=True):
        for label in labels:
            runs = list(evals(label).values())
            curve(column[0], label, runs, "ocr")
            curve(column[1], label, runs, "cards")
            path(column[2], label, runs)
        column[0].legend(fontsize=8)
        column[0].set(title=title)
        column[1].set(xlabel="updates")
        column[2].set(xlabel="gain in proxy since the start")
        column[2].axhline(0, color="gray", lw=0.5)
    for axis, what in zip(axes[:, 0], ("proxy: OCR reward", "gold: cards", "gain in gold"), strict=True):
        axis.set_ylabel(what)
    save(figure, "fig1")


def curve(axis, label, runs, name):
    """Mean over seeds, and the range from the lowest to the highest."""
    updates, values = runs[0]["update"], np.stack([run[name] for run in runs])
    axis.plot(updates, values.mean(0), "o-", ms=3, color=COLOURS[label], label=label)
    axis.fill_between(updates, values.min(0), values.max(0), color=COLOURS[label], alpha=0.15, lw=0)


def path(axis, label, runs):
    """Gold against proxy, as gains over the start: thin lines are seeds, the thick one is their mean."""
    gains = np.stack([[run[name] - run[name][0] for name in ("ocr", "cards")] for run in runs])
    for proxy, gold in gains:
        axis.plot(proxy, gold, "-", lw=0.8, alpha=0.5, color=COLOURS[label])
    axis.plot(*gains.mean(0), "o-", ms=3, lw=2, color=COLOURS[label], label=label)


def main():
    over_optimization()
    ratio_and_clip()
    clip_shares()
    gradient_norms()
    tables.main()


if __name__ == "__main__":
    main()
