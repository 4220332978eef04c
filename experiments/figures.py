"""The figures and the tables of experiments/README.md, from the files in experiments/results alone.

    python experiments/figures.py    # writes figures/{long,problem,snr}.png, prints the tables

The CSVs are written by run.py, snr.py and ratio.py. An error is a standard error over seeds unless said.
"""

import csv
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.stats import norm, ttest_rel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guard

HERE = Path(__file__).resolve().parent
LONG = {  # setting -> name, and line in the figure; the first four are drawn, in the order of cards.png
    "guard-6.7e-4": ("Guard, lr 6.7e-4", "tab:blue", "-"),
    "flow-grpo-2e-3": ("Flow-GRPO, lr 2e-3", "tab:red", "-"),
    "guard-2e-3": ("Guard, lr 2e-3", "tab:blue", ":"),
    "flow-grpo-6.7e-4": ("Flow-GRPO, lr 6.7e-4", "tab:red", ":"),
    "guard-6.7e-4-noclip": ("Guard, lr 6.7e-4, no clip", None, None),
    "flow-grpo-2e-3-noclip": ("Flow-GRPO, lr 2e-3, no clip", None, None),
    "guard-2e-3-noclip": ("Guard, lr 2e-3, no clip (added later)", None, None),
}
DRAWN, NO_CLIP = list(LONG)[:4], list(LONG)[4:]
SAMPLERS = ("flow on tiny/sd3", "cps on tiny/sd3", "flow on tiny/flux", "dance on tiny/flux")
PUSH = "guard, lr 0.00067, 2 updates an epoch, seed 21"
PARTS = ("colour", "frame", "pattern", "content")
TASKS = (("OCR", "ocr", "reward"), ("GenEval, partial", "geneval", "reward"),
         ("GenEval, strict", "geneval", "geneval_strict"), ("PickScore", "pickscore", "reward"))
DEFAULT = [(f"{name}, `tiny/{model}`", f"{task}-{model}", column)
           for name, task, column in TASKS for model in ("sd3", "flux")]
DANCE = [(f"{name}, {noise} noise", f"dance-{method}-{noise}", "reward")
         for name, method in (("Guard", "guard"), ("Flow-GRPO's weights", "flow-grpo"))
         for noise in ("shared", "own")]


