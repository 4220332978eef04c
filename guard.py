"""GRPO-Guard in one file: reinforcement learning of flow-matching image models, with a clip that works.

GRPO fine-tunes a text-to-image model on a reward. It draws a group of images per prompt with a stochastic
sampler, scores them, and pushes the model towards those that scored above their group's mean. PPO's clipping
is meant to stop that push once the policy has moved far enough. In flow models it does not: the importance
ratio of new and old policy lies below 1 on average, and its spread differs by orders of magnitude over the
denoising steps, so that samples with a positive advantage never reach the clip. The reward goes up, and the
pictures go bad. GRPO-Guard (arXiv 2510.22319) re-centres and rescales the ratio, and reweights the steps:

    RatioNorm     log r^ = s (log r + mean(d^2) / (2 s^2)) = mean(d * eps)       Eq. 8, in `log_ratio`
    reweighting   a step's objective is multiplied by delta = 1 / dt             in `reweighting`

One epoch, as in `train` at the end of this file:

    1. sample      per prompt, G images with the SDE sampler; keep latents, velocity and noise of every step
    2. reward      score the images, while the next ones are being sampled
    3. advantage   A = (reward - mean of its group) / (standard deviation of its group)
    4. update      run the model again on the kept latents; ratio; clip; delta; backward; one AdamW step
    5. evaluate    ODE sampling of held-out prompts: the reward, and gold scores that are only watched
    6. log, save   metrics.jsonl, fixed-seed sample sheets, LoRA checkpoints that diffusers loads

Symbols, the same in all of the file ("mean" of the maths is the mean over D):

    x       latents (1 - sigma) x0 + sigma x1, x1 noise        B        samples in a slice, all of one prompt
    v       velocity x1 - x0, what the transformer predicts    G        group size, samples per prompt
    sigma   noise level, from 1 (noise) to 0 (image)           T        trained denoising steps
    dt      sigma - sigma_next > 0                             C, H, W  channels, height, width of the latents
    mu, s   mean and deviation: x_next = mu + s eps            D        C * H * W, dimensions of a sample
    a, b    mu = a x + b v, for every sampler                  L        text tokens
    eps     the step's noise, standard normal                  A        advantage
    d       mu_new - mu_old = b (v_new - v_old)                rho      ratio - 1 = expm1(log_ratio)

Left out on purpose: trainer classes, callbacks, DDP (one flat all-reduce of the LoRA gradients does), reading
settings from files, and everything about rewards, which are plain functions in rewards.py.

    python guard.py --task ocr                                 # a tiny real SD3, on a CPU, in minutes
    torchrun --nproc_per_node=8 guard.py --task ocr            # SD3.5-M on 8 GPUs
    python guard.py --resume runs/NAME                         # go on where it stopped
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

import rewards
from rewards import BadInput

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if ON_GPU else torch.device("cpu")
DTYPES = ("float32", "bfloat16", "float16")
METHOD_NAMES = ("flow-grpo", "temp-reweight", "mean-revised", "rationorm", "guard", "guard-v")


# ------------------------------------------------------------------------------------------------------------
# Settings


def flag(default, text, **more):
    """A field of Args: its default, what --help says, and more of argparse's options."""
    return field(default=default, metadata={"help": text} | more)


@dataclass
class Args:
    """The command line. What is None comes from the task and from PRESETS; all of it goes to config.json."""

    task: str = flag("ocr", "what to learn", choices=rewards.TASKS)
    reward: str | None = flag(None, "what to train on; the task's own unless given", choices=rewards.REWARDS)
    gold: list[str] | None = flag(None, "watched, never trained on", choices=(*rewards.REWARDS, "none"))
    prompts: str | None = flag(None, "file, or folder in Flow-GRPO's layout; the task's own unless given")
    model: str | None = flag(None, "alias, folder or hub id; sd3.5-medium, or tiny-sd3 without a GPU")
    method: str = flag("guard", "ratio and weight of the steps, see METHODS", choices=METHOD_NAMES)
    sde: str = flag("flow", "sampler of Flow-GRPO, DanceGRPO or Flow-CPS", choices=("flow", "dance", "cps"))
    sde_window: int | None = flag(None, "have noise in, and train, only so many steps, drawn anew each epoch")
    steps: int | None = flag(None, "denoising steps in training")
    eval_steps: int | None = flag(None, "denoising steps in evaluation")
    eta: float | None = flag(None, "noise level of the sampler")
    guidance: float | None = flag(None, "guidance scale in sampling and training; 1 for none")
    resolution: str | None = flag(None, "pixels: N or HxW")
    group_size: int | None = flag(None, "images per prompt")
    groups: int | None = flag(None, "prompts an epoch, over all processes")
    updates_per_epoch: int | None = flag(None, "optimizer updates an epoch, each on its share of the prompts")
    micro_batch: int | None = flag(None, "images in one pass of the transformer; divides group_size")
    epochs: int | None = flag(None, "epochs in all")
    lr: float | None = flag(None, "learning rate")
    clip: float | None = flag(None, "clip range of rho = ratio - 1")
    kl_beta: float = flag(0.0, "weight of the KL to the model without its LoRA")
    lora_rank: int | None = flag(None, "rank of the LoRA")
    lora_alpha: int | None = flag(None, "alpha of the LoRA")
    init_lora: str | None = flag(None, "LoRA to start from, folder or file; it sets rank and alpha")
    ema_decay: float | None = flag(None, "largest decay of the LoRA's moving average; 0 for none")
    eval_every: int | None = flag(None, "epochs between evaluations")
    eval_prompts: int | None = flag(None, "held-out prompts in an evaluation")
    save_every: int | None = flag(None, "epochs between checkpoints")
    keep: int = flag(3, "checkpoints that stay")
    dtype: str | None = flag(None, "the model's; the SDE is always float32", choices=DTYPES)
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    offload: bool = flag(False, "text encoders, VAE and the stored rollout wait on the CPU while unused")
    compile: bool = flag(False, "torch.compile the transformer's blocks")
    seed: int = flag(0, "keys every random number")
    run_dir: str | None = flag(None, "folder of the run; runs/ and the time unless given")
    resume: str | None = flag(None, "folder of a run to go on with")
    dry_run: bool = flag(False, "print the resolved settings and the arithmetic, load nothing")


