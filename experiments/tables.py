"""Every table of experiments/README.md, from the CSVs in git alone.

    python experiments/tables.py               # prints them all

A function per table returns it as Markdown; tests/test_experiments.py looks for it on the page.
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from experiments.run import MODELS, RESULTS, SEEDS, TABLE, TASKS, read  # noqa: E402
from tiny import cards  # noqa: E402

REWARD = dict(ocr="ocr", geneval="tiny-geneval", pickscore="tiny-pickscore")  # of the tiny models, by task
STRICT = "tiny-geneval-strict"


# ------------------------------------------------------------------------------------------------------------
# Reading


def runs_of(label):
    """Seed -> folder of results, of a label's runs that are done."""
    group = next(group for group, rows in TABLE.items() if label in rows)
    folders = {seed: RESULTS / f"{label}-s{seed}" for seed in SEEDS[group]}
    return {seed: folder for seed, folder in folders.items() if (folder / "run.json").exists()}


def about(folder):
    """What run.json says of a run."""
    return json.loads((folder / "run.json").read_text())


def columns(path, where=lambda row: True):
    """A CSV's columns as float arrays, but for those that are words."""
    rows = [row for row in read(path) if where(row)]
    names = rows[0].keys() - {"first", "prompt"}
    return {name: np.array([float(row[name]) for row in rows]) for name in names}


def ends(runs, name, digits=3):
    """Means over runs of a column of their evaluations, before and after: two cells."""
    return [f"{statistics.mean(run[name][place] for run in runs):.{digits}f}" for place in (0, -1)]


def base_deviation(folder, reward):
    """Standard deviation of the base model's scores over the held-out prompts, a picture each."""
    rows = [row for row in read(folder / "scores.csv") if row["update"] == "0"]
    return statistics.stdev(float(row[reward]) for row in rows)


def spread(values, digits=3, sign=""):
    """Mean ± standard deviation over seeds; one seed has none."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(header, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|-" * len(header) + "|", *lines[1:]])


# ------------------------------------------------------------------------------------------------------------
# The default runs


def trained():
    """(task, model, folders, columns of their evaluations) of what has any run that is done."""
    for model in MODELS:
        for task in TASKS:
            folders = list(runs_of(f"{task}-{model}").values())
            if folders:
                yield task, model, folders, [columns(folder / "evals.csv") for folder in folders]


def table_of_default_runs():
    """Means over seeds, of the gains with their standard deviation."""
    rows = []
    for task, model, folders, runs in trained():
        gains = [run["proxy"][-1] - run["proxy"][0] for run in runs]
        deviations = [base_deviation(folder, REWARD[task]) for folder in folders]
        relative = [gain / deviation for gain, deviation in zip(gains, deviations, strict=True)]
        digits = 4 if task == "pickscore" else 3  # its scores are small
        strict = ends(runs, STRICT) if task == "geneval" else ["", ""]
        seconds = [about(folder)["seconds"] for folder in folders]
        seconds = [s for s in seconds if s is not None]  # None: it was stopped in between
        minutes = f"{statistics.mean(seconds) / 60:.0f}" if seconds else ""
        rows.append([
            f"`{task}`", f"`{model}`", str(len(runs)), f"{runs[0]['update'][-1]:.0f}",
            *ends(runs, "proxy", digits), spread(gains, digits, "+"), spread(relative, 2, "+"),
            *strict, *ends(runs, "cards"), minutes])
    return table(["task", "model", "seeds", "updates", "reward, base", "after", "gain", "gain in deviations",
                  "strict, base", "after", "gold, base", "after", "minutes"], rows)


def table_of_parts():
    """The parts of the gold score before and after, means over seeds."""
    rows = []
    for task, model, _, runs in trained():
        parts = [" → ".join(ends(runs, f"cards-{part}")) for part in cards.PARTS]
        rows.append([f"`{task}`", f"`{model}`", *parts])
    return table(["task", "model", *cards.PARTS], rows)


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


def as_written(name):
    """A CSV as plan.py wrote it, a column per command."""
    rows = read(HERE / name)
    return table(list(rows[0]), [list(row.values()) for row in rows])


def table_of_plan():
    return as_written("plan.csv")


def table_of_measured():
    return as_written("measured.csv")


TABLES = {name: function for name, function in globals().items() if name.startswith("table_of_")}


def main():
    for name, function in TABLES.items():
        print(f"\n{name}\n\n{function()}")


if __name__ == "__main__":
    main()