def read(name):
    with open(HERE / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def runs_of(setting):
    """seed -> the evaluations of that run: update -> row of evals.csv."""
    runs = {}
    for row in read("evals"):
        if row["run"] == f"{setting}-s{row['seed']}":
            runs.setdefault(int(row["seed"]), {})[int(row["update"])] = row
    return runs


def column_of(run, column):
    return np.array([float(row[column]) for row in run.values()])


# ------------------------------------------------------------------------------------------------------------
# Tables, in Markdown


def table(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|-" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def mean_and_error(values, digits=3, sign=""):
    """Mean ± standard error; the value itself if there is one."""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
    return text


def curves_table(column, updates, *parts):
    """Reward and gold after some updates. parts: name -> setting; each at the seeds that all of it has."""
    rows = []
    for part in parts:
        for name, found in at_common_seeds(part).items():
            cells = [name, str(len(found))]
            for key in ("reward", "gold"):
                cells += [mean_and_error([float(run[k][key]) for run in found.values()]) for k in updates]
            rows.append(cells)
    return table([column, "seeds", *(f"{key} {k}" for key in ("reward", "gold") for k in updates)], rows)


def at_common_seeds(settings):
    """name -> seed -> run, of settings by name."""
    runs = {name: runs_of(setting) for name, setting in settings.items()}
    seeds = sorted(set.intersection(*(set(found) for found in runs.values())))
    return {name: {seed: found[seed] for seed in seeds} for name, found in runs.items()}


def long(*settings):
    """name -> setting, of long runs."""
    return {LONG[setting][0]: f"long-{setting}" for setting in settings}


def readme_table():
    """Some columns of `ranges`, for the first page."""
    columns, rows = ranges()
    columns, *rows = ([row[0], row[2], *row[4:6]] for row in (columns, *rows))
    return table(columns, rows)


def long_table():
    return curves_table("run", (20, 40, 100), long(*DRAWN))


def no_clip_table():
    pairs = [long(bare.removesuffix("-noclip"), bare) for bare in NO_CLIP]
    return curves_table("run", (20, 40, 100), *pairs)


def ablation_table():
    """Five methods at 6.7e-4."""
    ablated = {f"`{name}`": f"ablation-{name}" for name in ("temp-reweight", "mean-revised", "rationorm")}
    ends = {"Flow-GRPO": "long-flow-grpo-6.7e-4"}, {"Guard": "long-guard-6.7e-4"}
    return curves_table("method", (10, 20, 40), ends[0] | ablated | ends[1])


def shift_table():
    """Flow-GRPO with and without its shift, and Guard, where the clip acts."""
    settings = {"Flow-GRPO": "long-flow-grpo-2e-3", "`mean-revised`": "shift-mean-revised-2e-3"}
    return curves_table("method", (10, 20, 40), settings | {"Guard": "long-guard-2e-3"})


def kl_table():
    with_kl = {f"{LONG[setting][0]}, KL": f"kl-{setting}" for setting in DRAWN[:2]}
    return curves_table("run", (10, 20, 40), long(*DRAWN[:2]) | with_kl)


def paper_table():
    """The paper's Table 1 at this scale: changes by update 40, and those of gold at equal gain, per seed."""
    rows = []
    for task, name in (("ocr", "OCR"), ("geneval", "GenEval"), ("pickscore", "PickScore")):
        for model, baseline in (("sd3", "Flow-GRPO"), ("flux", "DanceGRPO")):
            settings = {method: f"table-{task}-{model}-{method}" for method in ("flow-grpo", "guard")}
            if (task, model) == ("ocr", "sd3"):
                settings = {"flow-grpo": "long-flow-grpo-2e-3", "guard": "long-guard-6.7e-4"}
            without, guarded = at_common_seeds(settings).values()
            changes = [changes_at_equal_gain(without[seed], guarded[seed]) for seed in without]
            cells = [mean_and_error(values, sign="+") for values in np.array(changes).T]
            rows.append([f"{name}, `tiny/{model}`, {baseline}", str(len(changes)), *cells])
    readings = ("gain", "gold", "gold at equal gain")
    columns = [f"{reading}, {run}" for reading in readings for run in ("without", "Guard")]
    return table(["run", "seeds", *columns], rows)


def changes_at_equal_gain(*runs, last=40):
    """Per run: the gain by update `last`, gold's change, and that at the smaller of the largest gains."""
    curves = []
    for run in runs:
        update, reward, gold = (column_of(run, column) for column in ("update", "reward", "gold"))
        curves.append([(values - values[0])[update <= last] for values in (reward, gold)])
    equal = min(gain.max() for gain, _ in curves)
    gains, changes = ([curve[i][-1] for curve in curves] for i in (0, 1))
    return *gains, *changes, *(at(equal, *curve) for curve in curves)


RANGES = {  # at one rate, 2e-3, and two updates an epoch
    "Flow-GRPO, clip 1e-4": "two-flow-grpo-1e-4",
    "Flow-GRPO, clip 1e-5": "two-flow-grpo-1e-5",
    "Guard, clip 2e-6": "two-guard",
}


def ranges():
    """Columns and rows of method and clip range: speed, gold at one gain and at the end, shares outside."""
    rows = []
    for name, runs in at_common_seeds(RANGES).items():
        curves = [[column_of(run, key) for key in ("update", "reward", "gold")] for run in runs.values()]
        speed = [at(0.3, reward - reward[0], update) for update, reward, _ in curves]
        then = [at(0.3, reward - reward[0], gold) for _, reward, gold in curves]
        ends = [[curve[i][-1] for curve in curves] for i in (1, 2)]
        names = {f"{RANGES[name]}-s{seed}" for seed in runs}
        steps = [row for row in read("updates") if row["run"] in names]
        shares = [statistics.mean(float(row[side]) for row in steps) for side in ("clip_high", "clip_low")]
        cells = [mean_and_error(speed, 1), *(mean_and_error(values) for values in (then, *ends))]
        rows.append([name, str(len(runs)), *cells, *(f"{share:.1%}" for share in shares)])
    columns = ["run, lr 2e-3", "seeds", "updates to a gain of 0.3", "gold then"]
    return [*columns, "reward 40", "gold 40", "above the range", "below"], rows


def ranges_tests():
    """The two planned comparisons of these runs: difference paired by seed, and p before any correction."""
    wide, narrow, guard = ({seed: float(run[40]["gold"]) for seed, run in runs.items()}
                           for runs in at_common_seeds(RANGES).values())
    rows = []
    for name, first in (("Guard", guard), ("Flow-GRPO at 1e-5", narrow)):
        a, b = (np.array([runs[seed] for seed in wide]) for runs in (first, wide))
        p = f"{ttest_rel(a, b).pvalue:.3f}"
        rows.append([f"{name} less Flow-GRPO at 1e-4", str(len(a)), mean_and_error(a - b, 3, "+"), p])
    return table(["gold 40", "seeds", "difference", "p, uncorrected"], rows)


def tests_table():
    """The planned comparisons: difference paired by seed, p of a t-test, and p by Holm's method."""
    guard, flow = ({lr: runs_of(f"long-{method}-{lr}") for lr in ("6.7e-4", "2e-3")}
                   for method in ("guard", "flow-grpo"))
    short = guard["6.7e-4"] | runs_of("weights-guard")  # the long runs begin with the same 20 updates
    pairs = [
        ("gold 100, Guard less Flow-GRPO, both 6.7e-4", guard["6.7e-4"], flow["6.7e-4"], "gold", 100),
        ("gold 100, Guard less Flow-GRPO, both 2e-3", guard["2e-3"], flow["2e-3"], "gold", 100),
        ("gold 100, Guard 6.7e-4 less Flow-GRPO 2e-3", guard["6.7e-4"], flow["2e-3"], "gold", 100),
        ("reward 20, `snr` less Guard, both 6.7e-4", runs_of("weights-snr"), short, "reward", 20),
    ]
    rows, p_values = [], []
    for name, first, second, column, k in pairs:
        seeds = sorted(first.keys() & second.keys())
        a, b = (np.array([float(runs[seed][k][column]) for seed in seeds]) for runs in (first, second))
        p_values.append(float(ttest_rel(a, b).pvalue))
        rows.append([name, str(len(seeds)), mean_and_error(a - b, 4, "+"), f"{p_values[-1]:.3f}"])
    largest = 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(pairs) - rank) * p_values[i]))
        rows[i].append(f"{largest:.3f}")
    return table(["planned comparison", "seeds", "difference", "p", "p, Holm"], rows)


