"""Every figure and table of the README's findings, from the CSVs in experiments/results alone.

    python experiments/figures.py              # writes experiments/figures/*.png, prints the tables

Runs that are not there yet are left out; a figure without its data is skipped, with a line that says so.
"""

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from experiments.run import CLIP, FIRST_SEED, RESULTS, SEEDS, TABLE, read  # noqa: E402
from tiny import cards  # noqa: E402

COLOURS = {
    "guard": "tab:blue",
    "flow-grpo": "tab:red",
    "guard-third": "tab:cyan",
    "flow-grpo-tight": "tab:orange",
    "temp-reweight": "tab:pink",
    "mean-revised": "tab:brown",
    "rationorm": "tab:green",
    "guard-v": "tab:purple",
    "flow-grpo-third": "salmon",
    "guard-kl": "navy",
    "flow-grpo-kl": "darkred",
    "dance": "tab:red",
    "dance-guard": "tab:blue",
}
COMPARISONS = {
    "same learning rate": ("guard", "flow-grpo"),
    "the paper's ratio of learning rates, 1 : 3": ("guard-third", "flow-grpo"),
    "same rate, same share clipped": ("guard", "flow-grpo-tight"),
    "same learning rate, a third": ("guard-third", "flow-grpo-third"),
}
PARTS = [f"cards-{part}" for part in cards.PARTS]


# ------------------------------------------------------------------------------------------------------------
# Reading


def runs_of(label):
    """Seed -> folder of its results, of the runs that are done."""
    group = next(group for group, rows in TABLE.items() if label in rows)
    folders = {seed: RESULTS / f"{label}-s{seed}" for seed in SEEDS.get(group, [FIRST_SEED])}
    return {seed: folder for seed, folder in folders.items() if (folder / "run.json").exists()}


def columns(path, where=lambda row: True):
    """A CSV's columns as float arrays, those that are numbers."""
    rows = [row for row in read(path) if where(row)]
    return {
        name: np.array([float(row[name]) for row in rows]) for name in rows[0] if is_number(rows[0][name])
    }


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def evals(label, others=()):
    """Seed -> columns of its evaluations, for the seeds that all of the others have too."""
    shared = set(runs_of(label)).intersection(*map(runs_of, others))
    return {seed: columns(folder / "evals.csv") for seed, folder in runs_of(label).items() if seed in shared}


def second_updates(folder):
    """Columns of the updates that can clip: those that are not the first of an epoch."""
    return columns(folder / "updates.csv", lambda row: row["first"] == "False")


def clipped(folder):
    """(share above, share below) over the updates that can clip."""
    rows = second_updates(folder)
    return rows["clip_high"].mean(), rows["clip_low"].mean()


