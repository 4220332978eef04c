"""Runs of guard.py in processes of their own, and what they leave.

They are forked from a process that has already imported guard.py's libraries: a second in place of five.
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "peft", "rewards", "torch.distributed", "diffusers.training_utils",
    "diffusers.pipelines.flux.pipeline_flux", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5",
])


def be_guard(arguments, output, environment, prepare):
    """In the fork: what `ENVIRONMENT python guard.py ARGUMENTS` does, after prepare, "module:function"."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.environ |= environment
    torch.set_num_threads(1)
    sys.argv = ["guard.py", *arguments.split()]
    if prepare:
        module, function = prepare.split(":")
        getattr(importlib.import_module(module), function)()
    importlib.import_module("guard").main()


def start(arguments, output, prepare=None, ranks=1):
    """Start guard.py in so many processes, as torchrun does. They print to OUTPUT-RANK.out and .err."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes = []
    for rank in map(str, range(ranks)):
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        given = (arguments, f"{output}-{rank}", environment, prepare)
        processes.append(FORKS.Process(target=be_guard, args=given, daemon=True))
        processes[-1].start()
    return processes


def run(arguments, output, prepare=None):
    """guard.py to its end. Returns its exit code and the lines of stderr without progress bars."""
    (process,) = start(arguments, output, prepare)
    process.join(300)
    return process.exitcode, errors(f"{output}-0.err")


def errors(file):
    """Lines of stderr but for progress bars, which write over themselves."""
    text = Path(file).read_text().replace("\x1b[A", "")
    lines = [line.split("\r")[-1].strip() for line in text.split("\n")]
    return [line for line in lines if line and "%|" not in line]


def lines_of(folder, *kinds):
    """Lines of metrics.jsonl of these kinds, without the seconds, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line | {"seconds": None} for line in lines if line["kind"] in kinds]


def state_of(folder, updates):
    return torch.load(folder / f"checkpoint-{updates:06d}" / "state.pt", weights_only=True)
