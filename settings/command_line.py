"""From the command line to settings that hold: presets, --resume, and one line for whatever is wrong.

guard.py says what can be set (`Args`) and what its models want (`MODELS`). Nothing here is of the method.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers

import rewards
from rewards import BadInput

HERE = Path(__file__).resolve().parent.parent
ON_RESUME = ("epochs", "eval_every", "eval_prompts", "save_every", "keep")  # what --resume may change
BY_TASK = {"ocr": {}, "geneval": dict(epochs=930), "pickscore": dict(epochs=510, clip=4e-6)}  # for SD3.5-M
TINY_SD3, TINY_FLUX = str(HERE / "tiny" / "sd3"), str(HERE / "tiny" / "flux")
TINY = dict(  # the embedded models'
    dtype="float32", lr=2e-3, clip=2.3e-5, ema_decay=0.0, group_size=16, groups=8, epochs=10, micro_batch=16,
    eval_steps=10, guidance=1.0, resolution="32x64", eval_every=5, eval_prompts=256,
    gold=["cards", *(f"cards-{part}" for part in rewards.CARD_PARTS)])  # fmt: skip


def tiny_task(prompts, reward, gold=(), **settings):
    """Gold is drawn from the task's own held-out prompts."""
    prompts = str(rewards.PROMPTS / prompts)
    gold = [*TINY["gold"], *gold]
    return dict(prompts=prompts, gold_prompts=prompts, reward=reward, gold=gold, **settings)


TINY_BY_TASK = {
    "ocr": tiny_task("cards", "ocr"),
    "geneval": tiny_task("cards-geneval", "tiny-geneval", ["tiny-geneval-strict"], groups=32, lr=1e-3),
    "pickscore": tiny_task("cards-pickscore", "tiny-pickscore"),
}
AT_LEAST = dict(steps=2, group_size=2, guidance=1, kl_beta=0, ema_decay=0, seed=0)  # other whole numbers: 1


class Parser(transformers.HfArgumentParser):
    """A flag for every field of Args; errors are one line, like all of BadInput."""

    def error(self, message):
        raise BadInput(message)


def parse(argv, Args, models):
    """Args: what is on the command line, else what the resumed run or the preset has. Raises BadInput."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    not_given = argparse.Namespace(**dict.fromkeys(vars(Args())))
    flags = Parser(Args, prog="guard.py", allow_abbrev=False).parse_args(argv, not_given)
    given = {name: value for name, value in vars(flags).items() if value is not None}
    if "gold" in given:
        given["gold"] = [name for name in given["gold"] if name != "none"]
    if "resume" in given:
        settings = settings_of_run(given, Args)
    else:
        if "model" not in given:
            given["model"] = default_model()
        settings = preset(Args(**given), models)
    args = Args(**settings | given)
    validate(args)
    return args


def default_model():
    """Says what it chose, and why. A laptop's one GPU is too small for SD3.5-M, whose weights are gated."""
    if torch.cuda.is_available() and dist.is_torchelastic_launched():
        model, why = "sd3.5-medium", "torchrun started this on GPUs"
    else:
        model, why = "tiny-sd3", "it was not started by torchrun on GPUs"
    if os.environ.get("RANK", "0") == "0":
        print(f"--model {model}, since {why}")
    return model


def preset(args, models):
    """Settings of the task, the model, the method and the sampler; a later one wins."""
    model = find_model(args.model, models)
    settings = dict(gold_prompts=rewards.TASKS["pickscore"]["prompts"])
    settings |= rewards.TASKS[args.task] | model.settings | model.by_task[args.task]
    if args.method not in ("rationorm", "guard"):
        settings |= model.baseline
    if args.sde == "dance":
        settings["eta"] = 0.3  # DanceGRPO's own
    return settings


def find_model(name, models):
    """The row of an alias or its folder; of another model that of the first with its pipeline's class."""
    for alias, model in models.items():
        if name in (alias, model.place) or Path(name).resolve() == Path(model.place):
            return model
    with bad_model(name, models):
        index = Path(name) / "model_index.json"
        if "/" not in name or index.exists():
            config = json.loads(index.read_text())
        else:
            config = diffusers.DiffusionPipeline.load_config(name)
        like = {model.backbone.pipeline: model for model in reversed(models.values())}
        return like[config["_class_name"]]._replace(place=name)


