"""What guard.py promises, as a reader would check it: the maths first, then one small real run.

    pytest test_guard.py

The rest is in tests/: rewards and prompt sets, bad input, faults and resuming, full-size models.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on a machine with a GPU

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file

import guard
import rewards

HERE = Path(__file__).resolve().parent
KINDS = ("flow", "dance", "cps")
ETA = 0.7


def sd3_sigmas(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


def a_step(kind="flow", index=4):
    return guard.schedule(sd3_sigmas(10), ETA, kind)[index]


def velocities(batch=6, dims=512, moved=0.05, dtype=torch.float64):
    """(v_new, v_old, eps), each (batch, dims)."""
    torch.manual_seed(0)
    v_old, eps = torch.randn(batch, dims, dtype=dtype), torch.randn(batch, dims, dtype=dtype)
    return v_old + moved * torch.randn(batch, dims, dtype=dtype), v_old, eps


# ------------------------------------------------------------------------------------------------------------
# The sampler


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_every_sampler_is_the_euler_step_of_diffusers(kind):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    x, expected = (torch.randn(2, 4, 8, 16),) * 2
    for step, t in zip(
        guard.schedule(scheduler.sigmas.tolist(), 0.0, kind), scheduler.timesteps, strict=True
    ):
        v = torch.randn_like(x)
        x = step.a * x + step.b * v
        expected = scheduler.step(v, t, expected).prev_sample
        assert (step.a, step.s) == (1.0, 0.0)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def test_flow_and_dance_are_the_published_sde_steps():
    """Flow-GRPO: x - dt [v + g²/(2 sigma) (x + (1 - sigma) v)] + g sqrt(dt) eps; the samplers differ in g."""
    torch.manual_seed(0)
    x, v = torch.randn(2, 5, dtype=torch.float64)
    for sigma, sigma_next in ((0.96, 0.9), (0.5, 0.3), (1.0, 0.97)):
        below = 1 - sigma if sigma < 1 else 1 - sigma_next
        for kind, g in (("flow", ETA * math.sqrt(sigma / below)), ("dance", ETA)):
            a, b, s = guard.sde_coefficients(sigma, sigma_next, ETA, kind)
            dt = sigma - sigma_next
            mu = x - dt * (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v))
            torch.testing.assert_close(a * x + b * v, mu)
            assert s == pytest.approx(g * math.sqrt(dt))


@pytest.mark.parametrize("kind", ["flow", "dance"])
def test_sde_keeps_the_marginals_of_the_ode(kind):
    """For Gaussian data of variance w the exact velocity is linear in x, and the variance can be followed."""
    w, variance = 0.3, 1.0
    sigmas = np.linspace(0.999, 0, 4001).tolist()
    for step, sigma_next in zip(guard.schedule(sigmas, 0.3, kind), sigmas[1:], strict=True):
        sigma = step.sigma
        slope = (sigma - (1 - sigma) * w) / ((1 - sigma) ** 2 * w + sigma**2)  # v = slope x
        variance = (step.a + step.b * slope) ** 2 * variance + step.s**2
        assert variance == pytest.approx((1 - sigma_next) ** 2 * w + sigma_next**2, abs=0.02)
    assert variance == pytest.approx(w, abs=0.02)


def test_cps_keeps_the_coefficients():
    """Flow-CPS: x_next = (1 - sigma_next) x0 + c x1 + s eps with c² + s² = sigma_next²: no noise too many."""
    x0, x1 = torch.randn(2, 5, dtype=torch.float64)
    sigma, sigma_next = 0.8, 0.6
    a, b, s = guard.sde_coefficients(sigma, sigma_next, ETA, "cps")
    c = math.sqrt(sigma_next**2 - s**2)
    x, v = (1 - sigma) * x0 + sigma * x1, x1 - x0
    torch.testing.assert_close(a * x + b * v, (1 - sigma_next) * x0 + c * x1)
    assert s == pytest.approx(sigma_next * math.sin(ETA * math.pi / 2))


def test_the_last_step_has_no_noise_and_is_not_trained():
    for kind in KINDS:
        steps = guard.schedule(sd3_sigmas(10), ETA, kind)
        assert [step.s > 0 for step in steps] == [True] * 9 + [False]
    assert sd3_sigmas(10)[-3:] == pytest.approx([0.278, 0.0089, 0], abs=1e-3)  # SD3 shifts its schedule twice
    assert guard.schedule(sd3_sigmas(10), ETA, "flow")[8].s == pytest.approx(0.225, abs=1e-3)


def test_only_the_steps_of_the_window_have_noise():
    args = guard.Args(steps=10, sde_window=3, seed=1)
    starts = set()
    for epoch in range(60):
        window = guard.noisy_steps(args, epoch)
        steps = guard.schedule(sd3_sigmas(10), ETA, "flow", window)
        assert [i for i, step in enumerate(steps) if step.s > 0] == list(window)
        assert len(window) == 3
        starts.add(window.start)
    assert starts == set(range(7))
    with pytest.raises(ValueError, match="expected flow, dance or cps"):
        guard.sde_coefficients(1.0, 0.9, 0.7, "ddim")


# ------------------------------------------------------------------------------------------------------------
# Log-probability and ratio


def test_log_prob_is_the_mean_of_normal_log_densities():  # Eq. 6
    x_next, mu, _ = velocities()
    expected = torch.distributions.Normal(mu, 0.3).log_prob(x_next).mean(1)
    torch.testing.assert_close(guard.log_prob(x_next, mu, 0.3), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_flow_grpo_ratio_is_the_difference_of_log_probs(kind):  # Eq. 7
    v_new, v_old, eps = velocities()
    x = torch.randn_like(v_old)
    step = a_step(kind)
    x_next = step.a * x + step.b * v_old + step.s * eps
    new, old = (guard.log_prob(x_next, step.a * x + step.b * v, step.s) for v in (v_new, v_old))
    ratio = guard.log_ratio(v_new, v_old, eps, step.b, step.s, "flow-grpo")
    torch.testing.assert_close(ratio, new - old, rtol=1e-9, atol=1e-12)


def test_the_other_ratios_follow_from_it():
    v_new, v_old, eps = velocities()
    step = a_step()
    raw, tempered, revised, norm, guarded = (
        guard.log_ratio(v_new, v_old, eps, step.b, step.s, method) for method in guard.METHODS
    )
    shift = ((step.b * (v_new - v_old)) ** 2).mean(1) / (2 * step.s**2)
    assert torch.equal(tempered, raw)
    torch.testing.assert_close(revised, raw + shift)
    torch.testing.assert_close(norm, step.s * (raw + shift))  # Eq. 8
    torch.testing.assert_close(guarded, norm)


@pytest.mark.parametrize("method", guard.METHODS)
def test_an_unchanged_policy_has_ratio_exactly_1_and_samples_do_not_touch_each_other(method):
    v_new, v_old, eps = velocities(dtype=torch.float32)
    step = a_step()
    assert torch.equal(guard.log_ratio(v_old, v_old, eps, step.b, step.s, method), torch.zeros(6))
    one_moved = v_old.clone()
    one_moved[2] = v_new[2]
    rho = torch.expm1(guard.log_ratio(one_moved, v_old, eps, step.b, step.s, method))
    assert rho[2] != 0 and torch.equal(rho[[0, 1, 3, 4, 5]], torch.zeros(5))


def test_ratio_norm_removes_the_left_shift():
    """Over the noise, log r has mean -KL/D, which is sqrt(KL/2) of its spread; Eq. 8 has mean 0.

    And E[r] = exp(-KL/D + KL/D²), below 1.
    """
    count, dims = 20000, 64
    step = a_step()
    torch.manual_seed(0)
    v_old = torch.randn(1, dims, dtype=torch.float64)
    v_new = v_old + 0.4 * torch.randn(1, dims, dtype=torch.float64)
    eps = torch.randn(count, dims, dtype=torch.float64)
    raw, norm = (
        guard.log_ratio(v_new, v_old, eps, step.b, step.s, method) for method in ("flow-grpo", "guard")
    )
    kl = ((step.b * (v_new - v_old)) ** 2).sum().item() / (2 * step.s**2)  # summed over D

    def within_3_errors(values, expected):
        return abs(values.mean().item() - expected) < 3 * values.std().item() / math.sqrt(count)

    assert within_3_errors(raw, -kl / dims) and within_3_errors(
        raw.exp(), math.exp(-kl / dims + kl / dims**2)
    )
    assert not within_3_errors(raw, 0) and raw.mean() < 0
    assert -raw.mean().item() / raw.std().item() == pytest.approx(math.sqrt(kl / 2), abs=3 / math.sqrt(count))
    assert within_3_errors(norm, 0)


def test_the_spread_of_the_normalised_ratio_goes_as_1_over_sqrt_D():
    """So the paper's clip range of 2e-6 at D = 65,536 is 2e-6 sqrt(65,536 / 512) at D = 512."""
    step, spread = a_step(), {}
    for dims in (512, 32768):
        v_new, v_old, eps = velocities(batch=400, dims=dims)
        spread[dims] = guard.log_ratio(v_new, v_old, eps, step.b, step.s, "guard").std().item()
    assert spread[512] / spread[32768] == pytest.approx(8, rel=0.15)
    assert 2e-6 * math.sqrt(65536 / 512) == pytest.approx(2.3e-5, rel=0.02)


