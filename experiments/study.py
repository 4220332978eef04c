"""The study's tables: what a run loses in gold by the time it has gained so much in reward, and paired tests.

    python experiments/study.py                # prints them all, from the CSVs in git alone

A run's *gain* is its reward less that of its own first evaluation, on the same held-out prompts and noise. A
table has no row for what has not been run. LOG.md has the plan, which was fixed before the runs.
"""

import statistics
import sys
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import rewards  # noqa: E402
from experiments.run import BASELINE, GUARD, RESULTS, SEEDS, TABLE, read  # noqa: E402
from experiments.tables import about, columns, runs_of, table  # noqa: E402
from settings.command_line import TINY  # noqa: E402
from tiny import cards  # noqa: E402

D, IMAGES = 512, 128  # dimensions of a latent of the tiny models; pictures an epoch
FRONTIER_LEVELS, LEVELS, LEVEL = (0.075, 0.15), (0.125, 0.225), 0.15  # gains at which gold is read off
SIDE_GAIN, TIE = 0.2, 0.005  # of win, tie and lose; the pictures are of the evaluations nearest to it
FALL = 0.01  # of gold: a run that is over-optimized
PRINTED = "rationorm, (1 + eta²/2) / dt"  # DanceGRPO's weight in notes of others
TAU = {"a tenth": 0.1, "a third": 1 / 3}


# ------------------------------------------------------------------------------------------------------------
# Reading


def curve(folder):
    """(update, gain in reward, change in gold) at every evaluation of a run, three arrays."""
    evals = columns(folder / "evals.csv")
    return evals["update"], evals["proxy"] - evals["proxy"][0], evals["cards"] - evals["cards"][0]


def distance(folder):
    """The root of KL to the base, of the stochastic trajectory, at every evaluation."""
    return np.sqrt(D * columns(folder / "evals.csv")["kl_to_base"])


def at(level, x, *ys):
    """What each of ys is where x first reaches a level, between two evaluations by a straight line.

    x: a number an evaluation; ys: the same, or arrays. None if x never reaches it.
    """
    reached = np.flatnonzero(x >= level)
    if not len(reached):
        return None
    i = reached[0]
    part = (level - x[i - 1]) / (x[i] - x[i - 1])
    return tuple(y[i - 1] + part * (y[i] - y[i - 1]) for y in ys)


def at_gain(folder, level):
    """(updates, gold lost) where the gain first reaches a level; None if it never does."""
    updates, gain, gold = curve(folder)
    return at(level, gain, updates, -gold)


def readings(folders, level):
    """at_gain of the runs that reach it."""
    return [reading for folder in folders if (reading := at_gain(folder, level))]


def losses(label, level):
    """Seed -> gold lost at a gain, of the runs that reach it."""
    found = {seed: at_gain(folder, level) for seed, folder in runs_of(label).items()}
    return {seed: reading[1] for seed, reading in found.items() if reading}


def without_extra_seeds(label):
    """Folders of a label's runs, without the two seeds that only the main comparison has."""
    return [folder for seed, folder in runs_of(label).items() if seed not in SEEDS["main"][3:]]


def grid_runs(method, lr=None):
    """Folders of a method's runs of the grid, at one learning rate or at all."""
    start = method if lr is None else f"{method}-lr{lr:g}-"
    labels = [label for label in TABLE["frontier"] if label.startswith(start)]
    return [folder for label in labels for folder in runs_of(label).values()]


def mean_and_error(values, digits=4):
    """Mean ± standard error; empty for no value, the value itself for one."""
    values = list(values)
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def mean_of(values, digits=4):
    """The same and how many there are."""
    values = list(values)
    return mean_and_error(values, digits) + (f" ({len(values)})" if len(values) > 1 else "")


def later_updates(*folders):
    """Columns of updates.csv, a row a step, of the updates where the ratio is not 1; {} of no folder."""
    found = [columns(folder / "updates.csv", lambda row: row["first"] == "False") for folder in folders]
    return {name: np.concatenate([run[name] for run in found]) for name in (found[0] if found else ())}


def clipped(folder):
    """Shares of samples outside the clip range and of blocked ones, over steps and later updates."""
    steps = later_updates(folder)
    return (steps["clip_high"] + steps["clip_low"]).mean(), steps["blocked"].mean()


