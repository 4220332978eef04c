"""GRPO-Guard in one file: reinforcement learning of flow-matching image models, with a clip that works.

GRPO fine-tunes a text-to-image model on a reward. It draws a group of images per prompt with a stochastic
sampler, scores them, and pushes the model towards those that scored above their group's mean. PPO's clipping
is meant to stop that push once the policy has moved far enough. In flow models it does not: the importance
ratio of new and old policy lies below 1 on average, and its spread differs by orders of magnitude over the
denoising steps, so that samples with a positive advantage never reach the clip. The reward goes up, and the
pictures go bad. GRPO-Guard (arXiv 2510.22319) re-centres and rescales the ratio, and reweights the steps:

    RatioNorm     log r^ = s (log r + mean(d^2) / (2 s^2)) = mean(d * eps)       Eq. 8, in `log_ratio`
    reweighting   a step's objective is multiplied by delta = 1 / dt             in `reweighting`

One epoch, as in `train_epoch` and `train` at the end of this file:

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

    python guard.py --task ocr                                              # a tiny real SD3, on a CPU
    torchrun --nproc_per_node=8 guard.py --task ocr                         # SD3.5-M on 8 GPUs
    torchrun --nproc_per_node=8 guard.py --task ocr --model flux.1-dev
    python guard.py --resume runs/NAME                                      # go on where it stopped
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import peft
import safetensors
import torch
import torch.distributed as dist
import transformers
from diffusers.training_utils import EMAModel, cast_training_params
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import rewards
from rewards import BadInput

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if ON_GPU else torch.device("cpu")
METHOD_NAMES = ("flow-grpo", "temp-reweight", "mean-revised", "rationorm", "guard", "guard-v")


# ------------------------------------------------------------------------------------------------------------
# Settings


def flag(default, text, **more):
    """A field of Args: its default, what --help says, and more of argparse's options."""
    return field(default=default, metadata={"help": text} | more)


@dataclass
class Args:
    """The command line. Defaults are the paper's for SD3.5-M; other presets differ as MODELS says."""

    task: str = flag("ocr", "what to learn", choices=rewards.TASKS)
    reward: str = flag("ocr", "what to train on; the task's own unless given", choices=rewards.REWARDS)
    gold: list[str] = flag(None, "watched, never trained on", choices=(*rewards.REWARDS, "none"))
    prompts: str = flag(None, "file, or folder in Flow-GRPO's layout; the task's own unless given")
    model: str = flag("sd3.5-medium" if ON_GPU else "tiny-sd3", "alias, pipeline folder or hub id")
    method: str = flag("guard", "ratio and weight of the steps, see METHODS", choices=METHOD_NAMES)
    sde: str = flag("flow", "sampler of Flow-GRPO, DanceGRPO or Flow-CPS", choices=("flow", "dance", "cps"))
    sde_window: int | None = flag(None, "have noise in, and train, only so many steps, drawn anew each epoch")
    steps: int = flag(10, "denoising steps in training")
    eval_steps: int = flag(40, "denoising steps in evaluation")
    eta: float = flag(0.7, "noise level of the sampler")
    guidance: float = flag(4.5, "guidance scale in sampling and training; 1 for none")
    resolution: str = flag("512", "pixels: N or HxW")
    group_size: int = flag(24, "images per prompt")
    groups: int = flag(48, "prompts an epoch, over all processes")
    updates_per_epoch: int = flag(2, "optimizer updates an epoch, each on its share of the prompts")
    micro_batch: int = flag(8, "images in one pass of the transformer; divides group_size")
    epochs: int = flag(240, "epochs in all")
    lr: float = flag(1e-4, "learning rate")
    clip: float = flag(2e-6, "clip range of rho = ratio - 1")
    kl_beta: float = flag(0.0, "weight of the KL to the model without its LoRA")
    lora_rank: int = flag(32, "rank of the LoRA")
    lora_alpha: int = flag(64, "alpha of the LoRA")
    init_lora: str | None = flag(None, "LoRA to start from, folder or file; it sets rank and alpha")
    ema_decay: float = flag(0.9, "largest decay of the LoRA's moving average; 0 for none")
    eval_every: int = flag(30, "epochs between evaluations")
    eval_prompts: int = flag(1024, "held-out prompts in an evaluation")
    save_every: int = flag(30, "epochs between checkpoints")
    keep: int = flag(3, "checkpoints that stay")
    dtype: str = flag("float16", "of the model, not the SDE", choices=("float32", "bfloat16", "float16"))
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    offload: bool = flag(False, "text encoders, VAE and the stored rollout wait on the CPU while unused")
    compile: bool = flag(False, "torch.compile the transformer's blocks")
    seed: int = flag(0, "keys every random number")
    run_dir: str = flag(time.strftime("runs/%Y%m%d-%H%M%S"), "folder of the run")
    resume: str | None = flag(None, "folder of a run to go on with")
    dry_run: bool = flag(False, "print the resolved settings and the arithmetic, load nothing")