def test_rho_keeps_digits_that_the_difference_of_log_probs_loses():
    """Root mean square error over 32 samples of SD3.5's size, in fp32, against float64."""
    dims, step = 16 * 64 * 64, a_step(index=8)
    torch.manual_seed(0)
    x, v_old, eps, moved = torch.randn(4, 32, dims, dtype=torch.float64)
    v_new = v_old + 1e-4 * moved
    exact = guard.log_ratio(v_new, v_old, eps, step.b, step.s, "flow-grpo")
    low = [tensor.float() for tensor in (v_new, v_old, eps)]
    ours = guard.log_ratio(*low, step.b, step.s, "flow-grpo")
    x_next = (step.a * x + step.b * v_old + step.s * eps).float()
    new, old = (guard.log_prob(x_next, step.a * x.float() + step.b * v, step.s) for v in low[:2])
    our_error, their_error = ((value.double() - exact).square().mean().sqrt() for value in (ours, new - old))
    assert our_error < 1e-9
    assert their_error > 10 * our_error


# ------------------------------------------------------------------------------------------------------------
# Objective


def test_the_objective_is_ppos_without_its_constant():  # Eq. 12
    rho = torch.linspace(-0.3, 0.3, 7, dtype=torch.float64)
    for advantage in (-1.5, 2.0):
        ratio, A = 1 + rho, torch.full_like(rho, advantage)
        ppo = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) - A
        torch.testing.assert_close(guard.surrogate(rho, A, 0.2, 3.0), 3.0 * ppo)
    rho = torch.tensor([-0.3, 0.0, 0.3], requires_grad=True)
    guard.surrogate(rho, torch.ones(3), 0.2, 1.0).sum().backward()
    assert rho.grad.tolist() == [1, 1, 0]  # a good sample stops pushing above the clip, and only there


