"""The figures and the tables of experiments/README.md, from the files in experiments/results alone.

    python experiments/figures.py    # writes figures/{long,parts}.png, prints the tables

The CSVs are written by run.py and snr.py. An error is a standard error over seeds unless said. Last it prints
a row for each setting that was run: the numbers of the page's list come from there.
"""

import csv
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import ttest_rel

HERE = Path(__file__).resolve().parent
PARTS = {  # method, clip range -> setting, at two and at eight updates an epoch
    ("Flow-GRPO", "1e-4"): "flow-grpo-1e-4",
    ("Flow-GRPO", "1e-5"): "flow-grpo-1e-5",
    ("`mean-revised`", "1e-5"): "mean-revised-1e-5",
    ("Flow-GRPO, KL mask", "none"): "flow-mask",
    ("Guard", "5e-7"): "guard-5e-7",
    ("Guard", "2e-6"): "guard",
    ("Guard", "none"): "guard-noclip",
    ("Guard, shift kept", "2e-6"): "guard-shift",
    ("`guard-mask`", "none"): "guard-mask",
}
DRAWN = {  # 100 updates. Method, learning rate, clip range -> setting
    ("Flow-GRPO", "2e-3", "1e-4"): "long-flow-grpo-2e-3",
    ("Guard", "2e-3", "2e-6"): "long-guard-2e-3",
    ("Flow-GRPO", "2e-3", "1e-5"): "long-flow-grpo-2e-3-1e-5",
}
LONG = DRAWN | {
    ("Flow-GRPO", "2e-3", "none"): "long-flow-grpo-2e-3-noclip",
    ("Guard", "2e-3", "none"): "long-guard-2e-3-noclip",
    ("Flow-GRPO", "6.7e-4", "1e-4"): "long-flow-grpo-6.7e-4",
    ("Guard", "6.7e-4", "2e-6"): "long-guard-6.7e-4",
    ("Guard", "6.7e-4", "none"): "long-guard-6.7e-4-noclip",
}
STYLES = (dict(color="tab:red", ls="-"), dict(color="tab:blue", ls="-"), dict(color="tab:red", ls="--"))
ABLATION = {  # method, learning rate, weight of the KL -> setting
    ("Flow-GRPO", "6.7e-4", "0"): "long-flow-grpo-6.7e-4",
    ("`mean-revised`", "6.7e-4", "0"): "ablation-mean-revised",
    ("`rationorm`", "6.7e-4", "0"): "ablation-rationorm",
    ("`temp-reweight`", "6.7e-4", "0"): "ablation-temp-reweight",
    ("Guard", "6.7e-4", "0"): "long-guard-6.7e-4",
    ("Guard", "6.7e-4", "0.1"): "kl-guard-6.7e-4",
    ("Flow-GRPO", "2e-3", "0"): "long-flow-grpo-2e-3",
    ("Flow-GRPO", "2e-3", "0.1"): "kl-flow-grpo-2e-3",
}
FIRST_PAGE = [("Flow-GRPO", "1e-4"), ("Flow-GRPO", "1e-5"), ("Guard", "2e-6"), ("`guard-mask`", "none")]