def snr_table():
    """Signal-to-noise ratios as shares of that of w = s: predicted, and measured ± jackknife error."""
    methods = ("flow-grpo", "rationorm", "guard")
    rows = []
    for sampler in SAMPLERS:
        found = {row["weights"]: row for row in read("snr") if row["run"] == f"{sampler}, seed 21"}
        cells = []
        for name in methods:
            predicted = float(found[name]["predicted"]) / float(found["snr"]["predicted"])
            share, error = (float(found[name][key]) for key in ("share", "share_error"))
            cells += [f"{predicted:.2f}", f"{share:.2f} ± {error:.2f}"]
        rows.append(["`{}` on `{}`".format(*sampler.split(" on ")), *cells])
    names = {"flow-grpo": "Flow-GRPO", "rationorm": "RatioNorm", "guard": "Guard"}
    columns = [f"{names[name]}, {how}" for name in methods for how in ("predicted", "measured")]
    return table(["sampler", *columns], rows)


def clip_table():
    """What a clip range does: second updates of one run, and how far runs with that range came."""
    runs = {2e-7: "clip-2.56e-5", 5.4687e-7: "clip-7e-5"}  # named by their ranges at D = 512
    runs |= {2e-6: "long-guard-6.7e-4", 1e9: "long-guard-6.7e-4-noclip"}
    rows = []
    for row in read("push"):
        clip = float(row["clip"])
        if row["run"] == PUSH and clip in runs:
            run = runs_of(runs[clip])[21]
            update, reward, gold = (column_of(run, column) for column in ("update", "reward", "gold"))
            gain, change = reward - reward[0], gold - gold[0]
            cells = ["none" if clip > 1 else f"{clip:.2g}".replace("e-0", "e-")]
            cells += [f"{float(row['outside']):.0%}", f"{float(row['along']):+.2f}"]
            cells += [f"{at(0.2, gain, update):.1f}", f"{at(0.2, gain, change):+.4f}"]
            rows.append([*cells, f"{at(40, update, gain):+.3f}", f"{at(40, update, change):+.4f}"])
    readings = ["updates to a gain of 0.2", "gold then", "gain at 40", "gold then"]
    return table(["clip", "outside", "push along", *readings], rows)


