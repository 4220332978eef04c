"""GRPO-Guard in one file: reinforcement learning of flow-matching image models.

GRPO fine-tunes a text-to-image model on a reward. It draws a group of images per prompt with a stochastic
sampler, scores them, and makes those above their group's mean more likely. PPO's clip is meant to stop that
push once the policy has moved far enough. The paper (arXiv 2510.22319) finds that in flow models it does not:
the log of the importance ratio of new and old policy is centred below 0, and its standard deviation differs
many times over from one denoising step to another. So no one clip range stops good samples from above, the
reward goes on rising, and the pictures go bad. GRPO-Guard changes two equations:

    RatioNorm     log r^ = s (log r + mean(d²) / (2 s²)) = mean(d eps)        Eq. 8, in `log_ratio`
    reweighting   a step's objective is multiplied by delta = 1 / dt          in `reweighting`

In this project's own runs, on small models, a lower learning rate did most to slow this down. At a high rate
Guard kept more quality than Flow-GRPO, and at a low one it learned faster. The weights of its steps have the
larger signal-to-noise ratio, and its clip acts on both sides.

One epoch, as in the loop of `train`:

    1. sample      per prompt, G images with the SDE sampler; keep x, v and eps of every trained step
    2. reward      score the images, on a thread, while the next ones are being sampled
    3. advantage   A = (reward - average of its group) / (standard deviation of its group)
    4. update      twice, on half of the groups each: run the model again on the kept x; ratio; clip; delta;
                   backward; one AdamW step
    5. save        a line in metrics.jsonl, a checkpoint
    6. evaluate    now and then: held-out prompts by the ODE sampler, the reward, gold scores only watched

The clip acts from an epoch's second update on. In the first the policy is still the one that drew the images,
so the ratio is 1. In the second it says how far the first update, on other images, has moved the model. The
clip drops samples that the first update has already moved the way of their advantage, good ones up and bad
ones down. Samples that it has moved the wrong way keep their gradient, which points back. So a narrow clip is
a brake, and with a very narrow one the second update pushes against the first.

Symbols, the same in all of the file; mean(...) in an equation is over the D dimensions of one sample:

    here    in the paper                                       here    shapes
    sigma   t, the noise level, from 1 (noise) to 0 (image)    B       samples that the model sees at once
    g       sigma_t, the noise rate                            G       group size, samples per prompt
    s       sigma_t sqrt(dt), a step's standard deviation      T       trained steps: those with noise, s > 0
    d       mu_new - mu_old, the paper's -Delta mu             C, H, W channels, height, width of the latents
    eps     the step's noise, standard normal                  D       C * H * W, dimensions of a sample
    x       latents (1 - sigma) x0 + sigma x1, x1 noise        L, E    text tokens, width of an embedding
    v       velocity x1 - x0, what the transformer predicts
    dt      sigma - sigma_next > 0                             A       advantage
    a, b    of every sampler: mu = a x + b v,                  rho     ratio - 1 = expm1(log_ratio)
            x_next = mu + s eps, d = b (v_new - v_old)

Left out on purpose: trainer classes, callbacks, DDP (one flat all-reduce of the LoRA's gradients does), more
than one reward at a time. Where this code departs from the paper or from the authors' code a comment says
"Departure"; README.md has most of these in one table. Equations are numbered by our notes on version 2 of the
paper, not checked against the PDF.

    torchrun --nproc_per_node=8 guard.py --task ocr                       # SD3.5-M on 8 GPUs
    torchrun --nproc_per_node=8 guard.py --task ocr --model flux.1-dev
    python guard.py --task ocr --model tiny/sd3                           # a small real SD3, on a CPU
    python guard.py --resume runs/NAME                                    # go on where it stopped
"""

import fcntl
import json
import logging
import math
import os
import shutil
import sys
import time
import traceback
from collections import namedtuple
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch
import torch.distributed as dist
import transformers
from diffusers.training_utils import cast_training_params
from safetensors.torch import save
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import rewards
from rewards import BadInput

logging.getLogger("transformers.utils.import_utils").setLevel("ERROR")  # it says that torchvision is missing
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if ON_GPU else torch.device("cpu")
METHODS = ("flow-grpo", "temp-reweight", "mean-revised", "rationorm", "guard")
RATIO_NORM = ("rationorm", "guard")  # those with the ratio of Eq. 8
REWARD_DEADLINE = 600  # seconds from a rank's last image to its last reward

# ------------------------------------------------------------------------------------------------------------
# Settings


def flag(default, text, **more):
    """A field of Args: its default, what --help says, and more of argparse's options."""
    return field(default=default, metadata={"help": text} | more)


@dataclass
class Args:
    """The command line. Defaults are the paper's for SD3.5-M; PRESETS has what differs from them."""

    task: str = flag("ocr", "what to learn", choices=["ocr", "geneval", "pickscore"])
    reward: str = flag(None, "name in rewards.py or module:function; the task's own unless given")
    gold: list[str] = field(default_factory=list, metadata={"help": "rewards that are only logged, or none"})
    prompts: str = flag(None, "file, or folder in Flow-GRPO's layout; the task's own unless given")
    model: str = flag("sd3.5-medium", "sd3.5-medium, flux.1-dev, a folder or a hub id")
    method: str = flag("guard", "log-ratio and weight of the steps", choices=METHODS)
    sde: str = flag("flow", "sampler of Flow-GRPO, DanceGRPO or Flow-CPS", choices=["flow", "dance", "cps"])
    same_noise: bool = flag(False, "a group starts from one initial noise, as in DanceGRPO")
    sde_window: int | None = flag(None, "how many steps in a row have noise and are trained")
    steps: int = flag(10, "denoising steps in training; the last has no noise")
    eval_steps: int = flag(40, "denoising steps in evaluation")
    eta: float = flag(0.7, "noise level of the sampler")
    guidance: float = flag(4.5, "guidance scale in sampling and training; 1 is none for SD3")
    height: int = flag(512, "pixels")
    width: int = flag(512, "pixels")
    group_size: int = flag(24, "images per prompt")
    groups: int = flag(48, "prompts an epoch, over all processes")
    updates_per_epoch: int = flag(2, "optimizer updates an epoch, each on its share of the prompts")
    micro_batch: int = flag(8, "images in one pass of the transformer; divides group_size")
    epochs: int = flag(240, "epochs in all; 0 evaluates and ends")
    lr: float = flag(1e-4, "learning rate")
    clip: float | None = flag(None, "clip range of ratio - 1; the paper's times 65,536 / D unless given")
    kl_beta: float = flag(0.0, "weight of the KL to the model without its LoRA")
    lora_rank: int = flag(32, "rank of the LoRA")
    lora_alpha: int = flag(64, "alpha of the LoRA")
    init_lora: str = flag(None, "LoRA to start from, folder or file, of rank --lora_rank")
    ema_decay: float = flag(0.9, "largest decay of the LoRA's average, moved every 8 updates; 0: none")
    eval_every: int = flag(30, "epochs between evaluations")
    eval_prompts: int = flag(1024, "held-out prompts in an evaluation")
    save_every: int = flag(1, "epochs between checkpoints")
    keep: int = flag(3, "checkpoints that stay")
    dtype: str = flag("float16", "of the model, not the SDE", choices=["float32", "bfloat16", "float16"])
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    offload: bool = flag(False, "encoders, embeddings, VAE and the kept rollout are on the CPU when idle")
    seed: int = flag(0, "keys every random number")
    run_dir: str = flag(None, "folder of the run, new or empty; runs/DATE-TIME unless given")
    resume: str = flag(None, "folder of a run to go on with; other flags change those settings alone")
    dry_run: bool = flag(False, "print the settings and end")