ON_RESUME = ("epochs", "eval_every", "eval_prompts", "save_every", "keep")  # what --resume may change
# What differs from the defaults above: in general, by task, by model; a later one wins. Two values are for
# methods tuned as Guard and for those tuned as the baseline, see METHODS.
PAPER = dict(lr=(1e-4, 3e-4), clip=(2e-6, 1e-4))
BY_TASK = {"ocr": {}, "geneval": dict(epochs=930), "pickscore": dict(epochs=510, clip=(4e-6, 1e-4))}
FLUX = dict(
    steps=6, eval_steps=28, eta=0.9, guidance=3.5, lr=(2e-4, 3e-4), dtype="bfloat16", grad_checkpoint=True)
TINY = dict(
    prompts=rewards.CARD_PROMPTS, gold=[name for name in rewards.REWARDS if name.startswith("cards")],
    eval_steps=10, guidance=1.0, lr=(2e-3, 2e-3), clip=(4e-5, 1e-3), dtype="float32", ema_decay=0.0,
    group_size=16, groups=8, epochs=20, micro_batch=16, resolution="32x64",
    eval_every=10, eval_prompts=256, save_every=10)
MODELS = {  # alias -> folder or hub id, preset
    "tiny-sd3": (str(HERE / "tiny" / "sd3"), TINY),
    "tiny-flux": (str(HERE / "tiny" / "flux"), TINY | dict(epochs=30)),
    "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", {}),
    "flux.1-dev": ("black-forest-labs/FLUX.1-dev", FLUX),
}
AT_LEAST = dict(steps=2, group_size=2, guidance=1, kl_beta=0, ema_decay=0, seed=0)  # other whole numbers: 1
REWARD_TIMEOUT = 600  # seconds that a slice's rewards may take; then the run stops


class Parser(transformers.HfArgumentParser):
    """A flag for every field of Args; errors are one line, like all of BadInput."""

    def error(self, message):
        raise BadInput(message)


def parse_args(argv=None):
    """The command line as Args; defaults are the resumed run's or the preset's. Raises BadInput."""
    parser = Parser(Args, prog="guard.py", allow_abbrev=False)
    given = parser.parse_args(argv)
    saved = read_config(given.resume) if given.resume else {}
    parser.set_defaults(**saved or preset(given))
    args = Args(**vars(parser.parse_args(argv)))
    for name, value in saved.items():
        if getattr(args, name) != value and name not in ON_RESUME:
            raise BadInput(f"--{name}: this run has {value}; --resume may change only {', '.join(ON_RESUME)}")
    args.gold = [name for name in args.gold if name != "none"]
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


def preset(given):
    """Settings of the task, the model and the method."""
    settings = PAPER | rewards.TASKS[given.task] | BY_TASK[given.task] | MODELS[alias_of(given.model)][1]
    settings |= {name: settings[name][METHODS[given.method].tuned_as] for name in ("lr", "clip")}
    if given.method == "guard-v":
        settings["clip"] *= settings.get("steps", Args.steps)
    if given.sde == "dance":
        settings["eta"] = 0.3  # DanceGRPO's own
    return settings


def alias_of(model):
    """The alias whose preset a model takes: its own, or that of its pipeline's class."""
    for alias, (place, _) in MODELS.items():
        if model in (alias, place) or Path(model).resolve() == Path(place):
            return alias
    try:
        config = diffusers.DiffusionPipeline.load_config(model, local_files_only="/" not in model)
        return BACKBONES[config["_class_name"]][1]
    except Exception as error:  # whatever the hub's client raises: gated, unknown, offline, not JSON
        raise BadInput(why_not_loaded(model, error)) from None


def why_not_loaded(model, error):
    return (f"--model {model}: expected {', '.join(MODELS)}, or the place of a {' or '.join(BACKBONES)}; "
            f"if gated, accept its licence and run hf auth login ({error!r:.300})")


def validate(args):
    """Raise BadInput for all that can be known to be wrong before a model is loaded."""
    share = max(1, args.updates_per_epoch) * WORLD
    sides, (unit, largest) = resolution_of(args), picture_sides(MODELS.get(args.model, [args.model])[0])
    checks = [
        *((name, AT_LEAST.get(name, 1) <= value < math.inf, f"{AT_LEAST.get(name, 1)} or more")
          for name, value in vars(args).items() if type(value) is int or name in AT_LEAST),
        *((name, 0 < getattr(args, name) < math.inf, "more than 0") for name in ("lr", "clip", "eta")),
        ("ema_decay", args.ema_decay < 1, "less than 1"),
        ("eta", args.sde != "cps" or args.eta <= 1, "at most 1 with cps"),
        ("sde_window", (args.sde_window or 1) < args.steps, f"1 to {args.steps - 1}"),
        ("micro_batch", args.group_size % max(1, args.micro_batch) == 0, f"a divisor of {args.group_size}"),
        ("groups", args.groups % share == 0, f"a multiple of updates_per_epoch x processes = {share}"),
        ("resolution", all(side % unit == 0 < side <= largest for side in sides),
         f"multiples of {unit} pixels, at most {largest}"),
        ("init_lora", not args.init_lora or Path(args.init_lora).exists(), "a folder or a safetensors file"),
        ("run_dir", args.resume or not (Path(args.run_dir) / "config.json").exists(),
         f"a new folder, since this holds a run; go on with --resume {args.run_dir}, or name another"),
    ]
    for name, holds, expected in checks:
        if not holds:
            raise BadInput(f"--{name} {getattr(args, name)}: expected {expected}")
    rewards.read_set(args.prompts, [args.reward, *args.gold])


