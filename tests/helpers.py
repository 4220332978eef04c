"""What several test files need: reading a run's folder, and being one of its processes."""

import json
import os
import signal
import sys

import torch
from safetensors.torch import load_file

import guard


def lines_of(folder, kind=None):
    """metrics.jsonl, of one kind or all, without the seconds, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if kind in (None, line["kind"])]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def checkpoint_names(folder):
    return [path.name for path in guard.checkpoints(guard.Args(run_dir=str(folder)))]


def state_of(folder, updates):
    """All tensors that --resume needs: weights, their average, the optimizer's."""
    return load_file(folder / f"checkpoint-{updates:06d}" / "state.safetensors")


def assert_same_run(one, other, updates):
    """The same lines, and after so many updates the same state, to the bit."""
    assert lines_of(one) == lines_of(other)
    mine, theirs = state_of(one, updates), state_of(other, updates)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def lines_without_bars(err):
    """The lines of stderr but for progress bars, which go up a line and write over themselves."""
    lines = [line.split("\r")[-1].replace("\x1b[A", "").strip() for line in err.split("\n")]
    return [line for line in lines if line and "%|" not in line]


def be_rank(rank, ranks, port, arguments, output, prepare):
    """One process of a run, as torchrun would start it; guard was imported without torchrun's environment."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(f"{output}-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), RANK=str(rank))
    os.environ |= dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    guard.RANK, guard.WORLD = rank, ranks
    sys.argv = ["guard.py", *arguments.split()]
    if prepare:
        prepare()
    guard.main()
