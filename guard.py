"""GRPO-Guard in one file: reinforcement learning of flow-matching image models.

GRPO fine-tunes a text-to-image model on a reward. It draws a group of images per prompt with a stochastic
sampler, scores them, and pushes the model towards those that scored above their group's mean. PPO's clip is
meant to stop that push once the policy has moved far enough. In flow models, the paper says, it does not:
the importance ratio of new and old policy lies below 1 on average, and its spread differs by orders of
magnitude over the denoising steps. So good samples hardly reach the upper clip: the reward goes up, and the
pictures go bad. GRPO-Guard (arXiv 2510.22319) mends that with two equations:

    RatioNorm     log r^ = s (log r + mean(d²) / (2 s²)) = mean(d eps)        Eq. 8, a line of `log_ratio`
    reweighting   a step's objective is multiplied by delta = 1 / dt          a line of `reweighting`

One epoch, as in `train_epoch` and in the loop of `train`:

    1. sample      per prompt, G images with the SDE sampler; keep x, v and eps of every trained step
    2. reward      score the images, on a thread, while the next ones are being sampled
    3. advantage   A = (reward - mean of its group) / (standard deviation of its group)
    4. update      run the model again on the kept x; ratio; clip; delta; backward; one AdamW step
    5. log, save   metrics.jsonl, a checkpoint
    6. evaluate    now and then: held-out prompts by the ODE sampler, the reward, gold scores only watched

Symbols, the same in all of the file. "mean" in the maths is always over the D dimensions of one sample:

    x       latents (1 - sigma) x0 + sigma x1, x1 noise        B        samples in a slice
    v       velocity x1 - x0, what the transformer predicts    G        group size, samples per prompt
    sigma   noise level, from 1 (noise) to 0 (image)           T        trained steps: those with noise, s > 0
    dt      sigma - sigma_next > 0                             C, H, W  channels, height, width of the latents
    mu, s   mean and deviation: x_next = mu + s eps            D        C * H * W, dimensions of a sample
    a, b    mu = a x + b v, for every sampler                  L, E     text tokens, width of an embedding
    eps     the step's noise, standard normal                  A        advantage
    d       mu_new - mu_old = b (v_new - v_old)                rho      ratio - 1 = expm1(log_ratio)

Left out on purpose: trainer classes, callbacks, DDP (one flat all-reduce of the LoRA gradients does). Beside
this file: rewards, which are plain functions in rewards.py and scorers/, and settings/command_line.py, which
turns flags and presets into checked `Args`. Where this code departs from the paper or from the authors' code
a comment says "Departure"; README.md lists them in one table.

    python guard.py --task ocr                                              # a tiny real SD3, on a CPU
    torchrun --nproc_per_node=8 guard.py --task ocr                         # SD3.5-M on 8 GPUs
    torchrun --nproc_per_node=8 guard.py --task ocr --model flux.1-dev
    python guard.py --resume runs/NAME                                      # go on where it stopped
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel, cast_training_params
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import rewards
from scorers.background import TIMEOUT, Scorers, report_evaluation, result_of, sheet
from settings import command_line
from settings.command_line import BY_TASK, TINY, TINY_BY_TASK, TINY_FLUX, TINY_SD3

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if ON_GPU else torch.device("cpu")
METHODS = ("flow-grpo", "temp-reweight", "mean-revised", "rationorm", "guard")

# ------------------------------------------------------------------------------------------------------------
# Settings


def flag(default, text, **more):
    """A field of Args: its default, what --help says, and more of argparse's options."""
    return field(default=default, metadata={"help": text} | more)


@dataclass
class Args:
    """The command line. Defaults are the paper's for SD3.5-M; MODELS and rewards.TASKS say the rest."""

    task: str = flag("ocr", "what to learn", choices=rewards.TASKS)
    reward: str = flag("ocr", "what to train on; the task's own unless given", choices=rewards.REWARDS)
    gold: list[str] = flag(None, "rewards watched, never trained on", choices=[*rewards.REWARDS, "none"])
    prompts: str = flag(None, "file, or folder in Flow-GRPO's layout; the task's own unless given")
    gold_prompts: str = flag(None, "as prompts: what gold is drawn from; PickScore's unless given")
    model: str = flag(None, "alias, folder or hub id; sd3.5-medium by torchrun on GPUs, else tiny-sd3")
    method: str = flag("guard", "log-ratio and weight of the steps", choices=METHODS)
    sde: str = flag("flow", "sampler of Flow-GRPO, DanceGRPO or Flow-CPS", choices=["flow", "dance", "cps"])
    sde_window: int = flag(None, "have noise in, and train, only so many steps, drawn anew each epoch")
    steps: int = flag(10, "denoising steps in training; the last has no noise")
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
    clip: float = flag(2e-6, "clip range of rho = ratio - 1; it goes as 1/sqrt(D), see log_ratio")
    kl_beta: float = flag(0.0, "weight of the KL to the model without its LoRA")
    lora_rank: int = flag(32, "rank of the LoRA")
    lora_alpha: int = flag(64, "alpha of the LoRA")
    init_lora: str = flag(None, "LoRA to start from, folder or file; it sets rank and alpha")
    ema_decay: float = flag(0.9, "largest decay of the LoRA's moving average; 0 for none")
    eval_every: int = flag(30, "epochs between evaluations")
    eval_prompts: int = flag(1024, "held-out prompts in an evaluation")
    save_every: int = flag(1, "epochs between checkpoints")
    keep: int = flag(3, "checkpoints that stay")
    dtype: str = flag("float16", "of the model, not the SDE", choices=["float32", "bfloat16", "float16"])
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    offload: bool = flag(False, "encoders, embeddings, VAE and the kept rollout wait on the CPU while unused")
    seed: int = flag(0, "keys every random number")
    run_dir: str = flag(time.strftime("runs/%Y%m%d-%H%M%S"), "folder of the run")
    resume: str = flag(None, "folder of a run to go on with")
    dry_run: bool = flag(False, "print the resolved settings and the arithmetic, load nothing")


