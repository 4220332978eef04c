"""1, 2 and 4 processes train the same, also if one has nothing to learn, and if their number changes.

The processes are forked from one that has imported guard.py, since importing takes longer than these runs do,
and find what torchrun would set. test_guard.py and test_reliability.py start torchrun itself.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import guard
import rewards

SETTINGS = (  # two updates an epoch of 4 groups each: one group a rank and update for 4 processes
    "--model tiny-sd3 --groups 8 --group_size 4 --micro_batch 4 --steps 3 --eval_steps 2 --eval_prompts 8 "
    "--gold cards --kl_beta 0.01 --epochs 2 --save_every 1 --eval_every 1"
)
LR = 2e-3  # the preset's: about as far as one update moves a weight
WEIGHTS = dict(rtol=0, atol=0.05 * LR)  # after 4 updates
NUMBERS = dict(rel=1e-3, abs=1e-6)  # of metrics.jsonl


def brightness():
    """A reward that is never the same for two pictures, so that no group is dead."""
    return lambda images, prompts, metadata: [np.asarray(image).mean() / 255 for image in images]


def brightness_until_told_to_stop():
    """Sends its own process SIGTERM in the second epoch, if that is rank 1 of 2."""
    score, calls = brightness(), []

    def reward(images, prompts, metadata):
        calls.append(1)  # its slices: 1 of 2 in each evaluation, 4 of 8 in the first epoch
        if guard.RANK == 1 and len(calls) == 1 + 4 + 1 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(images, prompts, metadata)

    return reward


def brightness_of_rank_0():
    """Rank 1 of 2 draws slots 2, 3, 6 and 7: their pictures, known by the prompt, all score the same."""
    prompts, _ = rewards.read_set(rewards.CARD_PROMPTS)
    args, score = guard.Args(groups=8, seed=0), brightness()
    orders = [guard.prompt_order(args, epoch, len(prompts)) for epoch in range(2)]
    dead = {prompts[order[slot]][0] for order in orders for slot in (2, 3, 6, 7)}

    def reward(images, prompts, metadata):
        return [0.5] * len(images) if prompts[0] in dead else score(images, prompts, metadata)

    return reward


def one_rank(rank, port, processes, arguments, reward):
    """A process of a run. Leaves, beside what guard.py does, the rewards and advantages of every epoch."""
    torch.set_num_threads(1)
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    guard.RANK, guard.WORLD, original, seen = rank, processes, guard.advantages, {}

    def kept(scores):
        advantage = original(scores)
        seen[f"rewards.{len(seen) // 2}"], seen[f"advantages.{len(seen) // 2}"] = scores, advantage
        return advantage

    guard.advantages, rewards.REWARDS["ocr"] = kept, reward
    sys.argv = ["guard.py", *arguments.split()]
    guard.main()
    save_file(seen, Path(sys.argv[sys.argv.index("--run_dir") + 1]) / f"seen-{rank}.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name, processes, more, reward): a whole run. Returns its folder."""
    folder = tmp_path_factory.mktemp("runs")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["guard"])

    def run(name, processes, more="", reward=brightness):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        arguments = f"{SETTINGS} --run_dir {folder / name} {more}"
        ranks = [
            context.Process(target=one_rank, args=(rank, port, processes, arguments, reward), daemon=True)
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=600)
        assert [rank.exitcode for rank in ranks] == [0] * processes
        return folder / name

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield run


@pytest.fixture(scope="module")
def one(run):
    return run("one", 1)


@pytest.fixture(scope="module", params=[2, 4])
def several(request, run):
    return run(f"of-{request.param}", request.param)


