"""1, 2 and 4 processes train the same, also if one has nothing to learn, and if their number changes.

The processes find what torchrun would set: see `start` in conftest.py. test_guard.py and test_reliability.py
start torchrun itself.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import checkpoint_names, lines_of, state_of
from PIL import Image
from safetensors.torch import load_file, save_file

import guard
import rewards

# Two updates an epoch, of 4 groups and 8 slices each: a group's two images are drawn by two processes.
SETTINGS = (
    "--model tiny-sd3 --groups 8 --group_size 2 --micro_batch 1 --steps 2 --eval_steps 2 --eval_prompts 4 "
    "--gold cards-frame --kl_beta 0.01 --epochs 2 --eval_every 2"
)
LR = 2e-3  # the preset's: about as far as one update moves a weight
WEIGHTS = dict(rtol=0, atol=0.05 * LR)  # after 4 updates
NUMBERS = dict(rel=1e-3, abs=1e-6)  # of metrics.jsonl


def brightness():
    """A reward that is never the same for two pictures, so that no group is dead."""
    return lambda images, prompts, metadata: [np.asarray(image).mean() / 255 for image in images]


def brightness_until_killed():
    """Rank 1 of 2 sends itself SIGTERM in the second epoch."""
    score, calls = brightness(), []

    def reward(images, prompts, metadata):
        calls.append(1)  # its slices: 2 of 4 in an evaluation, 8 of 16 in the first epoch
        if guard.RANK == 1 and len(calls) == 2 + 8 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(images, prompts, metadata)

    return reward


def brightness_of_rank_0():
    """With whole groups in a slice, rank 1 of 2 has the odd ones: their pictures all score the same."""
    prompts, _ = rewards.read_set(rewards.PROMPTS / "cards")
    args, score = guard.Args(groups=8, seed=0), brightness()
    orders = [guard.prompt_order(args, epoch, len(prompts)) for epoch in range(2)]
    dead = {prompts[order[slot]][0] for order in orders for slot in (1, 3, 5, 7)}

    def reward(images, prompts, metadata):
        return [0.5] * len(images) if prompts[0] in dead else score(images, prompts, metadata)

    return reward


def keep_what_it_sees():
    """Each rank leaves the rewards and advantages of every epoch, as it had them."""
    original, seen = guard.advantages, {}
    file = Path(sys.argv[sys.argv.index("--run_dir") + 1]) / f"seen-{guard.RANK}.safetensors"

    def kept(scores):
        advantage = original(scores)
        epoch = len(seen) // 2
        seen[f"rewards.{epoch}"], seen[f"advantages.{epoch}"] = scores, advantage
        save_file(seen, file)
        return advantage

    guard.advantages = kept


def with_brightness():
    keep_what_it_sees()
    rewards.REWARDS["ocr"] = brightness


def with_brightness_until_killed():
    rewards.REWARDS["ocr"] = brightness_until_killed


def with_brightness_of_rank_0():
    keep_what_it_sees()
    rewards.REWARDS["ocr"] = brightness_of_rank_0


@pytest.fixture(scope="module")
def run(tmp_path_factory, start):
    """run(name, ranks, more, prepare, codes): a whole run, of that many processes. Returns its folder."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, ranks, more="", prepare=with_brightness, codes=None):
        arguments = f"{SETTINGS} --run_dir {folder / name} {more}"
        output = folder / f"{name}-output"
        processes = start(arguments, output, ranks, prepare)
        for process in processes:
            process.join(300)
        outputs = [Path(f"{output}-{rank}.txt").read_text()[-2000:] for rank in range(ranks)]
        assert [process.exitcode for process in processes] == (codes or [0] * ranks), outputs
        return folder / name

    return run


@pytest.fixture(scope="module")
def one(run):
    return run("one", 1)


@pytest.fixture(scope="module", params=[2, 4])
def several(request, run):
    return run(f"of-{request.param}", request.param)


def seen_by_ranks(folder):
    """Rewards and advantages of every epoch, as each rank had them."""
    return [load_file(path) for path in sorted(folder.glob("seen-*.safetensors"))]


def assert_lines_close(one, several):
    """Within the tolerance where numbers are no integers, else equal; as many and in the same order."""
    mine, theirs = lines_of(one), lines_of(several)
    assert [list(line) for line in mine] == [list(line) for line in theirs]
    for line, other in zip(mine, theirs, strict=True):
        for name, value in line.items():
            measured = isinstance(value, (float, list, dict))
            assert other[name] == (pytest.approx(value, **NUMBERS) if measured else value), (name, other)


def assert_weights_close(one, several, updates):
    mine, theirs = state_of(one, updates), state_of(several, updates)
    assert mine.keys() == theirs.keys()
    for name in mine:
        if name.startswith(("live.", "average.", "step.")):
            torch.testing.assert_close(theirs[name], mine[name], **WEIGHTS)