MODELS = {
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
}
# What differs from Args, by the class of the pipeline. The rows of a run apply in order: all, its task,
# baseline, its sampler. Then those of guard.json, which a model's folder may hold, override them. `clip` is
# at D = 65,536.
SD3_PRESET = {
    "all": dict(clip=2e-6),
    "geneval": dict(epochs=930),
    "pickscore": dict(epochs=510, clip=4e-6),
    "baseline": dict(lr=3e-4, clip=1e-4),  # the methods with the ratio of Eq. 7
    "dance": dict(eta=0.3, same_noise=True),
}
FLUX = dict(steps=6, eval_steps=28, eta=0.9, guidance=3.5, lr=2e-4, dtype="bfloat16", grad_checkpoint=True)
FLUX_ROWS = {"all": dict(FLUX, clip=2e-6), "ocr": dict(epochs=270), "geneval": dict(epochs=630)}
PRESETS = {"StableDiffusion3Pipeline": SD3_PRESET, "FluxPipeline": SD3_PRESET | FLUX_ROWS}
# Lower bounds of the flags that are numbers; 1 for those not here.
LEAST = dict(steps=2, group_size=2, eta=1e-3, lr=0, clip=0, kl_beta=0, ema_decay=0, seed=0, epochs=0)


def require(condition, message):
    if not condition:
        raise BadInput(message)


def parse_args(argv=None):
    """The command line as Args. What is not given is the resumed run's or the preset's. Raises BadInput."""
    parser = transformers.HfArgumentParser(Args, prog="guard.py", allow_abbrev=False)
    parser.error = lambda message: require(False, message)
    given = parser.parse_args(argv)
    if given.resume:
        config = Path(given.resume) / "config.json"
        require(config.is_file(), f"--resume {given.resume}: expected a run's folder, with config.json")
        parser.set_defaults(**json.loads(config.read_text()))
    else:
        parser.set_defaults(**preset(given))
    args = Args(**vars(parser.parse_args(argv)))
    args.gold = [name for name in args.gold if name != "none"]
    args.run_dir = args.resume or args.run_dir or time.strftime("runs/%Y%m%d-%H%M%S")
    check(args)
    if given.clip is None and not args.resume:
        args.clip *= 65536 / math.prod(latent_shape(args))
    return args


def preset(given):
    """Settings by model, task, method and sampler."""
    own = Path(given.model) / "guard.json"
    own = json.loads(own.read_text()) if own.exists() else {}
    family = "guard" if given.method in RATIO_NORM else "baseline"
    settings = dict(prompts=f"prompts/{given.task}", reward=given.task)
    for table in (PRESETS[read_index(given.model)["_class_name"]], own):
        for row in ("all", given.task, family, given.sde):
            settings |= table.get(row, {})
    if given.prompts:
        settings.pop("gold", None)  # the gold rewards in guard.json suit the prompts there
    return settings


def read_index(name):
    """The model_index.json of a model: its pipeline's parts. Raises BadInput if guard.py cannot train it."""
    try:
        index = diffusers.DiffusionPipeline.load_config(MODELS.get(name, name))
    except (OSError, ValueError) as error:
        how = "if gated, accept its licence and run `hf auth login`; --model tiny/sd3 runs on a CPU"
        raise BadInput(f"--model {name}: {' '.join(str(error).split())[:200]}; {how}") from None
    kind, scheduler = index["_class_name"], (index["scheduler"] or [None, None])[1]
    require(kind in PRESETS, f"--model {name}: is a {kind}; expected {' or '.join(PRESETS)}")
    is_euler = scheduler == "FlowMatchEulerDiscreteScheduler"
    require(is_euler, f"--model {name}: has a {scheduler}; expected FlowMatchEulerDiscreteScheduler")
    return index


def latent_shape(args):
    """(C, H, W)"""
    vae = diffusers.AutoencoderKL.load_config(MODELS.get(args.model, args.model), subfolder="vae")
    scale = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels to a latent
    return vae["latent_channels"], args.height // scale, args.width // scale


def check(args):
    """Raise BadInput for what would fail late or in silence."""
    for name, value in vars(args).items():
        if type(value) in (int, float):
            least = LEAST.get(name, 1)
            require(least <= value < math.inf, f"--{name} {value}: expected {least} or more")
    G, updates, window = args.group_size, args.updates_per_epoch, args.sde_window or 1
    require(G % args.micro_batch == 0, f"--micro_batch {args.micro_batch}: expected a divisor of {G}")
    require(args.groups % updates == 0, f"--groups {args.groups}: expected a multiple of {updates}")
    require(window < args.steps, f"--sde_window {window}: expected at most {args.steps - 1}")
    names = [name.split(":")[-1] for name in args.gold]
    require(len(set(names)) == len(names), f"--gold {args.gold}: expected functions of different names")
    require(args.sde != "cps" or args.eta <= 1, f"--eta {args.eta}: expected at most 1 with cps")
    for name in ("height", "width"):
        require(getattr(args, name) % 16 == 0, f"--{name} {getattr(args, name)}: expected a multiple of 16")
    has_lora = not args.init_lora or Path(args.init_lora).exists() or newest_checkpoint(args)
    require(has_lora, f"--init_lora: there is no {args.init_lora}")
    training_set, held_out = rewards.prompt_files(args.prompts)
    rewards.read_prompts(training_set, [args.reward])
    rewards.read_prompts(held_out, [args.reward, *args.gold])


# ------------------------------------------------------------------------------------------------------------
# The maths: pure functions of numbers and tensors