# ------------------------------------------------------------------------------------------------------------
# 1 and 3. The frontier and the main comparison

MAIN = ("main-guard", "main-flow-grpo", "main-flow-grpo-3lr")
NAMES = {
    "main-guard": "Guard, lr 6.7e-4",
    "main-flow-grpo": "Flow-GRPO, lr 6.7e-4",
    "main-guard-3lr": "Guard, lr 2e-3",
    "main-flow-grpo-3lr": "Flow-GRPO, lr 2e-3",
    "best-guard": "Guard, lr 2.2e-4, clip 7e-5",
    "best-flow-grpo": "Flow-GRPO, lr 6.7e-4, clip 2.2e-4",
}
COMPARISONS = [  # planned: the same rate, the paper's pairing of rates, best against best; then added: 2e-3
    ("main-guard", "main-flow-grpo"), ("main-guard", "main-flow-grpo-3lr"),
    ("best-guard", "best-flow-grpo"), ("main-guard-3lr", "main-flow-grpo-3lr")]


def table_of_frontier():
    """A run a setting: what is clipped, where it ends, what it has lost at two gains."""
    rows = []
    for label in TABLE["frontier"]:
        for folder in runs_of(label).values():
            settings, (_, gain, gold) = about(folder)["settings"], curve(folder)
            lost = [losses(label, level).values() for level in FRONTIER_LEVELS]
            rows.append([
                f"`{settings['method']}`", f"{settings['lr']:g}", f"{settings['clip']:g}",
                *(f"{share:.0%}" for share in clipped(folder)), f"{gain[-1]:+.3f}", f"{gold[-1]:+.4f}",
                *(mean_of(values) for values in lost)])
    lost = [f"gold lost at +{level:g}" for level in FRONTIER_LEVELS]
    header = ["method", "lr", "clip", "outside", "blocked", "gain after 20 updates", "gold", *lost]
    return table(header, sorted(rows, key=lambda row: (row[0], float(row[1]), float(row[2]))))


def best_settings():
    """Method -> label of its best setting: the smallest mean loss at both levels of the frontier."""
    best = {}
    for label in TABLE["frontier"]:
        for folder in runs_of(label).values():
            lost = [at_gain(folder, level) for level in FRONTIER_LEVELS]
            if all(lost):
                method = about(folder)["settings"]["method"]
                best.setdefault(method, []).append((sum(loss for _, loss in lost) / 2, label))
    return {method: min(found)[1] for method, found in best.items()}


def summary(labels, levels, folders_of=lambda label: list(runs_of(label).values())):
    """Rows of runs, their ends and the gold lost at gains, means over seeds ± standard error (seeds)."""
    rows = []
    for label in labels:
        folders = folders_of(label)
        if folders:
            ends = [curve(folder) for folder in folders]
            lost = [mean_of(reading[1] for reading in readings(folders, level)) for level in levels]
            blocked = statistics.mean(clipped(folder)[1] for folder in folders)
            rows.append([
                NAMES.get(label, f"`{label}`"), str(len(folders)), f"{ends[0][0][-1]:.0f}", f"{blocked:.0%}",
                f"{statistics.mean(gain[-1] for _, gain, _ in ends):+.3f}",
                f"{statistics.mean(gold[-1] for _, _, gold in ends):+.4f}", *lost])
    header = ["run", "seeds", "updates", "blocked", "gain", "gold", *(f"gold lost at +{x:g}" for x in levels)]
    return table(header, rows)


def table_of_main():
    return summary(NAMES, LEVELS)


def readme_table():
    """The main README's: of table_of_main what is needed to answer."""
    rows = [[name, mean_and_error(losses(label, LEVELS[1]).values())] for label, name in NAMES.items()]
    return table(["run", f"gold lost at +{LEVELS[1]:g}"], rows)


def pairs(a, b, level):
    """Gold lost by a less that lost by b at a gain, a number a seed, and p of the paired t-test."""
    one, other = losses(a, level), losses(b, level)
    seeds = sorted(one.keys() & other.keys())
    both = [one[seed] for seed in seeds], [other[seed] for seed in seeds]
    p = ttest_rel(*both).pvalue if len(seeds) > 2 else float("nan")
    return [x - y for x, y in zip(*both, strict=True)], p