@pytest.mark.parametrize("kind", KINDS)
def test_guard_gives_every_step_the_same_gradient(kind):
    """Norm of the objective's gradient with respect to v at rho = 0: over the steps, largest to smallest."""
    spread = {}
    v_old, eps = velocities(batch=1)[1:]
    for method in guard.METHODS:
        norms = []
        for step in guard.schedule(sd3_sigmas(10), ETA, kind)[:-1]:
            v_new = v_old.clone().requires_grad_()
            rho = torch.expm1(guard.log_ratio(v_new, v_old, eps, step.b, step.s, method))
            delta = guard.reweighting(step, ETA, kind, method)
            guard.surrogate(rho, torch.ones(1), 1e-3, delta).sum().backward()
            norms.append(v_new.grad.norm().item())
        spread[method] = max(norms) / min(norms)
    assert spread["guard"] == pytest.approx(1 + ETA**2 / 2 if kind == "flow" else 1.0)  # see `reweighting`
    assert spread["flow-grpo"] == pytest.approx(spread["mean-revised"]) and spread["flow-grpo"] > 2
    assert spread["temp-reweight"] == pytest.approx(spread["rationorm"])
    if kind == "flow":
        assert spread["flow-grpo"] == pytest.approx(26, rel=0.05)
        assert spread["rationorm"] == pytest.approx(8.4, rel=0.05)


def test_advantages_compare_with_the_own_group_and_dead_groups_have_none():
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    A = guard.advantages(scores)
    expected = (scores[0] - 1.5) / (math.sqrt(1.25) + 1e-4)
    torch.testing.assert_close(A[0], expected)
    assert torch.equal(A[1], torch.zeros(4, dtype=torch.float64))
    lonely = torch.zeros(1, 100, dtype=torch.float64)
    lonely[0, 7] = 1
    assert guard.advantages(lonely).max() == 5