def read(name):
    with open(HERE / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


@cache
def load():
    """setting -> seed -> column -> array, over the evaluations or over the denoising steps of that run."""
    settings = {}
    for row in read("evals") + read("updates"):
        setting, _, seed = row.pop("run").rpartition("-s")
        run = settings.setdefault(setting, {}).setdefault(int(seed), {})
        for key in row.keys() - {"task", "model", "method", "sde"}:
            run[key] = np.append(run.get(key, []), float(row[key] or "nan"))
    return settings


def runs_of(setting):
    """seed -> run"""
    return load().get(setting, {})


def parts(updates):
    """Those of PARTS that were run with so many updates an epoch."""
    found = {(updates, *name): f"{updates}-{setting}" for name, setting in PARTS.items()}
    return {name: setting for name, setting in found.items() if runs_of(setting)}


# ------------------------------------------------------------------------------------------------------------
# What is read off a run


def at(level, x, y):
    """y where x first reaches a level, by a straight line between two evaluations; nan if it never does."""
    i = np.argmax(x >= level)
    return np.interp(level, x[i - 1 : i + 1], y[i - 1 : i + 1]) if x[i] >= level else np.nan


def gain(run):
    return run["reward"] - run["reward"][0]


def at_gain(level, column):
    return lambda run: at(level, gain(run), run[column])


def updates_to_gain(run):
    """Of 0.3, as planned for the test: the last update if it is never reached."""
    return np.nan_to_num(at_gain(0.3, "update")(run), nan=run["update"][-1])


def best(run):
    return (run["reward"] + run["gold"]).max()


def after(column, update):
    return lambda run: run[column][run["update"] == update].item()


def end(column):
    return lambda run: run[column][-1]


def change(column):
    return lambda run: run[column][-1] - run[column][0]


# ------------------------------------------------------------------------------------------------------------
# Tables, in Markdown


def table(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|-" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def mean_and_error(values, digits=3, sign=""):
    """Mean ± standard error of what is not nan; the value itself if there is one."""
    found = [value for value in values if not np.isnan(value)]
    if not found:
        return "-"
    text = f"{np.mean(found):{sign}.{digits}f}"
    if len(found) > 1:
        text += f" ± {np.std(found, ddof=1) / len(found) ** 0.5:.{digits}f}"
    return text if len(found) == len(values) else f"{text} ({len(found)} of {len(values)})"


def mean_of(reading, *form):
    return lambda runs: mean_and_error([reading(run) for run in runs], *form)


def outside(runs):
    shares = [np.mean([run[side] for run in runs]) for side in ("clip_high", "clip_low")]
    return " / ".join(f"{share:.1%}" for share in shares)


def summary(about, settings, cells):
    """A row for each setting. about: columns of its name. cells: column -> a function of its runs."""
    rows = []
    for name, setting in settings.items():
        runs = list(runs_of(setting).values())
        rows.append([*name, str(len(runs)), *(cell(runs) for cell in cells.values())])
    return table([*about, "seeds", *cells], rows)


def curves(about, settings, *updates):
    """Reward and gold after some updates."""
    cells = {f"{column} {k}": mean_of(after(column, k)) for column in ("reward", "gold") for k in updates}
    return summary(about, settings, cells)


ABOUT = ("updates an epoch", "method", "clip range")
READINGS = {
    "updates to a gain of 0.2": mean_of(at_gain(0.2, "update"), 1),
    "updates to a gain of 0.3": mean_of(at_gain(0.3, "update"), 1),
    "gold then": mean_of(at_gain(0.3, "gold")),
    "best reward + gold": mean_of(best),
    "reward at the end": mean_of(end("reward")),
    "gold at the end": mean_of(end("gold")),
    "above / below": outside,
    "KL": lambda runs: f"{np.mean([run['moved'][-1] for run in runs]):.2f}",
}


def parts_table():
    return summary(ABOUT, parts("two") | parts("eight"), READINGS)


def first_page_table():
    """Some of it, without the errors."""
    columns = ("updates to a gain of 0.3", "gold then", "gold at the end")
    rows = []
    for name, setting in (parts("two") | parts("eight")).items():
        if name[1:] in FIRST_PAGE:
            runs = list(runs_of(setting).values())
            rows.append([*name, *(READINGS[column](runs).partition(" ±")[0] for column in columns)])
    return table([*ABOUT, *columns], rows)


def paper_table():
    """The paper's Table 1 at this scale: changes by update 40, and those of gold at equal gain, per seed."""
    rows = []
    for task, name in (("ocr", "OCR"), ("geneval", "GenEval"), ("pickscore", "PickScore")):
        for model, baseline in (("sd3", "Flow-GRPO"), ("flux", "DanceGRPO")):
            settings = [f"table-{task}-{model}-{method}" for method in ("flow-grpo", "guard")]
            if (task, model) == ("ocr", "sd3"):
                settings = ["long-flow-grpo-2e-3", "long-guard-6.7e-4"]
            without, guarded = map(runs_of, settings)
            changes = [changes_at_equal_gain(without[seed], guarded[seed]) for seed in without]
            cells = [mean_and_error(values, sign="+") for values in np.array(changes).T]
            rows.append([f"{name}, `tiny/{model}`, {baseline}", str(len(changes)), *cells])
    readings = ("gain", "gold", "gold at equal gain")
    columns = [f"{reading}, {run}" for reading in readings for run in ("without", "Guard")]
    return table(["run", "seeds", *columns], rows)


def changes_at_equal_gain(*runs, last=40):
    """Per run: the gain by update `last`, gold's change, and that at the smaller of the largest gains."""
    pairs = [[(run[key] - run[key][0])[run["update"] <= last] for key in ("reward", "gold")] for run in runs]
    equal = min(gains.max() for gains, _ in pairs)
    gains, changes = ([pair[i][-1] for pair in pairs] for i in (0, 1))
    return *gains, *changes, *(at(equal, *pair) for pair in pairs)


def tests():
    """The planned comparisons in two families: what, the runs of two settings, and what is read off."""
    two_wide, two_narrow, two_guard, narrow, guarded, shifted, masked = map(runs_of, (
        "two-flow-grpo-1e-4", "two-flow-grpo-1e-5", "two-guard",
        "eight-flow-grpo-1e-5", "eight-guard", "eight-guard-shift", "eight-guard-mask"))
    yield (
        ("two: gold 40, Guard − Flow-GRPO 1e-4", two_guard, two_wide, after("gold", 40)),
        ("two: gold 40, Flow-GRPO 1e-5 − 1e-4", two_narrow, two_wide, after("gold", 40)),
        ("eight: updates to 0.3, `guard-mask` − Flow-GRPO 1e-5", masked, narrow, updates_to_gain),
        ("eight: best reward + gold, `guard-mask` − Guard", masked, guarded, best),
        ("eight: best reward + gold, shift kept − Guard", shifted, guarded, best),
    )
    guard_low, flow_low, guard_high, flow_high = map(runs_of, (
        "long-guard-6.7e-4", "long-flow-grpo-6.7e-4", "long-guard-2e-3", "long-flow-grpo-2e-3"))
    short = guard_low | runs_of("weights-guard")  # which is the first 20 updates of the long runs
    yield (
        ("earlier: gold 100, Guard − Flow-GRPO, both 6.7e-4", guard_low, flow_low, after("gold", 100)),
        ("earlier: gold 100, Guard − Flow-GRPO, both 2e-3", guard_high, flow_high, after("gold", 100)),
        ("earlier: gold 100, Guard 6.7e-4 − Flow-GRPO 2e-3", guard_low, flow_high, after("gold", 100)),
        ("earlier: reward 20, w = s − Guard, 6.7e-4", runs_of("weights-snr"), short, after("reward", 20)),
    )


def tests_table():
    """Difference paired by seed, p of a two-sided t-test, and p by Holm's method over the family."""
    rows = []
    for family in tests():
        p_values = []
        for name, first, second, reading in family:
            seeds = sorted(first.keys() & second.keys())
            a, b = (np.array([reading(runs[seed]) for seed in seeds]) for runs in (first, second))
            p_values.append(ttest_rel(a, b).pvalue)
            rows.append([name, str(len(seeds)), mean_and_error(a - b, 3, "+"), f"{p_values[-1]:.3f}"])
        largest = 0.0
        for rank, i in enumerate(np.argsort(p_values)):
            largest = max(largest, min(1.0, (len(family) - rank) * p_values[i]))
            rows[i - len(family)].append(f"{largest:.3f}")
    return table(["planned comparison", "seeds", "difference", "p", "p, Holm"], rows)


def snr_table():
    """Squared ratios of signal to noise as shares of that of w = s. Measured: ± jackknife error."""
    names = {"flow-grpo": "Flow-GRPO", "rationorm": "RatioNorm", "guard": "Guard"}
    rows = []
    for row in read("snr"):
        if row["weights"] in names:
            columns = ("predicted", "with_noise", "share", "share_error")
            predicted, with_noise, share, error = (float(row[column]) for column in columns)
            sampler, _, model = row["run"].partition(",")[0].partition(" on ")
            seen = f"{share:.2f} ± {error:.2f}" if share > error else "none seen"
            about = [f"`{sampler}` on `{model}`", names[row["weights"]]]
            rows.append([*about, f"{predicted:.2f}", f"{with_noise:.2f}", seen])
    return table(["sampler", "weights", "predicted", "with the steps' noise", "measured"], rows)


def every_setting():
    """Whatever was run: the numbers of the page's list."""
    cells = {"updates": mean_of(end("update"), 0)}
    for column in ("reward", "geneval_strict", "gold"):
        cells |= {column: mean_of(end(column)), f"{column}, change": mean_of(change(column), 3, "+")}
    cells |= {"above / below": outside, "s an epoch": mean_of(end("epoch_seconds"), 0)}
    return summary(["setting"], {(setting,): setting for setting in sorted(load())}, cells)


# ------------------------------------------------------------------------------------------------------------
# Figures


def draw_long():
    """Cards of seed 22 before and after 100 updates at lr 2e-3; below, reward and gold of all seeds."""
    figure = plt.figure(figsize=(10, 6.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    names = [f"{method}\nclip {clip}" for method, _, clip in DRAWN]
    axes = upper.subplots(4, 1)
    cards = np.split(plt.imread(HERE / "results" / "cards.png"), 4)
    # Two were made once more for their pictures; Guard's came out a little different.
    pictured = ("pictures-flow-grpo-2e-3", "pictures-guard-2e-3", "long-flow-grpo-2e-3-1e-5")
    runs = [runs_of(setting)[22] for setting in pictured]
    rows = [("before training", "black", runs[0], 0)]
    rows += [(name, style["color"], run, -1)
             for name, style, run in zip(names, STYLES, runs, strict=True)]
    for axis, of_row, (name, colour, run, i) in zip(axes, cards, rows, strict=True):
        axis.imshow(of_row, interpolation="nearest", aspect="auto")
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, color=colour)
        scores = f"reward {run['reward'][i]:.2f}\ngold {run['gold'][i]:.2f}"
        axis.text(1.01, 0.5, scores, transform=axis.transAxes, va="center", fontsize=11, color=colour)
    axes[0].set_title("The same prompts and noise, before and after 100 updates on an OCR reward")
    axes = lower.subplots(1, 2)
    for name, setting, style in zip(names, DRAWN.values(), STYLES, strict=True):
        runs = list(runs_of(setting).values())
        for axis, column in zip(axes, ("reward", "gold"), strict=True):
            values = [run[column] for run in runs]
            axis.plot(runs[0]["update"], np.transpose(values), lw=0.6, alpha=0.5, **style)
            axis.plot(runs[0]["update"], np.mean(values, 0), lw=2.2, label=name.replace("\n", ", "), **style)
    axes[0].set(xlabel="updates", title="OCR reward, which is trained on")
    axes[1].set(xlabel="updates", title="gold, which is only watched")
    axes[1].legend(fontsize=9, loc="lower left")
    return figure


def draw_parts():
    """Gold lost against reward gained: a point an evaluation of every seed, a line their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharex=True, sharey=True)
    for axis, updates in zip(axes, ("two", "eight"), strict=True):
        for (_, *name), setting in parts(updates).items():
            runs = list(runs_of(setting).values())
            gained = np.array([gain(run) for run in runs])
            lost = np.array([run["gold"][0] - run["gold"] for run in runs])
            idle = np.mean([run["blocked"] for run in runs]) < 0.01
            place = list(PARTS).index(tuple(name)) / len(PARTS)
            colour = plt.cm.autumn(place) if idle else plt.cm.viridis(place)
            axis.plot(gained.ravel(), lost.ravel(), ".", ms=3, alpha=0.5, color=colour)
            label = ", ".join(name).replace("`", "").replace("none", "no clip")
            axis.plot(gained.mean(0), lost.mean(0), color=colour, lw=2, label=label)
        axis.set(xlabel="reward gained", title=f"{updates} updates an epoch")
        axis.legend(fontsize=8, loc="upper left")
    axes[0].set(ylabel="gold lost")
    return figure


def tables():
    return [
        parts_table(),
        tests_table(),
        curves(("method", "lr", "clip range"), LONG, 40, 100),
        paper_table(),
        snr_table(),
        curves(("method", "lr", "KL"), ABLATION, 20, 40),
    ]


def main(folder=HERE / "figures"):
    for draw in (draw_long, draw_parts):
        figure = draw()
        figure.savefig(folder / f"{draw.__name__.removeprefix('draw_')}.png", dpi=110)
        plt.close(figure)
    print(*tables(), every_setting(), sep="\n\n")


if __name__ == "__main__":
    main()