@contextlib.contextmanager
def bad_input(message):
    """Whatever goes wrong inside is the user's to mend, and is told in one line."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{message} ({error!r:.300})".replace("\n", " ")) from None


def bad_model(name, models):
    """The same for a model that cannot be loaded."""
    pipelines = dict.fromkeys(model.backbone.pipeline for model in models.values())
    places = f"{', '.join(models)}, or the place of a {' or '.join(pipelines)}"
    return bad_input(f"--model {name}: expected {places}; if gated, accept its licence and run hf auth login")


def settings_of_run(given, Args):
    """What a run was started with. Settings that guard.py did not have then are at their default."""
    path = Path(given["resume"]) / "config.json"
    defaults = vars(Args())
    with bad_input(f"--resume {given['resume']}: expected a run folder; cannot read {path}"):
        saved = json.loads(path.read_text())["args"]
        settings = {name: saved.get(name, default) for name, default in defaults.items()}
    settings |= dict(run_dir=str(given["resume"]), dry_run=False)
    for name in defaults.keys() & given.keys() - {*ON_RESUME, "resume", "dry_run"}:
        if given[name] != settings[name]:
            may = ", ".join(ON_RESUME)
            raise BadInput(f"--{name}: this run has {settings[name]}; --resume may change only {may}")
    return settings


def validate(args):
    """Raise BadInput for all that can be known to be wrong before a model is loaded."""

    def expect(holds, name, expected):
        if not holds:
            raise BadInput(f"--{name} {getattr(args, name)}: expected {expected}")

    for name, value in vars(args).items():
        if type(value) is int or name in AT_LEAST:
            least = AT_LEAST.get(name, 1)
            expect(least <= value < math.inf, name, f"{least} or more")
    for name in ("lr", "clip", "eta"):
        expect(0 < getattr(args, name) < math.inf, name, "more than 0")
    expect(args.ema_decay < 1, "ema_decay", "less than 1")
    expect(args.sde != "cps" or args.eta <= 1, "eta", "at most 1 with cps")
    expect((args.sde_window or 1) < args.steps, "sde_window", f"1 to {args.steps - 1}")
    expect(args.group_size % args.micro_batch == 0, "micro_batch", f"a divisor of {args.group_size}")
    share = args.updates_per_epoch * int(os.environ.get("WORLD_SIZE", 1))
    expect(args.groups % share == 0, "groups", f"a multiple of updates_per_epoch x processes = {share}")
    height, width = resolution(args)
    fits = height % 16 == width % 16 == 0 < height * width
    expect(fits, "resolution", "multiples of 16 pixels")
    if not args.resume:
        there = not args.init_lora or Path(args.init_lora).exists()
        expect(there, "init_lora", "a folder or a safetensors file")
        is_new = not (Path(args.run_dir) / "config.json").exists()
        how = f"go on with --resume {args.run_dir}, or name another"
        expect(is_new, "run_dir", f"a new folder, since this holds a run; {how}")
    rewards.read_set(args.prompts, [args.reward])
    rewards.read_set(args.gold_prompts, args.gold, "gold_prompts")


def resolution(args):
    """(height, width) in pixels."""
    sides = args.resolution.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise BadInput(f"--resolution {args.resolution}: expected N or HxW in pixels, like 512 or 32x64")
    return int(sides[0]), int(sides[-1])


def fitting_resolution(args, transformer, patch):
    """The same, or BadInput if it is too large for the transformer's position embeddings."""
    largest = patch * transformer.config.get("pos_embed_max_size", math.inf)
    if max(resolution(args)) > largest:
        raise BadInput(f"--resolution {args.resolution}: this model draws at most {largest} pixels a side")
    return resolution(args)


def arithmetic(args):
    """Two lines that say what an epoch consists of."""
    images, updates = args.groups * args.group_size, args.updates_per_epoch
    world = int(os.environ.get("WORLD_SIZE", 1))
    return (
        f"an epoch: {args.groups} prompts x {args.group_size} = {images} images of {args.steps} steps; "
        f"{updates} updates of {images // updates}\n"
        f"each of {world} processes: {images // world} images, {args.micro_batch} at a time"
    )


def write_config(args, device):
    """config.json: every setting, and of every start of the run commit, packages, processes and device.

    The first start stays as it was; later ones are appended as `resumed`.
    """
    path = Path(args.run_dir) / "config.json"
    start = dict(
        commit=git_commit(),
        processes=int(os.environ.get("WORLD_SIZE", 1)),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions={package.name: package.version for package in distributions()},
    )
    if args.resume:
        config = json.loads(path.read_text())
        config["resumed"] = [*config.get("resumed", []), start]
    else:
        config = start
    config["args"] = asdict(args)
    (path.parent / "samples").mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        file.write(json.dumps(config, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the old one's place
    partial.replace(path)


def git_commit():
    """Of this repository; None without git or without a repository."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def leave(code, error):
    """At once, without waiting for a reward that hangs. Bad input is the same on every rank: one says it."""
    if code == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"guard.py: error: {error}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(code)
