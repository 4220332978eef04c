"""GRPO-Guard in one file: reinforcement learning of flow-matching image models.

GRPO fine-tunes a text-to-image model on a reward. It draws a group of images per prompt with a stochastic
sampler, scores them, and makes those above their group's mean more likely. PPO's clip is meant to stop that
push once the policy has moved far enough. The paper (arXiv 2510.22319) finds that in flow models it does not:
the log of the importance ratio of new and old policy is centred below 0, and its standard deviation differs
many times over from one denoising step to another. So the clip almost never stops a good sample from above,
the reward goes on rising, and the pictures go bad. GRPO-Guard changes two equations:

    RatioNorm     log r_guard = s (log r + mean(d²) / (2 s²)) = mean(d eps)     in `log_ratio`
    reweighting   a step's objective is multiplied by delta, 1 / dt for `flow`  in `reweighting`

In this project's own runs, on small models with two updates an epoch, what kept the pictures from going bad
was a low learning rate or, at a high one, a clip range narrow enough to act: Guard's, or a tenth of
Flow-GRPO's usual one. Guard learned faster: its weights give an update a better signal-to-noise ratio (with
the samplers `flow` and `cps`, see `reweighting`).

With eight updates an epoch the shift helped: at one clip range it holds the policy back. So one method more,
`guard-mask`, is not the paper's: Guard with the shift kept (see `log_ratio`) and, in place of the clip, the
mask of Flow-DPPO (arXiv 2606.11025; see `clip_range`). It was the fastest there.

One epoch, as in the loop of `train`:

    0. evaluate    now and then: held-out prompts by the ODE sampler; the reward, and other rewards, `gold`,
                   that are only watched
    1. sample      per prompt, G images with the SDE sampler; keep x, v and eps of every trained step
    2. reward      score the images, on a thread, while the next ones are being sampled
    3. advantage   A = (reward - average of its group) / (standard deviation of its group)
    4. update      twice or more, each time on a share of the groups: run the model again on the kept x;
                   ratio; clip; delta; backward; one AdamW step
    5. save        a line in metrics.jsonl, and state.pt for --resume

A run's folder has config.json, metrics.jsonl (see `log`), state.pt, and of each evaluation lora-000123, after
123 updates: the LoRA for diffusers, samples.png and samples.jsonl.

In an epoch's first update the policy is still the one that drew the images, so the ratio is 1 and nothing is
clipped. In the next ones it says how far the updates before, on other images, have moved the model:

    ratio             good sample, A > 0                  bad sample, A < 0
    above 1 + clip    blocked: it has moved far enough    keeps its gradient, which points back
    below 1 - clip    keeps its gradient, points back     blocked: it has moved far enough

So a narrow clip is a brake, and with a very narrow one the second update pushes against the first.
With `guard-mask` a sample's range is endless until its step's KL reaches 0.655 nats, and from then on 0.

Symbols, the same in all of the file; mean(...) in an equation is over the D dimensions of one sample:

    here    meaning, and the paper's symbol                    here    shapes
    sigma   t, the noise level, from 1 (noise) to 0 (image)    B       samples that the model sees at once
    g       sigma_t, the noise rate                            G       group size, samples per prompt
    s       sigma_t sqrt(dt), a step's standard deviation      T       trained steps: those with noise, s > 0
    d       mu_new - mu_old, the paper's -Delta mu             C, H, W channels, height, width of the latents
    eps     the step's noise, standard normal                  D       C * H * W, dimensions of a sample
    x       latents (1 - sigma) x0 + sigma x1, x1 noise        L, E    text tokens, width of an embedding
    v       velocity x1 - x0, what the transformer predicts
    dt      sigma - sigma_next > 0
    a, b    of every sampler: mu = a x + b v,                  A       advantage
            x_next = mu + s eps, d = b (v_new - v_old)         excess  ratio - 1 = expm1(log_ratio)

The paper's equations. Their numbers are from our notes on its version 2, not checked against the PDF:

    Eq. 6   log-probability of a step   `log_prob`
    Eq. 7   Flow-GRPO's ratio           `log_ratio`
    Eq. 8   RatioNorm                   `log_ratio`     TeleBoost, another project, has this number too
    Eq. 12  objective with delta        `update`        TeleBoost too

Many processes: the batches of an epoch are dealt out to the ranks, and scores, gradients and what is logged
are summed over the ranks. Neither weights nor batches are sent. Each rank draws the same LoRA, takes the
same summed gradients, and has its noise from keys. So a first rollout is the same on any number of ranks.
Later ones drift apart by the order in which gradients are summed.

Left out on purpose: trainer classes, callbacks, DDP (one flat all-reduce of the LoRA's gradients does), more
than one reward at a time. Where this code departs from the paper or from the authors' code a comment says
"Departure"; README.md has most of these in one table.

    torchrun --nproc_per_node=8 guard.py --task ocr                       # SD3.5-M on 8 GPUs
    torchrun --nproc_per_node=8 guard.py --task ocr --model black-forest-labs/FLUX.1-dev
    python guard.py --task ocr --model tiny/sd3                           # a tiny SD3, on a CPU
    python guard.py --resume runs/NAME                                    # go on where it stopped
"""

import json
import logging
import math
import os
import sys
import time
import traceback
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch
import torch.distributed as dist
import transformers
from diffusers.training_utils import cast_training_params, offload_models
from safetensors.torch import load_file, save
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import rewards
from rewards import BadInput

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if ON_GPU else torch.device("cpu")
METHODS = ("flow-grpo", "temp-reweight", "mean-revised", "rationorm", "guard", "guard-mask")
MASK_KL = 0.655  # nats of a step, for `guard-mask`: Flow-DPPO's 1e-5 on a mean over D = 65,536
PAPER_D = 16 * 64 * 64  # 65,536, dimensions of a latent in the paper: 16 channels, 512 x 512 pixels
REWARD_TIMEOUT = 600  # seconds that the rewards of a batch may take


# ------------------------------------------------------------------------------------------------------------
# The maths: pure functions of numbers and tensors


def sde_coefficients(sigma: float, sigma_next: float, eta: float, sde: str) -> tuple[float, float, float]:
    """(a, b, s) of one denoising step: mu = a x + b v, x_next = mu + s eps.

    1 >= sigma > sigma_next >= 0; eta: noise level, 0 or more (cps: at most 1). sde: "flow" (Flow-GRPO, arXiv
    2505.05470), "dance" (DanceGRPO, arXiv 2505.07818) or "cps" (Flow-CPS, arXiv 2509.05952). Without noise,
    and at sigma_next = 0, each is the Euler step of diffusers' FlowMatchEulerDiscreteScheduler: (1, -dt, 0).
    Raises ValueError for another sde.

    Departure: the last step has no noise, so it is not trained. Flow-GRPO's pipelines add noise there too,
    and decode the noisy latents; DanceGRPO's, like this one, do not.
    """
    dt = sigma - sigma_next
    if eta == 0 or sigma_next == 0:
        return 1.0, -dt, 0.0
    if sde == "cps":
        s = sigma_next * math.sin(eta * math.pi / 2)
        # mu = (1 - sigma_next) x0 + c x1, with x0 = x - sigma v and x1 = x + (1 - sigma) v
        c = math.sqrt(sigma_next**2 - s**2)  # the old noise that stays: c² + s² = sigma_next²
        return (1 - sigma_next) + c, -sigma * (1 - sigma_next) + (1 - sigma) * c, s
    if sde == "flow":
        # 1 - sigma is 0 at the first step, so Flow-GRPO takes the next step's sigma there.
        clean_share = 1 - sigma if sigma < 1 else 1 - sigma_next
        g = eta * math.sqrt(sigma / clean_share)
    elif sde == "dance":
        g = eta
    else:
        raise ValueError(f"unknown sde {sde!r}; expected flow, dance or cps")
    # mu = x - dt [v + g² / (2 sigma) (x + (1 - sigma) v)], sorted by x and v
    half = g**2 * dt / (2 * sigma)
    return 1 - half, -dt - half * (1 - sigma), g * math.sqrt(dt)