def table_of_pairs():
    """The planned comparisons: negative numbers mean that Guard has lost less."""
    rows = []
    for a, b in COMPARISONS:
        for level in LEVELS:
            differences, p = pairs(a, b, level)
            if differences:
                count = sum(d < 0 for d in differences)
                rows.append([f"{NAMES[a]} less {NAMES[b]}", f"+{level:g}", mean_of(differences),
                             f"{count} of {len(differences)}", "" if np.isnan(p) else f"{p:.3f}"])
    return table(["gold lost by", "at a gain of", "difference", "Guard lost less", "p"], rows)


# ------------------------------------------------------------------------------------------------------------
# 4, 5 and 9. Variants, tasks, cost


def table_of_ablation():
    """What helps: the methods, beside the main runs of the same seeds; no clip; the left shift alone."""
    labels = [*MAIN[:2], *TABLE["ablation"], *TABLE["noclip"], *TABLE["shift"]]
    # 0.1 is not planned: RatioNorm alone gains little more
    return summary(labels, [0.1, LEVEL], without_extra_seeds)


def table_of_variants():
    """KL and CPS on tiny-sd3, DanceGRPO on tiny-flux, each with and without Guard."""
    return summary([*TABLE["kl"], *TABLE["cps"], *TABLE["dance"]], [0.05, 0.1, LEVEL])


def seconds_of_epoch(label):
    """Alone on the machine; None if that was not run. The runs themselves ran beside each other."""
    label = label.removesuffix("-3lr")  # the rate takes no time
    alone = [about(folder)["epoch_seconds"] for folder in runs_of(f"time-{label}").values()]
    return statistics.mean(alone) if alone else None


def table_of_cost():
    """Images and seconds to a gain, and the gold lost there; means over the runs that reach it."""
    rows = []
    for label in ("main-guard", "window-3", "steps-6", "main-guard-3lr", "window-3-3lr"):
        folders, epoch = without_extra_seeds(label), seconds_of_epoch(label)
        if not folders or not epoch:
            continue
        row = [NAMES.get(label, f"`{label}`"), str(len(folders)), f"{epoch:.1f}"]
        for level in LEVELS:
            found = readings(folders, level)
            epochs = [updates / 2 for updates, _ in found]
            row += [mean_of((n * IMAGES for n in epochs), 0), mean_of((n * epoch for n in epochs), 0),
                    mean_of(lost for _, lost in found)]
        rows.append(row)
    to = [f"{what} at +{level:g}" for level in LEVELS for what in ("images", "seconds", "gold lost")]
    return table(["run", "seeds", "seconds an epoch", *to], rows)


# Task, backbone -> labels without and with Guard.
TASK_RUNS = {
    ("ocr", "tiny-sd3, Flow-GRPO"): ("main-flow-grpo", "main-guard"),
    ("geneval", "tiny-sd3, Flow-GRPO"): ("geneval-flow-grpo", "geneval-tiny-sd3"),
    ("pickscore", "tiny-sd3, Flow-GRPO"): ("pickscore-flow-grpo", "pickscore-tiny-sd3"),
    ("ocr", "tiny-flux, DanceGRPO"): ("dance-flow-grpo", "dance-guard"),
    ("geneval", "tiny-flux, DanceGRPO"): ("geneval-dance-flow-grpo", "geneval-dance-guard"),
    ("pickscore", "tiny-flux, DanceGRPO"): ("pickscore-dance-flow-grpo", "pickscore-dance-guard"),
}


def table_of_tasks():
    """The layout of the paper's Table 1: after 20 updates and at equal gain, without and with Guard."""
    rows = []
    for (task, backbone), labels in TASK_RUNS.items():
        row, lost = [f"`{task}`", backbone], []
        for label in labels:
            folders = without_extra_seeds(label)
            # 20 updates: the main runs have more, and an evaluation after 18 and 24.
            ends = [[np.interp(20, curve(f)[0], values) for values in curve(f)[1:]] for f in folders]
            row += [mean_of([end[k] for end in ends]) for k in (0, 1)]
            lost.append(mean_of(reading[1] for reading in readings(folders, LEVEL)))
        rows.append(row + lost)
    both = [f"gold lost at +{LEVEL} {how}" for how in ("without", "with")]
    header = ["task", "model, baseline", "gain without Guard", "gold", "gain with Guard", "gold", *both]
    return table(header, rows)


