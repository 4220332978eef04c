"""The page of results says what the CSVs in git say, and the scripts behind them do what they claim."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import guard
from experiments import plan, precision, run, tables

HERE = Path(__file__).resolve().parent.parent
PAGE = (HERE / "experiments" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------------
# The page


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_of_the_page_is_that_of_its_csv(name):
    printed = tables.TABLES[name]()
    assert len(printed.splitlines()) > 2
    assert printed in PAGE


def test_every_table_of_the_page_is_one_of_these():
    on_page = re.findall(r"(?:^\|.*\n)+", PAGE, re.M)
    assert sorted(on_page) == sorted(f"{function()}\n" for function in tables.TABLES.values())


def test_every_figure_of_the_page_is_there_and_none_else():
    shown = set(re.findall(r"\(figures/(\w+)\.png\)", PAGE))
    assert shown == {path.stem for path in (HERE / "experiments" / "figures").glob("*.png")}


def test_every_csv_has_a_reader():
    code = "".join(path.read_text() for path in (HERE / "experiments").glob("*.py"))
    found = {path.name for path in (HERE / "experiments").rglob("*.csv") if "runs" not in path.parts}
    assert len(found) > 8 and all(f'"{name}"' in code for name in found)


def test_results_hold_whole_runs():
    """As many updates as the setting says, and ratios of exactly 1 in the first update of every epoch."""
    names = {path.parent.name for path in run.RESULTS.glob("*/run.json")}
    assert names == set(run.all_runs())
    for name in names:
        evals, updates = (tables.columns(run.RESULTS / name / file) for file in ("evals.csv", "updates.csv"))
        assert evals["update"][0] == 0 and evals["update"][-1] == 2 * run.EPOCHS
        first = updates["update"] % 2 == 1
        assert not updates["ratio_mean"][first].any() and not updates["ratio_std"][first].any()
        assert (updates["ratio_std"][~first] > 0).all()


# ------------------------------------------------------------------------------------------------------------
# Their arithmetic


def evaluations(proxy, gold):
    return {"ocr": np.array(proxy), "cards": np.array(gold)}


def test_gold_at_a_gain_in_proxy_lies_on_the_path_through_the_evaluations():
    path = evaluations([0.5, 0.625, 0.5625, 0.75], [0.9, 0.88, 0.8, 0.7])
    assert tables.gold_at(path, 0.0625) == pytest.approx(-0.01)  # half way to the second
    assert tables.gold_at(path, 0.125) == pytest.approx(-0.02)  # the second
    assert tables.gold_at(path, 0.1875) == pytest.approx(-0.1 - 0.1 * 2 / 3)  # on the way to the last
    assert math.isnan(tables.gold_at(path, 0.3))


def test_spread_is_the_standard_deviation_over_seeds():
    assert tables.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert tables.spread([0.25], 2) == "0.25"


def test_what_the_algebra_says_of_the_gradients():
    """Of figure 3: the gradient of the log-ratio with respect to v, by step, largest over smallest."""
    steps = precision.trained_steps()
    for method, expected in (("flow-grpo", 26), ("rationorm", 8.4), ("guard", 1.25)):
        sizes = [abs(step.b) * guard.reweighting(step, precision.ETA, "flow", method) for step in steps]
        if method == "flow-grpo":
            sizes = [size / step.s for size, step in zip(sizes, steps, strict=True)]
        assert max(sizes) / min(sizes) == pytest.approx(expected, rel=0.02)


# ------------------------------------------------------------------------------------------------------------
# The scripts


def test_a_run_of_the_table_is_a_command_of_guard_py():
    for name, (group, given) in run.all_runs().items():
        args = guard.parse_args([*given.split(), "--run_dir", "runs/none"])
        assert name.endswith(f"-s{args.seed}") and args.seed in run.SEEDS.get(group, [run.FIRST_SEED])
        assert args.eval_prompts == 512 and args.gold[0] == "cards"


def test_a_run_leaves_its_numbers(tmp_path, monkeypatch):
    """run.py's recording, on a small run: every score of an evaluation, every rho of a second update."""
    for name in ("evaluate", "slice_loss", "train_epoch"):
        monkeypatch.setattr(guard, name, getattr(guard, name))  # put back in the end
    monkeypatch.setattr(guard.rewards, "load", guard.rewards.load)
    small = ("--model tiny-sd3 --epochs 1 --groups 2 --group_size 4 --micro_batch 2 --steps 8 --eval_steps 2 "
             "--eval_prompts 3 --gold cards --seed 10")
    settings = dict(RUNS=tmp_path / "runs", RESULTS=tmp_path / "results", EPOCHS=1, RATIO_EPOCHS=[0])
    for name, value in settings.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "all_runs", lambda: {"small": ("main", small)})
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    run.run_one("small")
    results = tmp_path / "results" / "small"
    assert json.loads((results / "run.json").read_text())["command"] == f"guard.py {small}"
    evals, scores, rho = (run.read(results / f"{name}.csv") for name in ("evals", "scores", "rho"))
    assert [row["update"] for row in evals] == ["0", "2"] and len(scores) == 6
    for row in evals:
        for name in ("ocr", "cards"):
            of_it = [float(each[name]) for each in scores if each["update"] == row["update"]]
            assert float(row[name]) == pytest.approx(np.mean(of_it), abs=1e-4)
    wanted = [("1", str(step), str(member)) for member in range(4) for step in range(7)]
    assert sorted((row["slot"], row["step"], row["member"]) for row in rho) == sorted(wanted)
    first = [row for row in run.read(results / "updates.csv") if row["first"] == "True"]
    assert all(float(row["ratio_std"]) == 0 for row in first)


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