# ------------------------------------------------------------------------------------------------------------
# The maths: pure functions of numbers and tensors


def sde_coefficients(sigma: float, sigma_next: float, eta: float, kind: str) -> tuple[float, float, float]:
    """(a, b, s) of one denoising step: mu = a x + b v, x_next = mu + s eps.

    1 >= sigma > sigma_next >= 0; eta: noise level, 0 or more (cps: at most 1). kind: "flow" (Flow-GRPO, arXiv
    2505.05470), "dance" (DanceGRPO, arXiv 2505.07818) or "cps" (Flow-CPS, arXiv 2509.05952). Without noise,
    and at sigma_next = 0, each is the Euler step of diffusers' FlowMatchEulerDiscreteScheduler: (1, -dt, 0).
    So the last step has no noise and is not trained. With noise, raises ValueError for another kind.
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
        below = 1 - sigma if sigma < 1 else 1 - sigma_next  # at sigma = 1 the next step's
        g = eta * math.sqrt(sigma / below)  # noise rate: s² = g² dt
    elif kind == "dance":
        g = eta
    else:
        raise ValueError(f"unknown kind {kind!r}; expected flow, dance or cps")
    # mu = x - dt [v + g² / (2 sigma) (x + (1 - sigma) v)], sorted by x and v
    half = g**2 * dt / (2 * sigma)
    return 1 - half, -dt - half * (1 - sigma), g * math.sqrt(dt)


# One denoising step of a schedule, five numbers. It is a trained step if it has noise: s > 0.
Step = namedtuple("Step", "sigma dt a b s")


def schedule(sigmas, eta, kind, noisy=None) -> list[Step]:
    """n + 1 sigmas -> n steps. noisy: indices of the steps with noise, all but the last unless given."""
    steps = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        level = eta if noisy is None or i in noisy else 0.0
        steps.append(Step(sigma, sigma - sigma_next, *sde_coefficients(sigma, sigma_next, level, kind)))
    return steps


def mean(x):
    """(B, ...) -> (B,): over the D dimensions of each sample, the "mean" of all equations."""
    return x.flatten(1).mean(1)


def log_prob(x_next: torch.Tensor, mu: torch.Tensor, s: float) -> torch.Tensor:
    """Log-density of a step under N(mu, s²), a mean over D and not a sum: Eq. 6.

    x_next, mu: (B, ...) -> (B,), in their dtype. Training does not call it: see `log_ratio`.
    """
    return mean(-((x_next - mu) ** 2) / (2 * s**2) - math.log(s) - 0.5 * math.log(2 * math.pi))


def log_ratio(v_new, v_old, eps, b: float, s: float, method: str) -> torch.Tensor:
    """Log of the importance ratio of a step by one of METHODS; v_new, v_old, eps: (B, ...) -> (B,).

    Eq. 7 is log_prob(x_next, mu_new, s) - log_prob(x_next, mu_old, s), where x_next = mu_old + s eps.
    Departure: the authors subtract two log-probabilities, which loses digits. Here the difference is written
    out, and is exactly 0 when v is unchanged.

    Its second term is the left shift. It is sqrt(KL/2) times the spread of the first, KL being the step's,
    summed over D. PPO usually stops within a fraction of a nat, where that is little. But a clip range of
    1e-4 on the mean over D = 65,536 is 6.6 nats on the sum, and at a spread of that size the shift is 3.3
    times as large: good samples hardly reach the upper clip. E[ratio] is 1 for a summed log_prob, where a few
    large ratios make up for the shift, and exp(-KL/D + KL/D²) < 1 for the mean. Eq. 8 leaves the shift out.
    Departure: each sample has its own shift; the authors' code averages over the batch.

    Eq. 8 is a mean over D of products d eps, so at equal d its spread goes as 1/sqrt(D), and so must the
    clip range: the paper's 2e-6 at D = 65,536 (16 x 64 x 64) is 2.3e-5 at D = 512, the tiny models'.
    """
    d = b * (v_new - v_old)  # (B, ...), mu_new - mu_old
    if method in ("rationorm", "guard"):
        return mean(d * eps)  # Eq. 8
    if method == "mean-revised":
        return mean(d * eps) / s  # Eq. 7 without the shift
    return mean(d * eps) / s - mean(d**2) / (2 * s**2)  # Eq. 7; the second term is the left shift


def reweighting(step: Step, eta: float, kind: str, method: str) -> float:
    """delta, the weight of a step's objective.

    The gradient of Eq. 8 with respect to v_new is b eps / D, so that a step counts in proportion to |b|.
    For `flow` |b| = (1 + eta²/2) dt, but dt at the first step; divided by dt it is alike at all the others.
    For `dance` and `cps` b is not proportional to dt, so |b| itself is divided out; 1 + eta²/2 makes the
    scale that of `flow`. Departure: others print (1 + eta²/2) / dt for DanceGRPO, which is nearly as even.
    """
    if method == "temp-reweight":  # a method of the paper's ablation
        return step.s
    if method != "guard":
        return 1.0
    if kind == "flow":
        return 1 / step.dt
    return (1 + eta**2 / 2) / abs(step.b)


def surrogate(rho, A, clip, delta):
    """(B,) PPO's clipped objective, reweighted: Eq. 12 without its constant delta A, since ratio = 1 + rho.

    In rho, because fp32 numbers near 1 are 1.2e-7 apart, and Guard's clip range is 2e-6.
    """
    return delta * torch.minimum(rho * A, rho.clamp(-clip, clip) * A)


def advantages(scores: torch.Tensor) -> torch.Tensor:
    """(groups, G) rewards -> (groups, G): each against its group, within ±5.

    A dead group, one whose rewards are all equal, gets zeros.
    """
    spread = scores.std(1, unbiased=False, keepdim=True)
    normalised = (scores - scores.mean(1, keepdim=True)) / (spread + 1e-4)
    live = scores.amax(1, keepdim=True) > scores.amin(1, keepdim=True)
    return torch.where(live, normalised.clamp(-5, 5), 0.0)


def rng(*key):
    """A generator that depends on its key alone, so not on the number of processes nor on a restart.

    Departure: the authors' seeds depend on the process.
    """
    return np.random.default_rng(key)


EVALUATION, ORDER, WINDOW = 2**40, 2**40 + 1, 2**40 + 2  # in a key, where others have the epoch


# ------------------------------------------------------------------------------------------------------------
# Backbones: prompt -> embeddings; x, sigma, embeddings -> v; latents -> images


class SD3:
    """Stable Diffusion 3 and 3.5 of any size, from a loaded StableDiffusion3Pipeline.

    Another backbone is a class like this or like Flux, where only what differs is written, and a row of
    MODELS. LORA_TARGETS must fit the names of its attention layers.
    """

    pipeline = "StableDiffusion3Pipeline"  # the class in its model_index.json

    def __init__(self, pipe, args):
        self.pipe, self.transformer = pipe, pipe.transformer.to(DEVICE)
        self.guidance, self.dtype = args.guidance, getattr(torch, args.dtype)
        self.resting = "cpu" if args.offload else DEVICE  # where encoders, embeddings and VAE wait
        encoders = [part for name, part in pipe.components.items() if "text_encoder" in name]
        self.encoders = torch.nn.ModuleList(encoders)
        self.patch = 2 * pipe.vae_scale_factor  # pixels to a side of what one token draws
        height, width = command_line.fitting_resolution(args, pipe.transformer, self.patch)
        self.shape = (pipe.vae.config.latent_channels, 2 * height // self.patch, 2 * width // self.patch)
        for module in (self.encoders, pipe.vae, self.transformer):
            module.requires_grad_(False).eval()
        self.empty = self.encode([""])[""]  # the prompt that guidance leads away from

    @torch.no_grad()
    def encode(self, prompts):
        """prompt -> its embeddings (1, L, E) and (1, E). One by one: other batch sizes round otherwise."""
        self.encoders.to(DEVICE)
        embeddings = {prompt: self.embed(prompt) for prompt in prompts}
        self.encoders.to(self.resting)
        return embeddings

    def embed(self, prompt):
        """Embeddings of the tokens, (1, L, E), and pooled, (1, E), of two widths E."""
        length = min(128, self.pipe.tokenizer_3.model_max_length)  # of T5's; less in the tiny models
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, DEVICE, do_classifier_free_guidance=False, max_sequence_length=length)
        return tokens.to(self.resting), pooled.to(self.resting)

    def sigmas(self, steps):
        """steps + 1 noise levels from 1 to 0, as the model's own scheduler sets them."""
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.sigmas.tolist()

    def velocity(self, x, sigma, texts):
        """v with guidance: (B, C, H, W) fp32 -> fp32. texts: the embeddings of B prompts, from `encode`.

        Sampling and training both come here with the same slices, so that the first ratio is 1: to the bit on
        a CPU, as far as rounding is the same on a GPU.
        Departure: two passes of B with guidance, where the authors make one of 2 B.
        """
        v = self.predict(x, sigma, texts)
        if self.guidance > 1:
            v_empty = self.predict(x, sigma, [self.empty] * len(x))
            v = v_empty + self.guidance * (v - v_empty)
        return v

    def predict(self, x, sigma, texts):
        """One pass of the transformer."""
        tokens, pooled = together(texts)
        timestep = torch.full((len(x),), sigma, device=x.device) * 1000
        return self.transformer(x.to(self.dtype), tokens, pooled, timestep, return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, x):
        """(B, C, H, W) latents -> B PIL images, at a time as many as make one of 512 x 512: memory."""
        vae = self.pipe.vae.to(DEVICE)
        count = max(1, 64 * 64 // math.prod(x.shape[2:]))
        x = (x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        pixels = [vae.decode(latents, return_dict=False)[0] for latents in x.split(count)]
        vae.to(self.resting)
        return self.pipe.image_processor.postprocess(torch.cat(pixels))


class Flux(SD3):
    """FLUX.1-dev of any size, from a loaded FluxPipeline. Guidance is an input of it, not a second pass."""

    pipeline = "FluxPipeline"

    def embed(self, prompt):
        length = min(128, self.pipe.tokenizer_2.model_max_length)
        tokens, pooled, _ = self.pipe.encode_prompt(prompt, None, DEVICE, max_sequence_length=length)
        return tokens.to(self.resting), pooled.to(self.resting)

    def sigmas(self, steps):
        """The shift of the noise levels depends on the number of image tokens."""
        c, tokens = self.pipe.scheduler.config, math.prod(self.shape[1:]) // 4
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        shift = c.base_shift + slope * (tokens - c.base_image_seq_len)
        self.pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=shift)
        return self.pipe.scheduler.sigmas.tolist()

    def velocity(self, x, sigma, texts):
        B, _, H, W = x.shape
        tokens, pooled = together(texts)
        packed = torch.pixel_unshuffle(x.to(self.dtype), 2).flatten(2).mT  # (B, H W / 4, 4 C), 2 x 2 a token
        text_ids = torch.zeros(tokens.shape[1], 3, device=x.device)
        image_ids = self.pipe._prepare_latent_image_ids(B, H // 2, W // 2, x.device, x.dtype)
        level = torch.full((B,), sigma, device=x.device)
        guidance = torch.full((B,), self.guidance, device=x.device)
        v = self.transformer(
            packed, tokens, pooled, level, image_ids, text_ids, guidance, return_dict=False)[0]
        return torch.pixel_shuffle(v.mT.unflatten(2, (H // 2, W // 2)), 2).float()


def together(texts):
    """Embeddings of B prompts as one: (B, L, E) and (B, E)."""
    tokens, pooled = zip(*texts, strict=True)
    return torch.cat(tokens).to(DEVICE), torch.cat(pooled).to(DEVICE)


# A model's folder or hub id, the class that runs it, its settings where they are not those of Args, more of
# them by task, and what replaces these for the baseline: flow-grpo, temp-reweight and mean-revised.
Model = namedtuple("Model", "place backbone settings by_task baseline")
FLUX = dict(steps=6, eval_steps=28, eta=0.9, guidance=3.5, lr=2e-4, dtype="bfloat16", grad_checkpoint=True)
BASELINE = dict(lr=3e-4, clip=1e-4)
MODELS = {  # a model without an alias takes the first row that has its pipeline's class
    "sd3.5-medium": Model("stabilityai/stable-diffusion-3.5-medium", SD3, {}, BY_TASK, BASELINE),
    "flux.1-dev": Model("black-forest-labs/FLUX.1-dev", Flux, FLUX, BY_TASK, BASELINE),
    "tiny-sd3": Model(TINY_SD3, SD3, TINY, TINY_BY_TASK, dict(clip=1.1e-3)),
    "tiny-flux": Model(TINY_FLUX, Flux, TINY, TINY_BY_TASK, dict(clip=1.1e-3)),
}
# With its prefix, so that SD3.5's attn2 stays out. Departure for FLUX: flow_grpo's own script has others.
LORA_TARGETS = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


def load_backbone(args):
    """The model with a LoRA that requires gradients, on DEVICE. Reads safetensors only. Raises BadInput."""
    model = command_line.find_model(args.model, MODELS)
    dtypes = {"default": getattr(torch, args.dtype), "vae": torch.float32}
    with command_line.bad_model(args.model, MODELS):  # damaged, gated, offline, not in this diffusers
        pipe = diffusers.DiffusionPipeline.from_pretrained(model.place, use_safetensors=True, dtype=dtypes)
    backbone = model.backbone(pipe, args)
    add_lora(backbone, args)
    if args.grad_checkpoint:
        backbone.transformer.enable_gradient_checkpointing()
    return backbone


def add_lora(backbone, args):
    """A new LoRA, or --init_lora's. On resume its newest checkpoint's, so that --init_lora may be gone."""
    if args.init_lora:
        source = max(checkpoints(args), default=args.init_lora)
        with command_line.bad_input(f"--init_lora {source}: cannot be loaded"):
            backbone.pipe.load_lora_weights(source, adapter_name="default", use_safetensors=True)
        lora = backbone.transformer.peft_config["default"]
        args.lora_rank, args.lora_alpha = lora.r, lora.lora_alpha
    else:
        torch.manual_seed(args.seed)
        lora = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=LORA_TARGETS,
                               init_lora_weights="gaussian")
        backbone.transformer.add_adapter(lora)
    cast_training_params(backbone.transformer, torch.float32)  # it learns in fp32, whatever the model is in


# ------------------------------------------------------------------------------------------------------------
# 1-2. Sample and reward

# B = micro_batch samples that go through the transformer together, in training all of one group:
#   numbers, keys   lists of B: a sample's place in the epoch, the key of its noise
#   texts, images   lists of B: its prompt's embeddings, its image
#   kept            a list of T tensors (3, B, C, H, W): x, v_old and eps of every trained step
Slice = namedtuple("Slice", "numbers keys texts images kept")


def prompt_order(args, epoch, count):
    """Indices of the epoch's prompts: one shuffled pass over all prompts follows another."""
    positions = range(epoch * args.groups, (epoch + 1) * args.groups)
    return [int(rng(args.seed, ORDER, p // count).permutation(count)[p % count]) for p in positions]


def noisy_steps(args, epoch):
    """Indices of the steps with noise, which are trained: all but the last, or the epoch's window of them."""
    window = args.sde_window or args.steps - 1
    start = int(rng(args.seed, WINDOW, epoch).integers(args.steps - window))
    return range(start, start + window)


@torch.no_grad()
def sample(backbone, steps, texts, keys):
    """Integrate a slice from noise to an image.

    texts: the embeddings of B prompts. keys: B, each of which gives with the step a sample's noise. Returns
    the latents (B, C, H, W), and a list of T tensors (3, B, C, H, W): x, v and eps of every trained step.
    """

    def draw(last):
        """(B, C, H, W). last, the end of the keys: 0 for the noise at sigma = 1, i + 1 for step i."""
        values = [rng(*key, last).standard_normal(backbone.shape, np.float32) for key in keys]
        return torch.from_numpy(np.stack(values)).to(DEVICE)

    x, kept = draw(0), []
    for i, step in enumerate(steps):
        v = backbone.velocity(x, step.sigma, texts)
        x_next = step.a * x + step.b * v  # mu
        if step.s > 0:
            eps = draw(i + 1)
            x_next += step.s * eps
            kept.append(torch.stack([x, v, eps]))
        x = x_next
    return x, kept


def rollout(backbone, args, steps, prompts, group_size, epoch, names, scorers):
    """Sample `group_size` images of each prompt; score each slice while the next one is being sampled.

    prompts: (prompt, metadata). names: of the rewards. Sample i belongs to prompt i // group_size; slices of
    `micro_batch` samples go round the ranks. The same slices and the same noise for any number of ranks make
    the same images and scores; gradients then differ by the order of a sum. Returns this rank's slices, the
    (names, N) scores of all ranks, and the seconds spent waiting for them after the last image.
    """
    N = len(prompts) * group_size
    mine = [numbers.tolist() for numbers in torch.arange(N).split(args.micro_batch)[RANK::WORLD]]
    embeddings = backbone.encode({prompts[i // group_size][0] for numbers in mine for i in numbers})
    slices, futures = [], []
    for numbers in tqdm(mine, desc="sample", leave=False, disable=RANK > 0):
        pairs = [prompts[i // group_size] for i in numbers]
        keys = [(args.seed, epoch, i // group_size, i % group_size) for i in numbers]
        texts = [embeddings[prompt] for prompt, _ in pairs]
        x, kept = sample(backbone, steps, texts, keys)
        images = backbone.decode(x)
        futures.append(scorers.submit(names, images, pairs))
        slices.append(Slice(numbers, keys, texts, images, [tensors.to(backbone.resting) for tensors in kept]))
    started = time.perf_counter()
    scores = torch.zeros(len(names), N, dtype=torch.float64)
    for piece, future in zip(slices, futures, strict=True):
        scores[:, piece.numbers] = result_of(future)
    waited = time.perf_counter() - started
    return slices, all_reduce(scores.to(DEVICE)).cpu(), waited  # the others' columns are 0: an exact sum


# ------------------------------------------------------------------------------------------------------------
# 4. Update


class Policy:
    """What is trained: the LoRA's parameters, their moving average and the optimizer."""

    def __init__(self, backbone, args):
        lora = {name: p for name, p in backbone.transformer.named_parameters() if p.requires_grad}
        self.names, self.params = list(lora), list(lora.values())
        self.ema = EMAModel(self.params, decay=args.ema_decay)
        self.optimizer = torch.optim.AdamW(self.params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)
        self.loss_scale, self.skipped = 1.0, 0  # the second: updates without a finite gradient, in a row
        for p in self.params:
            p.grad = torch.zeros_like(p)  # also on a rank that has nothing to learn from

    def step(self, divisor):
        """One AdamW step with the sum of all ranks' gradients / divisor. Returns their norm before clipping.

        A gradient that is not finite, as when fp16 overflows, is skipped, and the loss scale halved for good.
        """
        gradients = [p.grad for p in self.params]
        total = all_reduce(parameters_to_vector(gradients))
        vector_to_parameters(total / (divisor * self.loss_scale), gradients)
        norm = clip_grad_norm_(self.params, 1.0)
        self.skipped = 0 if norm.isfinite() else self.skipped + 1
        if self.skipped == 10:
            raise FloatingPointError("10 updates in a row without a finite gradient; try a smaller --lr")
        if self.skipped:
            self.loss_scale /= 2
            say(f"skipped an update: its gradient is not finite; the loss scale is {self.loss_scale} now")
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def update_average(self, updates):
        """Every 8 updates, with a decay of at most (1 + n) / (10 + n) after n of them: diffusers' warm-up.

        Departure: the authors do so once a micro-batch. With a decay of 0 it is the live parameters.
        """
        if updates % 8 == 0 or self.ema.decay == 0:
            self.ema.optimization_step = updates
            self.ema.step(self.params)

    @contextlib.contextmanager
    def averaged(self):
        """The moving average stands in for the live parameters meanwhile."""
        self.ema.store(self.params)
        self.ema.copy_to(self.params)
        try:
            yield
        finally:
            self.ema.restore(self.params)


def kl_to_base(backbone, step, x, v, texts):
    """(B,) mean(d²) / (2 s²), d = mu - mu of the model without its LoRA: the step's KL divided by D."""
    backbone.transformer.disable_adapters()
    with torch.no_grad():
        v_base = backbone.velocity(x, step.sigma, texts)
    backbone.transformer.enable_adapters()
    d = step.b * (v - v_base)
    return mean(d**2) / (2 * step.s**2)


def slice_loss(backbone, args, step, t, piece, A):
    """A slice at the t-th trained step: loss (B,) to be minimised, rho (B,) and KL (B,)."""
    x, v_old, eps = piece.kept[t].to(DEVICE)  # (B, C, H, W) each
    v_new = backbone.velocity(x, step.sigma, piece.texts)
    rho = torch.expm1(log_ratio(v_new, v_old, eps, step.b, step.s, args.method))
    delta = reweighting(step, args.eta, args.sde, args.method)
    loss = -surrogate(rho, A, args.clip, delta)
    kl = torch.zeros_like(rho)
    if args.kl_beta:  # outside delta. Times dt it is mean(d²) / (2 g²), the authors' form, since s² = g² dt
        kl = kl_to_base(backbone, step, x, v_new, piece.texts)
        loss = loss + args.kl_beta * step.dt * kl
    return loss, rho, kl


def update(backbone, policy, args, steps, slices, advantage, groups):
    """One optimizer update on some groups, by their numbers. Returns what metrics.jsonl says of it.

    slices: this rank's of the epoch; advantage: (groups, G) of the epoch. The loss is a mean over samples, T
    and D, which makes dL/dv about 4e-9 for SD3.5, less than fp16 can hold. So sums are back-propagated, and
    the fp32 gradients divided in the end.

    Departures: the authors scale gradients by autocast's scaler. Their epochs are shuffled and their dead
    samples dropped; here groups stay whole in an update, and dead ones count in the mean.
    """
    trained, D = [step for step in steps if step.s > 0], math.prod(backbone.shape)
    terms = len(groups) * args.group_size * len(trained)
    values = torch.zeros(3, advantage.numel(), len(trained), dtype=torch.float64)  # loss, rho, KL
    # A dead group has no gradient but its KL's, so it takes no passes.
    learning = [group for group in groups if args.kl_beta or advantage[group].any()]
    mine = [piece for piece in slices if piece.numbers[0] // args.group_size in learning]
    for piece in tqdm(mine, desc="update", leave=False, disable=RANK > 0):
        A = advantage.flatten()[piece.numbers].float().to(DEVICE)  # (B,)
        for t, step in enumerate(trained):
            loss, rho, kl = slice_loss(backbone, args, step, t, piece, A)
            (loss.sum() * D * policy.loss_scale).backward()
            values[:, piece.numbers, t] = torch.stack([loss, rho, kl]).detach().double().cpu()
    norm = policy.step(terms * D)
    values = all_reduce(values.to(DEVICE)).cpu().unflatten(1, advantage.shape)  # (3, groups, G, T)
    loss, rho, kl = values[:, groups]
    kl = kl.mean((0, 1)) if args.kl_beta else torch.tensor(math.nan)
    line = dict(loss=loss.sum() / terms, grad_norm=norm, kl=kl, **statistics(args, rho, advantage[groups]))
    return dict(skipped=policy.skipped > 0) | {name: for_json(value) for name, value in line.items()}


def statistics(args, rho, advantage):
    """Per trained step, of the samples whose group is live: see `log`. rho (n, G, T), advantage (n, G)."""
    live = advantage.any(1)
    rho, A = rho[live].flatten(0, 1), advantage[live].view(-1, 1)  # (samples, T), (samples, 1)
    high, low = rho > args.clip, rho < -args.clip
    # PPO's min blocks these alone: beyond the range with A of the other sign a gradient passes.
    blocked = (high & (A > 0)) | (low & (A < 0))
    shares = dict(clip_high=high, clip_low=low, blocked=blocked)
    means = {name: where.double().mean(0) for name, where in shares.items()}
    deviation = (rho - rho.mean(0)).square().mean(0).sqrt()
    return dict(live=torch.tensor(len(rho)), ratio_mean=rho.mean(0), ratio_std=deviation) | means


def for_json(tensor):
    """JSON has no NaN and no infinity: None in their place."""
    return tensor.tolist() if tensor.isfinite().all() else None


# ------------------------------------------------------------------------------------------------------------
# The epoch and the loop


def train_epoch(backbone, policy, args, epoch, prompts, scorers, bar):
    """Sample, reward, advantage, update, log."""
    started = time.perf_counter()
    steps = schedule(backbone.sigmas(args.steps), args.eta, args.sde, noisy_steps(args, epoch))
    chosen = [prompts[i] for i in prompt_order(args, epoch, len(prompts))]
    slices, scores, waited = rollout(
        backbone, args, steps, chosen, args.group_size, epoch, [args.reward], scorers)
    sampled = time.perf_counter()
    advantage = advantages(scores.view(args.groups, args.group_size))
    shares = torch.arange(args.groups).view(args.updates_per_epoch, -1).tolist()  # a group is in one update
    for place, groups in enumerate(shares):
        # The first update is on-policy: rho is 0 there, so the clip can act in the later ones only, where rho
        # says how far the ones before, with other images, have moved the policy. With one it never acts.
        first, updates = place == 0, epoch * args.updates_per_epoch + place + 1
        line = update(backbone, policy, args, steps, slices, advantage, groups)
        policy.update_average(updates)
        log(args, kind="update", epoch=epoch, update=updates, first=first, **line)
        off = np.max(np.abs(line["ratio_mean"] or 0) + np.array(line["ratio_std"] or 0))
        if first and off > args.clip / 10:  # exactly 0 on a CPU in fp32
            say(f"warning: before any update ratio - 1 is {off:.1e}; the clip range is {args.clip:.1e}")
        bar.set_postfix_str(f"reward {scores.mean():.3f}, clip blocks {np.mean(line['blocked'] or 0):.0%}")
    log(args, kind="rollout", epoch=epoch, reward_mean=scores.mean().item(), images=scores.numel(),
        reward_std=scores.std(correction=0).item(), dead_groups=(advantage == 0).all(1).sum().item(),
        sigma=[step.sigma for step in steps if step.s > 0],
        seconds=dict(sample=sampled - started - waited, reward=waited, train=time.perf_counter() - sampled))


def train(args):
    """Epochs, checkpoints and evaluations."""
    backbone = load_backbone(args)
    policy = Policy(backbone, args)
    start = load_checkpoint(policy, args) if args.resume else 0
    prompts, _ = rewards.read_set(args.prompts)
    scorers = Scorers([args.reward, *args.gold], DEVICE, backbone.patch)
    if RANK == 0:
        command_line.write_config(args, DEVICE)
    say(f"{args.method} on {args.model} ({DEVICE.type}): {sum(map(torch.numel, policy.params)):,} weights "
        f"in the LoRA, {len(prompts)} prompts, {args.run_dir}\n{command_line.arithmetic(args)}")
    evaluations = {*range(0, args.epochs, args.eval_every), args.epochs}  # after so many epochs
    page = Path(args.run_dir) / f"samples/{start * args.updates_per_epoch:06d}.png"
    if start in evaluations or page.exists():  # an evaluation after the last checkpoint is done again
        evaluate(backbone, policy, args, scorers, start * args.updates_per_epoch)
    bar = tqdm(range(start, args.epochs), initial=start, total=args.epochs, desc="epoch", disable=RANK > 0)
    for epoch in bar:
        train_epoch(backbone, policy, args, epoch, prompts, scorers, bar)
        done = epoch + 1
        # Saved before it is evaluated, so that a gold score that fails costs no epoch.
        if RANK == 0 and (done == args.epochs or done % args.save_every == 0):
            save_checkpoint(backbone, policy, args, done)
        if done in evaluations:
            evaluate(backbone, policy, args, scorers, done * args.updates_per_epoch)


@torch.no_grad()
def evaluate(backbone, policy, args, scorers, updates):
    """Draw held-out prompts by the ODE sampler with the averaged weights: reward, gold scores, looks, KL.

    kl_to_base is the KL of the first slice's whole stochastic trajectory, divided by D: the plain sum of its
    steps', where the loss of training weighs each by dt.
    """
    ode, sde = (schedule(backbone.sigmas(args.eval_steps), eta, args.sde) for eta in (0.0, args.eta))
    names = {args.prompts: [args.reward, *rewards.LOOKS]}
    if args.gold:  # of the same drawing if the two sets are one
        names[args.gold_prompts] = names.get(args.gold_prompts, []) + args.gold
    means, kl = {}, torch.zeros((), device=DEVICE)
    with policy.averaged():
        for path in names:
            prompts = rewards.read_set(path)[1][: args.eval_prompts]
            slices, scores, _ = rollout(backbone, args, ode, prompts, 1, EVALUATION, names[path], scorers)
            means |= {(path, name): row.mean().item() for name, row in zip(names[path], scores, strict=True)}
            if path == args.prompts and RANK == 0:
                first = slices[0]
                captions = [prompts[i][0] for i in first.numbers]
                page = sheet(first.images, captions, scores[0, first.numbers].tolist())
                page.save(f"{args.run_dir}/samples/{updates:06d}.png")
                _, kept = sample(backbone, sde, first.texts, first.keys)
                for step, (x, v, _) in zip(sde[:-1], kept, strict=True):
                    kl += kl_to_base(backbone, step, x, v, first.texts).mean()
    gold = {name: means[args.gold_prompts, name] for name in args.gold}
    looks = {name: means[args.prompts, name] for name in rewards.LOOKS}
    proxy, kl = means[args.prompts, args.reward], all_reduce(kl).item()
    log(args, kind="eval", update=updates, proxy=proxy, gold=gold, looks=looks, kl_to_base=kl)
    if RANK == 0:
        report_evaluation(Path(args.run_dir) / "metrics.jsonl")


# ------------------------------------------------------------------------------------------------------------
# Many processes: every rank has its slices, and tensors are summed over ranks


def all_reduce(tensor):
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def say(text):
    if RANK == 0:
        tqdm.write(text)


# ------------------------------------------------------------------------------------------------------------
# Log, save and resume


def log(args, **line):
    """A line of metrics.jsonl.

    rollout  one epoch's sampling: reward_mean and reward_std over its `images`; dead_groups; sigma of each
             trained step; seconds spent sampling, waiting for rewards, training
    update   first: the epoch's first, where rho is still 0; live: samples not in dead groups; skipped: its
             gradient was not finite; loss; grad_norm before clipping to 1. Per trained step, noisiest first:
             kl to the base, of all samples, if it is in the loss; of the live ones ratio_mean and ratio_std,
             of rho = ratio - 1; clip_high and clip_low, shares with rho > clip and rho < -clip; blocked, the
             share whose gradient PPO blocks: the high ones with A > 0 and the low ones with A < 0
    eval     of held-out prompts: proxy, the trained reward; gold; looks; kl_to_base. See `evaluate`
    """
    if RANK == 0:
        with open(Path(args.run_dir) / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def checkpoints(args):
    """The run's whole checkpoints, oldest first."""
    return sorted(path for path in Path(args.run_dir).glob("checkpoint-*") if not path.suffix)


def save_checkpoint(backbone, policy, args, epochs):
    """checkpoint-000123 (updates): the averaged LoRA for diffusers, and the whole state for --resume."""
    folder = Path(args.run_dir) / f"checkpoint-{epochs * args.updates_per_epoch:06d}"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with policy.averaged():
        # Without the adapter's metadata diffusers would take alpha = rank, here half the strength.
        weights = peft.get_peft_model_state_dict(backbone.transformer)
        metadata = backbone.transformer.peft_config["default"].to_dict()
        backbone.pipe.save_lora_weights(partial, weights, transformer_lora_adapter_metadata=metadata)
    state, moments = {}, policy.optimizer.state_dict()["state"]
    for i, name in enumerate(policy.names):
        tensors = dict(live=policy.params[i].detach(), average=policy.ema.shadow_params[i])
        tensors |= moments.get(i, {})  # none before the first step
        state |= {f"{kind}.{name}": tensor.cpu().contiguous() for kind, tensor in tensors.items()}
    save_file(state, partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps(dict(epoch=epochs, loss_scale=policy.loss_scale)) + "\n")
    shutil.copy(Path(args.run_dir) / "metrics.jsonl", partial)
    for path in partial.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    partial.replace(folder)  # a folder of this name is whole
    for old in checkpoints(args)[: -args.keep]:
        shutil.rmtree(old)


def load_checkpoint(policy, args):
    """Put the last checkpoint into the policy, and metrics.jsonl back to it. Returns the epochs done.

    Every rank reads it: on several machines --resume needs a disk that they share. Raises BadInput if it is
    damaged, with all files as they were.
    """
    metrics = Path(args.run_dir) / "metrics.jsonl"
    if not checkpoints(args):
        metrics.unlink(missing_ok=True)
        return 0
    folder = checkpoints(args)[-1]
    with command_line.bad_input(f"{folder}: cannot be read; remove it to go on before it"):
        position = json.loads((folder / "state.json").read_text())
        state, optimizer = load_file(folder / "state.safetensors"), policy.optimizer.state_dict()
        for i, name in enumerate(policy.names):
            policy.params[i].data.copy_(state[f"live.{name}"])
            policy.ema.shadow_params[i].copy_(state[f"average.{name}"])
            kinds = [kind for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}.{name}" in state]
            optimizer["state"][i] = {kind: state[f"{kind}.{name}"] for kind in kinds}
        policy.optimizer.load_state_dict(optimizer)
        policy.loss_scale = position["loss_scale"]
        if RANK == 0:
            shutil.copy(folder / "metrics.jsonl", metrics)
    return position["epoch"]


# ------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    """The command line as Args. What is not given is the resumed run's or the preset's. Raises BadInput."""
    return command_line.parse(argv, Args, MODELS)


def main():
    """Exit code 0; 2 for bad input; 1 where the work was not done, and a line that says why."""
    try:
        args = parse_args()
        if args.dry_run:
            say(json.dumps(asdict(args), indent=2) + "\n" + command_line.arithmetic(args))
            return
        if ON_GPU:
            torch.cuda.set_device(DEVICE)
            torch.set_float32_matmul_precision("high")  # TF32 in fp32 matmuls, the LoRA's; rho is elementwise
        if WORLD > 1:
            backend, device = ("nccl", DEVICE) if ON_GPU else ("gloo", None)
            # Longer than a reward may take, so that its own error is the one that is read.
            dist.init_process_group(backend, timeout=2 * TIMEOUT, device_id=device)
            dist.barrier()  # every rank has seen that the run's folder is free, before rank 0 writes there
        train(args)
    except rewards.BadInput as error:
        command_line.leave(2, error)
    except (rewards.RewardError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        command_line.leave(1, f"{type(error).__name__}: {error}; checkpoints are whole, go on with --resume")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