# One denoising step of a schedule, five numbers. It is a trained step if it has noise: s > 0.
Step = namedtuple("Step", "sigma dt a b s")


def make_schedule(sigmas, eta, sde, noisy=None) -> list[Step]:
    """n + 1 sigmas -> n steps. noisy: indices of the steps with noise, or None for all but the last."""
    schedule = []
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        level = eta if noisy is None or i in noisy else 0.0
        schedule.append(Step(sigma, sigma - sigma_next, *sde_coefficients(sigma, sigma_next, level, sde)))
    return schedule


def mean(x):
    """(B, ...) -> (B,): over the D dimensions of each sample, the "mean" of all equations."""
    return x.flatten(1).mean(1)


def log_prob(x_next: torch.Tensor, mu: torch.Tensor, s: float) -> torch.Tensor:
    """Log-density of a step under N(mu, s²), a mean over D and not a sum: Eq. 6.

    So it is the usual log-density divided by D. Log-ratios are too, and clip ranges have to fit that.
    x_next, mu: (B, ...) -> (B,), in their dtype. Training does not call it: see `log_ratio`.
    """
    return mean(-((x_next - mu) ** 2) / (2 * s**2) - math.log(s) - 0.5 * math.log(2 * math.pi))


def log_ratio(v_new, v_old, eps, b: float, s: float, method: str) -> torch.Tensor:
    """Log of the importance ratio of a step by one of METHODS; v_new, v_old, eps: (B, ...) -> (B,).

    Eq. 7 is log_prob(x_next, mu_new, s) - log_prob(x_next, mu_old, s) with x_next = mu_old + s eps:

        log r = mean(d eps) / s - mean(d²) / (2 s²)             a noise term less a shift

    The shift. Let KL = sum(d²) / (2 s²) be the step's KL divergence in nats. Over the draws of eps:

                       mean          standard deviation
        noise term     0             sqrt(2 KL) / D
        log r          -KL / D       sqrt(2 KL) / D

    So log r is centred sqrt(KL / 2) of its standard deviations below 0: the left shift. A log-probability
    that is a sum over D has the same shift. What differs is the expected ratio: E[r] = 1 for a sum, where a
    few large ratios make up for the shift, and E[r] = exp(KL / D² - KL / D) < 1 for a mean.

    Eq. 8 leaves the shift out and multiplies by s. If v moves alike at all steps, the standard deviation of
    Eq. 8 goes as |b|, which varies 8-fold over the steps of SD3.5 with `flow`; that of Eq. 7 goes as |b| / s,
    26-fold. So one clip range comes closer to fitting all steps. (With `dance` it is the reverse: 7.5-fold
    and 2.9-fold.) exp(Eq. 8) is no importance ratio any more: it measures how far the new mean lies along
    the noise that was drawn, and serves as a trust region.

    `guard-mask` takes s times Eq. 7, which keeps the shift. Its gradient with respect to mu_new is
    (x_next - mu_new) / (s D), where that of Eq. 8 is eps / D: a good sample is a target, a bad one a place to
    leave, and not only a direction.

    Departure: the authors subtract two log-probabilities, which in fp32 errs by 5 % of Guard's range. Here
    the difference is written out, and is exactly 0 when v is unchanged. (A transformer that computes in fp16
    or bf16 rounds v, which moves the ratio by more.) Departure: each sample has its own shift; the authors'
    code averages it over the batch.
    """
    d = b * (v_new - v_old)  # (B, ...), mu_new - mu_old
    if method == "guard-mask":
        return mean(d * eps) - mean(d**2) / (2 * s)  # s times Eq. 7
    if method in ("rationorm", "guard"):
        return mean(d * eps)  # Eq. 8
    if method == "mean-revised":
        return mean(d * eps) / s  # Eq. 7 without the shift
    return mean(d * eps) / s - mean(d**2) / (2 * s**2)  # Eq. 7; the second term is the left shift


def clip_range(v_new, v_old, step: Step, method: str, clip: float) -> torch.Tensor:
    """The clip range of ratio - 1 of each sample: (B,). v_new, v_old: (B, ...). clip: --clip at their D.

    A range on a mean over D is D times as wide on the sum. At D = 65,536:

        Flow-GRPO, 1e-4      6.6 nats, or 0.66 with 1e-5
        Guard, 2e-6          0.131 / s nats, since Eq. 8 has the factor s: over the trained steps of SD3.5
                             `flow` 0.2 to 0.6, `dance` 0.8 to 2.2, `cps` 0.2 to 0.5 and 16.5 at the last

    To keep these nats at another D, `update` multiplies --clip by 65,536 / D. Of random samples these shares
    lie outside (Guard's at s = 0.3):

        KL, nats                              0.1        1        3        7       21
        shift / standard deviation            0.2      0.7      1.2      1.9      3.2
        Flow-GRPO, clip 1e-4      above         0        0   <0.01%    0.01%   <0.01%
                                  below         0   <0.01%       7%      55%      99%
        Flow-GRPO, clip 1e-5      above        5%      12%       7%       2%    0.04%
                                  below       11%      60%      83%      96%     100%
        Guard, clip 2e-6          above       16%      38%      43%      45%      47%
                                  below       16%      38%      43%      45%      47%

    So Flow-GRPO's usual range almost never stops a good sample from above: it is so wide that once ratios
    reach it the shift has moved them below. A narrow one stops some.

    `guard-mask` does not use --clip. Its range is endless until the step's KL reaches MASK_KL, and then 0. So
    a sample that has moved that far loses its gradient if A (ratio - 1) > 0. That is Flow-DPPO's mask.
    """
    if method != "guard-mask":
        return v_new.new_full((len(v_new),), clip)
    moved = ((step.b * (v_new - v_old)) ** 2).flatten(1).sum(1) / (2 * step.s**2)  # (B,) KL in nats
    return torch.where(moved < MASK_KL, torch.inf, 0.0)