def resolution_of(args):
    """(height, width) in pixels."""
    sides = args.resolution.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise BadInput(f"--resolution {args.resolution}: expected N or HxW in pixels, like 512 or 32x64")
    return int(sides[0]), int(sides[-1])


def picture_sides(folder):
    """(multiple, maximum) of a picture's sides in pixels; 16 and 2048 for models not on this disk."""
    configs = [Path(folder) / part / "config.json" for part in ("vae", "transformer")]
    try:
        vae, transformer = (json.loads(config.read_text()) for config in configs)
    except (OSError, ValueError):  # one that is damaged is named when it is loaded
        return 16, 2048
    unit = 2 ** len(vae["block_out_channels"])  # a token is 2 x 2 latents
    return unit, unit * transformer.get("pos_embed_max_size", 2048 // unit)


def arithmetic(args):
    """Two lines that say what an epoch consists of."""
    images, updates = args.groups * args.group_size, args.updates_per_epoch
    return (f"an epoch: {args.groups} prompts x {args.group_size} = {images} images of {args.steps} steps; "
            f"{updates} updates of {images // updates}\n"
            f"each of {WORLD} processes: {args.groups // WORLD} prompts, {args.micro_batch} images at a time")


def say(text):
    if RANK == 0:
        tqdm.write(text)


# ------------------------------------------------------------------------------------------------------------
# The maths: pure functions of numbers and tensors


def sde_coefficients(sigma: float, sigma_next: float, eta: float, kind: str) -> tuple[float, float, float]:
    """(a, b, s) of one denoising step, x_next = a x + b v + s eps.

    1 >= sigma > sigma_next >= 0; eta: noise level, 0 or more (cps: at most 1). kind: "flow" (Flow-GRPO, arXiv
    2505.05470), "dance" (DanceGRPO, arXiv 2505.07818) or "cps" (Flow-CPS, arXiv 2509.05952). Without noise,
    and at sigma_next = 0, each is the Euler step of diffusers' FlowMatchEulerDiscreteScheduler: (1, -dt, 0).
    Raises ValueError for another kind.
    """
    dt = sigma - sigma_next
    if eta == 0 or sigma_next == 0:
        return 1.0, -dt, 0.0
    if kind == "cps":
        s = sigma_next * math.sin(eta * math.pi / 2)
        c = math.sqrt(sigma_next**2 - s**2)  # the old noise that stays: c² + s² = sigma_next²
        return (1 - sigma_next) + c, -sigma * (1 - sigma_next) + (1 - sigma) * c, s
    if kind == "flow":  # at sigma = 1 the denominator would be 0
        g = eta * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_next)))
    elif kind == "dance":
        g = eta
    else:
        raise ValueError(f"unknown kind {kind!r}; expected flow, dance or cps")
    half = g**2 * dt / (2 * sigma)
    return 1 - half, -dt - half * (1 - sigma), g * math.sqrt(dt)


def log_prob(x_next: torch.Tensor, mu: torch.Tensor, s: float) -> torch.Tensor:
    """Log-density of a step under N(mu, s²): the mean over a sample's D dimensions, not the sum. Eq. 6.

    x_next, mu: (B, ...) -> (B,), in their dtype. Training never calls it: the difference of two of these is
    the log-ratio, but nearly all digits cancel in it. `log_ratio` is the same number, with them.
    """
    log_density = -((x_next - mu) ** 2) / (2 * s**2) - math.log(s) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


# log_ratio = k mean(d eps) - shift mean(d²) / (2 s²), k a function of (b, s); delta, of (s, flat), is the
# weight of a step, see `reweighting`; tuned_as: lr and clip range of a preset, 0 Guard's, 1 the baseline's.
Method = namedtuple("Method", "k shift delta tuned_as")
METHODS = {
    "flow-grpo": Method(lambda b, s: 1 / s, 1.0, lambda s, flat: 1.0, 1),  # Eq. 7
    "temp-reweight": Method(lambda b, s: 1 / s, 1.0, lambda s, flat: s, 1),
    "mean-revised": Method(lambda b, s: 1 / s, 0.0, lambda s, flat: 1.0, 1),
    "rationorm": Method(lambda b, s: 1.0, 0.0, lambda s, flat: 1.0, 0),  # Eq. 8
    "guard": Method(lambda b, s: 1.0, 0.0, lambda s, flat: flat, 0),  # Eq. 8 and the reweighting
    "guard-v": Method(lambda b, s: 1 / abs(b), 0.0, lambda s, flat: 1.0, 0),  # this project's own, see README
}


