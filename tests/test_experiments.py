"""The tables of the README are those of the CSVs in git, and the figures' arithmetic is right."""

import math
from pathlib import Path

import numpy as np
import pytest

from experiments import figures, run

HERE = Path(__file__).resolve().parent.parent


def evaluations(proxy, gold):
    return {"ocr": np.array(proxy), "cards": np.array(gold)}


def test_gold_at_a_gain_in_proxy_lies_on_the_path_through_the_evaluations():
    path = evaluations([0.5, 0.625, 0.5625, 0.75], [0.9, 0.88, 0.8, 0.7])
    assert figures.gold_at(path, 0.0625) == pytest.approx(-0.01)  # half way to the second
    assert figures.gold_at(path, 0.125) == pytest.approx(-0.02)  # the second
    assert figures.gold_at(path, 0.1875) == pytest.approx(-0.1 - 0.1 * 2 / 3)  # on the way to the last
    assert math.isnan(figures.gold_at(path, 0.3))


def test_spread_is_the_standard_deviation_over_seeds():
    assert figures.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert figures.spread([0.25], 2, "+") == "+0.25"


def test_a_run_of_the_table_is_a_command_of_guard_py():
    import guard

    for name, (group, given) in run.all_runs().items():
        args = guard.parse_args([*given.split(), "--run_dir", "runs/none"])
        assert name.endswith(f"-s{args.seed}") and args.seed in run.SEEDS.get(group, [run.FIRST_SEED])
        assert args.eval_prompts == 512 and args.gold[0] == "cards"


def test_results_hold_whole_runs():
    """As many updates as the setting says, and ratios of exactly 1 in the first update of every epoch."""
    names = [path.parent.name for path in run.RESULTS.glob("*/run.json")]
    assert set(names) <= set(run.all_runs())
    for name in names:
        evals, updates = (figures.columns(run.RESULTS / name / file) for file in ("evals.csv", "updates.csv"))
        assert evals["update"][0] == 0 and evals["update"][-1] == 2 * run.EPOCHS
        first = updates["update"] % 2 == 1
        assert not updates["ratio_mean"][first].any() and not updates["ratio_std"][first].any()
        assert (updates["ratio_std"][~first] > 0).all()


@pytest.mark.parametrize("table", ["methods", "ratios", "equal_proxy", "side_by_side", "words"])
def test_the_tables_of_the_readme_are_those_of_the_results(table, capsys):
    getattr(figures, f"table_of_{table}")()
    printed = capsys.readouterr().out.strip()
    assert len(printed.splitlines()) > 2
    assert printed in (HERE / "README.md").read_text()