def sde_coefficients(sigma: float, sigma_next: float, eta: float, kind: str) -> tuple[float, float, float]:
    """(a, b, s) of one denoising step: mu = a x + b v, x_next = mu + s eps.

    1 >= sigma > sigma_next >= 0; eta: noise level, 0 or more (cps: at most 1). kind: "flow" (Flow-GRPO, arXiv
    2505.05470), "dance" (DanceGRPO, arXiv 2505.07818) or "cps" (Flow-CPS, arXiv 2509.05952). Without noise,
    and at sigma_next = 0, each is the Euler step of diffusers' FlowMatchEulerDiscreteScheduler: (1, -dt, 0).
    With noise, raises ValueError for another kind.

    Departure: so the last step has no noise and is not trained. Flow-GRPO's pipelines add noise there too,
    and decode it; DanceGRPO, like us, does not.
    """
    dt = sigma - sigma_next
    if eta == 0 or sigma_next == 0:
        return 1.0, -dt, 0.0
    if kind == "cps":
        s = sigma_next * math.sin(eta * math.pi / 2)
        # mu = (1 - sigma_next) x0 + c x1, with x0 = x - sigma v and x1 = x + (1 - sigma) v
        c = math.sqrt(sigma_next**2 - s**2)  # the old noise that stays: c² + s² = sigma_next²
        return (1 - sigma_next) + c, -sigma * (1 - sigma_next) + (1 - sigma) * c, s
    if kind == "flow":
        # 1 - sigma is 0 at the first step, so Flow-GRPO takes the next step's sigma there.
        clean_share = 1 - sigma if sigma < 1 else 1 - sigma_next
        g = eta * math.sqrt(sigma / clean_share)
    elif kind == "dance":
        g = eta
    else:
        raise ValueError(f"unknown kind {kind!r}; expected flow, dance or cps")
    # mu = x - dt [v + g² / (2 sigma) (x + (1 - sigma) v)], sorted by x and v
    half = g**2 * dt / (2 * sigma)
    return 1 - half, -dt - half * (1 - sigma), g * math.sqrt(dt)


# One denoising step of a schedule, five numbers. It is a trained step if it has noise: s > 0.
Step = namedtuple("Step", "sigma dt a b s")


def make_schedule(sigmas, eta, kind, noisy=None) -> list[Step]:
    """n + 1 sigmas -> n steps. noisy: indices of those with noise, all unless given; the last has none."""
    schedule = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        level = eta if noisy is None or i in noisy else 0.0
        schedule.append(Step(sigma, sigma - sigma_next, *sde_coefficients(sigma, sigma_next, level, kind)))
    return schedule


def mean(x):
    """(B, ...) -> (B,): over the D dimensions of each sample, the "mean" of all equations."""
    return x.flatten(1).mean(1)


def log_prob(x_next: torch.Tensor, mu: torch.Tensor, s: float) -> torch.Tensor:
    """Log-density of a step under N(mu, s²), a mean over D and not a sum: Eq. 6.

    So it is the usual log-density divided by D, and so are log-ratios and the clip ranges that fit them.
    x_next, mu: (B, ...) -> (B,), in their dtype. Training does not call it: see `log_ratio`.
    """
    return mean(-((x_next - mu) ** 2) / (2 * s**2) - math.log(s) - 0.5 * math.log(2 * math.pi))


def log_ratio(v_new, v_old, eps, b: float, s: float, method: str) -> torch.Tensor:
    """Log of the importance ratio of a step by one of METHODS; v_new, v_old, eps: (B, ...) -> (B,).

    1. Eq. 7 is log_prob(x_next, mu_new, s) - log_prob(x_next, mu_old, s), with x_next = mu_old + s eps.
       Written out it is mean(d eps) / s - mean(d²) / (2 s²): a noise term and a shift.
    2. Let KL = sum(d²) / (2 s²), the step's, summed over D, in nats. The noise term has mean 0 and standard
       deviation sqrt(2 KL) / D. The shift is -KL / D.
    3. So the log-ratio is centred sqrt(KL/2) standard deviations below 0, for a sum over D as for a mean: 0.2
       at 0.1 nat, 0.7 at 1 nat, 3.2 at 20 nats. This is the left shift.
    4. On a mean over D = 65,536 a clip range of 1e-4 is 6.6 nats of the sum. One standard deviation is as
       large as that at KL = 21, and by then the centre lies 3.3 deviations low. So either nothing is clipped,
       or nearly only the low side.
    5. Eq. 8 leaves the shift out and multiplies by s. Its standard deviation is proportional to |b|, which
       varies 8-fold over the steps of SD3.5; that of Eq. 7 to |b| / s, 26-fold. So one clip range comes
       closer to fitting all steps.
    6. Guard's clip range is 2e-6. As a range of the summed log-ratio it is 2e-6 D / s = 0.131 / s nats, 0.2
       to 0.6: PPO's usual size. To keep that at another D, scale the range by 1/D.

    exp(Eq. 8) is no importance ratio any more. It measures how far the new mean lies along the noise that was
    drawn, and is used as a trust region.

    Departure: the authors subtract two log-probabilities, which loses digits. Here the difference is written
    out, in fp32, and is exactly 0 when v is unchanged. Departure: each sample has its own shift; the authors'
    code averages it over the batch.
    """
    d = b * (v_new - v_old)  # (B, ...), mu_new - mu_old
    if method in RATIO_NORM:
        return mean(d * eps)  # Eq. 8
    if method == "mean-revised":
        return mean(d * eps) / s  # Eq. 7 without the shift
    return mean(d * eps) / s - mean(d**2) / (2 * s**2)  # Eq. 7; the second term is the left shift


def reweighting(step: Step, eta: float, kind: str, method: str) -> float:
    """delta, the weight of a step's objective.

    The gradient of Eq. 8 with respect to v_new is b eps / D, so without delta a step counts in proportion to
    |b|. delta is 1/|b| up to a constant, so that steps count alike:

    - `flow`: 1/dt, since |b| = (1 + eta²/2) dt at every step but the first, where sigma = 1 and |b| = dt.
    - `dance` and `cps`: (1 + eta²/2) / |b|, since their b is not proportional to dt. The constant makes the
      scale that of `flow`. Departure: TeleBoost has (1 + eta² (1 - sigma) / (2 sigma)) / dt for DanceGRPO.

    Why it helps. At a step with little noise the reward says little about that noise. By Stein's identity the
    signal, E[A eps], is s times the gradient of the expected advantage with respect to x_next. The noise of
    A eps has size 1 at every step. Let w be the weight of a step's eps, and assume that this gradient, and
    what the LoRA does to v, are alike at all steps. Then the sum over the steps has the signal-to-noise ratio
    sum(w s) / sqrt(sum(w²)), at most sqrt(sum(s²)). On SD3.5 with `flow` it is 0.66 for Flow-GRPO
    (w = |b| / s), 0.87 for RatioNorm (w = |b|), 1.31 for Guard (w constant but at the first step), and 1.43
    at best (w = s). Measured on the small models the differences are larger: see experiments/README.md.
    """
    if method == "temp-reweight":  # a method of the paper's ablation
        return step.s
    if method != "guard":
        return 1.0
    if kind == "flow":
        return 1 / step.dt
    return (1 + eta**2 / 2) / abs(step.b)