def test_the_clip_blocks_only_what_pushes_further_away():
    """blocked: rho above clip of a good sample, rho below -clip of a bad one. Dead groups do not count."""
    rho = torch.tensor([[2.0, 2.0, -2.0, -2.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)[..., None]
    advantage = torch.tensor([[1.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    line = guard.statistics(guard.Args(clip=1.0), rho, advantage)
    assert line["live"] == 4 and line["ratio_mean"] == 0 and line["ratio_std"] == 2
    assert (line["clip_high"], line["clip_low"], line["blocked"]) == (0.5, 0.5, 0.75)


# ------------------------------------------------------------------------------------------------------------
# Keys, prompts, ranks


def test_noise_depends_on_its_key_alone():
    first = guard.rng(0, 1, 2, 3, 4).standard_normal(32)
    assert np.array_equal(first, guard.rng(0, 1, 2, 3, 4).standard_normal(32))
    others = [guard.rng(*key).standard_normal(32) for key in np.eye(5, dtype=int).tolist()]
    assert all(not np.array_equal(first, other) for other in others)
    assert guard.rng(5).standard_normal(10000, np.float32).std() == pytest.approx(1, abs=0.03)


def test_prompts_are_drawn_without_replacement():
    args = guard.Args(groups=4, seed=3)
    drawn = [index for epoch in range(5) for index in guard.prompt_order(args, epoch, 10)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]


# ------------------------------------------------------------------------------------------------------------
# A small run of the real thing

SMALL = "--groups 4 --group_size 4 --micro_batch 4 --eval_prompts 4 --steps 4 --eval_steps 4 --epochs 2"


def run(arguments, processes=1):
    command = [sys.executable, "guard.py"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "guard.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments.split()], cwd=HERE, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def lines_of(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """Two epochs of two updates on the tiny SD3."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(f"--run_dir {folder} {SMALL}")
    return folder


def test_the_first_update_of_every_epoch_has_ratio_exactly_1(a_run):
    updates = lines_of(a_run, "update")
    assert [line["first"] for line in updates] == [True, False, True, False]
    assert [line["update"] for line in updates] == [1, 2, 3, 4]
    for line in updates:
        if line["live"] and line["first"]:
            assert line["ratio_mean"] == line["ratio_std"] == [0.0] * 3
        elif line["live"]:
            assert all(std > 0 for std in line["ratio_std"])
    assert any(line["live"] for line in updates if line["first"])
    assert any(line["live"] for line in updates if not line["first"])


def test_the_first_updates_are_the_committed_ones(a_run):
    """Seed 0 on tiny/sd3: a change of behaviour cannot slip in. Measured on an AMD EPYC with torch 2.13.0."""
    first, second = lines_of(a_run, "update")[:2]
    assert lines_of(a_run, "rollout")[0]["reward_mean"] == pytest.approx(0.21875, abs=1e-6)
    assert first["grad_norm"] == pytest.approx(0.0182408, rel=1e-3)
    assert second["grad_norm"] == pytest.approx(0.0109002, rel=1e-3)
    assert second["loss"] == pytest.approx(2.6987e-4, rel=1e-2)
    assert second["ratio_std"] == pytest.approx([9.94682e-5, 5.41675e-4, 1.35155e-3], rel=1e-2)
    assert (second["live"], second["clip_high"]) == (8, [0.5, 0.5, 0.875])
    assert second["blocked"] == [0.375, 0.125, 0.5]


def test_a_run_leaves_what_it_should(a_run):
    config = json.loads((a_run / "config.json").read_text())
    assert (
        config["args"]["lr"] > 0 and config["args"]["model"] == "tiny-sd3" and "torch" in config["versions"]
    )
    evaluations, rollouts = lines_of(a_run, "eval"), lines_of(a_run, "rollout")
    assert [line["update"] for line in evaluations] == [0, 4]
    assert evaluations[0]["kl_to_base"] == 0 < evaluations[1]["kl_to_base"]
    assert set(evaluations[0]["gold"]) == {"cards", *(f"cards-{part}" for part in rewards.CARD_PARTS)}
    assert tuple(evaluations[0]["looks"]) == rewards.LOOKS
    assert [line["images"] for line in rollouts] == [16, 16]
    assert all(line["seconds"].keys() == {"sample", "reward", "train"} for line in rollouts)
    assert sorted(p.name for p in (a_run / "samples").iterdir()) == ["000000.png", "000004.png"]
    assert sorted(p.name for p in a_run.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000004"]
    kept = {p.suffix for p in a_run.rglob("*") if p.is_file()}
    assert kept == {".json", ".jsonl", ".png", ".safetensors"}  # nothing pickled


def test_the_saved_lora_draws_in_plain_diffusers_what_the_evaluation_drew(a_run, tmp_path):
    """Same noise, same weights at full strength: the same pixels, to a level of 256.

    Not to the bit, since the pipeline encodes its four prompts in one batch.
    """
    folder = shutil.copytree(a_run, tmp_path / "copy")
    checkpoint = folder / "checkpoint-000004"
    args = guard.parse_args(["--resume", str(folder)])
    backbone = guard.load_backbone(args)
    policy = guard.Policy(backbone, args)
    guard.load_checkpoint(policy, args)
    prompts = [prompt for prompt, _ in rewards.read_prompts(HERE / "prompts/cards/test.txt")[:4]]
    texts = list(backbone.encode(prompts).values())
    keys = [(args.seed, guard.EVALUATION, i, 0) for i in range(4)]
    ode = guard.schedule(backbone.sigmas(4), 0.0, "flow")
    with policy.averaged():
        ours = backbone.decode(guard.sample(backbone, ode, texts, keys)[0])

    def draw(pipe):
        values = [guard.rng(*key, 0).standard_normal(backbone.shape, np.float32) for key in keys]
        latents = torch.from_numpy(np.stack(values))
        return pipe(
            prompts,
            height=32,
            width=64,
            num_inference_steps=4,
            guidance_scale=1.0,
            latents=latents,
            max_sequence_length=18,
        ).images

    pipe = StableDiffusion3Pipeline.from_pretrained(HERE / "tiny/sd3")
    pipe.set_progress_bar_config(disable=True)
    base = draw(pipe)
    pipe.load_lora_weights(checkpoint)
    adapter = pipe.transformer.peft_config["default_0"]
    assert (adapter.r, adapter.lora_alpha) == (32, 64)
    for mine, theirs, before in zip(ours, draw(pipe), base, strict=True):
        mine, theirs, before = (np.array(image, dtype=int) for image in (mine, theirs, before))
        assert np.abs(mine - theirs).max() <= 1
        assert np.abs(mine - before).max() >= 10


def test_a_resumed_run_equals_an_uninterrupted_one(a_run, tmp_path):
    """Cut back to its first checkpoint, as after a kill in the second epoch, and resumed."""
    cut = tmp_path / "cut"
    shutil.copytree(a_run, cut)
    shutil.rmtree(cut / "checkpoint-000004")
    run(f"--resume {cut}")
    state = [load_file(folder / "checkpoint-000004/state.safetensors") for folder in (a_run, cut)]
    assert state[0].keys() == state[1].keys() and len(state[0]) > 100
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    for kind in ("update", "eval"):
        assert lines_of(a_run, kind) == lines_of(cut, kind)


def test_two_processes_train_what_one_does(a_run, tmp_path):
    """The same images, rewards and ratios; weights equal but for the order in which gradients are summed."""
    two = tmp_path / "two"
    run(f"--run_dir {two} {SMALL}", processes=2)
    one_line, two_line = lines_of(a_run, "rollout")[0], lines_of(two, "rollout")[0]
    assert (
        one_line["reward_mean"] == two_line["reward_mean"]
        and one_line["reward_std"] == two_line["reward_std"]
    )
    assert lines_of(a_run, "eval")[0] == lines_of(two, "eval")[0]
    for mine, theirs in zip(lines_of(a_run, "update"), lines_of(two, "update"), strict=True):
        assert mine["live"] == theirs["live"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    state = [load_file(folder / "checkpoint-000002/state.safetensors") for folder in (a_run, two)]
    for name, value in state[0].items():
        if name.startswith(
            "exp_avg."
        ):  # the gradients; Adam's step turns rounding of tiny ones into sign flips
            scale = value.abs().max().item() + 1e-12
            torch.testing.assert_close(state[1][name], value, rtol=1e-3, atol=1e-3 * scale)
