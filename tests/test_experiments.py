"""The page of results says what the CSVs in git say, and the scripts behind them do what they claim."""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import guard
from experiments import best_of_n, figures, plan, precision, run, study, tables

HERE = Path(__file__).resolve().parent.parent
PAGE = (HERE / "experiments" / "README.md").read_text()
README = (HERE / "README.md").read_text()
TABLES = tables.TABLES | study.TABLES
SENTENCES = study.sentences()


# ------------------------------------------------------------------------------------------------------------
# The page


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_page_is_that_of_its_csv(name):
    printed = TABLES[name]()
    assert len(printed.splitlines()) > 2
    assert printed in PAGE


def test_every_table_of_the_page_is_one_of_these():
    on_page = re.findall(r"(?:^\|.*\n)+", PAGE, re.M)
    assert sorted(on_page) == sorted(f"{function()}\n" for function in TABLES.values())


@pytest.mark.parametrize("sentence", SENTENCES)
def test_what_is_said_of_the_study_is_what_its_csvs_say(sentence):
    """On the page of results, and the answers in the main README too."""
    page = " ".join(PAGE.split())
    assert sentence in page
    if sentence in SENTENCES[: study.ANSWERS]:
        assert sentence in " ".join(README.split())


def test_the_main_readme_has_the_main_table():
    assert study.readme_table() in README


def test_every_figure_of_the_page_is_there_and_none_else():
    shown = set(re.findall(r"\(figures/(\w+)\.png\)", PAGE))
    assert shown == {path.stem for path in (HERE / "experiments" / "figures").glob("*.png")}


def test_every_csv_has_a_reader():
    code = "".join(path.read_text() for path in (HERE / "experiments").glob("*.py"))
    found = {path.name for path in (HERE / "experiments").rglob("*.csv") if "runs" not in path.parts}
    assert len(found) >= 4 and all(f'"{name}"' in code for name in found)


def test_results_hold_whole_runs():
    """As many updates as the setting says, and ratios of exactly 1 in the first update of every epoch."""
    names = {path.name for path in run.RESULTS.glob("*") if path.is_dir()}
    assert names <= set(run.all_runs())
    for name in names:
        about = tables.about(run.RESULTS / name)
        assert about["command"] == f"guard.py {run.all_runs()[name][2]}"
        evals, updates = (tables.columns(run.RESULTS / name / file) for file in ("evals.csv", "updates.csv"))
        last = about["settings"]["epochs"] * about["settings"]["updates_per_epoch"]
        assert evals["update"][0] == 0 and evals["update"][-1] == last
        first = updates["update"] % about["settings"]["updates_per_epoch"] == 1
        assert not updates["ratio_mean"][first].any() and not updates["ratio_std"][first].any()
        assert (updates["ratio_std"][~first] > 0).all()


# ------------------------------------------------------------------------------------------------------------
# Their arithmetic


def test_spread_is_the_standard_deviation_over_seeds():
    assert tables.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert tables.spread([0.25], 2) == "0.25"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results with two of three seeds of `geneval-tiny-flux`, and no other run."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed, after, seconds in ((0, 0.7, 540), (2, 0.9, None)):
        folder = tmp_path / f"geneval-tiny-flux-s{seed}"
        folder.mkdir()
        gold = {f"cards-{part}": 0.5 for part in tables.cards.PARTS} | {"cards": 0.8, tables.STRICT: 0.25}
        rows = [
            dict(update=update, proxy=proxy, kl_to_base=0) | gold | {"cards-frame": frame}
            for update, proxy, frame in ((0, 0.6, 0.5), (20, 0.1, 0.1), (40, after, 0.75))]
        run.write(folder / "evals.csv", rows)
        scores = [
            {"update": update, "prompt": prompt, "tiny-geneval": score}
            for update in (0, 40) for prompt, score in (("one", 0.5), ("two", 0.6), ("three", 0.7 + update))]
        run.write(folder / "scores.csv", scores)
        (folder / "run.json").write_text(json.dumps(dict(seconds=seconds)))
    return tmp_path


def test_a_table_has_a_row_for_what_has_a_run_that_is_done(results):
    (results / "ocr-tiny-sd3-s0").mkdir()  # without run.json it is not done
    assert tables.table_of_default_runs().splitlines()[2:] == [
        "| `geneval` | `tiny-flux` | 2 | 40 | 0.600 | 0.800 | +0.200 ± 0.141 | +2.00 ± 1.41 | 0.250 | "
        "0.250 | 0.800 | 0.800 | 9 |"]
    assert tables.table_of_parts().splitlines()[2:] == [
        "| `geneval` | `tiny-flux` | 0.500 → 0.500 | 0.500 → 0.750 | 0.500 → 0.500 | 0.500 → 0.500 |"]