def reweighting(step: Step, eta: float, sde: str, method: str) -> float:
    """delta, the weight of a step's objective.

    The gradient of Eq. 8 with respect to v_new is b eps / D. So without delta a step counts in proportion to
    |b|. Guard's delta is (1 + eta²/2) / |b|, which makes all steps count alike. (A factor that all steps
    share hardly matters, since Adam divides by it.) With `flow` that is the paper's 1 / dt, since
    |b| = (1 + eta²/2) dt. But at the first step |b| = dt, so with 1 / dt it counts 1 / (1 + eta²/2) as much.
    With `dance` and `cps` |b| is not proportional to dt. Departure: for DanceGRPO TeleBoost has
    (1 + eta² (1 - sigma) / (2 sigma)) / dt.

    Why it helps. A step should count for as much as its noise affects the reward, which is little where the
    noise is small. The best weight is w = s, and Guard's comes near:

        an update is the sum over the steps of w A eps, with a step's weight w
        signal: E[A eps] = s times the gradient of the expected advantage with respect to x_next (Stein)
        noise: A eps has size 1 at every step
        signal-to-noise ratio of the sum: sum(w s) / sqrt(sum(w²)), at most sqrt(sum(s²))

    This assumes that the gradient of the expected advantage, and what the LoRA does to v, are alike at all
    steps. On SD3.5:

                    Flow-GRPO, w = |b| / s    RatioNorm, w = |b|    Guard, w = delta |b|    best, w = s
        `flow`      0.66                      0.87                  1.31                    1.43
        `cps`       0.04                      1.15                  1.66                    1.84
        `dance`     0.30                      0.28                  0.28                    0.30

    What was measured on the small models is in experiments/README.md.
    """
    if method == "temp-reweight":  # of the paper's ablation: with Eq. 7 it makes w = |b|, as RatioNorm does
        return step.s
    if not method.startswith("guard"):
        return 1.0
    if sde == "flow":
        return 1 / step.dt
    return (1 + eta**2 / 2) / abs(step.b)


def advantages(scores: torch.Tensor) -> torch.Tensor:
    """(groups, G) rewards -> (groups, G): each against its group, within ±5.

    A dead group, one whose rewards are all equal, gets zeros. Departure: DanceGRPO takes the unbiased
    deviation.
    """
    deviation = scores.std(1, unbiased=False, keepdim=True)
    normalised = (scores - scores.mean(1, keepdim=True)) / (deviation + 1e-4)
    live = scores.amax(1, keepdim=True) > scores.amin(1, keepdim=True)  # exact; the deviation is not
    return torch.where(live, normalised.clamp(-5, 5), 0.0)


# ------------------------------------------------------------------------------------------------------------
# The loop
#
# A backbone, SD3 or Flux further down, has encode(prompts), sigmas(count), velocity(x, sigma, embeddings) and
# decode(latents). The transformer in it has a LoRA. `Learner` holds that LoRA's parameters, their average and
# the optimizer.


def train(args):
    """All epochs. Raises BadInput for what cannot be read or loaded, and whatever a reward raises."""
    training_set, held_out, judges = load_task(args)
    backbone = load_backbone(args)
    learner = Learner(backbone, args)
    start = open_run(learner, args, training_set + held_out)
    per_epoch = args.updates_per_epoch
    bar = tqdm(range(start, args.epochs), initial=start, total=args.epochs, desc="epoch", disable=RANK > 0)
    for epoch in bar:
        # 0. Evaluate on held-out prompts, here and after the last epoch.
        if epoch % args.eval_every == 0:
            evaluate(backbone, learner, args, held_out, judges, epoch * per_epoch)
        # 1. Sample: G images per prompt, batch by batch.
        times = [time.perf_counter()]
        schedule = make_schedule(backbone.sigmas(args.steps), args.eta, args.sde, noisy_steps(args, epoch))
        prompts = prompts_of_epoch(args, epoch, training_set)
        batches = rollout(backbone, args, schedule, prompts, args.group_size, epoch, judges[:1])  # the reward
        times.append(time.perf_counter())
        # 2. Reward: wait for what the thread has not scored yet.
        scores = collect(batches, 1, args.groups * args.group_size).view(args.groups, args.group_size)
        times.append(time.perf_counter())
        # 3. Advantage: each image against its group.
        A = advantages(scores)  # (groups, G)
        # 4. Update: each on its own groups. The second's ratios say how far the first has moved the model.
        for k, group_ids in enumerate(torch.arange(args.groups).view(per_epoch, -1).tolist()):
            line, _ = update(backbone, learner, args, schedule, batches, A, group_ids)
            done = epoch * per_epoch + k + 1
            learner.update_average(done, args.ema_decay)
            log(args, kind="update", epoch=epoch, update=done, first=(k == 0), **line)
            off = (line["excess_mean"] or []) + (line["excess_std"] or [])  # null if no sample is live
            if epoch == start and k == 0 and any(abs(x) > 0.1 * line["clip"] for x in off):
                say("the first ratios are off 1 by more than a tenth of the clip range; try another --dtype")
        times.append(time.perf_counter())
        # 5. Save, before the evaluation, so that a gold score that fails costs no epoch.
        log_rollout(args, epoch, scores, times)
        bar.set_postfix_str(f"training reward {scores.mean():.3f}")
        save_state(learner, args, epoch + 1)
    evaluate(backbone, learner, args, held_out, judges, args.epochs * per_epoch)


# ------------------------------------------------------------------------------------------------------------
# 1 and 2. Sample and reward

# B = micro_batch samples that go through the transformer together, in training all of one group:
#   numbers      list of B: a sample's place in the epoch; it belongs to the group number // group_size
#   embeddings   (B, L, E) of the prompts' tokens and (B, E) pooled, on the CPU
#   images       list of B PIL images
#   kept         list of T tensors (3, B, C, H, W): x, v_old and eps of every trained step, on the CPU
#   scores       a future of the (judges, B) scores
Batch = namedtuple("Batch", "numbers embeddings images kept scores")


def rng(*key):
    """A generator that depends on its key alone, so not on the number of processes nor on a restart.

    Departure: the authors' seeds depend on the process.
    """
    return np.random.default_rng(key)


# The second number of a key says what it is for: the epoch in training, else one of these. (numpy pads a
# short key with zeros, so keys of one kind have one length.)
EVALUATION, ORDER, WINDOW = 2**40, 2**40 + 1, 2**40 + 2


def prompts_of_epoch(args, epoch, training_set):
    """The epoch's prompts. All of the set are dealt out in a random order, then all again in another one."""
    size, first = len(training_set), epoch * args.groups
    # Of a set of 50, prompt 70 of the run is the one at place 20 of order 1.
    places = [divmod(n, size) for n in range(first, first + args.groups)]
    orders = {which: rng(args.seed, ORDER, which).permutation(size) for which, _ in places}
    return [training_set[orders[which][place]] for which, place in places]