ON_RESUME = ("epochs", "eval_every", "eval_prompts", "save_every", "keep")  # what --resume may change
MODELS = {  # alias -> folder or hub id
    "tiny-sd3": str(HERE / "tiny" / "sd3"),
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
}
# Two values are for methods tuned as Guard and for those tuned as the baseline, see METHODS.
PAPER = dict(
    steps=10, eval_steps=40, eta=0.7, guidance=4.5, lr=(1e-4, 3e-4), clip=(2e-6, 1e-4), dtype="float16",
    group_size=24, groups=48, updates_per_epoch=2, epochs=240, micro_batch=8, resolution="512",
    lora_rank=32, lora_alpha=64, ema_decay=0.9, eval_every=30, eval_prompts=1024, save_every=30)
PRESETS = {
    "sd3.5-medium": PAPER,
    "tiny-sd3": PAPER | dict(
        prompts=rewards.CARD_PROMPTS, gold=["cards", *(f"cards-{part}" for part in rewards.CARD_PARTS)],
        eval_steps=10, guidance=1.0, lr=(5e-4, 5e-4), clip=(4e-5, 1e-3), dtype="float32", ema_decay=0.0,
        group_size=16, groups=8, epochs=20, micro_batch=16, resolution="32x64",
        eval_every=10, eval_prompts=256, save_every=10),
}


class Parser(HfArgumentParser):
    """A flag for every field of Args; errors are one line, like all of BadInput."""

    def error(self, message):
        raise BadInput(message)


def parse_args(argv=None):
    """The command line as a complete Args: no None that a preset fills. Raises BadInput; loads no model."""
    parser = Parser(Args, prog="guard.py", allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    resume = parser.parse_args(argv).resume
    saved = read_config(resume) if resume else {}
    parser.set_defaults(**saved)
    args = Args(**vars(parser.parse_args(argv)))
    for name, value in saved.items():
        if getattr(args, name) != value and name not in ON_RESUME:
            raise BadInput(f"--{name} {getattr(args, name)}: this run has {value}; leave it out, "
                           f"--resume may change only {', '.join(ON_RESUME)}")
    fill_in(args)
    validate(args)
    return args


def read_config(run_dir):
    """The settings that a run was started with, but for those that say how to start it."""
    path = Path(run_dir) / "config.json"
    try:
        saved = json.loads(path.read_text())["args"] | {"run_dir": str(run_dir)}
        return {name: saved[name] for name in vars(Args()) if name not in ("resume", "dry_run")}
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"--resume {run_dir}: expected a run folder; cannot read {path}") from None


def fill_in(args):
    """Replace what is None by the task's and the model's own."""
    if args.model is None:
        args.model = "sd3.5-medium" if ON_GPU else "tiny-sd3"
        say(f"model {args.model}, since there is {'a' if ON_GPU else 'no'} CUDA device and no --model")
    for name, value in (rewards.TASKS[args.task] | PRESETS[preset_of(args.model)]).items():
        if getattr(args, name) is None:
            setattr(args, name, value[METHODS[args.method].tuned_as] if isinstance(value, tuple) else value)
            if name == "clip" and args.method == "guard-v":
                args.clip *= args.steps
    args.gold = [name for name in args.gold if name != "none"]
    args.run_dir = args.run_dir or str(Path("runs") / time.strftime("%Y%m%d-%H%M%S"))