# ------------------------------------------------------------------------------------------------------------
# 6. The ratio and the gradient, by step


STEPS = ["step", "Flow-GRPO: mean", "foretold", "spread", "above", "below",
         "Guard: mean", "spread", "above", "below"]


def foretold(spread, D=D):
    """E[ratio] - 1 of Flow-GRPO = exp(-KL/D + KL/D²) - 1, from the standard deviation of the ratio.

    If the change of velocity does not depend on the noise, the variance of the log-ratio is 2 KL / D², with
    KL that of the step.
    """
    kl = D**2 * spread**2 / 2
    return np.expm1(-kl / D + kl / D**2)


def by_step(label):
    """A dict a step, of second updates, means over them and over seeds: rho, its spread, what is outside."""
    updates = later_updates(*runs_of(label).values())
    if not updates:
        return []
    updates["foretold"] = foretold(updates["ratio_std"])
    return [{name: x[updates["step"] == t].mean() for name, x in updates.items()} for t in range(9)]


def table_of_steps():
    """Of the main runs at 6.7e-4."""
    rows = []
    for t, (baseline, guarded) in enumerate(zip(by_step(MAIN[1]), by_step(MAIN[0]), strict=False)):
        sides = [
            [f"{side['ratio_std']:.1e}", *(f"{side[name]:.1%}" for name in ("clip_high", "clip_low"))]
            for side in (baseline, guarded)]
        means = [f"{mean:.1e}" for mean in (baseline["ratio_mean"], baseline["foretold"])]
        rows.append([str(t), *means, *sides[0], f"{guarded['ratio_mean']:.1e}", *sides[1]])
    return table(STEPS, rows)


def gradients():
    """gradients.csv: (sampler, method) -> norms of the gradient, (seeds, steps)."""
    path, norms = RESULTS / "gradients.csv", {}
    data = read(path) if path.exists() else []
    for row in data:
        norms.setdefault((row["sde"], row["method"]), []).append(float(row["grad_norm"]))
    seeds = len({row["seed"] for row in data})
    return {name: np.reshape(values, (seeds, -1)) for name, values in norms.items()}


def unevenness(norms):
    """(seeds, steps) -> a number a seed: the largest norm over the smallest."""
    return norms.max(1) / norms.min(1)


def table_of_gradients():
    """By sampler and method, over the steps."""
    found = {name: mean_of(unevenness(norms), 1) for name, norms in gradients().items()}
    rows = [[f"`{sde}`", method, ratio] for (sde, method), ratio in found.items()]
    return table(["sampler", "method", "largest / smallest gradient"], rows)


# ------------------------------------------------------------------------------------------------------------
# 2, 7 and 8. Best of n, side by side, a second reader, looks


def table_of_best_of_n():
    rows = read(RESULTS / "best_of_n.csv")
    base = rows[0]
    return table(["n", "KL", "reward", "gain", "gold", "change"], [
        [row["n"], row["kl"], row["proxy"], f"{float(row['proxy']) - float(base['proxy']):+.3f}",
         row["gold"], f"{float(row['gold']) - float(base['gold']):+.4f}"] for row in rows])


def nearest(folder, gain=SIDE_GAIN):
    """(update, gain) of the evaluation nearest to a gain."""
    updates, gains, _ = curve(folder)
    i = abs(gains - gain).argmin()
    return int(updates[i]), float(gains[i])


def gold_of_prompts(folder, gain=SIDE_GAIN):
    """Gold of every held-out prompt where a run first reaches a gain, as in at_gain."""
    _, gains, _ = curve(folder)
    gold = columns(folder / "scores.csv")["cards"].reshape(len(gains), -1)  # (evaluations, prompts)
    return at(gain, gains, gold)[0]


def words_unseen():
    """Of the held-out prompts in their order: whether no training prompt has its word."""
    _, held_out = rewards.read_set(rewards.PROMPTS / "cards")
    words = [rewards.quoted_text(prompt) for prompt, _ in held_out[: TINY["eval_prompts"]]]
    return np.array([word in cards.UNSEEN_WORDS for word in words])