def test_without_a_run_a_table_has_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "none")
    assert len(tables.table_of_default_runs().splitlines()) == len(tables.table_of_parts().splitlines()) == 2


def test_what_the_algebra_says_of_the_gradients():
    """Of figure 3: the gradient of the log-ratio with respect to v, by step, largest over smallest."""
    steps = precision.trained_steps()
    for method, expected in (("flow-grpo", 26), ("rationorm", 8.4), ("guard", 1.25)):
        sizes = [abs(step.b) * guard.reweighting(step, precision.ETA, "flow", method) for step in steps]
        if method == "flow-grpo":
            sizes = [size / step.s for size, step in zip(sizes, steps, strict=True)]
        assert max(sizes) / min(sizes) == pytest.approx(expected, rel=0.02)
    sigmas = [step.sigma for step in steps]
    cps = guard.schedule([*sigmas, sigmas[-1] - steps[-1].dt, 0.0], precision.ETA, "cps")[:-1]
    sizes = [abs(step.b) / step.s for step in cps]
    assert sizes[-1] / sizes[0] == pytest.approx(735, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# The study


def a_run(folder, gains, golds, **settings):
    """Results of a run with an evaluation every second update; gold starts at 0.9, the reward at 0.5."""
    folder.mkdir()
    rows = [dict(update=2 * i, proxy=0.5 + gain, cards=0.9 + gold, kl_to_base=0.01 * i)
            for i, (gain, gold) in enumerate(zip(gains, golds, strict=True))]
    run.write(folder / "evals.csv", rows)
    steps = [dict(update=u, first=u % 2 == 1, live=4, grad_norm=1, step=t, ratio_mean=-1e-3, ratio_std=0.01,
                  clip_high=0.125, clip_low=0.25, blocked=0.1 + 0.1 * t) for u in (1, 2) for t in (0, 1)]
    run.write(folder / "updates.csv", steps)
    (folder / "run.json").write_text(json.dumps(dict(settings=settings, epoch_seconds=20.0)))
    return folder


def test_gold_is_read_where_the_gain_is_first_reached(tmp_path):
    one = a_run(tmp_path / "one", (0, 0.12, 0.05, 0.3), (0, -0.001, 0.002, -0.008))
    assert study.at_gain(one, 0.06) == pytest.approx((1, 0.0005))
    assert study.at_gain(one, 0.175) == pytest.approx((5, 0.003))  # half way from (4, -0.002) to (6, 0.008)
    assert study.at_gain(one, 0.31) is None
    assert study.nearest(one, 0.06) == (4, pytest.approx(0.05))
    assert study.clipped(one) == pytest.approx((0.375, 0.15))


def test_prompts_are_set_side_by_side_at_equal_gain(tmp_path, monkeypatch):
    """Half way between two evaluations, each prompt's gold is half way too. A tie is within 0.005."""
    golds = {"main-guard": (0.9, 0.8, 0.7), "main-flow-grpo": (0.8, 0.806, 0.8)}
    for label, after in golds.items():
        folder = a_run(tmp_path / label, (0, 0.4), (0, 0))
        rows = [dict(update=update, prompt=i, cards=gold)
                for update, found in ((0, (0.8, 0.8, 0.8)), (2, after)) for i, gold in enumerate(found)]
        run.write(folder / "scores.csv", rows)
    assert study.gold_of_prompts(tmp_path / "main-guard") == pytest.approx([0.85, 0.8, 0.75])
    monkeypatch.setattr(study, "MAIN", ("main-guard", "main-flow-grpo"))
    monkeypatch.setattr(study, "runs_of", lambda label: {21: tmp_path / label})
    monkeypatch.setattr(study, "words_unseen", lambda: np.array([False, False, True]))
    assert study.table_of_sides().splitlines()[2:] == [
        "| Flow-GRPO, lr 6.7e-4 | seen | 1 x 2 | 50% | 50% | 0% | +0.0235 |",
        "| Flow-GRPO, lr 6.7e-4 | unseen | 1 x 1 | 0% | 0% | 100% | -0.0500 |"]


@pytest.fixture
def pair_of_methods(tmp_path, monkeypatch):
    """Three seeds of Guard and of Flow-GRPO; the third of Flow-GRPO reaches no gain of 0.225."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed, mine, theirs, end in ((21, 1, 3, 0.3), (22, 2, 3, 0.3), (23, 3, 8, 0.2)):
        a_run(tmp_path / f"main-guard-s{seed}", (0, 0.25), (0, -mine * 1e-3))
        a_run(tmp_path / f"main-flow-grpo-s{seed}", (0, end), (0, -theirs * 1e-3 * end / 0.25))
    return tmp_path


def test_differences_are_paired_by_seed(pair_of_methods):
    differences, p = study.pairs("main-guard", "main-flow-grpo", 0.125)
    assert differences == pytest.approx([-0.001, -0.0005, -0.0025])
    # t = mean / (deviation / sqrt(3)) = -1.3333 / (1.0408 / 1.7321) = -2.2188, two-sided with 2 degrees
    assert p == pytest.approx(0.1567, abs=1e-4)
    differences, p = study.pairs("main-guard", "main-flow-grpo", 0.225)
    assert differences == pytest.approx([-0.0018, -0.0009]) and np.isnan(p)
    row = study.table_of_pairs().splitlines()[2]
    assert row.endswith("| +0.125 | -0.0013 ± 0.0006 (3) | 3 of 3 | 0.157 |")


def test_the_best_setting_is_that_with_the_least_mean_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    labels = [label for label in run.TABLE["frontier"] if label.startswith("guard")]
    for label, end, gold in zip(labels, (0.2, 0.2, 0.1), (-0.003, -0.002, -0.001), strict=False):
        a_run(tmp_path / f"{label}-s20", (0, end), (0, gold), method="guard", lr=1e-3, clip=1e-5)
    assert study.best_settings() == {"guard": labels[1]}  # the third reaches no gain of 0.15


def test_the_spread_foretells_the_mean_of_the_ratio():
    """By guard.py's own log-ratio, with a change of velocity that does not depend on the noise."""
    D, count = 64, 200_000
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(count, D, generator=generator, dtype=torch.float64)
    change = torch.randn(1, D, generator=generator, dtype=torch.float64)
    ratio = guard.log_ratio(change, 0, eps, b=-0.03, s=0.2, method="flow-grpo").exp()
    assert ratio.mean() - 1 == pytest.approx(study.foretold(ratio.std().item(), D), rel=0.03)
    assert ratio.mean() < 0.995


@pytest.mark.parametrize("method", run.CLIPS)
def test_the_best_settings_that_ran_again_are_those_of_the_frontier(method):
    def settings(flags):
        args = guard.parse_args([*flags.split(), "--run_dir", "runs/none"])
        return args.method, args.lr, args.clip

    best = run.TABLE["frontier"][study.best_settings()[method]]
    assert settings(run.TABLE["best"][f"best-{method}"]) == settings(best)


def test_a_warning_is_before_with_or_after_the_fall():
    cases = ((1, 2), (2, 2), (3, 2), (None, 2), (1, None), (None, None))
    expected = ["before", "with", "after", "never", "false", "quiet"]
    assert [study.verdict(*case) for case in cases] == expected
    assert study.first_evaluation(np.array([False, True, True])) == 1


def test_the_frontier_is_of_points_that_no_other_beats():
    points = [(0, 0), (0.1, -0.01), (0.1, -0.02), (0.2, -0.005), (0.3, -0.03), (0.05, -0.006)]
    assert figures.pareto(points) == [(0, 0), (0.2, -0.005), (0.3, -0.03)]


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_choices(n):
    reward, gold = np.array([0.2, 1, 1, 0.5, 0.5, 0.1]), np.array([0.9, 0.8, 0.6, 0.7, 0.75, 0.3])
    means = []
    for chosen in map(list, itertools.combinations(range(6), n)):
        best = [i for i in chosen if reward[i] == reward[chosen].max()]
        means.append((reward[chosen].max(), gold[best].mean()))
    assert best_of_n.best_of(n, reward, gold) == pytest.approx(np.mean(means, 0))


# ------------------------------------------------------------------------------------------------------------
# The scripts


def test_a_run_of_the_table_is_a_command_of_guard_py():
    names = list(run.all_runs())
    assert len(names) == 142 and {run.GUARD, run.BASELINE} <= set(names)
    assert names[1:7:5] == ["geneval-tiny-sd3-s0", "ocr-tiny-sd3-s1"] and names[18] == run.BASELINE
    assert names[37:40] == ["main-guard-s21", "main-flow-grpo-s21", "main-flow-grpo-3lr-s21"]
    for name, (group, label, given) in run.all_runs().items():
        args = guard.parse_args([*given.split(), "--run_dir", "runs/none"])
        preset = guard.parse_args(["--task", args.task, "--model", args.model, "--run_dir", "runs/none"])
        assert name == f"{label}-s{args.seed}" and args.seed in run.SEEDS[group]
        assert args.reward == tables.REWARD[args.task] and args.gold[0] == "cards"
        assert (tables.STRICT in args.gold) == (args.task == "geneval")
        if group == "default":
            assert label == f"{args.task}-{args.model}"
            assert vars(args) == vars(preset) | dict(seed=args.seed, keep=1)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A run of one epoch in the place of all those of the table, and folders of its own."""
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    flags = ("--model tiny-sd3 --epochs 1 --groups 2 --group_size 4 --micro_batch 2 --steps 8 --eval_steps 2 "
             "--eval_prompts 3 --reward cards-colour --gold cards")  # a reward that has no dead groups
    monkeypatch.setattr(run, "all_runs", lambda: {"small": ("default", "small", flags)})
    return flags


def test_a_run_leaves_its_numbers(tmp_path, monkeypatch, small):
    """run.py's recording, on a small run: every score of an evaluation, every rho of a second update."""
    for name in ("evaluate", "slice_loss", "train_epoch"):
        monkeypatch.setattr(guard, name, getattr(guard, name))  # put back in the end
    monkeypatch.setattr(guard.rewards, "load", guard.rewards.load)
    monkeypatch.setattr(run, "GUARD", "small")
    monkeypatch.setattr(run, "RATIO_EPOCHS", [0])
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    run.run_one("small")
    results = tmp_path / "results" / "small"
    about = json.loads((results / "run.json").read_text())
    assert about["command"] == f"guard.py {small}" and about["seconds"] > 0
    assert about["settings"] == dict(method="guard", lr=2e-3, clip=2.3e-5, epochs=1, updates_per_epoch=2)
    evals, scores, rho = (run.read(results / f"{name}.csv") for name in ("evals", "scores", "rho"))
    assert list(evals[0]) == ["update", "proxy", "cards", *guard.rewards.LOOKS, "kl_to_base"]
    assert [row["update"] for row in evals] == ["0", "2"] and len(scores) == 6
    for row in evals:
        for name, reward in (("proxy", "cards-colour"), ("cards", "cards")):
            of_it = [float(each[reward]) for each in scores if each["update"] == row["update"]]
            assert float(row[name]) == pytest.approx(np.mean(of_it), abs=1e-4)
    wanted = [("1", str(step), str(member)) for member in range(4) for step in range(7)]
    assert sorted((row["slot"], row["step"], row["member"]) for row in rho) == sorted(wanted)
    first = [row for row in run.read(results / "updates.csv") if row["first"] == "True"]
    assert first and all(float(row["ratio_std"]) == 0 for row in first)


def test_an_evaluation_done_again_after_a_stop_counts_once(tmp_path, small):
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    settings = dict(method="guard", lr=1.0, clip=1.0, epochs=1, updates_per_epoch=2, prompts="elsewhere")
    (folder / "config.json").write_text(json.dumps(dict(commit="c", args=settings)))
    step = dict.fromkeys(("ratio_mean", "ratio_std", "clip_high", "clip_low", "blocked"), [0.0])
    lines = [dict(kind="eval", update=0, proxy=0.5, gold=dict(cards=0.25), looks={}, kl_to_base=0),
             dict(kind="update", update=1, first=True, live=4, grad_norm=1.0) | step]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for update in (0, 2, 2):
        rows = [dict(update=update, prompt=prompt, cards="0.5000") for prompt in ("one", "two")]
        run.write(folder / "scores.csv", rows, append=True)
    run.collect("small", 5)
    scores = run.read(tmp_path / "results" / "small" / "scores.csv")
    assert [(row["update"], row["prompt"]) for row in scores] == [
        ("0", "one"), ("0", "two"), ("2", "one"), ("2", "two")]
    about = tables.about(tmp_path / "results" / "small")
    assert about["seconds"] == 5 and "prompts" not in about["settings"]
    assert not (tmp_path / "results" / "small" / "rho.csv").exists()


def peak_of_profiler(function, folder):
    """Bytes at the highest of CPU allocations less frees, by torch.profiler, which sees the allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(f"{folder}/trace.json")
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    events = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(np.cumsum([amount for _, amount in events]))


def test_the_plan_counts_what_the_profiler_sees(tmp_path):
    """Learning from a slice: fake tensors say what real ones take, to the byte; the profiler within 1 %."""
    args = plan.resolve(["--model", "tiny-sd3", "--micro_batch", "4"])
    backbone = guard.load_backbone(args)
    steps = guard.schedule([1.0, 0.5, 0.0], args.eta, args.sde)
    text = backbone.encode(["a card"])["a card"]
    kept = torch.zeros(3, 4, *backbone.shape)

    def learn():
        piece = guard.Slice([0, 1, 2, 3], None, [text] * 4, None, [kept])
        loss, _, _ = guard.slice_loss(backbone, args, steps[0], 0, piece, torch.ones(4))
        loss.sum().backward()

    guard.Policy(backbone, args)  # gradients that are there already
    learn()
    _, real = plan.counted(learn)
    profiler = peak_of_profiler(learn, tmp_path)
    plan.fake(backbone)
    with plan.faking():
        guard.Policy(backbone, args)
        text = tuple(plan.fresh(part) for part in text)
        kept = plan.fresh(kept)
        _, fake = plan.counted(learn)
    assert fake["peak"] == real["peak"] == pytest.approx(profiler, rel=0.01)
    assert fake["peak"] > 1e6 and fake["flops"] == real["flops"]