def log_ratio(v_new, v_old, eps, b: float, s: float, method: str) -> torch.Tensor:
    """Log of the importance ratio of a step, by a row of METHODS: Eq. 7 for flow-grpo, Eq. 8 for guard.

    v_new, v_old, eps: (B, ...) -> (B,), in their dtype. With x_next = mu_old + s eps and d = mu_new - mu_old,

        log r = log_prob(x_next, mu_new, s) - log_prob(x_next, mu_old, s)
              = mean(d eps) / s - mean(d²) / (2 s²)

    The second term is the left shift, there because log_prob is a mean over D; with a sum, E[ratio] is 1.
    Here every sample has its own, where the authors' code takes the batch's average. An unchanged velocity
    gives exactly 0.
    """
    row = METHODS[method]
    d = b * (v_new - v_old)  # (B, ...)
    centred = row.k(b, s) * (d * eps).flatten(1).mean(1)  # (B,), Eq. 8 where k = 1
    return centred - row.shift * (d**2).flatten(1).mean(1) / (2 * s**2)


Step = namedtuple("Step", "sigma dt a b s")  # numbers: one denoising step of a schedule


def schedule(sigmas, eta, kind, noisy=None) -> list[Step]:
    """n + 1 sigmas -> n steps. noisy: indices of those with noise, all but the last unless given."""
    steps = []
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        level = eta if noisy is None or i in noisy else 0.0
        steps.append(Step(sigma, sigma - sigma_next, *sde_coefficients(sigma, sigma_next, level, kind)))
    return steps


def reweighting(step: Step, eta: float, kind: str, method: str) -> float:
    """delta, the weight of a step's objective. Guard's evens out the gradient b eps of `log_ratio`.

    flow: 1 / dt, as in the paper. There b = -dt (1 + eta²/2) at every step but the first, where b = -dt, so
    the gradients are equal but for that factor. dance and cps: the same rule for their own b, flat.
    """
    flat = 1 / step.dt if kind == "flow" else (1 + eta**2 / 2) / abs(step.b)
    return METHODS[method].delta(step.s, flat)


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


# ------------------------------------------------------------------------------------------------------------
# Backbones: prompt -> embeddings; x, sigma, embeddings -> v; latents -> images


