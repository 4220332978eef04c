"""Every table of experiments/README.md, from the CSVs in git alone.

    python experiments/tables.py               # prints them all

A function per table returns it as Markdown; tests/test_experiments.py looks for it on the page.
"""

import statistics
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from experiments.run import FIRST_SEED, RESULTS, SEEDS, TABLE, read  # noqa: E402
from tiny import cards  # noqa: E402

COMPARISONS = {  # name -> Guard's runs and the baseline's
    "same learning rate": ("guard", "flow-grpo"),
    "the paper's ratio of learning rates, 1 : 3": ("guard-third", "flow-grpo"),
    "same rate, same share clipped": ("guard", "flow-grpo-tight"),
    "same learning rate, a third": ("guard-third", "flow-grpo-third"),
}
GOLD = ("cards", *(f"cards-{part}" for part in cards.PARTS))


# ------------------------------------------------------------------------------------------------------------
# Reading


def runs_of(label):
    """Seed -> folder of its results, of the runs that are done."""
    group = next(group for group, rows in TABLE.items() if label in rows)
    folders = {seed: RESULTS / f"{label}-s{seed}" for seed in SEEDS.get(group, [FIRST_SEED])}
    return {seed: folder for seed, folder in folders.items() if (folder / "run.json").exists()}


def columns(path, where=lambda row: True):
    """A CSV's columns as float arrays, but for those that are words."""
    rows = [row for row in read(path) if where(row)]
    names = rows[0].keys() - {"first", "prompt"}
    return {name: np.array([float(row[name]) for row in rows]) for name in names}


def evals(label):
    """Seed -> columns of its evaluations."""
    return {seed: columns(folder / "evals.csv") for seed, folder in runs_of(label).items()}


def second_updates(folder):
    """Columns of the updates that can clip, a row per step: those that are not the first of an epoch."""
    return columns(folder / "updates.csv", lambda row: row["first"] == "False")


def scores(folder, update):
    """Rows of scores.csv, one per held-out prompt, at the first update (0) or at the last (-1)."""
    rows = read(folder / "scores.csv")
    return [row for row in rows if row["update"] == rows[update]["update"]]


def spread(values, digits=3, sign=""):
    """Mean ± standard deviation over seeds; one seed has none."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(header, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|-" * len(header) + "|", *lines[1:]])


# ------------------------------------------------------------------------------------------------------------
# The paper at tiny scale


def table_of_methods():
    """Every run's last evaluation, and the base, from which all methods of a seed start."""
    starts = {seed: run for label in TABLE["main"] for seed, run in evals(label).items()}
    base = [spread([run[name][0] for run in starts.values()]) for name in ("ocr", *GOLD)]
    rows = [["base", str(len(starts)), *base, "0", "", ""]]
    for label in [label for group in TABLE.values() for label in group if runs_of(label)]:
        runs = list(evals(label).values())
        updates = [second_updates(folder) for folder in runs_of(label).values()]
        ends = [spread([run[name][-1] for run in runs]) for name in ("ocr", *GOLD, "kl_to_base")]
        clipped = [spread([run[name].mean() for run in updates], 2) for name in ("clip_high", "clip_low")]
        rows.append([f"`{label}`", str(len(runs)), *ends, *clipped])
    header = ["method", "seeds", "proxy (OCR)", "gold", *cards.PARTS, "KL to base", "clipped above", "below"]
    return table(header, rows)


def gold_at(run, gain):
    """Gain in gold where the path through a run's evaluations first reaches a gain in proxy; NaN if never."""
    proxy, gold = run["ocr"] - run["ocr"][0], run["cards"] - run["cards"][0]
    for i in range(1, len(proxy)):
        if proxy[i] >= gain:
            share = (gain - proxy[i - 1]) / (proxy[i] - proxy[i - 1])
            return float(gold[i - 1] + share * (gold[i] - gold[i - 1]))
    return float("nan")


def side_by_side(ours, theirs):
    """Win, tie, lose on the gold score over the first 100 held-out prompts, both from the same noise."""
    pairs = zip(scores(ours, -1)[:100], scores(theirs, -1)[:100], strict=True)
    gaps = [float(our["cards"]) - float(their["cards"]) for our, their in pairs]
    win = sum(gap > 0.005 for gap in gaps)
    lose = sum(gap < -0.005 for gap in gaps)
    return f"{win} : {len(gaps) - win - lose} : {lose}"


def table_of_comparisons():
    """Per seed: gold at the largest gain in proxy that both reached and at half of it, and side by side."""
    rows = []
    for title, (ours, theirs) in COMPARISONS.items():
        for seed, run in evals(ours).items():
            pair = run, evals(theirs)[seed]
            common = min((each["ocr"] - each["ocr"][0]).max() for each in pair)
            guard, baseline = (gold_at(each, common) for each in pair)
            half = gold_at(pair[0], common / 2) - gold_at(pair[1], common / 2)
            numbers = [f"{x:+.4f}" for x in (guard, baseline, guard - baseline, half)]
            wins = side_by_side(runs_of(ours)[seed], runs_of(theirs)[seed])
            rows.append([title, str(seed), f"{common:+.3f}", *numbers, wins])
    return table(["comparison", "seed", "gain in proxy", "gain in gold, Guard", "baseline", "difference",
                  "difference at half the gain", "win : tie : lose"], rows)