def noisy_steps(args, epoch):
    """Indices of the steps with noise, which are trained: all but the last, or the epoch's window of them.

    Like Flow-GRPO-Fast's the window lies in the first half of the steps, if it is no longer than that. It is
    drawn once an epoch. Departure: theirs is drawn anew each time that images are sampled, and DanceGRPO
    trains 60 % of the steps, drawn per sample.
    """
    window = args.sde_window or args.steps - 1
    first = int(rng(args.seed, WINDOW, epoch).integers(max(args.steps // 2 - window, 0) + 1))
    return range(first, first + window)


def sample(backbone, schedule, embeddings, keys, same_noise=False):
    """Integrate a batch from noise to latents of an image.

    embeddings: of B prompts. keys: B tuples (seed, epoch or EVALUATION, group, member); with the step they
    give a sample's noise. same_noise: the members of a group share the noise they start from. Returns the
    latents, (B, C, H, W), and a list of T tensors (3, B, C, H, W): x, v and eps of every trained step.
    """

    def draw(noise_keys):
        values = [rng(*key).standard_normal(backbone.shape, np.float32) for key in noise_keys]
        return torch.from_numpy(np.stack(values)).to(DEVICE)  # (B, C, H, W)

    # The last number of a key is 0 for the noise at sigma = 1, and i + 1 for step i.
    x = draw([(seed, epoch, group, 0 if same_noise else member, 0) for seed, epoch, group, member in keys])
    kept = []
    for i, step in enumerate(schedule):
        # Trained steps run with gradients on, as in `update`. Without, a GPU may take kernels that round in
        # another way, and the first ratio would not be 1.
        with torch.set_grad_enabled(step.s > 0):
            v = backbone.velocity(x, step.sigma, embeddings).detach()
        x_next = step.a * x + step.b * v
        if step.s > 0:
            eps = draw([(*key, i + 1) for key in keys])
            kept.append(torch.stack([x, v, eps]).cpu())
            x_next += step.s * eps
        x = x_next
    if not x.isfinite().all():
        raise FloatingPointError("a latent is not finite, as when float16 overflows; try --dtype bfloat16")
    return x, kept


def rollout(backbone, args, schedule, prompts, group_size, epoch, judges):
    """Sample `group_size` images of each prompt. Each batch is scored while the next one is being sampled.

    prompts: (prompt, metadata). epoch: or EVALUATION, for the keys. judges: reward functions. Returns this
    rank's batches.
    """
    # The members of a group come one after another. Batches are dealt out to the ranks in turn.
    everyone = range(len(prompts) * group_size)
    all_batches = [everyone[i : i + args.micro_batch] for i in range(0, len(everyone), args.micro_batch)]
    my_batches = all_batches[RANK::WORLD]
    my_prompts = {prompts[number // group_size][0] for numbers in my_batches for number in numbers}
    embeddings, batches = backbone.encode(my_prompts), []
    for numbers in tqdm(my_batches, desc="sample", leave=False, disable=RANK > 0):
        texts, metadata = zip(*(prompts[number // group_size] for number in numbers), strict=True)
        keys = [(args.seed, epoch, *divmod(number, group_size)) for number in numbers]
        # Of the tokens, (B, L, E), and pooled, (B, E).
        of_batch = [torch.cat(parts) for parts in zip(*(embeddings[text] for text in texts), strict=True)]
        x, kept = sample(backbone, schedule, of_batch, keys, args.same_noise)
        images = backbone.decode(x)
        scores = THREAD.submit(score, judges, images, texts, metadata)
        batches.append(Batch(list(numbers), of_batch, images, kept, scores))
    return batches


def start_thread():
    if ON_GPU:  # each thread has its device; with a stream of its own it does not wait for the sampling
        torch.cuda.set_device(DEVICE)
        torch.cuda.set_stream(torch.cuda.Stream())


THREAD = ThreadPoolExecutor(1, initializer=start_thread)  # computes rewards while the next batch is sampled


@torch.no_grad()  # here, since each thread has its own mode
def score(judges, images, texts, metadata):
    """(judges, B)"""
    return torch.tensor([judge(images, list(texts), list(metadata)) for judge in judges], dtype=torch.float64)


def collect(batches, count, total):
    """(count, total) scores by `count` judges of all ranks. Raises what a judge raised, or TimeoutError."""
    scores = torch.zeros(count, total, dtype=torch.float64)
    for batch in batches:
        scores[:, batch.numbers] = batch.scores.result(REWARD_TIMEOUT)
    # A sample's score is 0 on all ranks but the one that drew it, so the sum over ranks is exact.
    return all_reduce(scores.to(DEVICE)).cpu()


# ------------------------------------------------------------------------------------------------------------
# 4. Update


def update(backbone, learner, args, schedule, batches, A, group_ids):
    """One optimizer update on some of the epoch's groups.

    batches: this rank's of the epoch. A: (groups, G) advantages of the epoch. Returns what metrics.jsonl says
    of the update, and the excess of its samples, (groups of the update, G, T), 0 where it was not computed.

    The loss is a mean over samples, trained steps and D. Departure: groups stay whole in an update, and dead
    ones count in the mean; the authors shuffle an epoch's samples and drop the dead ones.
    """
    trained = [step for step in schedule if step.s > 0]  # T of them
    terms = len(group_ids) * args.group_size * len(trained)
    # Dead groups are skipped, unless they have the gradient of a KL.
    used = [group for group in group_ids if args.kl_beta or A[group].any()]
    my_batches = [batch for batch in batches if batch.numbers[0] // args.group_size in used]
    clip = args.clip * PAPER_D / math.prod(backbone.shape)  # see `clip_range`
    measured = torch.zeros(4, A.numel(), len(trained), dtype=torch.float64)  # of all samples, see below
    for batch in tqdm(my_batches, desc="update", leave=False, disable=RANK > 0):
        advantage = A.flatten()[batch.numbers].float().to(DEVICE)  # (B,)
        for t, step in enumerate(trained):
            x, v_old, eps = batch.kept[t].to(DEVICE)  # (B, C, H, W) each
            v_new = backbone.velocity(x, step.sigma, batch.embeddings)
            # ratio - 1, since fp32 numbers near 1 are 1.2e-7 apart, and Guard's clip range is 2e-6
            excess = torch.expm1(log_ratio(v_new, v_old, eps, step.b, step.s, args.method))  # (B,)
            delta = reweighting(step, args.eta, args.sde, args.method)
            # Eq. 12 has the ratio in place of excess: that adds delta A, which has no gradient.
            limit = clip_range(v_new, v_old, step, args.method, clip)  # (B,)
            clipped = excess.clamp(-limit, limit)
            loss = -delta * torch.minimum(excess * advantage, clipped * advantage)  # (B,) Eq. 12
            kl = torch.zeros_like(excess)
            if args.kl_beta:
                with torch.no_grad():
                    backbone.transformer.disable_adapters()
                    v_base = backbone.velocity(x, step.sigma, batch.embeddings)
                    backbone.transformer.enable_adapters()
                kl = mean((step.b * (v_new - v_base)) ** 2) / (2 * step.s**2)  # (B,) the step's KL / D
                # Not weighted by delta. dt kl = mean(d²) / (2 g²), as the authors have it, except in cps.
                loss = loss + args.kl_beta * step.dt * kl
            learner.scaler.scale(loss.sum() / terms).backward()
            measured[:, batch.numbers, t] = torch.stack([loss, excess, kl, limit]).detach().double().cpu()
    norm = learner.apply_gradients()
    # Each rank has filled in its own samples and left 0 for all others.
    measured = all_reduce(measured.to(DEVICE)).cpu().unflatten(1, A.shape)  # (4, groups, G, T)
    loss, excess, kl, limit = measured[:, group_ids]
    line = dict(loss=loss.sum() / terms, grad_norm=norm, kl=kl.mean((0, 1)))
    line |= clip_statistics(excess, A[group_ids], limit)
    # null, since JSON has no NaN, a mean over no live sample, and no infinity, a norm that overflowed
    line = {name: value.tolist() if value.isfinite().all() else None for name, value in line.items()}
    return line | dict(clip=clip, scale=learner.scaler.get_scale()), excess


def clip_statistics(excess, A, limit):
    """Per trained step, of samples of live groups: see `log`. excess, limit (groups, G, T), A (groups, G)."""
    live = A.any(1)
    excess, limit = excess[live].flatten(0, 1), limit[live].flatten(0, 1)  # (samples, T)
    high, low, A = excess > limit, excess < -limit, A[live].view(-1, 1)
    # Beyond the range on the side of A the minimum has no gradient. Elsewhere gradients pass.
    blocked = (high & (A > 0)) | (low & (A < 0))
    shares = dict(clip_high=high, clip_low=low, blocked=blocked)
    deviation = (excess - excess.mean(0)).square().mean(0).sqrt()
    line = dict(live=torch.tensor(len(excess)), excess_mean=excess.mean(0), excess_std=deviation)
    return line | {name: share.double().mean(0) for name, share in shares.items()}


class Learner:
    """What learns: the LoRA's parameters, their moving average as one flat vector, the optimizer."""

    def __init__(self, backbone, args):
        self.params = [p for p in backbone.transformer.parameters() if p.requires_grad]
        self.average = parameters_to_vector(self.params).detach()
        self.optimizer = torch.optim.AdamW(self.params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)
        # The loss is a mean over samples, steps and D, so dL/dv is about 4e-9 for SD3.5, which fp16 cannot
        # hold. The scaler multiplies the loss by 2**24, by less once that overflows, and divides gradients.
        # Departure: the authors' frozen weights are fp32, under fp16 autocast.
        self.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24, enabled=args.dtype == "float16")
        # A rank without a live group runs no backward pass, but needs a scale and gradients for the sum.
        self.scaler.scale(torch.zeros((), device=DEVICE))
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def apply_gradients(self):
        """One AdamW step with the sum of all ranks' gradients. Returns their norm before it is clipped to 1.

        In float16 an update whose gradient overflows is skipped, and the next ones are scaled by half. Raises
        FloatingPointError once the scale is below 1, where halving it has not helped.
        """
        gradients = [p.grad for p in self.params]
        vector_to_parameters(all_reduce(parameters_to_vector(gradients)), gradients)  # works on gradients too
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.params, 1.0, error_if_nonfinite=not self.scaler.is_enabled())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < 1:
            raise FloatingPointError("gradients overflow float16 again and again; try --dtype bfloat16")
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def update_average(self, updates, decay):
        """Every 8 updates the average moves a share of 1 - decay of the way to the parameters.

        updates: done so far, n. The decay is (1 + n) / (10 + n) at most. With a decay of 0 the average is the
        parameters themselves, at each update.

        Departure: by mistake the authors' code moves it once per micro-batch of such an update, on 16 GPUs 4
        times, which makes a decay of 0.9 one of 0.66. Theirs lags about 15 updates behind, ours about 72.
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
        return dict(params=parameters_to_vector(self.params).detach(), average=self.average,
                    optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())

    def load_state(self, state):
        vector_to_parameters(state["params"].to(DEVICE), self.params)
        self.average = state["average"].to(DEVICE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


# ------------------------------------------------------------------------------------------------------------
# 0. Evaluate, now and then


@torch.no_grad()
def evaluate(backbone, learner, args, prompts, judges, updates):
    """Score held-out prompts, drawn by the ODE sampler with the averaged LoRA, by the reward and gold scores.

    Leaves lora-000123, after 123 updates: the averaged LoRA, pictures of the first prompts in samples.png,
    and their scores in samples.jsonl.
    """
    folder = Path(args.run_dir) / f"lora-{updates:06d}"
    schedule = make_schedule(backbone.sigmas(args.eval_steps), 0.0, args.sde)
    learner.swap_average()
    if RANK == 0:
        save_lora(backbone, folder)
    batches = rollout(backbone, args, schedule, prompts, 1, EVALUATION, judges)
    learner.swap_average()
    scores = collect(batches, len(judges), len(prompts))  # (judges, prompts)
    names = ["reward", *(judge.name for judge in judges[1:])]
    means = dict(zip(names, scores.mean(1).tolist(), strict=True))
    say(f"update {updates}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
    reward = means.pop("reward")
    log(args, kind="eval", update=updates, prompts=len(prompts), reward=reward, gold=means)
    if RANK == 0:
        images = [image.resize((256, 256 * image.height // image.width)) for image in batches[0].images]
        diffusers.utils.make_image_grid(images, 1, len(images)).save(folder / "samples.png")
        with open(folder / "samples.jsonl", "w") as file:
            for (prompt, _), of_image in zip(prompts, scores.T[: len(images)].tolist(), strict=False):
                line = dict(prompt=prompt) | dict(zip(names, of_image, strict=True))
                file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------------------------------------
# From here on, what any such script needs. Settings


# What --resume takes from the command line. All else stays as the run began.
MAY_CHANGE = ("epochs", "eval_every", "offload", "grad_checkpoint")


def flag(default, text, **more):
    """A field of Args: its default, what --help says, and more of argparse's options."""
    return field(default=default, metadata={"help": text} | more)


@dataclass
class Args:
    """The command line. Defaults are the paper's for SD3.5-M; the rows below have what differs."""

    task: str = flag("ocr", "what to learn", choices=["ocr", "geneval", "pickscore"])
    reward: str = flag(None, "name in rewards.py, module:function or URL; the task's own unless given")
    gold: list[str] = field(default_factory=list, metadata={"help": "list of rewards only logged, or none"})
    prompts: str = flag(None, "file, or folder in Flow-GRPO's layout; the task's own unless given")
    model: str = flag("stabilityai/stable-diffusion-3.5-medium", "hub id or folder")
    method: str = flag("guard", "log-ratio and weight of the steps", choices=METHODS)
    sde: str = flag("flow", "sampler of Flow-GRPO, DanceGRPO or Flow-CPS", choices=["flow", "dance", "cps"])
    same_noise: bool = flag(False, "a group starts from one initial noise, as in DanceGRPO")
    sde_window: int = flag(0, "how many steps in a row have noise and are trained; 0: all but the last")
    steps: int = flag(10, "denoising steps in training; the last has no noise")
    eval_steps: int = flag(40, "denoising steps in evaluation")
    eta: float = flag(0.7, "noise level of the sampler")
    guidance: float = flag(4.5, "guidance scale in sampling and training; 1 is none for SD3")
    height: int = flag(512, "pixels")
    width: int = flag(512, "pixels")
    group_size: int = flag(24, "images per prompt")
    groups: int = flag(48, "prompts an epoch, over all processes")
    updates_per_epoch: int = flag(2, "optimizer updates an epoch; the clip acts from the second on")
    micro_batch: int = flag(8, "images in one pass of the transformer; divides group_size")
    epochs: int = flag(240, "epochs in all; 0 evaluates and ends")
    lr: float = flag(1e-4, "learning rate")
    clip: float = flag(2e-6, "clip range of ratio - 1 at D = 65,536; it is used as 65,536 / D times this")
    kl_beta: float = flag(0.0, "weight of the KL to the model without its LoRA")
    lora_rank: int = flag(32, "rank of a new LoRA")
    lora_alpha: int = flag(64, "alpha of a new LoRA")
    init_lora: str = flag(None, "LoRA to start from, of any rank and alpha: a file, its folder or a run")
    ema_decay: float = flag(0.9, "largest decay of the LoRA's average, moved every 8 updates; 0: none")
    eval_every: int = flag(30, "epochs between evaluations")
    eval_prompts: int = flag(1024, "held-out prompts in an evaluation")
    dtype: str = flag("float16", "of the model, not the SDE", choices=["float32", "bfloat16", "float16"])
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    offload: bool = flag(False, "encoders and VAE are on the CPU when idle")
    seed: int = flag(0, "keys every random number")
    run_dir: str = flag(None, "folder of the run, new or empty; runs/DATE-TIME unless given")
    resume: str = flag(None, f"folder of a run to go on with; only {', '.join(MAY_CHANGE)} may change")


# What differs from Args. The row of --sde wins over that of --method, that over --task's, and that over
# "all". The rows in the guard.json of a model's own folder win over these. BACKBONES says which model has
# which table.
BASELINES = dict.fromkeys(("flow-grpo", "temp-reweight", "mean-revised"), dict(lr=3e-4, clip=1e-4))
SD3_ROWS = BASELINES | {
    "geneval": dict(epochs=930),
    "pickscore": dict(epochs=510, clip=4e-6),
    "dance": dict(eta=0.3, same_noise=True),  # theirs has 16 steps, 720 pixels and groups of 12 as well
}
FLUX_ROWS = SD3_ROWS | {  # its lr has no primary source
    "all": dict(steps=6, eval_steps=28, eta=0.9, guidance=3.5, lr=2e-4, dtype="bfloat16",
                grad_checkpoint=True),
    "ocr": dict(epochs=270),
    "geneval": dict(epochs=630),
}  # fmt: skip


def require(condition, message):
    if not condition:
        raise BadInput(message)


def parse_args(argv=None):
    """What the command line says, else the resumed run, else the model's rows, else Args. Raises BadInput."""
    commands = __doc__.rpartition("\n\n")[2]
    about = "Defaults are SD3.5-M's. FLUX has rows of its own in guard.py, tiny/sd3 in its guard.json."
    parser = transformers.HfArgumentParser(Args, usage=commands, description=about, allow_abbrev=False)
    parser.error = lambda message: require(False, message)
    given = parser.parse_args(argv)
    defaults = read_config(given.resume) if given.resume else presets(given)
    parser.set_defaults(**defaults)
    args = Args(**vars(parser.parse_args(argv)))
    args.gold = [name for name in args.gold if name != "none"]
    if args.resume:
        other = {name for name in defaults if defaults[name] != getattr(args, name)} - {*MAY_CHANGE, "resume"}
        how = f"a new run, with --init_lora {args.resume}, can have another"
        require(not other, f"--resume {args.resume}: keeps its own {', '.join(sorted(other))}; {how}")
    if args.init_lora and not args.resume:
        args.init_lora = str(find_lora(Path(args.init_lora)))
    # A shell leaves the ~ of --run_dir=~/x to us.
    args.run_dir = str(Path(args.resume or args.run_dir or time.strftime("runs/%Y%m%d-%H%M%S")).expanduser())
    check(args)
    return args


def read_config(folder):
    """The settings of the run in that folder. Raises BadInput."""
    file = Path(folder) / "config.json"
    try:
        return asdict(Args(**json.loads(file.read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"--resume {folder}: {file} is not as guard.py wrote it: {error}") from None


def presets(given):
    """Defaults by model, task, method and sampler. Raises BadInput for a model that guard.py cannot train."""
    place, how = place_of(given.model), "--model tiny/sd3 runs on a CPU"
    try:
        require(ON_GPU or Path(place).exists(), "torch sees no GPU, and there is no such folder")
        pipeline = diffusers.DiffusionPipeline.load_config(place)["_class_name"]
        require(pipeline in BACKBONES, f"is a {pipeline}; expected {' or '.join(BACKBONES)}")
    except (OSError, ValueError) as error:
        how = f"if gated, accept its licence and run `hf auth login`; {how}"
        raise BadInput(f"--model {given.model}: {' '.join(str(error).split())[:200]}; {how}") from None
    own = Path(place) / "guard.json"
    tables = BACKBONES[pipeline][1], json.loads(own.read_text()) if own.exists() else {}
    defaults = dict(reward=given.task, prompts=f"prompts/{given.task}")
    for rows in tables:
        for choice in ("all", given.task, given.method, given.sde):
            defaults |= rows.get(choice, {})
    if given.prompts:
        defaults.pop("gold", None)  # the gold scores in guard.json suit the prompts there
    return defaults


def place_of(model):
    """A folder, here or beside this file; else a hub id."""
    places = Path(model), Path(__file__).resolve().parent / model
    return next((str(place) for place in places if place.exists()), model)


def find_lora(path):
    """The file that --init_lora means: itself, the one in its folder, or the newest of a run's folder."""
    folder = max(path.glob("lora-*"), default=path)
    file = folder / "pytorch_lora_weights.safetensors" if folder.is_dir() else folder
    require(file.is_file(), f"--init_lora {path}: there is no {file}")
    return file


# Lower bounds of the flags that would otherwise fail late or in silence.
LEAST = dict(steps=2, eval_steps=1, group_size=2, groups=1, micro_batch=1, updates_per_epoch=1, epochs=0,
             eta=1e-3, guidance=0, height=16, width=16, lr=0, clip=0, kl_beta=0, ema_decay=0, lora_rank=1,
             lora_alpha=1, eval_every=1, eval_prompts=1, seed=0)  # fmt: skip


def check(args):
    """Raise BadInput for what would go wrong late or in silence. Other nonsense soon fails by itself."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        require(least <= value < math.inf, f"--{name} {value}: expected {least} or more")
    are_set = {name in os.environ for name in ("RANK", "WORLD_SIZE")}
    require(len(are_set) == 1 and RANK < WORLD, "RANK or WORLD_SIZE is left over: unset it")
    G, updates, window = args.group_size, args.updates_per_epoch, args.sde_window
    require(G % args.micro_batch == 0, f"--micro_batch {args.micro_batch}: expected a divisor of {G}")
    require(args.groups % updates == 0, f"--groups {args.groups}: expected a multiple of {updates}")
    require(0 <= window < args.steps, f"--sde_window {window}: expected 1 to {args.steps - 1}, or 0 for all")
    require(args.sde != "cps" or args.eta <= 1, f"--eta {args.eta}: expected at most 1 with cps")
    moves = args.ema_decay == 0 or args.epochs == 0 or args.epochs * updates >= 8
    require(moves, f"--ema_decay {args.ema_decay}: first moves at update 8; in so short a run give 0")
    require(args.height % 16 == args.width % 16 == 0, "--height, --width: expected multiples of 16 pixels")
    in_use = RANK == 0 and not args.resume and any(Path(args.run_dir).glob("*"))
    require(not in_use, f"--run_dir {args.run_dir}: is not empty; --resume {args.run_dir} goes on with a run")


def load_task(args):
    """Training prompts, held-out prompts, and the functions that judge: the reward, then the gold scores.

    A prompt is (prompt, metadata). A judge has a `name` to be logged under. Raises BadInput.
    """
    training_file, held_out_file = rewards.prompt_files(args.prompts)
    training_set = rewards.read_prompts(training_file, [args.reward])
    held_out = rewards.read_prompts(held_out_file, [args.reward, *args.gold])
    count = min(args.eval_prompts, len(held_out))  # evenly over the file, which may be sorted
    judges = [rewards.load(name) for name in (args.reward, *args.gold)]
    names = ["prompt", "reward", *(judge.name for judge in judges[1:])]
    require(len(set(names)) == len(names), f"--gold {args.gold}: expected different names than {names}")
    return training_set, [held_out[i * len(held_out) // count] for i in range(count)], judges


# ------------------------------------------------------------------------------------------------------------
# Backbones: prompt -> embeddings; x, sigma, embeddings -> v; latents -> images


class SD3:
    """Stable Diffusion 3 and 3.5 of any size, from a loaded StableDiffusion3Pipeline.

    Another backbone is a class like Flux, which overrides what differs of `embed`, `sigmas` and `velocity`,
    and an entry of BACKBONES with its presets. LORA_TARGETS must fit the names of its attention layers. The
    pipeline's class must be an attribute of diffusers: where it is not, `diffusers.MyPipeline = MyPipeline`.
    Raises BadInput for a size in pixels that the model cannot take.
    """

    def __init__(self, pipe, args):
        self.pipe, self.transformer = pipe, pipe.transformer.to(DEVICE)
        self.guidance, self.dtype, self.offload = args.guidance, getattr(torch, args.dtype), args.offload
        scale = pipe.vae_scale_factor  # pixels to a latent
        self.shape = (pipe.vae.config.latent_channels, args.height // scale, args.width // scale)
        config = pipe.transformer.config
        most = config.get("pos_embed_max_size", math.inf) * config.patch_size * scale
        require(max(args.height, args.width) <= most, f"--height, --width: this model draws {most} at most")
        self.encoders = [part for name, part in pipe.components.items() if "text_encoder" in name]
        for module in (*self.encoders, pipe.vae):
            module.requires_grad_(False).eval().to("cpu" if args.offload else DEVICE)
        pipe.vae.enable_slicing()  # an image at a time, to save memory
        self.empty = self.encode([""])[""]  # the prompt that guidance leads away from

    @torch.no_grad()
    def encode(self, prompts):
        """prompt -> its embeddings (1, L, E) and (1, E), on the CPU. In batches they round differently."""
        with offload_models(*self.encoders, device=DEVICE, offload=self.offload):
            return {prompt: [tensor.cpu() for tensor in self.embed(prompt)] for prompt in prompts}

    def embed(self, prompt):
        """Embeddings of the tokens, (1, L, E), and pooled, (1, E), of two widths E."""
        length = min(128, self.pipe.tokenizer_3.model_max_length)  # of T5's; less in small models
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, DEVICE, do_classifier_free_guidance=False, max_sequence_length=length)
        return tokens, pooled

    def sigmas(self, count):
        """count + 1 noise levels from 1 to 0, as the model's own scheduler sets them."""
        self.pipe.scheduler.set_timesteps(count)
        return self.pipe.scheduler.sigmas.tolist()

    def velocity(self, x, sigma, embeddings):
        """v with guidance: (B, C, H, W) fp32 -> fp32. embeddings: of B prompts, from `encode`.

        Sampling and training both come here with the same batches, so that the first ratio is 1: to the bit
        on a CPU, as far as rounding is the same on a GPU.
        Departure: two passes of B with guidance, where the authors make one of 2 B.
        """
        v = self.predict(x, sigma, embeddings)
        if self.guidance > 1:
            v_empty = self.predict(x, sigma, [part.repeat_interleave(len(x), 0) for part in self.empty])
            v = v_empty + self.guidance * (v - v_empty)
        return v

    def predict(self, x, sigma, embeddings):
        """One pass of the transformer."""
        tokens, pooled = (part.to(DEVICE) for part in embeddings)
        timestep = torch.full((len(x),), sigma, device=x.device) * 1000
        return self.transformer(x.to(self.dtype), tokens, pooled, timestep, return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, x):
        """(B, C, H, W) latents -> B PIL images."""
        vae = self.pipe.vae
        x = (x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        with offload_models(vae, device=DEVICE, offload=self.offload):
            return self.pipe.image_processor.postprocess(vae.decode(x).sample)


class Flux(SD3):
    """FLUX.1-dev of any size, from a loaded FluxPipeline. Guidance is an input of it, not a second pass."""

    def embed(self, prompt):
        length = min(128, self.pipe.tokenizer_2.model_max_length)
        tokens, pooled, _ = self.pipe.encode_prompt(prompt, None, DEVICE, max_sequence_length=length)
        return tokens, pooled

    def sigmas(self, count):
        """The noise levels are shifted, by an amount that depends on the number of image tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        c, tokens = self.pipe.scheduler.config, math.prod(self.shape[1:]) // 4
        shift = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
        self.pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count), mu=shift)
        return self.pipe.scheduler.sigmas.tolist()

    def velocity(self, x, sigma, embeddings):
        B, _, H, W = x.shape
        tokens, pooled = (part.to(DEVICE) for part in embeddings)
        packed = torch.pixel_unshuffle(x.to(self.dtype), 2).flatten(2).mT  # (B, H W / 4, 4 C), 2 x 2 a token
        text_ids = torch.zeros(tokens.shape[1], 3, device=x.device)
        image_ids = self.pipe._prepare_latent_image_ids(B, H // 2, W // 2, x.device, x.dtype)
        level = torch.full((B,), sigma, device=x.device)
        has_guidance = self.transformer.config.guidance_embeds  # FLUX.1-schnell has none
        guidance = torch.full((B,), self.guidance, device=x.device) if has_guidance else None
        inputs = packed, tokens, pooled, level, image_ids, text_ids, guidance
        v = self.transformer(*inputs, return_dict=False)[0]  # (B, H W / 4, 4 C)
        return torch.pixel_shuffle(v.mT.unflatten(2, (H // 2, W // 2)), 2).float()


# By the class of the pipeline: the backbone, and what differs from Args.
BACKBONES = {"StableDiffusion3Pipeline": (SD3, SD3_ROWS), "FluxPipeline": (Flux, FLUX_ROWS)}
# The prefix leaves SD3.5's attn2 out. Departure for FLUX: flow_grpo's own script has other targets.
LORA_TARGETS = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


def load_backbone(args):
    """The model with a LoRA that requires gradients, on DEVICE. Reads safetensors only. Raises BadInput."""
    dtypes = {"default": getattr(torch, args.dtype), "vae": torch.float32}
    place = place_of(args.model)
    for file in Path(place).rglob("*.*"):
        is_pointer = file.is_file() and file.stat().st_size < 200 and b"git-lfs" in file.read_bytes()
        require(not is_pointer, f"--model {args.model}: {file} is a Git LFS pointer; run `git lfs pull`")
    pipe = diffusers.DiffusionPipeline.from_pretrained(place, use_safetensors=True, dtype=dtypes)
    for name, part in pipe.components.items():  # without its files a tokenizer gets a made-up vocabulary
        require("tokenizer" not in name or len(part) > 20, f"--model {args.model}: {name} has no vocabulary")
    transformer = pipe.transformer.requires_grad_(False)
    if args.init_lora:
        load_lora(transformer, Path(args.init_lora))
    else:
        torch.manual_seed(args.seed)  # the same LoRA on every rank
        lora = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=LORA_TARGETS,
                               init_lora_weights="gaussian")
        transformer.add_adapter(lora)
    cast_training_params(transformer, torch.float32)  # it learns in fp32, whatever the model is in
    transformer.eval()  # without dropout, so that the first ratio is 1
    if args.grad_checkpoint:
        transformer.enable_gradient_checkpointing()
    return BACKBONES[type(pipe).__name__][0](pipe, args)


def load_lora(transformer, file):
    """A LoRA as diffusers saves it, with its own rank and scaling. Raises BadInput for any other file.

    One that `save_lora` has saved trains at a scale of 1, not of alpha / rank: its scale is in its weights.
    """
    try:
        weights = load_file(file)
        transformer.load_lora_adapter(file, adapter_name="default", use_safetensors=True)
        params = [p.requires_grad_() for name, p in transformer.named_parameters() if "lora_" in name]
        require(0 < len(params) == len(weights), "is of other layers")  # diffusers skips what does not fit
        require(all(p.isfinite().all() for p in params), "is not finite")
    except Exception as error:  # the libraries raise many kinds for a file that is no such LoRA
        wanted = "expected the safetensors of a LoRA of this transformer, as diffusers saves them"
        raise BadInput(f"--init_lora {file}: {' '.join(str(error).split())[:200]}; {wanted}") from None


# ------------------------------------------------------------------------------------------------------------
# Files: the LoRA, the state, the log


def open_run(learner, args, prompts):
    """Make the run's folder, or go on from its state.pt. Returns the epochs done, 0 in a new run.

    Every rank reads state.pt: on several machines --resume needs a disk that they share. metrics.jsonl is cut
    back to it. Raises BadInput if the run is longer than --epochs, or the ranks see different files.
    """
    folder, epoch, size = Path(args.run_dir), 0, 0
    checksum = zlib.crc32(json.dumps(prompts).encode())
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        learner.load_state(state)
        epoch, size = state["epoch"], state["metrics"]
        with open(folder / "metrics.jsonl") as metrics:
            if json.loads(metrics.readline())["prompts"] != checksum:
                say(f"--resume {folder}: the prompts of {args.prompts} have changed since this run began")
    elif args.resume:
        say(f"--resume {folder}: has no state.pt yet, so it begins again")
    require(epoch <= args.epochs, f"--epochs {args.epochs}: the run has {epoch} behind it")
    is_same = all_reduce(torch.tensor(epoch, device=DEVICE)) == WORLD * epoch
    require(is_same, f"--resume {folder}: the processes see other files; they need a shared disk")
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mode = "a" if args.resume else "x"  # x: of two runs that start in one folder one ends here
        with open(folder / "metrics.jsonl", mode) as metrics:
            metrics.truncate(size)
        (folder / "config.partial").write_text(json.dumps(asdict(args), indent=2) + "\n")
        (folder / "config.partial").replace(folder / "config.json")
    versions = {part.__name__: part.__version__ for part in (torch, diffusers, transformers, peft)}
    log(args, kind="start", versions=versions, processes=WORLD, device=str(DEVICE), prompts=checksum)
    return epoch


def save_state(learner, args, epoch):
    """state.pt: all that --resume needs. The old one stays until the new one is whole."""
    if RANK == 0:
        folder = Path(args.run_dir)
        position = dict(epoch=epoch, metrics=(folder / "metrics.jsonl").stat().st_size)
        torch.save(position | learner.state(), folder / "state.partial")
        (folder / "state.partial").replace(folder / "state.pt")


def save_lora(backbone, folder):
    """For diffusers. With its scaling in lora_B the file needs no alpha, which some readers ignore."""
    weights = {}
    for name, weight in peft.get_peft_model_state_dict(backbone.transformer).items():
        layer, is_b, _ = name.partition(".lora_B")
        scale = backbone.transformer.get_submodule(layer).scaling["default"] if is_b else 1
        weights[f"transformer.{name}"] = weight * scale
    folder.mkdir(exist_ok=True)
    # Not save_file, which makes a file that its owner alone can read.
    (folder / "pytorch_lora_weights.safetensors").write_bytes(save(weights, {"format": "pt"}))


def log(args, **line):
    """A line of metrics.jsonl, by its `kind`:

    start    versions, processes, device, a checksum of the prompts
    rollout  one epoch's sampling: reward_mean and reward_std over its images; dead_groups; seconds spent
             sampling, waiting for rewards, training; memory, the most so far, in GiB of a GPU
    update   first: the epoch's first, where every ratio is 1; live: samples not in dead groups; loss;
             grad_norm before it is clipped to 1; the scaler's scale; clip, the range at this D. Per trained
             step, noisiest first: kl to the base, in nats divided by D, of all samples, 0 unless it is in the
             loss; of the live ones excess_mean and excess_std, of ratio - 1; clip_high and clip_low, shares
             beyond the clip range, or for guard-mask above and below 1 where the KL is reached; blocked,
             the share that has no gradient
    eval     of so many held-out prompts after `update` updates: reward, gold
    """
    if RANK == 0:
        with open(Path(args.run_dir) / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def log_rollout(args, epoch, scores, times):
    """See `log`. scores (groups, G); times, in seconds, before sampling and after each of the three parts."""
    seconds = dict(zip(("sample", "reward", "train"), np.diff(times).tolist(), strict=True))
    dead = (scores.amax(1) == scores.amin(1)).sum().item()
    memory = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None
    log(args, kind="rollout", epoch=epoch, reward_mean=scores.mean().item(), dead_groups=dead,
        reward_std=scores.std(correction=0).item(), seconds=seconds, memory=memory)


# ------------------------------------------------------------------------------------------------------------
# Ranks, and main


def all_reduce(tensor):
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def say(text):
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()  # os._exit, in `main`, does not


def main():
    """Exit code 0; 2 and one line for bad input; 1 and a traceback for anything else, at once."""
    # No loading bars, nor that torchvision is missing. What else the libraries warn of stays.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers.utils.import_utils").setLevel("ERROR")
    args = None
    try:
        args = parse_args()
        say(f"{args.method} on {args.model} ({DEVICE}): lr {args.lr:g}, clip {args.clip:g}, "
            f"{args.groups} prompts x {args.group_size} images an epoch, {args.run_dir}")
        if ON_GPU:
            torch.cuda.set_device(DEVICE)
            torch.set_float32_matmul_precision("high")  # TF32 in fp32 matmuls; the ratio has none
        if WORLD > 1:
            # Ranks that wait for another one's rewards wait longer than these may take.
            dist.init_process_group("nccl" if ON_GPU else "gloo", timeout=timedelta(hours=1))
        train(args)
    except BadInput as error:
        print(f"guard.py: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except KeyboardInterrupt:
        if args and Path(args.run_dir).exists():
            say(f"stopped; {args.run_dir}/lora-* stay; to go on: python guard.py --resume {args.run_dir}")
        os._exit(130)
    except (Exception, SystemExit):
        if args is None:  # --help, or a fault in reading the command line
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # without waiting for a reward that hangs, or for the other ranks
    say(f"{args.run_dir}/lora-*: the LoRA and pictures of each evaluation; lora-000000 is before training")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
