"""Runs of guard.py in processes of their own, and what they leave.

They are forked from a process that has already imported guard.py's libraries: a second in place of five.
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "peft", "rewards", "torch.distributed", "diffusers.training_utils",
    "diffusers.pipelines.flux.pipeline_flux", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5",
])
Done = namedtuple("Done", "codes out errors")


def load_brightness():
    """A reward that is never the same for two pictures, so that no group is dead."""
    return lambda images, prompts, metadata: [np.asarray(image).mean() / 255 for image in images]


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


def run(folder, arguments="", prepare=None, ranks=1):
    """guard.py to its end in so many processes, as torchrun starts them. A folder that is there is resumed.

    Returns all exit codes; what the first process printed; the last one's lines of stderr.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments = f"{'--resume' if folder.exists() else '--run_dir'} {folder} {arguments}"
    processes = []
    for rank in map(str, range(ranks)):
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        given = (arguments, f"{folder}-{rank}", environment, prepare)
        processes.append(FORKS.Process(target=be_guard, args=given, daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(300)
    out, err = Path(f"{folder}-0.out").read_text(), Path(f"{folder}-{ranks - 1}.err").read_text()
    # Progress bars write over themselves.
    lines = [line.split("\r")[-1].strip() for line in err.replace("\x1b[A", "").split("\n")]
    errors = [line for line in lines if line and "%|" not in line]
    return Done([process.exitcode for process in processes], out, errors)


def lines_of(folder, *kinds):
    """Lines of metrics.jsonl of these kinds, without the seconds, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line | {"seconds": None} for line in lines if line["kind"] in kinds]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