def preset_of(model):
    """The alias whose preset a model takes: its own, or that of its pipeline's class."""
    for alias, place in MODELS.items():
        if model in (alias, place) or Path(model).resolve() == Path(place):
            return alias
    if not Path(model).exists() and model.count("/") != 1:
        raise BadInput(f"--model {model}: unknown; give {', '.join(MODELS)}, a pipeline folder or a hub id")
    try:
        name = DiffusionPipeline.load_config(model)["_class_name"]
    except Exception as error:  # whatever the hub's client raises: gated, unknown, offline, not JSON
        raise BadInput(f"--model {model}: not a diffusers pipeline: {one_line(error)}") from None
    if name not in BACKBONES:
        raise BadInput(f"--model {model}: it is a {name}; expected {' or '.join(BACKBONES)}")
    return BACKBONES[name].preset


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def validate(args):
    """Raise BadInput for all that can be known to be wrong before a model is loaded."""
    counts = ("eval_steps", "groups", "updates_per_epoch", "micro_batch", "epochs", "lora_rank", "lora_alpha",
              "eval_every", "eval_prompts", "save_every", "keep")
    share = max(1, args.updates_per_epoch) * WORLD
    unit = picture_unit(MODELS.get(args.model, args.model))
    sides = resolution_of(args)
    checks = [(name, getattr(args, name) >= 1, "1 or more") for name in counts]
    checks += [(name, 0 < getattr(args, name) < math.inf, "more than 0") for name in ("lr", "clip", "eta")]
    checks += [
        ("steps", args.steps >= 2, "2 or more, since the last step has no noise and is not trained"),
        ("group_size", args.group_size >= 2, "2 or more, since a sample is compared with its group"),
        ("seed", args.seed >= 0, "0 or more"),
        ("kl_beta", 0 <= args.kl_beta < math.inf, "0 or more"),
        ("guidance", 1 <= args.guidance < math.inf, "1 or more"),
        ("ema_decay", 0 <= args.ema_decay < 1, "at least 0 and below 1"),
        ("eta", args.sde != "cps" or args.eta <= 1, "at most 1 with cps"),
        ("sde_window", not args.sde_window or 0 < args.sde_window < args.steps, f"1 to {args.steps - 1}"),
        ("micro_batch", args.group_size % max(1, args.micro_batch) == 0, f"a divisor of {args.group_size}"),
        ("groups", args.groups % share == 0, f"a multiple of updates_per_epoch x processes = {share}"),
        ("resolution", all(side and side % unit == 0 for side in sides), f"multiples of {unit} pixels"),
        ("init_lora", not args.init_lora or Path(args.init_lora).exists(), "a folder or a safetensors file"),
        ("run_dir", args.resume or not (Path(args.run_dir) / "config.json").exists(),
         f"a new folder, since this holds a run; go on with --resume {args.run_dir}, or name another"),
    ]
    for name, holds, expected in checks:
        if not holds:
            raise BadInput(f"--{name} {getattr(args, name)}: expected {expected}")
    for file in rewards.prompt_files(args.prompts):
        rewards.read_prompts(file, quoted=args.task == "ocr")


def resolution_of(args):
    """(height, width) in pixels."""
    sides = args.resolution.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise BadInput(f"--resolution {args.resolution}: expected N or HxW in pixels, like 512 or 32x64")
    return int(sides[0]), int(sides[-1])


def picture_unit(folder):
    """Pixels that a side is a multiple of: two latents, a patch. 16 for models that are not on this disk."""
    config = Path(folder) / "vae" / "config.json"
    return 2 ** len(json.loads(config.read_text())["block_out_channels"]) if config.exists() else 16


def arithmetic(args):
    """Two lines that say what an epoch consists of."""
    images, share, updates = args.groups * args.group_size, args.groups // WORLD, args.updates_per_epoch
    return (f"an epoch: {args.groups} prompts x {args.group_size} = {images} images of {args.steps} steps, "
            f"{updates} updates of {images // updates} images\n"
            f"each process (of {WORLD}): {share} prompts = {share * args.group_size} images, "
            f"{share // updates} prompts an update, passes of {args.micro_batch} images")


def say(text):
    if RANK == 0:
        tqdm.write(text)


# ------------------------------------------------------------------------------------------------------------
# The maths: pure functions of numbers and tensors


def sde_coefficients(sigma: float, sigma_next: float, eta: float, kind: str) -> tuple[float, float, float]:
    """(a, b, s) of one denoising step, x_next = a x + b v + s eps.

    1 >= sigma > sigma_next >= 0; eta: noise level, 0 or more (cps: at most 1). kind: "flow" (Flow-GRPO, arXiv
    2505.05470), "dance" (DanceGRPO, arXiv 2505.07818) or "cps" (Flow-CPS, arXiv 2509.05952). Without noise,
    and at sigma_next = 0, each is the Euler step of diffusers' FlowMatchEulerDiscreteScheduler: a = 1, b =
    -dt, s = 0. Raises ValueError for another kind.
    """
    dt = sigma - sigma_next
    if kind not in ("flow", "dance", "cps"):
        raise ValueError(f"unknown kind {kind!r}; expected flow, dance or cps")
    if eta == 0 or sigma_next == 0:
        return 1.0, -dt, 0.0
    if kind == "cps":
        s = sigma_next * math.sin(eta * math.pi / 2)
        c = math.sqrt(sigma_next**2 - s**2)  # the old noise that stays: c² + s² = sigma_next²
        return (1 - sigma_next) + c, -sigma * (1 - sigma_next) + (1 - sigma) * c, s
    if kind == "dance":
        g = eta
    else:  # at sigma = 1 the denominator would be 0
        g = eta * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_next)))
    half = g**2 * dt / (2 * sigma)
    return 1 - half, -dt - half * (1 - sigma), g * math.sqrt(dt)


def log_prob(x_next: torch.Tensor, mu: torch.Tensor, s: float) -> torch.Tensor:
    """Log-density of a step under N(mu, s²): the mean over a sample's D dimensions, not the sum. Eq. 6.

    x_next, mu: (B, ...) -> (B,), in their dtype. Training never calls it: the difference of two of these is
    the log-ratio, but nearly all digits cancel in it. `log_ratio` is the same number, with them.
    """
    log_density = -((x_next - mu) ** 2) / (2 * s**2) - math.log(s) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