class SD3:
    """Stable Diffusion 3 and 3.5 of any size: a loaded StableDiffusion3Pipeline."""

    def __init__(self, pipe, args):
        self.pipe, self.transformer = pipe, pipe.transformer.to(DEVICE)
        self.guidance, self.dtype = args.guidance, getattr(torch, args.dtype)
        self.resting = "cpu" if args.offload else DEVICE  # where encoders and VAE wait
        self.encoders = torch.nn.ModuleList(v for k, v in pipe.components.items() if "text_encoder" in k)
        self.shape = (pipe.vae.config.latent_channels,
                      *(side // pipe.vae_scale_factor for side in resolution_of(args)))
        for module in (self.encoders, pipe.vae, self.transformer):
            module.requires_grad_(False).eval()
        self.negative = self.encode([""])[0]

    @torch.no_grad()
    def encode(self, prompts):
        """N prompts -> N embeddings ((1, L, C), (1, C)), one by one: other batch sizes round otherwise."""
        self.encoders.to(DEVICE)
        embeddings = [tuple(part.to(self.dtype) for part in self.embed(prompt)) for prompt in prompts]
        self.encoders.to(self.resting)
        return embeddings

    def embed(self, prompt):
        """Embeddings of the tokens, and pooled."""
        length = min(128, self.pipe.tokenizer_3.model_max_length)  # of T5's; 16 in the tiny models
        outputs = self.pipe.encode_prompt(prompt, None, None, DEVICE, do_classifier_free_guidance=False,
                                          max_sequence_length=length)
        return outputs[0], outputs[2]

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
        v = self.transformer(x, tokens, pooled, timestep, return_dict=False)[0].float()
        if self.guidance > 1:
            v_without, v_with = v.chunk(2)
            v = v_without + self.guidance * (v_with - v_without)
        return v

    @torch.no_grad()
    def decode(self, x):
        """(B, C, H, W) latents -> B PIL images, at a time as many as make one of 512 x 512: memory."""
        vae, count = self.pipe.vae.to(DEVICE), max(1, 64 * 64 // math.prod(x.shape[2:]))
        x = (x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        pixels = torch.cat([vae.decode(latents, return_dict=False)[0] for latents in x.split(count)])
        vae.to(self.resting)
        return self.pipe.image_processor.postprocess(pixels)


class Flux(SD3):
    """FLUX.1-dev of any size: a loaded FluxPipeline. Guidance is an input of the model, not a second pass."""

    def embed(self, prompt):
        length = min(128, self.pipe.tokenizer_2.model_max_length)
        return self.pipe.encode_prompt(prompt, None, DEVICE, max_sequence_length=length)[:2]

    def sigmas(self, steps):
        """The shift of the noise levels depends on the number of image tokens."""
        c, tokens = self.pipe.scheduler.config, math.prod(self.shape[1:]) // 4
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        mu = c.base_shift + slope * (tokens - c.base_image_seq_len)
        self.pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        return self.pipe.scheduler.sigmas.tolist()

    def velocity(self, x, sigma, text):
        _, _, H, W = x.shape
        tokens, pooled = (part.expand(len(x), *part.shape[1:]) for part in text)
        packed = torch.pixel_unshuffle(x.to(self.dtype), 2).flatten(2).mT  # (B, H W / 4, 4 C), 2 x 2 a token
        text_ids = torch.zeros(tokens.shape[1], 3, device=x.device)
        image_ids = self.pipe._prepare_latent_image_ids(len(x), H // 2, W // 2, x.device, x.dtype)
        level, guidance = torch.tensor([[sigma], [self.guidance]], device=x.device).expand(2, len(x))
        v = self.transformer(packed, tokens, pooled, level, image_ids, text_ids, guidance, return_dict=False)
        return torch.pixel_shuffle(v[0].mT.unflatten(2, (H // 2, W // 2)), 2).float()


# By the class in model_index.json: the backbone, and whose preset a model of no alias takes.
BACKBONES = {"StableDiffusion3Pipeline": (SD3, "sd3.5-medium"), "FluxPipeline": (Flux, "flux.1-dev")}

# With its prefix, so that SD3.5's attn2 stays out.
LORA_TARGETS = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


def load_backbone(args):
    """The model with a LoRA that requires gradients, on DEVICE. Reads safetensors only. Raises BadInput."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            MODELS.get(args.model, [args.model])[0], use_safetensors=True,
            dtype={"default": getattr(torch, args.dtype), "vae": torch.float32})
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise BadInput(why_not_loaded(args.model, error)) from None
    backbone = BACKBONES[type(pipe).__name__][0](pipe, args)
    transformer = backbone.transformer
    if args.init_lora:
        try:
            pipe.load_lora_weights(args.init_lora, adapter_name="default", use_safetensors=True)
        except Exception as error:  # whatever diffusers raises: truncated, of another model, no LoRA at all
            raise BadInput(f"--init_lora {args.init_lora}: cannot be loaded ({error!r:.300})") from None
        lora = transformer.peft_config["default"]
        args.lora_rank, args.lora_alpha = lora.r, lora.lora_alpha
    else:
        torch.manual_seed(args.seed)
        transformer.add_adapter(peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha,
                                                init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    cast_training_params(transformer, torch.float32)  # the LoRA learns in fp32 whatever the model's precision
    if args.grad_checkpoint:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks()
    return backbone


# ------------------------------------------------------------------------------------------------------------
# Many processes: whole groups per rank, and sums of tensors

STOPPING = []  # not empty after SIGTERM: save and leave


def all_reduce(tensor):
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def stop_asked():
    """Whether any rank was told to stop. All ranks ask at the same places, so that all of them do."""
    return all_reduce(torch.tensor(float(len(STOPPING)), device=DEVICE)).item() > 0


# ------------------------------------------------------------------------------------------------------------
# 1-2. Sample and reward


class Slice(NamedTuple):
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
    window = args.sde_window or args.steps - 1
    start = int(rng(args.seed, WINDOW, epoch).integers(args.steps - window))
    return range(start, start + window)


def slots_of(args):
    """(updates_per_epoch, WORLD, n): the prompts, as places in the epoch, of every update and rank."""
    return torch.arange(args.groups).view(args.updates_per_epoch, WORLD, -1)


@torch.no_grad()
def sample(backbone, steps, text, keys):
    """Integrate a slice from noise to an image.

    keys: one per sample, (seed, epoch, prompt, member), which with the step gives its noise. Returns the
    latents (B, C, H, W) and x, v and eps of every noisy step: (T, 3, B, C, H, W).
    """

    def draw(number):
        """(B, C, H, W); 0 is the noise at sigma = 1, i + 1 that of step i."""
        values = [rng(*key, number).standard_normal(backbone.shape, np.float32) for key in keys]
        return torch.from_numpy(np.stack(values)).to(DEVICE)

    x, kept = draw(0), []
    for i, step in enumerate(steps):
        v = backbone.velocity(x, step.sigma, text)
        x_next = step.a * x + step.b * v
        if step.s > 0:
            eps = draw(i + 1)
            x_next += step.s * eps
            kept.append(torch.stack([x, v, eps]))
        x = x_next
    return x, torch.stack(kept) if kept else None


def rollout(backbone, args, epoch, steps, prompts, score):
    """Sample this rank's groups and score them, each slice while the next is being sampled.

    prompts: (prompt, metadata), of the whole epoch. score: (images, prompts, metadata) -> future of rewards.
    Returns this rank's slices, the (groups, G) rewards of all ranks, and the seconds spent waiting for them.
    Told to stop, it leaves the rest undone.
    """
    slots = slots_of(args)[:, RANK].flatten().tolist()
    texts = dict(zip(slots, backbone.encode([prompts[slot][0] for slot in slots]), strict=True))
    slices, futures = [], []
    passes = [(slot, start) for slot in slots for start in range(0, args.group_size, args.micro_batch)]
    for slot, start in tqdm(passes, desc="sample", leave=False, disable=RANK > 0):
        if STOPPING:
            break
        members = range(start, start + args.micro_batch)
        keys = [(args.seed, epoch, slot, member) for member in members]
        x, kept = sample(backbone, steps, texts[slot], keys)
        slices.append(Slice(slot, members, texts[slot], kept.to(backbone.resting)))
        futures.append(score(backbone.decode(x), *zip(*[prompts[slot]] * len(members), strict=True)))
    started = time.perf_counter()
    scores = torch.zeros(args.groups, args.group_size, dtype=torch.float64)
    for (slot, members, *_), future in zip(slices, futures, strict=True):
        scores[slot, list(members)] = torch.tensor(future.result(REWARD_TIMEOUT), dtype=torch.float64)
    waited = time.perf_counter() - started
    return slices, all_reduce(scores.to(DEVICE)).cpu(), waited  # the others' rows are 0: an exact sum


# ------------------------------------------------------------------------------------------------------------
# 4. Update


class Policy:
    """What is trained: the LoRA's parameters, their moving average and the optimizer."""

    def __init__(self, backbone, args):
        self.params = [p for p in backbone.transformer.parameters() if p.requires_grad]
        self.ema = EMAModel(self.params, decay=args.ema_decay)
        self.optimizer = torch.optim.AdamW(self.params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)
        self.skipped = 0  # updates without a finite gradient, in a row
        for p in self.params:
            p.grad = torch.zeros_like(p)
            # As AdamW does in its first step; already here, so that a checkpoint can be copied into it.
            moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            self.optimizer.state[p] = dict(step=torch.zeros(())) | moments

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
    terms, D = len(slots) * args.group_size * len(steps), math.prod(backbone.shape)
    stats = torch.zeros(3, *advantage.shape, len(steps), dtype=torch.float64)  # loss, rho, KL
    for piece in tqdm(slices, desc="update", leave=False, disable=RANK > 0):
        if piece.slot not in slots or not advantage[piece.slot].any():
            continue  # a dead group has no gradient, so it takes no passes
        A = advantage[piece.slot, list(piece.members)].float().to(DEVICE)  # (B,)
        for t, step in enumerate(steps):
            of_slice = slice_loss(backbone, args, step, t, piece, A)
            (of_slice[0].sum() * D).backward()
            stats[:, piece.slot, list(piece.members), t] = torch.stack(of_slice).detach().double().cpu()
    flat = all_reduce(torch.nn.utils.parameters_to_vector(p.grad for p in policy.params))
    torch.nn.utils.vector_to_parameters(flat / (terms * D), [p.grad for p in policy.params])
    norm = torch.nn.utils.clip_grad_norm_(policy.params, 1.0)
    policy.skipped = 0 if norm.isfinite() else policy.skipped + 1
    if policy.skipped == 3:
        raise FloatingPointError("3 updates in a row without a finite gradient; try a smaller --lr")
    if not policy.skipped:
        policy.optimizer.step()
    policy.optimizer.zero_grad(set_to_none=False)
    live = [slot for slot in slots if advantage[slot].any()]
    loss, rho, kl = all_reduce(stats.to(DEVICE)).cpu()[:, live].flatten(1, 2)  # (samples, T) each
    line = dict(loss=loss.sum() / terms, grad_norm=norm,
                ratio_mean=rho.mean(0), ratio_std=(rho - rho.mean(0)).square().mean(0).sqrt(),
                clip_high=(rho > args.clip).double().mean(0), clip_low=(rho < -args.clip).double().mean(0),
                kl=kl.mean(0) if args.kl_beta else torch.tensor(math.nan))  # NaN is logged as null
    line = {name: value.tolist() if value.isfinite().all() else None for name, value in line.items()}
    return dict(live=len(rho), skipped=policy.skipped > 0) | line


# ------------------------------------------------------------------------------------------------------------
# 5. Evaluate


def encode_once(backbone, args, prompts):
    """Embeddings of N prompts, (N, L, C) and (N, C), kept beside the run's folder by prompts and encoders.

    What the encoders make of an empty prompt stands for them.
    """
    key = repr([prompts, *(part.double().sum().item() for part in backbone.negative)]).encode()
    path = Path(args.run_dir).parent / "embeddings" / f"{hashlib.sha256(key).hexdigest()}.safetensors"
    if not path.exists():
        columns = [torch.cat(column) for column in zip(*backbone.encode(prompts), strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{RANK}-{os.getpid()}")
        save_file({str(i): column for i, column in enumerate(columns)}, partial)
        partial.rename(path)
    return [part for _, part in sorted(load_file(path, str(DEVICE)).items())]


@torch.no_grad()
def evaluate(backbone, policy, args, held_out, scorers, updates):
    """Draw held-out prompts with the averaged weights and the ODE sampler; score them by all scorers.

    Slices go round the ranks, the same for any number of them. The first, always rank 0's, also gives the
    sample sheet and the KL: that of the whole stochastic trajectory, as a mean over D.
    """
    ode, sde = (schedule(backbone.sigmas(args.eval_steps), eta, args.sde) for eta in (0.0, args.eta))
    scores = torch.zeros(len(held_out), len(scorers), dtype=torch.float64, device=DEVICE)
    kl = torch.zeros((), device=DEVICE)
    starts = range(0, len(held_out), args.micro_batch)[RANK::WORLD]
    with policy.averaged():
        for start in tqdm(starts, desc="evaluate", leave=False, disable=RANK > 0):
            index = range(len(held_out))[start : start + args.micro_batch]
            prompts, metadata = zip(*(held_out[i] for i in index), strict=True)
            text = encode_once(backbone, args, prompts)
            keys = [(args.seed, EVALUATION, i, 0) for i in index]
            images = backbone.decode(sample(backbone, ode, text, keys)[0])
            of_slice = [scorer(images, prompts, metadata) for scorer in scorers.values()]
            scores[list(index)] = torch.tensor(of_slice, dtype=torch.float64, device=DEVICE).T
            if start == 0:
                rewards.sheet(images, prompts, of_slice[0]).save(f"{args.run_dir}/samples/{updates:06d}.png")
                for step, (x, v, _) in zip(sde[:-1], sample(backbone, sde, text, keys)[1], strict=True):
                    kl += kl_to_base(backbone, step, x, v, text).mean() / step.dt
    means = dict(zip(scorers, all_reduce(scores).mean(0).tolist(), strict=True))
    gold, kl = {name: means[name] for name in args.gold}, all_reduce(kl).item()
    log(args, kind="eval", update=updates, proxy=means[args.reward], gold=gold, kl_to_base=kl)
    say(f"update {updates}: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items()))


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
    config = dict(args=asdict(args), commit=git.stdout.strip() or None, processes=WORLD,
                  device=torch.cuda.get_device_name(DEVICE) if ON_GPU else "cpu",
                  versions={package.name: package.version for package in distributions()})
    (Path(args.run_dir) / "samples").mkdir(parents=True, exist_ok=True)
    path = Path(args.run_dir) / "config.json"
    path.with_suffix(".partial").write_text(json.dumps(config, indent=2) + "\n")
    path.with_suffix(".partial").rename(path)


def checkpoints(args):
    """The run's whole checkpoints, oldest first."""
    return sorted(path for path in Path(args.run_dir).glob("checkpoint-*") if not path.suffix)


def save_checkpoint(backbone, policy, args, epoch, updates):
    """checkpoint-000123: the averaged LoRA for diffusers, and the whole state for --resume."""
    folder = Path(args.run_dir) / f"checkpoint-{updates:06d}"
    partial = folder.with_suffix(".partial")
    if folder.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    with policy.averaged():
        # Without the adapter's metadata diffusers would take alpha = rank, here half the strength.
        metadata = backbone.transformer.peft_config["default"].to_dict()
        backbone.pipe.save_lora_weights(partial, peft.get_peft_model_state_dict(backbone.transformer),
                                        transformer_lora_adapter_metadata=metadata)
    save_file({name: value.contiguous().cpu() for name, value in policy.tensors().items()},
              partial / "state.safetensors")
    logged = (Path(args.run_dir) / "metrics.jsonl").stat().st_size
    (partial / "state.json").write_text(json.dumps(dict(epoch=epoch, metrics_bytes=logged)) + "\n")
    os.sync()
    partial.rename(folder)  # a folder of this name is whole
    for old in checkpoints(args)[: -args.keep]:
        shutil.rmtree(old)


def load_checkpoint(policy, args):
    """Copy the last checkpoint into the policy, cut metrics.jsonl back to it. Returns the epochs done."""
    position = dict(epoch=0, metrics_bytes=0)
    for folder in checkpoints(args)[-1:]:
        try:
            position = json.loads((folder / "state.json").read_text())
            saved = load_file(folder / "state.safetensors")
            for name, tensor in policy.tensors().items():
                tensor.copy_(saved[name])
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise BadInput(f"{folder}: cannot be read; remove it to go on before it ({error})") from None
    metrics = Path(args.run_dir) / "metrics.jsonl"
    if RANK == 0 and metrics.exists():
        os.truncate(metrics, position["metrics_bytes"])
    return position["epoch"]


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(args):
    """Epochs, evaluations and checkpoints."""
    backbone = load_backbone(args)
    policy = Policy(backbone, args)
    if RANK == 0:
        write_config(args)
    done = load_checkpoint(policy, args) if args.resume else 0
    prompts, held_out = rewards.read_set(args.prompts)
    scorers = {name: rewards.load(name) for name in dict.fromkeys([args.reward, *args.gold])}
    check = partial(evaluate, backbone, policy, args, held_out[: args.eval_prompts], scorers)
    score = partial(ThreadPoolExecutor(1).submit, scorers[args.reward])  # on a thread, beside sampling
    say(f"{args.method} on {args.model} ({DEVICE.type}): {sum(map(torch.numel, policy.params)):,} weights "
        f"in the LoRA, {len(prompts)} prompts, {args.run_dir}\n{arithmetic(args)}")
    if not checkpoints(args):
        check(0)
    for epoch in (bar := tqdm(range(done, args.epochs), initial=done, total=args.epochs, disable=RANK > 0)):
        done = epoch + train_epoch(backbone, policy, args, epoch, prompts, score, bar)
        updates = done * args.updates_per_epoch
        if done > epoch and (done == args.epochs or done % args.eval_every == 0):
            check(updates)
        stop = stop_asked()
        if RANK == 0 and (stop or done == args.epochs or done % args.save_every == 0):
            save_checkpoint(backbone, policy, args, done, updates)
        if stop:
            say(f"stopped after epoch {done}; go on with: python guard.py --resume {args.run_dir}")
            break


def train_epoch(backbone, policy, args, epoch, prompts, score, bar):
    """Sample, reward, advantage, update, log. Returns whether it was done: no if told to stop in sampling."""
    started = time.perf_counter()
    steps = schedule(backbone.sigmas(args.steps), args.eta, args.sde, noisy_steps(args, epoch))
    chosen = [prompts[i] for i in prompt_order(args, epoch, len(prompts))]
    slices, scores, waited = rollout(backbone, args, epoch, steps, chosen, score)
    if stop_asked():
        return False
    sampled = time.perf_counter()
    advantage = advantages(scores)
    for number, slots in enumerate(slots_of(args).flatten(1).tolist()):
        line = update(backbone, policy, args, steps, slices, slots, advantage)
        line |= dict(epoch=epoch, update=epoch * args.updates_per_epoch + number + 1, first=number == 0)
        if line["update"] % 8 == 0 or not args.ema_decay:
            # Of this diffusers makes the decay, (1 + n) / (10 + n), lest a short run's average stay behind.
            policy.ema.optimization_step = line["update"]
            policy.ema.step(policy.params)
        log(args, kind="update", **line)
        high, low = (np.mean(line[name] or 0) for name in ("clip_high", "clip_low"))
        bar.set_postfix_str(f"reward {scores.mean():.3f}, clipped {high:.2f} above, {low:.2f} below")
        off = np.max(np.abs(line["ratio_mean"] or 0) + np.array(line["ratio_std"] or 0))
        if number == 0 and off > args.clip / 10:
            say(f"warning: before any update ratio - 1 is {off:.1e}; the clip range is {args.clip:.1e}")
    log(args, kind="rollout", epoch=epoch, reward_mean=scores.mean().item(), images=scores.numel(),
        reward_std=scores.std(correction=0).item(), dead_groups=(advantage == 0).all(1).sum().item(),
        seconds=dict(sample=sampled - started - waited, reward=waited, train=time.perf_counter() - sampled))
    return True


def main():
    """Exit code 0; 2 for bad input; 1 where the work was not done, and a line that says why."""
    signal.signal(signal.SIGTERM, lambda *_: STOPPING.append(True))
    try:
        args = parse_args()
        if args.dry_run:
            say(json.dumps(asdict(args), indent=2) + "\n" + arithmetic(args))
            return
        if ON_GPU:
            torch.cuda.set_device(DEVICE)
        if WORLD > 1:
            dist.init_process_group("nccl" if ON_GPU else "gloo", device_id=DEVICE if ON_GPU else None)
            dist.barrier()  # every rank has seen that the run's folder is free, before rank 0 writes there
        train(args)
    except BadInput as error:
        leave(2, error)
    except (rewards.RewardError, OSError, TimeoutError, FloatingPointError, KeyboardInterrupt) as error:
        leave(1, f"{type(error).__name__}: {error}; checkpoints are whole, go on with --resume")
    if WORLD > 1:
        dist.destroy_process_group()


def leave(code, error):
    """At once, without waiting for a reward that hangs."""
    if RANK == 0 or code == 1:
        print(f"guard.py: error: {error}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