def spread(values, digits=3, sign=""):
    """Mean ± standard deviation over seeds; one seed has none."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


# ------------------------------------------------------------------------------------------------------------
# Figures


def save(figure, name):
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures" / f"{name}.png", dpi=80, bbox_inches="tight")
    plt.close(figure)


def curves(axis, label, runs, y):
    """Mean over seeds, and the range from the lowest to the highest."""
    values = np.stack([run[y] for run in runs])
    axis.plot(runs[0]["update"], values.mean(0), "o-", ms=3, color=COLOURS[label], label=label)
    if len(runs) > 1:
        axis.fill_between(
            runs[0]["update"], values.min(0), values.max(0), color=COLOURS[label], alpha=0.15, lw=0
        )


def path(axis, label, runs):
    """Gold against proxy, as gains over the start: thin lines are seeds, the thick one is their mean."""
    gains = np.stack([[run[name] - run[name][0] for name in ("ocr", "cards")] for run in runs])
    for proxy, gold in gains:
        axis.plot(proxy, gold, "-", lw=0.8, alpha=0.5, color=COLOURS[label])
    axis.plot(*gains.mean(0), "o-", ms=3, lw=2, color=COLOURS[label], label=label)


def over_optimization(name, comparisons):
    """Proxy and gold over training, and gold against proxy; a column per comparison, of seeds it shares."""
    size = (4.4 * len(comparisons), 9)
    figure, axes = plt.subplots(3, len(comparisons), figsize=size, sharex="row", sharey="row", squeeze=False)
    for (title, labels), column in zip(comparisons.items(), axes.T, strict=True):
        labels = [label for label in labels if runs_of(label)]
        for label in labels:
            runs = list(evals(label, labels).values())
            curves(column[0], label, runs, "ocr")
            curves(column[1], label, runs, "cards")
            path(column[2], label, runs)
        if labels:
            column[0].legend(fontsize=8)
            title += f"\nseeds {', '.join(map(str, evals(labels[0], labels)))}"
        column[0].set(title=title)
        column[1].set(xlabel="updates")
        column[2].set(xlabel="gain in proxy since the start")
        column[2].axhline(0, color="gray", lw=0.5)
    for axis, what in zip(axes[:, 0], ("proxy: OCR reward", "gold: cards", "gain in gold"), strict=True):
        axis.set_ylabel(what)
    figure.tight_layout()
    save(figure, name)


def ratio_distributions():
    """Figure 2: rho of single samples by step and by the sign of their advantage."""
    shown, methods = (0, 2, 4, 6, 8), ("flow-grpo", "guard")
    figure, axes = plt.subplots(2, 5, figsize=(15, 5))
    for row, method in zip(axes, methods, strict=True):
        rows = columns(RESULTS / f"{method}-s{FIRST_SEED}" / "rho.csv", lambda row: float(row["advantage"]))
        clip = CLIP["guard" if method == "guard" else "baseline"]
        for axis, step in zip(row, shown, strict=True):
            here = rows["step"] == step
            limit = np.quantile(abs(rows["rho"][here]), 0.99)
            for sign, colour in ((1, "tab:green"), (-1, "tab:gray")):
                values = rows["rho"][here & (np.sign(rows["advantage"]) == sign)]
                title = f"A {'>' if sign > 0 else '<'} 0"
                axis.hist(
                    values,
                    np.linspace(-limit, limit, 41),
                    histtype="step",
                    density=True,
                    color=colour,
                    label=title,
                )
            axis.axvline(rows["rho"][here].mean(), color="black", lw=1, label="mean")
            axis.axvspan(min(clip, limit), limit, color="tab:red", alpha=0.15, lw=0)
            axis.axvspan(-limit, -min(clip, limit), color="tab:red", alpha=0.15, lw=0)
            axis.set(title=f"{method}, step {step}", yticks=[], xlim=(-limit, limit))
            axis.ticklabel_format(axis="x", scilimits=(0, 0))
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, "fig2")


def ratio_by_step():
    """Figure 2, second part: mean of rho in standard deviations, and spread, against the step; all seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for method in ("flow-grpo", "guard"):
        for folder in runs_of(method).values():
            rows = columns(folder / "updates.csv", lambda row: row["first"] == "False" and row["live"] != "0")
            steps = np.unique(rows["step"])
            mean = np.array([rows["ratio_mean"][rows["step"] == t].mean() for t in steps])
            deviation = np.array([np.sqrt((rows["ratio_std"][rows["step"] == t] ** 2).mean()) for t in steps])
            first = folder.name.endswith(str(FIRST_SEED))
            style = dict(color=COLOURS[method], marker="o", ms=3, lw=1, label=method if first else None)
            axes[0].plot(steps, mean, **style)
            axes[1].plot(steps, mean / deviation, **style)
            axes[2].semilogy(steps, deviation, **style)
    titles = ("mean of ratio - 1", "mean in standard deviations", "standard deviation of ratio - 1")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="denoising step, noisiest first")
    axes[0].legend()
    figure.tight_layout()
    save(figure, "fig2_steps")


def clip_shares():
    """Figure 12: share of samples clipped above and below, by step and over training; mean over seeds."""
    methods = [m for m in ("flow-grpo", "flow-grpo-tight", "guard", "guard-v") if runs_of(m)]
    figure, axes = plt.subplots(len(methods), 2, figsize=(11, 2.6 * len(methods)), squeeze=False)
    for pair, method in zip(axes, methods, strict=True):
        for axis, name in zip(pair, ("clip_high", "clip_low"), strict=True):
            shares = []
            for folder in runs_of(method).values():
                rows = second_updates(folder)
                shares.append(rows[name].reshape(-1, len(np.unique(rows["step"]))))
            length = min(map(len, shares))  # updates of dead groups alone have no rows
            image = axis.imshow(
                np.mean([s[:length] for s in shares], 0).T, aspect="auto", vmin=0, vmax=1, origin="lower"
            )
            side = "above" if name == "clip_high" else "below"
            axis.set(title=f"{method}: share {side} the range", xlabel="epoch", ylabel="step")
            figure.colorbar(image)
    figure.tight_layout()
    save(figure, "fig12")