class Method(NamedTuple):
    """log_ratio = k mean(d eps) - shift mean(d²) / (2 s²), then the weight of a step's objective."""

    k: object  # a function of (b, s)
    shift: float
    delta: str  # "1", "s" or "flat", see `reweighting`
    tuned_as: int  # lr and clip range of a preset: 0 Guard's, 1 the baseline's


METHODS = {
    "flow-grpo": Method(lambda b, s: 1 / s, 1.0, "1", 1),  # Eq. 7
    "temp-reweight": Method(lambda b, s: 1 / s, 1.0, "s", 1),
    "mean-revised": Method(lambda b, s: 1 / s, 0.0, "1", 1),
    "rationorm": Method(lambda b, s: 1.0, 0.0, "1", 0),  # Eq. 8
    "guard": Method(lambda b, s: 1.0, 0.0, "flat", 0),  # Eq. 8 and the reweighting
    "guard-v": Method(lambda b, s: 1 / abs(b), 0.0, "1", 0),  # this project's own, see the README
}


def log_ratio(v_new, v_old, eps, b: float, s: float, method: str) -> torch.Tensor:
    """Log of the importance ratio of a step, by a row of METHODS: Eq. 7 for flow-grpo, Eq. 8 for guard.

    v_new, v_old, eps: (B, ...) -> (B,), in their dtype. With x_next = mu_old + s eps and d = mu_new - mu_old,

        log r = log_prob(x_next, mu_new, s) - log_prob(x_next, mu_old, s) = mean(d eps) / s - mean(d²) / (2
        s²)

    The second term is the left shift. It is there because log_prob is a mean over D; with a sum, E[ratio] =
    1. Here every sample has its own, where the authors' code takes the batch's average [differs: 1]. An
    unchanged velocity gives exactly 0.
    """
    row = METHODS[method]
    d = b * (v_new - v_old)  # (B, ...)
    centred = row.k(b, s) * (d * eps).flatten(1).mean(1)  # (B,), Eq. 8 where k = 1
    return centred - row.shift * (d**2).flatten(1).mean(1) / (2 * s**2)


class Step(NamedTuple):
    """One denoising step of a schedule."""

    sigma: float
    dt: float
    a: float
    b: float
    s: float


def schedule(sigmas, eta, kind, noisy=None) -> list[Step]:
    """n + 1 sigmas -> n steps. noisy: indices of those with noise, all but the last unless given."""
    steps = []
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        level = eta if noisy is None or i in noisy else 0.0
        steps.append(Step(sigma, sigma - sigma_next, *sde_coefficients(sigma, sigma_next, level, kind)))
    return steps


def reweighting(step: Step, eta: float, kind: str, method: str) -> float:
    """delta, the weight of a step's objective. Guard's makes the gradient b eps of `log_ratio` alike
    everywhere.

    flow: 1 / dt, as in the paper. There b = -dt (1 + eta²/2) at every step but the first, where b = -dt, so
    the gradients are equal but for that factor. dance and cps: the same rule for their own b, flat.
    """
    match METHODS[method].delta:
        case "s":
            return step.s
        case "flat":
            return 1 / step.dt if kind == "flow" else (1 + eta**2 / 2) / abs(step.b)
    return 1.0


def surrogate(rho, advantage, clip, delta):
    """(B,) PPO's clipped objective, reweighted. Eq. 12, less the constant that the 1 of ratio = 1 + rho adds.

    In rho rather than the ratio, since fp32 numbers near 1 are 1.2e-7 apart and Guard's clip range is 2e-6.
    """
    return delta * torch.minimum(rho * advantage, rho.clamp(-clip, clip) * advantage)


def advantages(scores: torch.Tensor) -> torch.Tensor:
    """(groups, G) rewards -> (groups, G): each against its group, within ±5; 0 if all of it are equal."""
    spread = scores.std(1, unbiased=False, keepdim=True)
    normalised = (scores - scores.mean(1, keepdim=True)) / (spread + 1e-4)
    alive = scores.amax(1, keepdim=True) > scores.amin(1, keepdim=True)
    return torch.where(alive, normalised.clamp(-5, 5), 0.0)


EVALUATION, ORDER, WINDOW = 2**40, 2**40 + 1, 2**40 + 2  # in a key, where others have the epoch


def rng(*key):
    """A generator that depends on nothing but its key, so not on the number of processes nor on a restart."""
    return np.random.default_rng(key)


def noise(shape, *key) -> torch.Tensor:
    """Standard normal numbers in fp32, by key."""
    return torch.from_numpy(rng(*key).standard_normal(shape, dtype=np.float32))


# ------------------------------------------------------------------------------------------------------------
# Backbones: prompt -> embeddings; x, sigma, embeddings -> v; latents -> images