def test_any_number_of_processes_gives_the_same_rewards_and_advantages(one, several):
    """In the first epoch to the bit; in the second the gradients had been summed in another order."""
    (mine,) = seen_by_ranks(one)
    ranks = seen_by_ranks(several)
    assert len(ranks) == int(several.name[-1]) and len(mine) == 4
    for theirs in ranks:
        assert all(torch.equal(theirs[name], ranks[0][name]) for name in mine)
        assert all(torch.equal(theirs[name], mine[name]) for name in ("rewards.0", "advantages.0"))
        torch.testing.assert_close(theirs["rewards.1"], mine["rewards.1"], rtol=0, atol=1e-4)
        torch.testing.assert_close(theirs["advantages.1"], mine["advantages.1"], rtol=0, atol=1e-2)


def test_any_number_of_processes_logs_the_same_statistics_of_all_samples(one, several):
    assert_lines_close(one, several)
    mine, theirs = lines_of(one), lines_of(several)
    assert [line["kind"] for line in mine] == ["eval", *["update", "update", "rollout"] * 2, "eval"]
    assert mine[0] == theirs[0] and mine[3] == theirs[3]  # before any update, to the bit
    updates = [line for line in theirs if line["kind"] == "update"]
    assert [line["live"] for line in updates] == [8] * 4 and updates[0]["ratio_std"] == [0.0]
    assert all(std > 1e-4 for line in updates[1::2] for std in line["ratio_std"])
    assert all(value > 0 for line in updates[1:] for value in line["kl"])


def test_any_number_of_processes_gives_the_same_weights(one, several):
    assert_weights_close(one, several, 2)
    assert_weights_close(one, several, 4)
    before, after = state_of(one, 2), state_of(one, 4)
    assert max((after[name] - before[name]).abs().max() for name in after if "live" in name) > LR


def test_any_number_of_processes_draws_the_same_evaluation(one, several):
    """Before any update the very same pixels, then a level of 256 apart in a few."""
    names = ["000000.png", "000004.png"]
    assert [path.name for path in sorted((several / "samples").iterdir())] == names
    for name in names:
        mine, theirs = (np.asarray(Image.open(folder / "samples" / name), int) for folder in (one, several))
        assert np.abs(mine - theirs).max() <= (0 if name == names[0] else 2)


def test_a_rank_without_a_live_group_neither_stalls_nor_changes_the_others(run):
    """To the bit: it adds zeros."""
    more = "--micro_batch 2 --kl_beta 0"
    one = run("dead-1", 1, more, with_brightness_of_rank_0)
    two = run("dead-2", 2, more, with_brightness_of_rank_0)
    (mine,), theirs = seen_by_ranks(one), seen_by_ranks(two)[0]
    assert (mine["advantages.0"] == 0).all(1).tolist() == [False, True] * 4
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert lines_of(one) == lines_of(two)
    assert [line["dead_groups"] for line in lines_of(two, "rollout")] == [4, 4]
    assert [line["live"] for line in lines_of(two, "update")] == [4] * 4
    mine, theirs = state_of(one, 4), state_of(two, 4)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_two_processes_of_which_one_is_killed_go_on_as_one(one, run):
    """The other one does not wait for it."""
    codes = [1, -signal.SIGTERM]
    folder = run("killed", 2, prepare=with_brightness_until_killed, codes=codes)
    assert checkpoint_names(folder) == ["checkpoint-000002"]
    assert len(lines_of(folder, "rollout")) == 1
    run("killed", 1, f"--resume {folder}")
    assert_lines_close(one, folder)
    assert_weights_close(one, folder, 4)


def test_one_process_goes_on_as_two(one, run):
    """Cut back to its first checkpoint, as after a kill in the second epoch."""
    folder = one.with_name("cut")
    shutil.copytree(one, folder)
    shutil.rmtree(folder / "checkpoint-000004")
    run("cut", 2, f"--resume {folder}")
    assert_lines_close(one, folder)
    assert_weights_close(one, folder, 4)


@pytest.mark.parametrize(
    "task, model", [("ocr", "tiny-flux"), ("geneval", "tiny-sd3"), ("pickscore", "tiny-sd3")]
)
def test_two_processes_are_as_one_on_every_task(task, model, run):
    """With the preset's own reward. What is drawn before any update is the same to the bit."""
    gold = "cards tiny-geneval-strict" if task == "geneval" else "cards"
    more = f"--task {task} --model {model} --gold {gold} --kl_beta 0 --epochs 1 --groups 4 --group_size 4"
    more += " --micro_batch 4 --steps 4 --eval_steps 4"
    one, two = (run(f"{task}-{ranks}", ranks, more, None) for ranks in (1, 2))
    assert_lines_close(one, two)
    assert_weights_close(one, two, 2)
    assert lines_of(one, "rollout") == lines_of(two, "rollout")
    assert lines_of(one, "eval")[0] == lines_of(two, "eval")[0]