def sides_table():
    """Shares of the samples above and below the clip range in second updates of the long runs."""
    rows = []
    for setting in DRAWN:
        found = [row for row in read("updates") if row["run"].startswith(f"long-{setting}-s")]
        last = max(int(row["step"]) for row in found)
        cells = [LONG[setting][0]]
        for steps in ([row for row in found if int(row["step"]) == last], found):
            for side in ("clip_high", "clip_low"):
                cells.append(f"{statistics.mean(float(row[side]) for row in steps):.1%}")
        rows.append(cells)
    return table(["run", "last step, above", "below", "all steps, above", "below"], rows)


def at(level, x, y):
    """y where x first reaches a level, by a straight line between two evaluations; nan if it never does."""
    reached = np.flatnonzero(x >= level)
    if not len(reached):
        return np.nan
    i = reached[0]
    return y[i] if x[i] == level else y[i - 1] + (level - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])


def before_and_after(runs, column):
    """Two cells, the means over runs before and after, and one, the mean change ± its standard error."""
    before, after = (np.array([column_of(run, column)[i] for run in runs.values()]) for i in (0, -1))
    return [f"{before.mean():.3f}", f"{after.mean():.3f}", mean_and_error(after - before, sign="+")]


def before_and_after_table(settings):
    """A row for each (name, setting, column of evals.csv) and what became of gold."""
    columns = ["run", "seeds", "before", "after", "gain", "gold before", "after", "change"]
    rows = []
    for name, setting, column in settings:
        runs = runs_of(setting)
        rows.append([name, str(len(runs)), *before_and_after(runs, column), *before_and_after(runs, "gold")])
    return table(columns, rows)


def parts_table():
    """The mean change of each part of gold in the default runs."""
    rows = []
    for name, setting, column in DEFAULT:
        if column == "reward":
            changes = [before_and_after(runs_of(setting), part)[2].split(" ")[0] for part in PARTS]
            rows.append([name, *changes])
    return table(["run", *PARTS], rows)


# ------------------------------------------------------------------------------------------------------------
# Figures