def table_of_sides():
    """Prompt by prompt, gold of Guard against Flow-GRPO at equal gain, all seeds together."""
    rows, unseen = [], words_unseen()
    for other in MAIN[1:]:
        guarded, baseline = runs_of(MAIN[0]), runs_of(other)
        seeds = sorted(guarded.keys() & baseline.keys())
        more = [gold_of_prompts(guarded[seed]) - gold_of_prompts(baseline[seed]) for seed in seeds]
        for words, which in (("seen", ~unseen), ("unseen", unseen)):
            difference = np.concatenate([of_seed[which] for of_seed in more])
            shares = (difference > TIE).mean(), (abs(difference) <= TIE).mean(), (difference < -TIE).mean()
            rows.append([NAMES[other], words, f"{len(seeds)} x {which.sum()}",
                         *(f"{share:.0%}" for share in shares), f"{difference.mean():+.4f}"])
    header = ["Guard against", "words", "seeds x prompts", "win", "tie", "lose", "gold, Guard less the other"]
    return table(header, rows)


def table_of_readers():
    """readers.csv: the reward as two engines see it, on words that were trained on and on others."""
    path, rows = RESULTS / "readers.csv", []
    data = read(path) if path.exists() else []
    for label in dict.fromkeys(row["run"] for row in data):
        of_it = [row for row in data if row["run"] == label]
        cells = []
        for name in ("rapidocr, seen", "rapidocr, unseen", "ddddocr, seen", "ddddocr, unseen"):
            cells.append(mean_of((float(row[name]) for row in of_it), 3))
        rows.append([NAMES.get(label, label), *cells])
    return table(["pictures of", "RapidOCR, seen words", "unseen", "ddddocr, seen words", "unseen"], rows)


def first_evaluation(values):
    """Place of the first true one; None if there is none."""
    found = np.flatnonzero(values)
    return int(found[0]) if len(found) else None


VERDICTS = ("before", "with", "after", "never", "false", "quiet")


def verdicts():
    """(number of `looks`, threshold) -> verdict -> runs on tiny-sd3."""
    counts = {(name, said): dict.fromkeys(VERDICTS, 0) for name in rewards.LOOKS for said in TAU}
    groups = TABLE.keys() - {"default", "ratio", "time", "dance", "pickscore", "geneval"}
    folders = [folder for group in groups for label in TABLE[group] for folder in runs_of(label).values()]
    for folder in folders:
        evals = columns(folder / "evals.csv")
        fell = first_evaluation(evals["cards"] - evals["cards"][0] <= -FALL)
        for name, said in counts:
            moved = abs(evals[name] - evals[name][0]) > TAU[said] * max(evals[name][0], 0.01)
            counts[name, said][verdict(first_evaluation(moved), fell)] += 1
    return counts


def table_of_looks():
    """When a number warns in runs on tiny-sd3 where gold falls by 0.01; whether it does in the others."""
    rows = []
    for (name, said), counts in verdicts().items():
        if counts["never"] + counts["quiet"] < sum(counts.values()):  # else it never warned
            rows.append([f"`{name}`", said, *map(str, counts.values())])
    return table(["number", "threshold", "warns before", "at the same evaluation", "later", "never",
                  "warns without a fall", "quiet without a fall"], rows)


def verdict(warned, fell):
    """warned, fell: the evaluation of each, or None."""
    if fell is None:
        return "quiet" if warned is None else "false"
    if warned is None:
        return "never"
    return "before" if warned < fell else "with" if warned == fell else "after"


# ------------------------------------------------------------------------------------------------------------
# In words


def less(a, b, level):
    """Such as `0.0014 ± 0.0002`: how much less gold a has lost than b, at a gain."""
    return mean_and_error(-d for d in pairs(a, b, level)[0])


def chance(a, b, level):
    return f"{pairs(a, b, level)[1]:.3f}"