def gradient_norms():
    """Figure 3, and the largest over the smallest norm of each method."""
    rows = read(RESULTS / "gradients.csv")
    figure, axis = plt.subplots(figsize=(6, 4))
    seeds = sorted({row["seed"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        norms = np.array(
            [
                [float(row["grad_norm"]) for row in rows if (row["method"], row["seed"]) == (method, seed)]
                for seed in seeds
            ]
        )
        relative = norms / norms.mean(1, keepdims=True)
        ratio = norms.max(1) / norms.min(1)
        label = f"{method}: max / min {spread(ratio.tolist(), 1)}"
        axis.semilogy(relative.mean(0), "o-", color=COLOURS[method], label=label)
        axis.fill_between(
            range(norms.shape[1]), relative.min(0), relative.max(0), color=COLOURS[method], alpha=0.2
        )
    axis.set(xlabel="denoising step, noisiest first", ylabel="gradient norm / its mean over steps")
    axis.legend(fontsize=8)
    save(figure, "fig3")


def one_step_predictions():
    """Figure 11 in numbers: scores of the x0 predicted at each step."""
    rows = read(RESULTS / "predictions.csv")
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.4))
    names = {"ocr": "OCR", "cards": "gold", "cards-colour": "colour", "cards-glyph": "glyphs"}
    for axis, (column, title) in zip(axes, names.items(), strict=True):
        for run in dict.fromkeys(row["run"] for row in rows):
            label = run.removesuffix(f"-s{FIRST_SEED}")
            values = [float(row[column]) for row in rows if row["run"] == run]
            axis.plot(values, "o-", ms=3, color=COLOURS.get(label, "black"), label=label)
        axis.set(title=f"{title} of the x0 predicted at a step", xlabel="denoising step")
    axes[0].legend()
    figure.tight_layout()
    save(figure, "fig11_scores")


# ------------------------------------------------------------------------------------------------------------
# Tables, as Markdown


def table(header, rows):
    print("\n| " + " | ".join(header) + " |\n" + "|-" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def table_of_methods():
    """Every run's last evaluation."""
    rows = []
    for label in (label for group in TABLE.values() for label in group if runs_of(label)):
        runs, shares = list(evals(label).values()), [clipped(folder) for folder in runs_of(label).values()]
        rows.append(
            [
                f"`{label}`",
                str(len(runs)),
                *(spread([run[name][-1] for run in runs]) for name in ("ocr", "cards", *PARTS)),
                spread([run["kl_to_base"][-1] for run in runs]),
                *(spread(side, 2) for side in zip(*shares, strict=True)),
            ]
        )
    bases = [run for label in TABLE["main"] for run in evals(label).items()]
    bases = list(dict(bases).values())  # one run per seed: every method starts from the same numbers
    base = [spread([run[name][0] for run in bases]) for name in ("ocr", "cards", *PARTS)]
    rows.insert(0, ["base", str(len(bases)), *base, "0", "", ""])
    parts = [name.removeprefix("cards-") for name in PARTS]
    table(["method", "seeds", "proxy (OCR)", "gold", *parts, "KL to base", "clipped above", "below"], rows)


def table_of_ratios():
    """Mean and spread of rho in the second updates, pooled over seeds.

    The noise of their samples has no part in what moved the policy, so for a centred ratio the mean over
    samples must be 0 within its standard error.
    """
    cells = {}
    for method in ("flow-grpo", "guard"):
        runs = [second_updates(folder) for folder in runs_of(method).values()]
        rows = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
        for step in np.unique(rows["step"]):
            here = {name: values[rows["step"] == step] for name, values in rows.items()}
            total = here["live"].sum()
            mean = (here["live"] * here["ratio_mean"]).sum() / total
            deviation = np.sqrt((here["live"] * here["ratio_std"] ** 2).sum() / total)
            error = deviation / np.sqrt(total)
            texts = f"{mean:+.1e} ± {error:.0e}", f"{deviation:.1e}", f"{mean / error:+.1f}"
            cells.setdefault(step, [f"{step:.0f}"]).extend(texts)
    names = [
        f"{m}: {what}"
        for m in ("flow-grpo", "guard")
        for what in ("mean ± its error", "spread", "mean / error")
    ]
    table(["step", *names], cells.values())


def gold_at(run, gain):
    """Gain in gold where the path through a run's evaluations first reaches a gain in proxy; NaN if never."""
    proxy, gold = run["ocr"] - run["ocr"][0], run["cards"] - run["cards"][0]
    for i in range(1, len(proxy)):
        if proxy[i] >= gain:
            share = (gain - proxy[i - 1]) / (proxy[i] - proxy[i - 1])
            return float(gold[i - 1] + share * (gold[i] - gold[i - 1]))
    return float("nan")


def table_of_equal_proxy():
    """Gold at equal proxy: per seed, at the largest gain that both methods reached, and at half of it."""
    rows = []
    for title, labels in COMPARISONS.items():
        ours, theirs = (evals(label) for label in labels)
        for seed in sorted(ours.keys() & theirs.keys()):
            pair = ours[seed], theirs[seed]
            common = min((run["ocr"] - run["ocr"][0]).max() for run in pair)
            for share in (0.5, 1):
                gold = [gold_at(run, common * share) for run in pair]
                cells = [f"{value:+.4f}" for value in (*gold, gold[0] - gold[1])]
                rows.append([title, str(seed), f"{common * share:+.3f}", *cells])
    table(["comparison", "seed", "gain in proxy", "gain in gold, Guard", "baseline", "difference"], rows)


def scores(folder, update=None):
    """Columns of scores.csv at one update, the last unless given, with the prompts."""
    rows = read(folder / "scores.csv")
    update = rows[-1]["update"] if update is None else str(update)
    return [row for row in rows if row["update"] == update]


def table_of_side_by_side():
    """Win, tie, lose on the gold score over 100 held-out prompts, both models from the same noise."""
    rows = []
    for title, (ours, theirs) in COMPARISONS.items():
        for seed in sorted(runs_of(ours).keys() & runs_of(theirs).keys()):
            pair = [scores(runs_of(label)[seed])[:100] for label in (ours, theirs)]
            gaps = [float(a["cards"]) - float(b["cards"]) for a, b in zip(*pair, strict=True)]
            win, lose = sum(gap > 0.005 for gap in gaps), sum(gap < -0.005 for gap in gaps)
            rows.append([title, str(seed), str(win), str(len(gaps) - win - lose), str(lose)])
    table(["Guard against the baseline", "seed", "win", "tie (within 0.005)", "lose"], rows)


def table_of_words():
    """OCR of words trained on and of words never seen, before and after."""
    rows = []
    starts = {}  # seed -> the base's scores; the same for every method
    for label in TABLE["main"]:
        for seed, folder in runs_of(label).items():
            if read(folder / "scores.csv")[0]["update"] == "0":
                starts[seed] = scores(folder, 0)
    for label in TABLE["main"]:
        gains = {True: [], False: []}
        for seed in runs_of(label).keys() & starts.keys():
            folder = runs_of(label)[seed]
            for unseen, values in gains.items():
                before, after = (
                    statistics.mean(
                        float(row["ocr"])
                        for row in rows_of
                        if (cards.parse(row["prompt"])[0] in cards.UNSEEN_WORDS) == unseen
                    )
                    for rows_of in (starts[seed], scores(folder))
                )
                values.append(after - before)
        if gains[True]:
            rows.append(
                [
                    f"`{label}`",
                    str(len(gains[True])),
                    *(spread(gains[unseen], 3, "+") for unseen in (False, True)),
                ]
            )
    table(["method", "seeds", "gain in OCR, words trained on", "words never seen"], rows)


def main():
    done = {label: len(runs_of(label)) for group in TABLE.values() for label in group}
    print("runs: " + ", ".join(f"{label} {count}" for label, count in done.items()))
    over_optimization("fig1", COMPARISONS)
    more = {
        "ablation": ("guard", "flow-grpo", *TABLE["ablation"]),
        "with KL": ("guard", "flow-grpo", *TABLE["kl"]),
        "DanceGRPO": tuple(TABLE["dance"]),
    }
    over_optimization("fig9", more)
    ratio_by_step()
    clip_shares()
    for draw in (ratio_distributions, gradient_norms, one_step_predictions):
        try:
            draw()
        except FileNotFoundError as error:
            print(f"{draw.__name__} skipped: no {error.filename}", file=sys.stderr)
    table_of_methods()
    table_of_ratios()
    table_of_equal_proxy()
    table_of_side_by_side()
    table_of_words()


if __name__ == "__main__":
    main()