class SD3:
    """Stable Diffusion 3 and 3.5 of any size: a loaded StableDiffusion3Pipeline."""

    preset = "sd3.5-medium"

    def __init__(self, pipe, args):
        self.pipe, self.transformer = pipe, pipe.transformer
        self.guidance, self.dtype = args.guidance, getattr(torch, args.dtype)
        self.resting = "cpu" if args.offload else DEVICE  # where encoders and VAE wait
        self.encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
        self.t5_tokens = min(128, pipe.tokenizer_3.model_max_length)  # 16 in the tiny models
        self.shape = (self.transformer.config.in_channels,
                      *(side // pipe.vae_scale_factor for side in resolution_of(args)))
        for module in (*self.encoders, pipe.vae, self.transformer):
            module.requires_grad_(False).eval()
        self.transformer.to(DEVICE)
        self.negative = self.encode([""])[0]

    @torch.no_grad()
    def encode(self, prompts):
        """N prompts -> N embeddings ((1, L, C), (1, C)), one by one: other batch sizes round otherwise."""
        for encoder in self.encoders:
            encoder.to(DEVICE)
        embeddings = []
        for prompt in prompts:
            outputs = self.pipe.encode_prompt(prompt, None, None, DEVICE, do_classifier_free_guidance=False,
                                              max_sequence_length=self.t5_tokens)
            embeddings.append((outputs[0].to(self.dtype), outputs[2].to(self.dtype)))  # tokens, pooled
        for encoder in self.encoders:
            encoder.to(self.resting)
        return embeddings

    def sigmas(self, steps):
        """steps + 1 noise levels from 1 to 0, as the model's own scheduler sets them."""
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.sigmas.tolist()

    def velocity(self, x, sigma, text):
        """v with guidance: (B, C, H, W) fp32 -> fp32. text: the embeddings of one prompt, or of B.

        Sampling and training both come here with the same slices: only so is the ratio exactly 1 at first.
        """
        texts = [self.negative, text] if self.guidance > 1 else [text]
        tokens, pooled = (torch.cat([part.expand(len(x), *part.shape[1:]) for part in parts])
                          for parts in zip(*texts, strict=True))
        timestep = torch.full((len(pooled),), sigma, device=x.device) * 1000
        x = torch.cat([x.to(self.dtype)] * len(texts))
        v = self.transformer(x, tokens, pooled, timestep, return_dict=False)[0]
        if self.guidance > 1:
            v_without, v_with = v.chunk(2)
            v = v_without + self.guidance * (v_with - v_without)
        return v.float()

    @torch.no_grad()
    def decode(self, x):
        """(B, C, H, W) latents -> B PIL images, decoded one by one to spare memory."""
        vae = self.pipe.vae.to(DEVICE)
        x = (x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        pixels = torch.cat([vae.decode(latents, return_dict=False)[0] for latents in x.split(1)])
        vae.to(self.resting)
        return self.pipe.image_processor.postprocess(pixels)


BACKBONES = {"StableDiffusion3Pipeline": SD3}  # by the class that model_index.json names

# With their prefix, so that SD3.5's attn2 stays out.
LAYERS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
LORA_TARGETS = [f"attn.{layer}" for layer in LAYERS]


def load_backbone(args):
    """The model with a LoRA that requires gradients, on DEVICE. Reads safetensors only. Raises BadInput."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    precision = {"default": getattr(torch, args.dtype), "vae": torch.float32}
    place = MODELS.get(args.model, args.model)
    try:
        pipe = DiffusionPipeline.from_pretrained(place, dtype=precision, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {args.model}: cannot be loaded: {one_line(error)}") from None
    pipe.set_progress_bar_config(disable=True)
    backbone = BACKBONES[type(pipe).__name__](pipe, args)
    transformer = backbone.transformer
    if args.init_lora:
        pipe.load_lora_weights(args.init_lora, adapter_name="default", use_safetensors=True)
    else:
        torch.manual_seed(args.seed)
        transformer.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha,
                                           init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    cast_training_params(transformer, torch.float32)  # the LoRA learns in fp32 whatever the model's precision
    if args.grad_checkpoint:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks()
    return backbone


# ------------------------------------------------------------------------------------------------------------
# Many processes: whole groups per rank, and sums of tensors


def all_reduce(tensor):
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(total, rows, values):
    """(total, ...) from each rank's own rows. The others add zeros: exact for any number of ranks."""
    whole = torch.zeros(total, *values.shape[1:], dtype=values.dtype, device=DEVICE)
    whole[rows] = values.to(DEVICE)
    return all_reduce(whole).cpu()


# ------------------------------------------------------------------------------------------------------------
# 1-2. Sample and reward


@dataclass
class Slice:
    """Samples that go through the transformer together: `micro_batch` of one group."""

    slot: int  # which prompt of the epoch
    members: range  # which samples of the group
    text: tuple  # embeddings of the prompt
    kept: torch.Tensor  # (T, 3, B, C, H, W): x, v_old and eps of the trained steps


def prompt_order(args, epoch, count):
    """Indices of the epoch's prompts, without replacement: one shuffled pass over all follows another."""
    positions = range(epoch * args.groups, (epoch + 1) * args.groups)
    return [int(rng(args.seed, ORDER, p // count).permutation(count)[p % count]) for p in positions]


def noisy_steps(args, epoch):
    """Indices of the steps with noise, which are trained: all but the last, or the epoch's window of them."""
    if not args.sde_window:
        return range(args.steps - 1)
    start = int(rng(args.seed, WINDOW, epoch).integers(args.steps - args.sde_window))
    return range(start, start + args.sde_window)


def slots_of(args, update, rank, world):
    """The prompts, as positions in the epoch, that an update takes and a rank has of them."""
    share = args.groups // args.updates_per_epoch // world
    start = (update * world + rank) * share
    return range(start, start + share)


@torch.no_grad()
def sample(backbone, steps, text, keys):
    """Integrate a slice from noise to an image.

    keys: one per sample, (seed, epoch, prompt, member), which with the step gives its noise. Returns the
    latents (B, C, H, W) and, for each noisy step, x, v and eps stacked (3, B, C, H, W).
    """

    def draw(number):
        """(B, C, H, W); 0 is the noise at sigma = 1, i + 1 that of step i."""
        return torch.stack([noise(backbone.shape, *key, number) for key in keys]).to(DEVICE)

    x, kept = draw(0), []
    for i, step in enumerate(steps):
        v = backbone.velocity(x, step.sigma, text)
        x_next = step.a * x + step.b * v
        if step.s > 0:
            eps = draw(i + 1)
            x_next += step.s * eps
            kept.append(torch.stack([x, v, eps]))
        x = x_next
    return x, kept


def rollout(backbone, args, epoch, steps, prompts, score):
    """Sample this rank's groups and score them, each slice while the next is being sampled.

    prompts: (prompt, metadata), of the whole epoch. score: (images, prompts, metadata) -> future of rewards.
    Returns this rank's slices, the (groups, G) rewards of all ranks, and the seconds spent waiting for them.
    """
    slots = [slot for update in range(args.updates_per_epoch) for slot in slots_of(args, update, RANK, WORLD)]
    texts = dict(zip(slots, backbone.encode([prompts[slot][0] for slot in slots]), strict=True))
    slices, futures = [], []
    passes = [(slot, start) for slot in slots for start in range(0, args.group_size, args.micro_batch)]
    for slot, start in tqdm(passes, desc="sample", leave=False, disable=RANK > 0):
        members = range(start, start + args.micro_batch)
        keys = [(args.seed, epoch, slot, member) for member in members]
        x, kept = sample(backbone, steps, texts[slot], keys)
        slices.append(Slice(slot, members, texts[slot], torch.stack(kept).to(backbone.resting)))
        futures.append(score(backbone.decode(x), *zip(*[prompts[slot]] * len(members), strict=True)))
    started = time.perf_counter()
    scores = torch.tensor([future.result() for future in futures], dtype=torch.float64).view(len(slots), -1)
    waited = time.perf_counter() - started
    return slices, gather(args.groups, slots, scores), waited


# ------------------------------------------------------------------------------------------------------------
# 4. Update


@dataclass
class Policy:
    """What is trained: the LoRA's parameters, their moving average and the optimizer."""

    params: list
    ema: EMAModel
    optimizer: torch.optim.AdamW

    @contextlib.contextmanager
    def averaged(self):
        """The moving average stands in for the live parameters meanwhile."""
        self.ema.store(self.params)
        self.ema.copy_to(self.params)
        yield
        self.ema.restore(self.params)

    def tensors(self):
        """All state by name. A checkpoint is these, and is read by copying into these."""
        named = {}
        for i, (p, average) in enumerate(zip(self.params, self.ema.shadow_params, strict=True)):
            named |= {f"live.{i}": p.detach(), f"ema.{i}": average}
            named |= {f"{key}.{i}": value for key, value in self.optimizer.state[p].items()}
        return named


def make_policy(backbone, args):
    params = [p for p in backbone.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)
    for p in params:
        p.grad = torch.zeros_like(p)
        # As AdamW does in its first step; already here, so that a checkpoint can be copied into it.
        zeros = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        optimizer.state[p] = dict(step=torch.zeros(())) | zeros
    return Policy(params, EMAModel(params, decay=args.ema_decay), optimizer)


def kl_to_base(backbone, step, x, v, text):
    """(B,) mean(d²) / (2 g²), d against the model without its LoRA; g² = s² / dt, the noise rate."""
    backbone.transformer.disable_adapters()
    with torch.no_grad():
        v_base = backbone.velocity(x, step.sigma, text)
    backbone.transformer.enable_adapters()
    d = step.b * (v - v_base)
    return (d**2).flatten(1).mean(1) * step.dt / (2 * step.s**2)


def slice_loss(backbone, args, step, t, piece, advantage):
    """A slice at the t-th trained step: loss (B,) to be minimised, rho (B,) and KL (B,)."""
    x, v_old, eps = piece.kept[t].to(DEVICE)  # (B, C, H, W) each
    v_new = backbone.velocity(x, step.sigma, piece.text)
    rho = torch.expm1(log_ratio(v_new, v_old, eps, step.b, step.s, args.method))
    delta = reweighting(step, args.eta, args.sde, args.method)
    kl = kl_to_base(backbone, step, x, v_new, piece.text) if args.kl_beta else torch.zeros_like(rho)
    return args.kl_beta * kl - surrogate(rho, advantage, args.clip, delta), rho.detach(), kl.detach()


def update(backbone, policy, args, steps, slices, slots, advantage):
    """One optimizer update on a set of groups. Returns what metrics.jsonl says of it.

    slices: this rank's. slots: the set, over all ranks. advantage: (groups, G) of the epoch. The loss is a
    mean over samples (dead ones too), T and D, which makes dL/dv about 4e-9 for SD3.5, less than fp16 can
    hold. So sums are back-propagated, and the fp32 gradients divided in the end.
    """
    steps = [step for step in steps if step.s > 0]  # T
    samples, D = len(slots) * args.group_size, math.prod(backbone.shape)
    stats = torch.zeros(3, samples, len(steps), dtype=torch.float64)  # loss, rho, KL
    for piece in tqdm(slices, desc="update", leave=False, disable=RANK > 0):
        if piece.slot not in slots or not advantage[piece.slot].any():
            continue  # a dead group has no gradient, so it takes no passes
        A = advantage[piece.slot, list(piece.members)].float().to(DEVICE)  # (B,)
        row = (piece.slot - slots.start) * args.group_size + piece.members.start
        for t, step in enumerate(steps):
            of_slice = slice_loss(backbone, args, step, t, piece, A)
            (of_slice[0].sum() * D).backward()
            stats[:, row : row + len(A), t] = torch.stack(of_slice).detach().cpu()
    gradients = [p.grad for p in policy.params]
    flat = all_reduce(torch.nn.utils.parameters_to_vector(gradients))
    torch.nn.utils.vector_to_parameters(flat / (samples * len(steps) * D), gradients)
    norm = torch.nn.utils.clip_grad_norm_(policy.params, 1.0)
    policy.optimizer.step()
    policy.optimizer.zero_grad(set_to_none=False)
    loss, rho, kl = all_reduce(stats.to(DEVICE)).cpu()  # each (samples, T)
    alive = advantage[list(slots)].any(1).repeat_interleave(args.group_size)  # (samples,)
    rho, kl = rho[alive], kl[alive]
    by_step = dict(ratio_mean=rho.mean(0), ratio_std=rho.std(0, unbiased=False), kl=kl.mean(0),
                   clip_high=(rho > args.clip).double().mean(0),
                   clip_low=(rho < -args.clip).double().mean(0))
    by_step = {name: value.tolist() if len(rho) else None for name, value in by_step.items()}
    by_step["kl"] = by_step["kl"] if args.kl_beta else None
    return dict(loss=loss.mean().item(), grad_norm=norm.item(), live=len(rho)) | by_step


def update_ema(policy, args, updates):
    """Every 8 updates. The decay rises with their number, lest a short run's average stay at its start."""
    if updates % 8 == 0 or not args.ema_decay:
        policy.ema.optimization_step = updates  # of which diffusers makes (1 + updates) / (10 + updates)
        policy.ema.step(policy.params)


# ------------------------------------------------------------------------------------------------------------
# 5. Evaluate


@torch.no_grad()
def evaluate(backbone, policy, args, held_out, scorers, updates):
    """Draw held-out prompts with the averaged weights and the ODE sampler; score them by all scorers.

    Slices go round the ranks, the same for any number of them. The first, always rank 0's, also gives the
    sample sheet and the KL: that of the whole stochastic trajectory, as a mean over D.
    """
    ode, sde = (schedule(backbone.sigmas(args.eval_steps), eta, args.sde) for eta in (0.0, args.eta))
    rows, scores, kl = [], [], torch.zeros((), device=DEVICE)
    starts = range(0, len(held_out), args.micro_batch)[RANK::WORLD]
    with policy.averaged():
        for start in tqdm(starts, desc="evaluate", leave=False, disable=RANK > 0):
            index = range(len(held_out))[start : start + args.micro_batch]
            prompts, metadata = zip(*(held_out[i] for i in index), strict=True)
            text = [torch.cat(column) for column in zip(*backbone.encode(prompts), strict=True)]
            keys = [(args.seed, EVALUATION, i, 0) for i in index]
            images = backbone.decode(sample(backbone, ode, text, keys)[0])
            of_slice = [scorer(images, prompts, metadata) for scorer in scorers.values()]
            rows += index
            scores += zip(*of_slice, strict=True)
            if start == 0:
                sheet = rewards.sheet(images, prompts, of_slice[0])
                sheet.save(Path(args.run_dir) / "samples" / f"{updates:06d}.png")
                noisy = [step for step in sde if step.s > 0]
                for step, (x, v, _) in zip(noisy, sample(backbone, sde, text, keys)[1], strict=True):
                    kl += kl_to_base(backbone, step, x, v, text).mean() / step.dt
    scores = gather(len(held_out), rows, torch.tensor(scores, dtype=torch.float64).view(-1, len(scorers)))
    means = dict(zip(scorers, scores.mean(0).tolist(), strict=True))
    gold, proxy = {name: means[name] for name in args.gold}, means[args.reward]
    log(args, kind="eval", update=updates, proxy=proxy, gold=gold, kl_to_base=all_reduce(kl).item())
    watched = "".join(f", {name} {value:.4f}" for name, value in gold.items())
    say(f"update {updates}: {args.reward} {proxy:.4f} on {len(held_out)} held-out prompts{watched}")


# ------------------------------------------------------------------------------------------------------------
# 6. Log, save and resume


def log(args, **line):
    """A line of metrics.jsonl."""
    if RANK == 0:
        with open(Path(args.run_dir) / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def write_config(args):
    """config.json: every setting, the packages' versions, and the commit of this repository."""
    git = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True)
    names = ("torch", "diffusers", "peft", "transformers", "rapidocr", "onnxruntime", "pillow", "numpy")
    config = dict(args=asdict(args), versions={name: version(name) for name in names},
                  commit=git.stdout.strip() or None, processes=WORLD,
                  device=torch.cuda.get_device_name(DEVICE) if ON_GPU else "cpu")
    (Path(args.run_dir) / "samples").mkdir(parents=True, exist_ok=True)
    (Path(args.run_dir) / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def checkpoints(args):
    """The run's whole checkpoints, oldest first."""
    return sorted(path for path in Path(args.run_dir).glob("checkpoint-*") if not path.suffix)


def save_checkpoint(backbone, policy, args, epoch, updates):
    """checkpoint-000123: the averaged LoRA for diffusers, and the whole state for --resume."""
    folder = Path(args.run_dir) / f"checkpoint-{updates:06d}"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with policy.averaged():
        # Without the adapter's metadata diffusers would take alpha = rank, here half the strength.
        metadata = backbone.transformer.peft_config["default"].to_dict()
        backbone.pipe.save_lora_weights(partial, get_peft_model_state_dict(backbone.transformer),
                                        transformer_lora_adapter_metadata=metadata)
    save_file({name: value.contiguous().cpu() for name, value in policy.tensors().items()},
              partial / "state.safetensors")
    logged = (Path(args.run_dir) / "metrics.jsonl").stat().st_size
    position = dict(epoch=epoch, updates=updates, metrics_bytes=logged)
    (partial / "state.json").write_text(json.dumps(position) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)  # a folder of this name is whole
    for old in checkpoints(args)[: -args.keep]:
        shutil.rmtree(old)


def load_checkpoint(policy, args):
    """Copy the last checkpoint into the policy and cut metrics.jsonl back to it. Returns epochs, updates."""
    position = dict(epoch=0, updates=0, metrics_bytes=0)
    for folder in checkpoints(args)[-1:]:
        position = json.loads((folder / "state.json").read_text())
        saved = load_file(folder / "state.safetensors")
        for name, tensor in policy.tensors().items():
            tensor.copy_(saved[name])
    metrics = Path(args.run_dir) / "metrics.jsonl"
    if RANK == 0 and metrics.exists():
        os.truncate(metrics, position["metrics_bytes"])
    return position["epoch"], position["updates"]


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(args):
    """Sample, reward, advantage, update, evaluate, save; again."""
    backbone = load_backbone(args)
    policy = make_policy(backbone, args)
    if RANK == 0 and not args.resume:
        write_config(args)
    done, updates = load_checkpoint(policy, args) if args.resume else (0, 0)
    files = rewards.prompt_files(args.prompts)
    prompts, held_out = (rewards.read_prompts(file, args.task == "ocr") for file in files)
    scorers = {name: rewards.load(name) for name in dict.fromkeys([args.reward, *args.gold])}
    check = partial(evaluate, backbone, policy, args, held_out[: args.eval_prompts], scorers)
    scoring = ThreadPoolExecutor(1)  # beside sampling; a reward that can use more threads has its own
    score = partial(scoring.submit, scorers[args.reward])
    size = sum(p.numel() for p in policy.params)
    say(f"{args.method} on {args.model}: {size:,} LoRA parameters, {len(prompts)} prompts, {args.run_dir}")
    say(arithmetic(args))
    if done == 0:
        check(updates)
    for epoch in (bar := tqdm(range(done, args.epochs), initial=done, total=args.epochs, disable=RANK > 0)):
        started = time.perf_counter()
        steps = schedule(backbone.sigmas(args.steps), args.eta, args.sde, noisy_steps(args, epoch))
        chosen = [prompts[i] for i in prompt_order(args, epoch, len(prompts))]
        slices, scores, waited = rollout(backbone, args, epoch, steps, chosen, score)
        sampled = time.perf_counter()
        advantage = advantages(scores)
        for number in range(args.updates_per_epoch):
            line = update(backbone, policy, args, steps, slices, slots_of(args, number, 0, 1), advantage)
            updates += 1
            update_ema(policy, args, updates)
            log(args, kind="update", epoch=epoch, update=updates, first=number == 0, **line)
            report(args, bar, scores, line, number == 0)
        seconds = dict(sample=sampled - started - waited, reward=waited, train=time.perf_counter() - sampled)
        dead = int((advantage == 0).all(1).sum())
        log(args, kind="rollout", epoch=epoch, reward_mean=scores.mean().item(), images=scores.numel(),
            reward_std=scores.std(unbiased=False).item(), dead_groups=dead, seconds=seconds)
        last = epoch + 1 == args.epochs
        if last or (epoch + 1) % args.eval_every == 0:
            check(updates)
        if RANK == 0 and (last or (epoch + 1) % args.save_every == 0):
            save_checkpoint(backbone, policy, args, epoch + 1, updates)


def report(args, bar, scores, line, first):
    """Reward and clip shares beside the progress bar; a warning if an epoch's first ratio is not 1."""
    if not line["live"]:
        return
    high, low = (f"{np.mean(line[name]):.2f}" for name in ("clip_high", "clip_low"))
    bar.set_postfix(reward=f"{scores.mean():.3f}", clip_high=high, clip_low=low)
    off = max(np.abs(line["ratio_mean"]) + line["ratio_std"])
    if first and off > args.clip / 10:
        say(f"warning: ratio - 1 is about {off:.1e} before any update, and the clip range {args.clip:.1e}")


def main():
    try:
        args = parse_args()
        if args.dry_run:
            say(json.dumps(asdict(args), indent=2) + "\n" + arithmetic(args))
            return
        if WORLD > 1:
            dist.init_process_group("nccl" if ON_GPU else "gloo", device_id=DEVICE if ON_GPU else None)
            dist.barrier()  # every rank has seen that the run's folder is free, before rank 0 writes there
        train(args)
    except BadInput as error:
        if RANK == 0:
            print(f"guard.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