def advantages(scores: torch.Tensor) -> torch.Tensor:
    """(groups, G) rewards -> (groups, G): each against its group, within ±5.

    A dead group, one whose rewards are all equal, gets zeros. Departure: DanceGRPO takes the unbiased
    deviation, and trains 60 % of the steps, drawn per sample.
    """
    deviation = scores.std(1, unbiased=False, keepdim=True)
    normalised = (scores - scores.mean(1, keepdim=True)) / (deviation + 1e-4)
    live = scores.amax(1, keepdim=True) > scores.amin(1, keepdim=True)  # rounding could leave a deviation
    return torch.where(live, normalised.clamp(-5, 5), 0.0)


def rng(*key):
    """A generator that depends on its key alone, so not on the number of processes nor on a restart.

    Departure: the authors' seeds depend on the process.
    """
    return np.random.default_rng(key)


# The second number of a key says what it is for: the epoch in training, else one of these.
EVALUATION, ORDER, WINDOW = 2**40, 2**40 + 1, 2**40 + 2


# ------------------------------------------------------------------------------------------------------------
# Backbones: prompt -> embeddings; x, sigma, embeddings -> v; latents -> images


class SD3:
    """Stable Diffusion 3 and 3.5 of any size, from a loaded StableDiffusion3Pipeline.

    Another backbone is a class like Flux, which overrides what differs of `embed`, `sigmas` and `velocity`,
    an entry of BACKBONES, and one of PRESETS. LORA_TARGETS must fit the names of its attention layers.
    """

    def __init__(self, pipe, args):
        self.pipe, self.transformer = pipe, pipe.transformer.to(DEVICE)
        self.guidance, self.dtype = args.guidance, getattr(torch, args.dtype)
        self.idle = "cpu" if args.offload else DEVICE  # where encoders, embeddings and VAE wait
        encoders = [part for name, part in pipe.components.items() if "text_encoder" in name]
        self.encoders = torch.nn.ModuleList(encoders)
        self.shape = latent_shape(args)
        for module in (self.encoders, pipe.vae, self.transformer):
            module.requires_grad_(False).eval()
        self.empty = self.encode([""])[""]  # the prompt that guidance leads away from

    @torch.no_grad()
    def encode(self, prompts):
        """prompt -> its embeddings (1, L, E) and (1, E). One by one: rounding depends on the batch size."""
        self.encoders.to(DEVICE)
        embeddings = {prompt: self.embed(prompt) for prompt in prompts}
        self.encoders.to(self.idle)
        return embeddings

    def embed(self, prompt):
        """Embeddings of the tokens, (1, L, E), and pooled, (1, E), of two widths E."""
        length = min(128, self.pipe.tokenizer_3.model_max_length)  # of T5's; less in small models
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, DEVICE, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return tokens.to(self.idle), pooled.to(self.idle)

    def sigmas(self, count, unshifted=None):
        """count + 1 noise levels from 1 to 0, as the model's scheduler sets them, or shifts those given."""
        config, image_tokens = self.pipe.scheduler.config, math.prod(self.shape[1:]) // 4
        # FLUX's scheduler shifts the levels by the number of image tokens; SD3's ignores mu.
        shortest, longest = config.base_image_seq_len, config.max_image_seq_len
        slope = (config.max_shift - config.base_shift) / (longest - shortest)
        shift = config.base_shift + slope * (image_tokens - shortest)
        self.pipe.scheduler.set_timesteps(count, sigmas=unshifted, mu=shift)
        return self.pipe.scheduler.sigmas.tolist()

    def velocity(self, x, sigma, embeddings):
        """v with guidance: (B, C, H, W) fp32 -> fp32. embeddings: of B prompts, from `encode`.

        Sampling and training both come here with the same slices, so that the first ratio is 1: to the bit on
        a CPU, as far as rounding is the same on a GPU.
        Departure: two passes of B with guidance, where the authors make one of 2 B.
        """
        v = self.predict(x, sigma, embeddings)
        if self.guidance > 1:
            v_empty = self.predict(x, sigma, [self.empty] * len(x))
            v = v_empty + self.guidance * (v - v_empty)
        return v

    def predict(self, x, sigma, embeddings):
        """One pass of the transformer."""
        tokens, pooled = together(embeddings)
        timestep = torch.full((len(x),), sigma, device=x.device) * 1000
        return self.transformer(x.to(self.dtype), tokens, pooled, timestep, return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, x):
        """(B, C, H, W) latents -> B PIL images, in chunks of at most 512 x 512 pixels, to save memory."""
        vae = self.pipe.vae.to(DEVICE)
        count = max(1, 64 * 64 // math.prod(x.shape[2:]))
        x = (x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        pixels = [vae.decode(latents, return_dict=False)[0] for latents in x.split(count)]
        vae.to(self.idle)
        return self.pipe.image_processor.postprocess(torch.cat(pixels))


class Flux(SD3):
    """FLUX.1-dev of any size, from a loaded FluxPipeline. Guidance is an input of it, not a second pass."""

    def embed(self, prompt):
        length = min(128, self.pipe.tokenizer_2.model_max_length)
        tokens, pooled, _ = self.pipe.encode_prompt(prompt, None, DEVICE, max_sequence_length=length)
        return tokens.to(self.idle), pooled.to(self.idle)

    def sigmas(self, count):
        return super().sigmas(count, np.linspace(1, 1 / count, count))

    def velocity(self, x, sigma, embeddings):
        B, _, H, W = x.shape
        tokens, pooled = together(embeddings)
        packed = torch.pixel_unshuffle(x.to(self.dtype), 2).flatten(2).mT  # (B, H W / 4, 4 C), 2 x 2 a token
        text_ids = torch.zeros(tokens.shape[1], 3, device=x.device)
        image_ids = self.pipe._prepare_latent_image_ids(B, H // 2, W // 2, x.device, x.dtype)
        level = torch.full((B,), sigma, device=x.device)
        has_guidance = self.transformer.config.guidance_embeds  # FLUX.1-schnell has none
        guidance = torch.full((B,), self.guidance, device=x.device) if has_guidance else None
        v = self.transformer(
            packed, tokens, pooled, level, image_ids, text_ids, guidance, return_dict=False
        )[0]
        return torch.pixel_shuffle(v.mT.unflatten(2, (H // 2, W // 2)), 2).float()


BACKBONES = {"StableDiffusion3Pipeline": SD3, "FluxPipeline": Flux}
# The prefix leaves SD3.5's attn2 out. Departure for FLUX: flow_grpo's own script has other targets.
LORA_TARGETS = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


def together(embeddings):
    """Embeddings of B prompts as one: (B, L, E) and (B, E)."""
    tokens, pooled = zip(*embeddings, strict=True)
    return torch.cat(tokens).to(DEVICE), torch.cat(pooled).to(DEVICE)


def load_backbone(args):
    """The model with a LoRA that requires gradients, on DEVICE. Reads safetensors only."""
    pipe = load_pipeline(args)
    backbone = BACKBONES[type(pipe).__name__](pipe, args)
    torch.manual_seed(args.seed)  # the same LoRA on every rank
    lora = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=LORA_TARGETS,
                           init_lora_weights="gaussian")
    backbone.transformer.add_adapter(lora)
    cast_training_params(backbone.transformer, torch.float32)  # it learns in fp32, whatever the model is in
    if args.init_lora and not newest_checkpoint(args):
        load_lora(backbone, args)
    if args.grad_checkpoint:
        backbone.transformer.enable_gradient_checkpointing()
    return backbone


def load_lora(backbone, args):
    """Start from the LoRA in --init_lora, at its own strength. Raises BadInput for other layers or ranks."""
    weights, about = backbone.pipe.lora_state_dict(
        args.init_lora, use_safetensors=True, return_lora_metadata=True)
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    own = peft.get_peft_model_state_dict(backbone.transformer)
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (own, weights)]
    wanted = f"the layers of LORA_TARGETS alone, of rank {args.lora_rank}, as diffusers saves them"
    require(shapes[0] == shapes[1], f"--init_lora {args.init_lora}: expected {wanted}")
    strength = (about or {}).get("transformer.lora_alpha", args.lora_rank) / args.lora_alpha
    scaled = {name: weight * strength if "lora_B" in name else weight for name, weight in weights.items()}
    peft.set_peft_model_state_dict(backbone.transformer, scaled)


def load_pipeline(args):
    """The model's pipeline, its VAE in fp32. Raises BadInput unless it is whole.

    Where weights or a tokenizer are missing, the libraries go on with random layers or with a stub.
    """
    place, loaded = MODELS.get(args.model, args.model), {}
    index = read_index(args.model)
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part[0]}
    for name, (library, kind) in parts.items():
        if name.startswith(("transformer", "text_encoder", "vae")):
            model_class = getattr(diffusers if library == "diffusers" else transformers, kind)
            dtype = torch.float32 if name == "vae" else getattr(torch, args.dtype)
            loaded[name], about = model_class.from_pretrained(
                place, subfolder=name, use_safetensors=True, torch_dtype=dtype, output_loading_info=True)
            missing = sorted(about["missing_keys"])
            require(not missing, f"--model {args.model}: {name} has no weights for {missing[:1]}")
    pipe = diffusers.DiffusionPipeline.from_pretrained(place, **loaded)
    for name, part in pipe.components.items():
        is_whole = not name.startswith("tokenizer") or len(part) > 20  # a stub has a few tokens
        require(is_whole, f"--model {args.model}: {name} has no vocabulary")
    return pipe


# ------------------------------------------------------------------------------------------------------------
# 1 and 2. Sample and reward

# B = micro_batch samples that go through the transformer together, in training all of one group:
#   numbers      list of B: a sample's place in the epoch; it belongs to the group number // group_size
#   embeddings   list of B: its prompt's
#   images       list of B PIL images
#   kept         list of T tensors (3, B, C, H, W): x, v_old and eps of every trained step
#   scores       a future of the (rewards, B) scores
Slice = namedtuple("Slice", "numbers embeddings images kept scores")


def prompts_of_epoch(args, epoch, prompts):
    """The epoch's prompts. One shuffled pass over all prompts follows another, across the epochs."""
    chosen = []
    for position in range(epoch * args.groups, (epoch + 1) * args.groups):
        which_pass, place = divmod(position, len(prompts))
        order = rng(args.seed, ORDER, which_pass).permutation(len(prompts))
        chosen.append(prompts[order[place]])
    return chosen


def noisy_steps(args, epoch):
    """Indices of the steps with noise, which are trained: all but the last, or the epoch's window of them.

    Like Flow-GRPO-Fast's the window lies in the first half of the steps, if it is no longer than that.
    """
    window = args.sde_window or args.steps - 1
    start = int(rng(args.seed, WINDOW, epoch).integers(max(args.steps // 2 - window, 0) + 1))
    return range(start, start + window)


@torch.no_grad()
def sample(backbone, schedule, embeddings, keys, same_noise=False):
    """Integrate a slice from noise to an image.

    embeddings: of B prompts. keys: B tuples (seed, phase, group, member), which give with the step a sample's
    noise. same_noise: the members of a group share the noise they start from. Returns the latents,
    (B, C, H, W), and a list of T tensors (3, B, C, H, W): x, v and eps of every trained step.
    """

    def draw(noise_keys):
        values = [rng(*key).standard_normal(backbone.shape, np.float32) for key in noise_keys]
        return torch.from_numpy(np.stack(values)).to(DEVICE)  # (B, C, H, W)

    # The last number of a key is 0 for the noise at sigma = 1, and i + 1 for step i.
    x = draw([(seed, phase, group, 0 if same_noise else member, 0) for seed, phase, group, member in keys])
    kept = []
    for i, step in enumerate(schedule):
        v = backbone.velocity(x, step.sigma, embeddings)
        mu = step.a * x + step.b * v
        if step.s > 0:
            eps = draw([(*key, i + 1) for key in keys])
            kept.append(torch.stack([x, v, eps]))
            x = mu + step.s * eps
        else:
            x = mu
    if not x.isfinite().all():
        raise FloatingPointError("a latent is not finite, as when float16 overflows; try --dtype bfloat16")
    return x, kept


def rollout(backbone, args, schedule, prompts, group_size, phase, scorer, count):
    """Sample `group_size` images of each prompt. Each slice is scored while the next one is being sampled.

    prompts: (prompt, metadata). phase: the epoch or EVALUATION, for the keys. count: how many of the scorer's
    rewards. Returns this rank's slices.
    """
    # Slices go round the ranks. The members of a group come one after another.
    total, size = len(prompts) * group_size, args.micro_batch
    numbers_of_slices = [range(total)[i : i + size] for i in range(0, total, size)][RANK::WORLD]
    my_prompts = {prompts[number // group_size][0] for numbers in numbers_of_slices for number in numbers}
    embeddings, slices = backbone.encode(my_prompts), []
    for numbers in tqdm(numbers_of_slices, desc="sample", leave=False, disable=RANK > 0):
        numbers = list(numbers)
        pairs = [prompts[number // group_size] for number in numbers]
        keys = [(args.seed, phase, *divmod(number, group_size)) for number in numbers]
        of_slice = [embeddings[prompt] for prompt, _ in pairs]
        x, kept = sample(backbone, schedule, of_slice, keys, args.same_noise)
        images = backbone.decode(x)
        kept = [tensors.to(backbone.idle) for tensors in kept]
        slices.append(Slice(numbers, of_slice, images, kept, scorer.submit(images, pairs, count)))
    return slices


class Scorer:
    """Rewards on a thread of their own. It is a daemon: a reward that hangs keeps no process alive."""

    def __init__(self, names):
        self.rewards = [rewards.load(name) for name in names]
        # CUDA's current device is each thread's own.
        self.thread = ThreadPool(1, torch.cuda.set_device if ON_GPU else None, (DEVICE,) if ON_GPU else ())

    def submit(self, images, pairs, count):
        """Start scoring by the first `count` rewards. pairs: (prompt, metadata) of each image."""
        prompts, metadata = [prompt for prompt, _ in pairs], [about for _, about in pairs]
        scorers = self.rewards[:count]
        return self.thread.apply_async(lambda: [reward(images, prompts, metadata) for reward in scorers])

    def collect(self, slices, total):
        """(rewards, total) scores of all ranks' slices. Raises what a reward raised, or TimeoutError."""
        deadline = time.monotonic() + REWARD_DEADLINE
        scores = torch.zeros(len(self.rewards), total, dtype=torch.float64)
        for piece in slices:
            found = torch.tensor(piece.scores.get(deadline - time.monotonic()), dtype=torch.float64)
            scores[: len(found), piece.numbers] = found
        return all_reduce(scores.to(DEVICE)).cpu()  # a sample is 0 on all ranks but one: the sum is exact


# ------------------------------------------------------------------------------------------------------------
# 4. Update


class Policy:
    """What is trained: the LoRA's parameters, their moving average as one flat vector, the optimizer."""

    def __init__(self, backbone, args):
        self.params = [p for p in backbone.transformer.parameters() if p.requires_grad]
        self.average = parameters_to_vector(self.params).detach()
        self.optimizer = torch.optim.AdamW(self.params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)
        # The loss is a mean over samples, steps and D, so dL/dv is about 4e-9 for SD3.5, which fp16 cannot
        # hold. The scaler multiplies the loss by 2**24, by less once that overflows, and divides gradients.
        # Departure: the authors' frozen weights are fp32, under fp16 autocast.
        self.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24, enabled=args.dtype == "float16")
        # A rank without a live group joins in each update: it needs a scale, and gradients of 0.
        self.scaler.scale(torch.zeros((), device=DEVICE))
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def apply_gradients(self):
        """One AdamW step with the sum of all ranks' gradients. Returns their norm before it is clipped to 1.

        In float16 an update whose gradient overflows is skipped, and the next ones are scaled by half.
        """
        gradients = [p.grad for p in self.params]
        vector_to_parameters(all_reduce(parameters_to_vector(gradients)), gradients)  # for any tensors
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.params, 1.0, error_if_nonfinite=not self.scaler.is_enabled())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def update_average(self, updates, decay):
        """Every 8 updates, with a decay of at most (1 + n) / (10 + n) after n of them; 0 is no average.

        Departure: by mistake the authors' code repeats this once per micro-batch, on 16 GPUs 4 times, which
        makes 0.9 a decay of 0.66. Theirs lags about 15 updates, ours about 72.
        """
        if updates % 8 == 0 or decay == 0:
            decay = min(decay, (1 + updates) / (10 + updates))
            self.average.lerp_(parameters_to_vector(self.params).detach(), 1 - decay)

    def swap_average(self):
        """Exchange the trained parameters and their moving average."""
        trained = parameters_to_vector(self.params).detach()
        vector_to_parameters(self.average, self.params)
        self.average = trained

    def state(self):
        params = parameters_to_vector(self.params).detach()
        return dict(params=params, average=self.average, optimizer=self.optimizer.state_dict(),
                    scaler=self.scaler.state_dict())

    def load_state(self, state, lr):
        """lr: of the command line, which may be another than the state's."""
        vector_to_parameters(state["params"].to(DEVICE), self.params)
        self.average = state["average"].to(DEVICE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = lr
        if state["scaler"]:  # empty if the run was not in float16 before
            self.scaler.load_state_dict(state["scaler"])


def update(backbone, policy, args, schedule, slices, A, group_ids):
    """One optimizer update on some of the epoch's groups. Returns what metrics.jsonl says of it.

    slices: this rank's of the epoch. A: (groups, G) advantages of the epoch. The loss is a mean over samples,
    trained steps and D. Departure: groups stay whole in an update, and dead ones count in the mean; the
    authors shuffle an epoch's samples and drop the dead ones.
    """
    trained = [step for step in schedule if step.s > 0]  # T of them
    terms = len(group_ids) * args.group_size * len(trained)
    # Dead groups are skipped, unless they have the gradient of a KL.
    learning = [group for group in group_ids if args.kl_beta or A[group].any()]
    my_slices = [piece for piece in slices if piece.numbers[0] // args.group_size in learning]
    values = torch.zeros(3, A.numel(), len(trained), dtype=torch.float64)  # loss, rho and KL of all samples
    for piece in tqdm(my_slices, desc="update", leave=False, disable=RANK > 0):
        advantage = A.flatten()[piece.numbers].float().to(DEVICE)  # (B,)
        for t, step in enumerate(trained):
            x, v_old, eps = piece.kept[t].to(DEVICE)  # (B, C, H, W) each
            v_new = backbone.velocity(x, step.sigma, piece.embeddings)
            # ratio - 1, since fp32 numbers near 1 are 1.2e-7 apart, and Guard's clip range is 2e-6
            rho = torch.expm1(log_ratio(v_new, v_old, eps, step.b, step.s, args.method))  # (B,)
            delta = reweighting(step, args.eta, args.sde, args.method)
            clipped = rho.clamp(-args.clip, args.clip)
            loss = -delta * torch.minimum(rho * advantage, clipped * advantage)  # (B,) Eq. 12 less a constant
            kl = torch.zeros_like(rho)
            if args.kl_beta:
                with torch.no_grad():
                    backbone.transformer.disable_adapters()
                    v_base = backbone.velocity(x, step.sigma, piece.embeddings)
                    backbone.transformer.enable_adapters()
                kl = mean((step.b * (v_new - v_base)) ** 2) / (2 * step.s**2)  # (B,) the step's KL / D
                # Not weighted by delta. dt kl is the authors' mean(d²) / (2 g²): s² = g² dt, but not in cps.
                loss = loss + args.kl_beta * step.dt * kl
            policy.scaler.scale(loss.sum() / terms).backward()
            values[:, piece.numbers, t] = torch.stack([loss, rho, kl]).detach().double().cpu()
    norm = policy.apply_gradients()
    values = all_reduce(values.to(DEVICE)).cpu().unflatten(1, A.shape)  # (3, groups, G, T)
    loss, rho, kl = values[:, group_ids]
    line = dict(loss=loss.sum() / terms, grad_norm=norm, kl=kl.mean((0, 1)))
    line |= clip_statistics(rho, A[group_ids], args.clip)
    # JSON has no NaN: null in its place.
    return {name: value.tolist() if value.isfinite().all() else None for name, value in line.items()}


def clip_statistics(rho, A, clip):
    """Per trained step, of the samples whose group is live: see `log`. rho (groups, G, T), A (groups, G)."""
    live = A.any(1)
    rho, A = rho[live].flatten(0, 1), A[live].view(-1, 1)  # (samples, T), (samples, 1)
    high, low = rho > clip, rho < -clip
    # PPO's minimum blocks these alone: beyond the range with A of the other sign a gradient passes.
    blocked = (high & (A > 0)) | (low & (A < 0))
    shares = dict(clip_high=high, clip_low=low, blocked=blocked)
    deviation = (rho - rho.mean(0)).square().mean(0).sqrt()
    line = dict(live=torch.tensor(len(rho)), rho_mean=rho.mean(0), rho_std=deviation)
    return line | {name: share.double().mean(0) for name, share in shares.items()}


# ------------------------------------------------------------------------------------------------------------
# Many processes
#
# Every rank samples and trains on whole slices, and what it has computed is summed over the ranks. Noise
# comes from keys, and slices are the same. So no number depends on how many ranks there are, except for the
# order of a sum. Nothing is sent at the start: all draw the same LoRA, and take the same summed gradients.


def all_reduce(tensor):
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def say(text):
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()  # os._exit would lose it


# ------------------------------------------------------------------------------------------------------------
# 5. Log, save, resume


def claim_folder(args):
    """Make the run's folder, or take that of a run that goes on, and lock it until the process ends.

    Raises BadInput for a folder that is not empty, and for a run that another process is at work on.
    """
    folder = Path(args.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # an int: nothing closes it before the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"--run_dir {folder}: another process is at work on this run") from None
    if not args.resume:
        is_new = not any(folder.iterdir())
        require(is_new, f"--run_dir {folder}: is not empty; --resume {folder} goes on with a run")
        save_settings(args)
    (folder / "samples").mkdir(exist_ok=True)


def save_settings(args):
    """config.json; the old one stays until the new one is whole."""
    path = Path(args.run_dir) / "config.json"
    path.with_suffix(".partial").write_text(json.dumps(asdict(args), indent=2) + "\n")
    path.with_suffix(".partial").replace(path)


def log(args, **line):
    """A line of metrics.jsonl.

    start    versions, processes, device
    rollout  one epoch's sampling: reward_mean and reward_std over its `images`; dead_groups; sigma of each
             trained step; seconds spent sampling, waiting for rewards, training; memory, the most so far, in
             GiB of a GPU
    update   first: the epoch's first, where rho is still 0; live: samples not in dead groups; loss; grad_norm
             before it is clipped to 1. Per trained step, noisiest first: kl to the base, in nats divided by
             D, of all samples, 0 unless it is in the loss; of the live ones rho_mean and rho_std, of
             rho = ratio - 1; clip_high and clip_low, shares with rho > clip and rho < -clip; blocked, the
             share whose gradient PPO blocks: the high ones with A > 0 and the low ones with A < 0
    eval     of held-out prompts after `update` updates: reward, gold
    """
    if RANK == 0:
        with open(Path(args.run_dir) / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def save_checkpoint(backbone, policy, args, position):
    """checkpoint-000123 (updates): the averaged LoRA for diffusers, and the whole state for --resume.

    position: epochs and updates done, and in `saved` the names of the checkpoints that this run has written
    and not deleted. `saved` is brought up to date.
    """
    folder = Path(args.run_dir) / f"checkpoint-{position['updates']:06d}"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    policy.swap_average()
    weights = peft.get_peft_model_state_dict(backbone.transformer)
    policy.swap_average()
    # With alpha / rank in lora_B the file needs no alpha, which some readers ignore.
    scale = args.lora_alpha / args.lora_rank
    weights = {f"transformer.{name}": weight * scale if "lora_B" in name else weight
               for name, weight in weights.items()}
    (partial / "pytorch_lora_weights.safetensors").write_bytes(save(weights, {"format": "pt"}))
    shutil.copy(Path(args.run_dir) / "metrics.jsonl", partial)
    position["saved"].append(folder.name)
    too_old = position["saved"][: -args.keep]
    del position["saved"][: -args.keep]
    torch.save(dict(position=position, **policy.state()), partial / "state.pt")
    partial.replace(folder)  # a folder of this name is whole
    for name in too_old:
        shutil.rmtree(folder.with_name(name), ignore_errors=True)


def newest_checkpoint(args):
    """The folder of the run's last checkpoint, or None."""
    return max(Path(args.run_dir).glob("checkpoint-" + 6 * "[0-9]"), default=None)


def load_checkpoint(policy, args):
    """Put the newest checkpoint into the policy, cut metrics.jsonl back to it. Returns its `position`.

    Every rank reads it: on several machines --resume needs a disk that they share.
    """
    folder, position = newest_checkpoint(args), dict(epochs=0, updates=0, saved=[])
    if folder:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        position = state["position"]
        fits = len(state["params"]) == len(policy.average)
        require(fits, f"--resume {args.run_dir}: its LoRA has another size than --lora_rank or --model say")
        policy.load_state(state, args.lr)
    if RANK == 0:
        kept = (folder / "metrics.jsonl").read_text() if folder else ""
        (Path(args.run_dir) / "metrics.jsonl").write_text(kept)
        if args.epochs > position["epochs"]:  # not when --resume is only to evaluate
            save_settings(args)
        versions = {part.__name__: part.__version__ for part in (torch, diffusers, transformers, peft)}
        log(args, kind="start", versions=versions, processes=WORLD, device=str(DEVICE))
    is_same = all_reduce(torch.tensor(position["epochs"], device=DEVICE)) == WORLD * position["epochs"]
    require(is_same, f"--resume {args.run_dir}: the processes see other checkpoints; they need a shared disk")
    return position


# ------------------------------------------------------------------------------------------------------------
# 6. Evaluate


@torch.no_grad()
def evaluate(backbone, policy, args, scorer, updates):
    """Draw held-out prompts by the ODE sampler with the averaged weights: the reward, and gold scores."""
    prompts = rewards.read_prompts(rewards.prompt_files(args.prompts)[1])[: args.eval_prompts]
    schedule = make_schedule(backbone.sigmas(args.eval_steps), 0.0, args.sde)
    policy.swap_average()
    slices = rollout(backbone, args, schedule, prompts, 1, EVALUATION, scorer, 1 + len(args.gold))
    policy.swap_average()
    scores = scorer.collect(slices, len(prompts))  # (rewards, prompts)
    reward, *gold = scores.mean(1).tolist()
    gold = dict(zip([name.split(":")[-1] for name in args.gold], gold, strict=True))
    log(args, kind="eval", update=updates, reward=reward, gold=gold)
    say(f"update {updates}: reward {reward:.4f}" + "".join(f", {name} {gold[name]:.4f}" for name in gold))
    if RANK == 0:
        images = [image.resize((256, 256 * image.height // image.width)) for image in slices[0].images]
        columns = math.gcd(len(images), 4)
        page = diffusers.utils.make_image_grid(images, len(images) // columns, columns)
        page.save(f"{args.run_dir}/samples/{updates:06d}.png")


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(args):
    """Epochs, checkpoints and evaluations. Raises what a reward raises, and BadInput as `load_backbone`."""
    backbone = load_backbone(args)
    policy = Policy(backbone, args)
    position = load_checkpoint(policy, args)
    scorer = Scorer([args.reward, *args.gold])
    prompts = rewards.read_prompts(rewards.prompt_files(args.prompts)[0])
    evaluations = {*range(0, args.epochs, args.eval_every), args.epochs}  # numbers of epochs done
    sheet = Path(args.run_dir) / f"samples/{position['updates']:06d}.png"
    start = position["epochs"]
    # Due now, or made after this checkpoint and so cut from metrics.jsonl.
    if start in evaluations or start > args.epochs or sheet.exists():
        evaluate(backbone, policy, args, scorer, position["updates"])
    bar = tqdm(range(start, args.epochs), initial=start, total=args.epochs, desc="epoch", disable=RANK > 0)
    for epoch in bar:
        # 1. Sample: G images per prompt, slice by slice.
        times = [time.perf_counter()]
        schedule = make_schedule(backbone.sigmas(args.steps), args.eta, args.sde, noisy_steps(args, epoch))
        chosen = prompts_of_epoch(args, epoch, prompts)
        slices = rollout(backbone, args, schedule, chosen, args.group_size, epoch, scorer, count=1)
        times.append(time.perf_counter())
        # 2. Reward: wait for what the thread has not scored yet.
        scores = scorer.collect(slices, args.groups * args.group_size)[0].view(args.groups, args.group_size)
        times.append(time.perf_counter())
        bar.set_postfix_str(f"reward {scores.mean():.3f}")
        # 3. Advantage: each image against its group.
        A = advantages(scores)  # (groups, G)
        # 4. Update: each on its own groups, so in the second rho says how far the first has moved the policy.
        for k, group_ids in enumerate(torch.arange(args.groups).view(args.updates_per_epoch, -1).tolist()):
            line = update(backbone, policy, args, schedule, slices, A, group_ids)
            position["updates"] += 1
            policy.update_average(position["updates"], args.ema_decay)
            log(args, kind="update", epoch=epoch, update=position["updates"], first=k == 0, **line)
        times.append(time.perf_counter())
        # 5. Save, before the evaluation, so that a gold score that fails costs no epoch.
        log(args, kind="rollout", epoch=epoch, **rollout_line(schedule, scores, times))
        position["epochs"] = epoch + 1
        if RANK == 0 and ((epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs):
            save_checkpoint(backbone, policy, args, position)
        # 6. Evaluate on held-out prompts.
        if epoch + 1 in evaluations:
            evaluate(backbone, policy, args, scorer, position["updates"])


def rollout_line(schedule, scores, times):
    """See `log`. scores (groups, G); times, in seconds, before sampling and after each of the three parts."""
    seconds = dict(zip(("sample", "reward", "train"), np.diff(times).tolist(), strict=True))
    line = dict(images=scores.numel(), reward_mean=scores.mean().item(), seconds=seconds)
    line["reward_std"] = scores.std(correction=0).item()
    line["dead_groups"] = (scores.amax(1) == scores.amin(1)).sum().item()
    line["sigma"] = [step.sigma for step in schedule if step.s > 0]
    line["memory"] = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None
    return line


def main():
    """Exit code 0; 2 and one line for bad input; 1 and a traceback for anything else, at once."""
    try:
        args = parse_args()
        D = math.prod(latent_shape(args))
        say(f"{args.method} on {args.model} ({DEVICE}): lr {args.lr:g}, clip {args.clip:.3g} at D = {D:,}, "
            f"{args.groups} prompts x {args.group_size} images an epoch, {args.run_dir}")
        if args.dry_run:
            say(json.dumps(asdict(args), indent=2))
            return
        if RANK == 0:
            claim_folder(args)
        if ON_GPU:
            torch.cuda.set_device(DEVICE)
            torch.set_float32_matmul_precision("high")  # TF32 in the LoRA's matmuls; rho needs none
        if WORLD > 1:
            # Longer than a reward may take, so that its own error comes before that of ranks that wait.
            wait = timedelta(seconds=3 * REWARD_DEADLINE)
            dist.init_process_group("nccl" if ON_GPU else "gloo", timeout=wait)
        train(args)
    except BadInput as error:
        print(f"guard.py: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        if isinstance(error, torch.OutOfMemoryError):
            print("try --grad_checkpoint, --offload or a smaller --micro_batch", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # without waiting for a reward that hangs, or for the other ranks
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