def draw_long():
    """Cards after 100 updates; below, reward and gold, a thin line a seed and a thick one their mean."""
    figure = plt.figure(figsize=(10, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    rows = plt.imread(HERE / "results" / "cards.png")
    names = ["before training", *(LONG[setting][0].replace(", ", "\n") for setting in DRAWN)]
    colours = ["black", *(LONG[setting][1] for setting in DRAWN)]
    axes = upper.subplots(5, 1)
    for axis, name, colour, row in zip(axes, names, colours, np.split(rows, 5), strict=True):
        axis.imshow(row, interpolation="nearest", aspect="auto")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, color=colour)
        axis.set(xticks=[], yticks=[], frame_on=False)
    title = "The same prompts and noise, before and after 100 updates on an OCR reward"
    axes[0].set_title(title, fontsize=12)
    axes = lower.subplots(1, 3)
    for setting in DRAWN:
        name, colour, line = LONG[setting]
        runs = list(runs_of(f"long-{setting}").values())
        curves = [[column_of(run, column) for column in ("update", "reward", "gold")] for run in runs]
        for i, (update, reward, gold) in enumerate([*curves, np.mean(curves, axis=0)]):
            style = dict(lw=2.2, label=name) if i == len(curves) else dict(lw=0.6, alpha=0.5)
            for axis, (x, y) in zip(axes, ((update, reward), (update, gold), (reward, gold)), strict=True):
                axis.plot(x, y, color=colour, ls=line, **style)
    axes[0].set(xlabel="updates", title="OCR reward, which is trained on")
    axes[1].set(xlabel="updates", title="gold, which is only watched")
    axes[2].set(xlabel="reward", title="gold against reward")
    axes[1].legend(fontsize=8, loc="lower left")
    return figure


def draw_problem():
    """Exact densities of the log ratio at SD3.5's size, a row a step, if v moves alike at all steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    steps = guard.make_schedule(scheduler.sigmas.tolist(), 0.7, "flow")[:-1]
    b, s = (np.array([getattr(step, name) for step in steps]) for name in "bs")
    kl = 12 * (b / s) ** 2 / (b[-1] / s[-1]) ** 2  # nats
    noise = np.sqrt(2 * kl) / guard.PAPER_D
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    panels = (("Flow-GRPO, clip 1e-4", 1e-4, -kl / guard.PAPER_D, noise, 5),
              ("GRPO-Guard, clip 2e-6", 2e-6, np.zeros(9), s * noise, 40))  # fmt: skip
    for axis, (title, clip, centre, deviation, widest) in zip(axes, panels, strict=True):
        axis.axvspan(-1, 1, color="0.85", lw=0)
        x = np.linspace(-widest, widest, 4001)
        for i, of_step in enumerate(norm(mean, std) for mean, std in zip(centre, deviation, strict=True)):
            density = of_step.pdf(x * clip) / of_step.pdf(of_step.mean())
            axis.fill_between(x, i, i + 0.85 * density, color=plt.cm.viridis(i / 9), lw=0)
            shares = ((-widest, "left", of_step.cdf(-clip)), (widest, "right", of_step.sf(clip)))
            for place, side, share in shares:
                axis.text(place, i + 0.1, f" {share:.0%} ", ha=side, fontsize=8)
        axis.set(title=title, xlim=(-widest, widest), xlabel="log ratio / clip range")
    axes[0].set(ylabel="denoising step, noisiest first", yticks=range(9), yticklabels=range(1, 10))
    return figure


def draw_snr():
    """Each step's signal-to-noise ratio, measured, and a line proportional to s."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
    for axis, sampler in zip(axes, SAMPLERS, strict=True):
        rows = [row for row in read("snr") if row["run"] == f"{sampler}, seed 21"]
        rows = [row for row in rows if row["weights"].isdigit()]
        columns = ("predicted", "measured", "error")
        s, measured, error = (np.array([float(row[key]) for row in rows]) for key in columns)
        axis.errorbar(range(len(rows)), measured, error, fmt="o", ms=4, color="tab:blue", label="measured")
        scale = (s * measured / error**2).sum() / (s**2 / error**2).sum()
        axis.plot(scale * s, "k-", lw=1, label="proportional to s")
        axis.axhline(0, color="gray", lw=0.6)
        axis.set(title=sampler, xlabel="denoising step")
    axes[0].set_ylabel("signal-to-noise ratio of a group")
    axes[0].legend(fontsize=8)
    return figure


def tables():
    return [
        table(*ranges()), ranges_tests(), long_table(), snr_table(), clip_table(), no_clip_table(),
        sides_table(), shift_table(), tests_table(), ablation_table(), kl_table(), paper_table(),
        before_and_after_table(DEFAULT), parts_table(), before_and_after_table(DANCE),
    ]  # fmt: skip


def main(folder=HERE / "figures"):
    for draw, dpi in ((draw_long, 110), (draw_problem, 110), (draw_snr, 120)):
        figure = draw()
        figure.savefig(folder / f"{draw.__name__.removeprefix('draw_')}.png", dpi=dpi)
        plt.close(figure)
    print(*tables(), sep="\n\n")


if __name__ == "__main__":
    main()