def versus(a, b, level):
    """Such as `0.0014 ± 0.0002 less (3 seeds, p = 0.030)`: gold lost by a against b, at a gain."""
    found, _ = pairs(a, b, level)
    which = "less" if statistics.mean(found) < 0 else "more"
    size = less(a, b, level).removeprefix("-")
    return f"{size} {which} ({len(found)} seeds, p = {chance(a, b, level)})"


def less_gold_lost(level):
    """Guard against Flow-GRPO, the four comparisons."""
    same, pairing, best, high = (
        f"{less(*pair, level)} (p = {chance(*pair, level)})" for pair in COMPARISONS)
    return (f"At a gain of {level} GRPO-Guard had lost less gold than Flow-GRPO: {same} at the same learning "
            f"rate, 6.7e-4, and {high} at 2e-3. It was {pairing} at the paper's pairing, three times the "
            f"rate for Flow-GRPO, and {best} best setting against best; "
            f"{len(losses(MAIN[0], level))} seeds each")


def without_clip():
    """Guard against Flow-GRPO with a clip range that nothing reaches, and with the presets'."""
    without, with_it = (
        versus(f"{kind}-guard", f"{kind}-flow-grpo", LEVEL) for kind in ("noclip", "main"))
    return (f"Without any clip Guard at 6.7e-4 lost {without} than Flow-GRPO at a gain of {LEVEL}; with the "
            f"presets' clip ranges {with_it}")


def shift_alone():
    """mean-revised against Flow-GRPO, where the clip acts."""
    return ("Where the clip acts (lr 2e-3, clip 2.2e-4), removing the left shift alone lost "
            f"{versus('shift-mean-revised', 'shift-flow-grpo', LEVEL)}")


def shift_by_side():
    """What is outside the clip range there at the last step, means over seeds."""
    shares = [by_step(label)[-1][name] for label in TABLE["shift"] for name in ("clip_high", "clip_low")]
    return ("At the last step Flow-GRPO has {:.0%} of the samples above the range there and {:.0%} below, "
            "without the shift {:.0%} and {:.0%}").format(*shares)


def rate_against_method(level):
    """What a rate costs beside what the method brings."""
    pair = "main-flow-grpo", "main-guard-3lr"
    return (f"Guard at 2e-3 lost {less(*pair, level)} more than Flow-GRPO at 6.7e-4 "
            f"(p = {chance(*pair, level)})")


def narrower_clip():
    """Flow-GRPO at 6.7e-4 with a clip range of 2.2e-4 against the preset's."""
    pair = "best-flow-grpo", "main-flow-grpo"
    found = [f"{less(*pair, level)} less at a gain of {level}" for level in LEVELS]
    p = ", ".join(chance(*pair, level) for level in LEVELS)
    return (f"with 2.2e-4 in place of 1.1e-3 Flow-GRPO at 6.7e-4 lost {' and '.join(found)} "
            f"({len(losses(pair[0], LEVEL))} seeds, p = {p})")


def at_equal_distance(root=3):
    """Guard less Flow-GRPO at 6.7e-4, paired by seed."""
    guarded, baseline = (
        np.array([at(root, distance(folder), *curve(folder)[1:]) for folder in runs_of(label).values()])
        for label in MAIN[:2])
    gain, gold = (guarded - baseline).T
    p = ttest_rel(guarded[:, 1], baseline[:, 1]).pvalue
    return (f"Where the root of KL is {root}, Guard at 6.7e-4 had gained {mean_and_error(gain)} more than "
            f"Flow-GRPO, and its gold was {mean_and_error(gold)} higher (p = {p:.2f})")


def who_is_blocked():
    """Of the figure of the ratio: shares of good and of bad images at the last step."""
    shares = []
    for name in (BASELINE, GUARD):
        rows = columns(RESULTS / name / "rho.csv", lambda row: row["step"] == "8")
        rho, A, clip = rows["rho"], rows["advantage"], about(RESULTS / name)["settings"]["clip"]
        shares += [(rho[A > 0] > clip).mean(), (rho[A < 0] < -clip).mean()]
    return ("At the last step Flow-GRPO blocks {:.0%} of the good images and {:.0%} of the bad ones; Guard "
            "{:.0%} and {:.0%}").format(*shares)