def lines_of(folder):
    """metrics.jsonl without the seconds, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def seen_by_ranks(folder):
    """Rewards and advantages of every epoch, as each rank had them."""
    return [load_file(path) for path in sorted(folder.glob("seen-*.safetensors"))]


def state_of(folder, updates):
    return load_file(folder / f"checkpoint-{updates:06d}" / "state.safetensors")


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
        if name.startswith(("live.", "ema.", "step.")):
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
    assert [line["kind"] for line in mine] == ["eval", *["update", "update", "rollout", "eval"] * 2]
    assert mine[0] == theirs[0] and mine[3] == theirs[3]  # before any update, to the bit
    updates = [line for line in theirs if line["kind"] == "update"]
    assert [line["live"] for line in updates] == [16] * 4 and updates[0]["ratio_std"] == [0.0, 0.0]
    assert all(std > 1e-4 for line in updates[1::2] for std in line["ratio_std"])


def test_any_number_of_processes_gives_the_same_weights(one, several):
    assert_weights_close(one, several, 2)
    assert_weights_close(one, several, 4)
    before, after = state_of(one, 2), state_of(one, 4)
    assert max((after[name] - before[name]).abs().max() for name in after if "live" in name) > LR


def test_any_number_of_processes_draws_the_same_evaluation(one, several):
    """Before any update the very same pixels, then a level of 256 apart in a few."""
    names = ["000000.png", "000002.png", "000004.png"]
    assert [path.name for path in sorted((several / "samples").iterdir())] == names
    for name in names:
        mine, theirs = (np.asarray(Image.open(folder / "samples" / name), int) for folder in (one, several))
        assert np.abs(mine - theirs).max() <= (0 if name == names[0] else 2)


def test_a_rank_without_a_live_group_neither_stalls_nor_changes_the_others(run):
    """To the bit: it adds zeros."""
    one = run("dead-1", 1, reward=brightness_of_rank_0)
    two = run("dead-2", 2, reward=brightness_of_rank_0)
    (mine,), theirs = seen_by_ranks(one), seen_by_ranks(two)[0]
    assert (mine["advantages.0"] == 0).all(1).tolist() == [False, False, True, True] * 2
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert lines_of(one) == lines_of(two)
    assert [line["dead_groups"] for line in lines_of(two) if line["kind"] == "rollout"] == [4, 4]
    mine, theirs = state_of(one, 4), state_of(two, 4)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_two_processes_of_which_one_is_told_to_stop_go_on_as_one(one, run):
    """SIGTERM to the second rank alone, in the second epoch: both leave, the first one saves."""
    folder = run("stopped", 2, reward=brightness_until_told_to_stop)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-000002"]
    assert [line["kind"] for line in lines_of(folder)].count("rollout") == 1
    run("stopped", 1, f"--resume {folder}")
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


class Encoder:
    """A backbone, as far as encode_once needs one."""

    negative = (torch.zeros(1, 2, 3), torch.zeros(1, 4))

    @staticmethod
    def encode(prompts):
        return [(torch.full((1, 2, 3), float(len(prompt))), torch.ones(1, 4)) for prompt in prompts]


def test_a_rank_may_be_the_first_to_write_in_the_runs_folder(tmp_path):
    tokens, pooled = guard.encode_once(Encoder, guard.Args(run_dir=str(tmp_path / "runs" / "a")), ("a", "bb"))
    assert tokens[:, 0, 0].tolist() == [1, 2] and pooled.shape == (2, 4)


def test_ranks_may_keep_the_same_embeddings_at_the_same_time(tmp_path, monkeypatch):
    """As with a set that has prompts twice: rank 1 writes and finishes while rank 0 is about to finish."""
    args, save, ranks = guard.Args(run_dir=str(tmp_path / "a")), guard.save_file, []

    def save_and_be_overtaken(tensors, path):
        save(tensors, path)
        ranks.append(guard.RANK)
        if len(ranks) == 1:
            monkeypatch.setattr(guard, "RANK", 1)
            assert guard.encode_once(Encoder, args, ("a",))[0].unique() == 1
            monkeypatch.setattr(guard, "RANK", 0)

    monkeypatch.setattr(guard, "save_file", save_and_be_overtaken)
    assert guard.encode_once(Encoder, args, ("a",))[0].unique() == 1
    assert ranks == [0, 1]