def table_of_words():
    """OCR of words trained on and of words never seen, before and after."""
    rows, starts = [], [runs_of("guard-third")[seed] for seed in SEEDS["main"]]
    for label, update in (("base", 0), *((label, -1) for label in TABLE["main"])):
        folders = starts if label == "base" else runs_of(label).values()
        cells = []
        for unseen in (False, True):
            means = []
            for folder in folders:
                chosen = [row for row in scores(folder, update) if is_unseen(row["prompt"]) == unseen]
                means.append(statistics.mean(float(row["ocr"]) for row in chosen))
            cells.append(spread(means))
        rows.append([f"`{label}`", *cells])
    return table(["method", "OCR of words trained on", "of words never seen"], rows)


def is_unseen(prompt):
    return cards.parse(prompt)[0] in cards.UNSEEN_WORDS


def table_of_ratios():
    """Mean and spread of rho in the second updates, pooled over seeds.

    The noise of their samples has no part in what moved the policy, so for a centred ratio the mean over
    samples must be 0 within its standard error.
    """
    header, rows = ["step"], [[str(step)] for step in range(9)]
    for method in ("flow-grpo", "guard"):
        header += [f"{method}: mean ± its error", f"{method}: spread", f"{method}: mean / error"]
        runs = [second_updates(folder) for folder in runs_of(method).values()]
        live, means, deviations, steps = (
            np.concatenate([run[name] for run in runs])
            for name in ("live", "ratio_mean", "ratio_std", "step"))
        for step, row in enumerate(rows):
            weights = live * (steps == step)
            mean = np.average(means, weights=weights)
            deviation = np.sqrt(np.average(deviations**2, weights=weights))
            error = deviation / np.sqrt(weights.sum())
            row += [f"{mean:+.1e} ± {error:.0e}", f"{deviation:.1e}", f"{mean / error:+.1f}"]
    return table(header, rows)


# ------------------------------------------------------------------------------------------------------------
# Cost, precision, faults


SPEED = {  # what -> parts of bench.csv above and below the line
    "(sampling + training) / bare passes": (("sampling", "training"), ("bare sampling", "bare training")),
    "sampling / bare forward passes": (("sampling",), ("bare sampling",)),
    "training / bare forward and backward passes": (("training",), ("bare training",)),
    "sampling with the OCR reward beside it / without": (("sampling + reward",), ("sampling",)),
    "of it, waiting after the last picture": (("tail",), ("sampling + reward",)),
}


def table_of_speed():
    """bench.csv: medians and ranges over the rounds, ratios within a round."""
    data = read(HERE / "bench.csv")
    header, cells = [""], {what: [what] for what in (*SPEED, "images/s, sampled", "images/s, and trained on")}
    for model, device in dict.fromkeys((row["model"], row["device"]) for row in data):
        header.append(f"`{model}`, {device}")
        of_it = [row for row in data if (row["model"], row["device"]) == (model, device)]

        def seconds(parts, of_it=of_it):
            return sum(np.array([float(r["seconds"]) for r in of_it if r["what"] == part]) for part in parts)

        for what, (above, below) in SPEED.items():
            ratio = seconds(above) / seconds(below)
            cells[what].append(f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
        images = int(of_it[0]["images"])
        for what, done in (("images/s, sampled", ["sampling"]),
                           ("images/s, and trained on", ["sampling", "training"])):
            cells[what].append(f"{np.median(images / seconds(done)):.1f}")
    return table(header, cells.values())


def table_of_precision():
    """precision.csv: Guard, a velocity that moved by 1e-4, the first, middle and last step."""
    rows = [
        [row["velocity"], row["step"], row["spread"], row["kept"], row["difference"]]
        for row in read(HERE / "precision.csv")
        if (row["method"], row["moved"]) == ("guard", "0.0001") and row["step"] in ("0", "4", "8")]
    return table(["velocities", "step", "spread", "error, kept", "error, difference"], rows)


def table_of_soak():
    lives, rows = read(HERE / "soak.csv"), []
    phases = ("starting", "sampling", "waiting for rewards", "updating", "evaluating", "saving")
    for name, among in [*((phase, [phase]) for phase in phases), ("all", phases)]:
        lost = [int(life["epochs lost"]) for life in lives if life["phase"] in among]
        rows.append([name, str(len(lost)), str(sum(lost))])
    return table(["killed while", "kills", "finished epochs done again"], rows)


def table_of_plan():
    """As plan.py wrote it, a column per command."""
    return whole("plan.csv")


def table_of_default_runs():
    """As they were noted by hand."""
    return whole("default_runs.csv")


def whole(name):
    rows = read(HERE / name)
    return table(list(rows[0]), [list(row.values()) for row in rows])


TABLES = {name: function for name, function in globals().items() if name.startswith("table_of_")}


def main():
    for name, function in TABLES.items():
        print(f"\n{name}\n\n{function()}")


if __name__ == "__main__":
    main()