def blocked_and_lost(method, lr):
    """(share blocked, gold lost at LEVEL) of the runs of the grid that reach it, by clip range."""
    return [(clipped(folder)[1], reading[1])
            for folder in grid_runs(method, lr) if (reading := at_gain(folder, LEVEL))]


def grid_losses(method, lr):
    """Such as `0.0032 to 0.0035`: gold lost at LEVEL over the clip ranges of the grid."""
    lost = [lost for _, lost in blocked_and_lost(method, lr)]
    return f"{min(lost):.4f} to {max(lost):.4f}"


def grid_run(method, lr, clip):
    """(gain in reward, change in gold) at the end of a run of the grid."""
    _, gain, gold = curve(*runs_of(f"{method}-lr{lr:g}-clip{clip:g}").values())
    return gain[-1], gold[-1]


def best_of(n):
    """Gains in reward and gold of the best of n."""
    rows = {row["n"]: row for row in read(RESULTS / "best_of_n.csv")}
    return tuple(float(rows[str(n)][name]) - float(rows["1"][name]) for name in ("proxy", "gold"))


def cost(label, level):
    """Seconds to a gain and gold lost there, the latter with its error, over the seeds of the variants."""
    found = readings(without_extra_seeds(label), level)
    epochs = statistics.mean(updates / 2 for updates, _ in found)
    return epochs * seconds_of_epoch(label), mean_and_error(lost for _, lost in found)


def cost_of_window(window, whole, level):
    """How a window of three noisy steps compares with all nine, at one learning rate."""
    (seconds, lost), (all_seconds, all_lost) = (cost(label, level) for label in (window, whole))
    found, p = pairs(window, whole, level)
    return (f"took {seconds / all_seconds:.0%} of the time to a gain of {level} and had lost {lost} gold. "
            f"With all nine steps it was {all_lost} ({len(found)} seeds, p = {p:.2f})")


def mean_end(label):
    """(gain in reward, change in gold) at the end, means over the seeds of the variants."""
    return np.mean([[values[-1] for values in curve(f)[1:]] for f in without_extra_seeds(label)], axis=0)


def window_in_the_end():
    """After 20 updates at 2e-3, which is the preset: a window against all steps, seeds of the variants."""
    ends = [*mean_end("window-3-3lr"), *mean_end("main-guard-3lr")]
    return ("after 20 updates at the preset's 2e-3 it had gained {:.3f} and {:+.3f} gold, with all nine "
            "steps {:.3f} and {:+.3f}").format(*ends)


ANSWERS = 8  # of the sentences, those that the main README has too


def sentences():
    """What the pages say of the study in words with numbers."""
    most = LEVELS[1]
    reward, gold = best_of(4)
    wide = grid_run("guard", 2e-3, 2.1e-4)
    return [
        less_gold_lost(most),
        rate_against_method(most),
        who_is_blocked(),
        without_clip(),
        shift_alone(),
        f"At a gain of {LEVEL} Guard lost {grid_losses('guard', 6.7e-4)} at 6.7e-4 and "
        f"{grid_losses('guard', 2e-3)} at 2e-3; Flow-GRPO {grid_losses('flow-grpo', 6.7e-4)} and "
        f"{grid_losses('flow-grpo', 2e-3)}",
        f"the base model's best of four pictures gains {reward:.3f} reward and {gold:+.4f} gold",
        f"With `--sde_window 3` Guard at 6.7e-4 {cost_of_window('window-3', 'main-guard', most)}",
        f"at 6.7e-4 Guard gained {grid_run('guard', 6.7e-4, 7e-5)[0]:.3f} with a clip of 7e-5 and "
        f"{grid_run('guard', 6.7e-4, 2.3e-5)[0]:.3f} with 2.3e-5",
        f"at 2e-3 and 2.1e-4 it gained {wide[0]:.3f} and lost {-wide[1]:.3f} gold",
        shift_by_side(),
        narrower_clip(),
        at_equal_distance(),
        *shares_of_steps(),
        blocked_or_not(),
        what_gradients_did(),
        what_grid_said(),
        what_readers_saw(),
        *what_variants_did(),
        f"At 2e-3 it {cost_of_window('window-3-3lr', 'main-guard-3lr', most)}",
        window_in_the_end(),
    ]


def shares_of_steps():
    """Of the table by step: what is clipped at the ends."""
    last, guarded = by_step(MAIN[1])[-1], by_step(MAIN[0])
    outside = [100 * (guarded[t]["clip_high"] + guarded[t]["clip_low"]) for t in (0, -1)]
    return [
        f"At the last step Flow-GRPO's mean is {last['ratio_mean']:.1e}, and {last['foretold']:.1e} was "
        f"foretold; it clips {last['clip_low']:.1%} of the samples below and {last['clip_high']:.1%} above",
        f"Guard clips both sides alike, {outside[0]:.1f} % of the samples at the first step and "
        f"{outside[1]:.0f} % at the last"]


def blocked_or_not():
    """Guard's runs of the grid at the two lower rates."""
    found = blocked_and_lost("guard", 2.2e-4) + blocked_and_lost("guard", 6.7e-4)
    blocked, lost = zip(*found, strict=True)
    return (f"with {min(blocked):.0%} to {max(blocked):.0%} blocked Guard lost {min(lost):.4f} to "
            f"{max(lost):.4f} at a gain of {LEVEL}")


def what_gradients_did():
    """Of the table of gradients."""
    of = {name: unevenness(norms).mean() for name, norms in gradients().items()}
    flow = [of["flow", method] for method in ("flow-grpo", "rationorm", "guard")]
    dance = of["dance", PRINTED], of["dance", "guard"]
    return ("Over the steps the gradient differs by a factor of {:.0f} for Flow-GRPO, {:.0f} with RatioNorm "
            "and {:.1f} for Guard; for DanceGRPO's sampler the weight printed in notes of others leaves "
            "{:.1f} and ours {:.1f}").format(*flow, *dance)


def what_grid_said():
    """The one of `looks` that warns at all often."""
    tenth, third = (list(verdicts()["grid", said].values()) for said in TAU)
    return (f"`grid`, by a third, warned before the fall in {third[0]} of {sum(third[:4])} runs, at the same "
            f"evaluation in {third[1]} and later in {third[2]}; without a fall in {third[4]} of "
            f"{sum(third[4:])}. By a tenth it warned in {sum(tenth) - tenth[3] - tenth[5]} of "
            f"{sum(tenth)} runs")


def what_variants_did():
    """KL, CPS and DanceGRPO."""
    gain = {label: mean_end(label)[0] for label in (*TABLE["cps"], *TABLE["dance"])}
    level = 0.05
    return [
        f"With DanceGRPO on `tiny-flux` Guard gained {gain['dance-guard']:.3f} in 20 updates and the "
        f"baseline {gain['dance-flow-grpo']:.3f}; at 2e-3 {gain['dance-guard-3lr']:.3f} and "
        f"{gain['dance-flow-grpo-3lr']:.3f}, and at a gain of {level} Guard had lost "
        f"{versus('dance-guard-3lr', 'dance-flow-grpo-3lr', level)}",
        f"A KL of 0.04 changed nothing that 20 updates can show: at a gain of {LEVEL} Guard lost "
        f"{versus('kl-guard', 'main-guard', LEVEL)}, Flow-GRPO "
        f"{versus('kl-flow-grpo', 'main-flow-grpo', LEVEL)}",
        f"With CPS Flow-GRPO learned nothing in 20 updates ({gain['cps-flow-grpo']:+.3f}), and Guard "
        f"learned as with its own sampler ({gain['cps-guard']:+.3f}): at a gain of {LEVEL} it lost "
        f"{versus('cps-guard', 'main-guard', LEVEL)}"]


def what_readers_saw():
    """Means over seeds, on words that were trained on."""
    data = read(RESULTS / "readers.csv")
    means = [statistics.mean(float(row[f"{reader}, seen"]) for row in data if row["run"] == run)
             for reader in ("ddddocr", "rapidocr") for run in ("base", "main-guard")]
    return "ddddocr saw {:.3f} become {:.3f} where RapidOCR saw {:.3f} become {:.3f}".format(*means)


TABLES = {name: function for name, function in globals().items() if name.startswith("table_of_")}


def main():
    for name, function in TABLES.items():
        print(f"\n{name}\n\n{function()}")
    print(best_settings(), *sentences(), sep="\n\n")


if __name__ == "__main__":
    main()
