"""The maths of guard.py, as a reader would check it: the sampler, the ratio, the objective, the noise.

    pytest test_guard.py

No model is loaded here. Small real runs, and all else, are in tests/.
"""

import math
import os

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on a machine with a GPU

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import guard

SDES = ("flow", "dance", "cps")
ETA = 0.7


def sd3_sigmas(steps=10):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


def a_step(sde="flow", index=4):
    return guard.make_schedule(sd3_sigmas(), ETA, sde)[index]


def velocities(batch=6, dims=512, moved=0.05, dtype=torch.float64):
    """(v_new, v_old, eps), each (batch, dims)."""
    torch.manual_seed(0)
    v_old, eps = torch.randn(batch, dims, dtype=dtype), torch.randn(batch, dims, dtype=dtype)
    return v_old + moved * torch.randn(batch, dims, dtype=dtype), v_old, eps


# ------------------------------------------------------------------------------------------------------------
# The sampler


@pytest.mark.parametrize("sde", SDES)
def test_without_noise_every_sampler_is_the_euler_step_of_diffusers(sde):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    x, expected = (torch.randn(2, 4, 8, 16),) * 2
    schedule = guard.make_schedule(scheduler.sigmas.tolist(), 0.0, sde)
    for step, t in zip(schedule, scheduler.timesteps, strict=True):
        v = torch.randn_like(x)
        x = step.a * x + step.b * v
        expected = scheduler.step(v, t, expected).prev_sample
        assert (step.a, step.s) == (1.0, 0.0)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def test_flow_and_dance_are_the_published_sde_steps():
    """Both: x - dt [v + g² / (2 sigma) (x + (1 - sigma) v)] + g sqrt(dt) eps. They differ in g."""
    torch.manual_seed(0)
    x, v = torch.randn(2, 5, dtype=torch.float64)
    for sigma, sigma_next in ((0.96, 0.9), (0.5, 0.3), (1.0, 0.97)):
        clean_share = 1 - sigma if sigma < 1 else 1 - sigma_next
        for sde, g in (("flow", ETA * math.sqrt(sigma / clean_share)), ("dance", ETA)):
            a, b, s = guard.sde_coefficients(sigma, sigma_next, ETA, sde)
            dt = sigma - sigma_next
            mu = x - dt * (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v))
            torch.testing.assert_close(a * x + b * v, mu)
            assert s == pytest.approx(g * math.sqrt(dt))


@pytest.mark.parametrize("sde", ["flow", "dance"])
def test_an_sde_keeps_the_marginals_of_the_ode(sde):
    """For Gaussian data of variance w the exact velocity is linear in x, and the variance can be followed."""
    w, variance = 0.3, 1.0
    sigmas = np.linspace(0.999, 0, 4001).tolist()
    for step, sigma_next in zip(guard.make_schedule(sigmas, 0.3, sde), sigmas[1:], strict=True):
        sigma = step.sigma
        slope = (sigma - (1 - sigma) * w) / ((1 - sigma) ** 2 * w + sigma**2)  # v = slope x
        variance = (step.a + step.b * slope) ** 2 * variance + step.s**2
        assert variance == pytest.approx((1 - sigma_next) ** 2 * w + sigma_next**2, abs=0.02)
    assert variance == pytest.approx(w, abs=0.02)


def test_cps_keeps_the_coefficients():
    """Flow-CPS: x_next = (1 - sigma_next) x0 + c x1 + s eps with c² + s² = sigma_next²."""
    x0, x1 = torch.randn(2, 5, dtype=torch.float64)
    sigma, sigma_next = 0.8, 0.6
    a, b, s = guard.sde_coefficients(sigma, sigma_next, ETA, "cps")
    c = math.sqrt(sigma_next**2 - s**2)
    x, v = (1 - sigma) * x0 + sigma * x1, x1 - x0
    torch.testing.assert_close(a * x + b * v, (1 - sigma_next) * x0 + c * x1)
    assert s == pytest.approx(sigma_next * math.sin(ETA * math.pi / 2))


def test_the_last_step_has_no_noise_and_is_not_trained():
    for sde in SDES:
        steps = guard.make_schedule(sd3_sigmas(), ETA, sde)
        assert [step.s > 0 for step in steps] == [True] * 9 + [False]
    assert sd3_sigmas()[-3:] == pytest.approx([0.278, 0.0089, 0], abs=1e-3)  # SD3 shifts its schedule twice
    assert a_step(index=8).s == pytest.approx(0.225, abs=1e-3)


def test_only_the_steps_of_the_window_have_noise_in_the_first_half():
    args = guard.Args(steps=10, sde_window=3, seed=1)
    starts = set()
    for epoch in range(60):
        window = guard.noisy_steps(args, epoch)
        schedule = guard.make_schedule(sd3_sigmas(), ETA, "flow", window)
        assert [i for i, step in enumerate(schedule) if step.s > 0] == list(window)
        assert len(window) == 3
        starts.add(window.start)
    assert starts == {0, 1, 2}
    assert guard.noisy_steps(guard.Args(steps=10, sde_window=6), 0) == range(6)
    assert guard.noisy_steps(guard.Args(steps=10), 0) == range(9)


# ------------------------------------------------------------------------------------------------------------
# Log-probability and ratio


def test_log_prob_is_the_mean_of_normal_log_densities():  # Eq. 6
    x_next, mu, _ = velocities()
    expected = torch.distributions.Normal(mu, 0.3).log_prob(x_next).mean(1)
    torch.testing.assert_close(guard.log_prob(x_next, mu, 0.3), expected)


@pytest.mark.parametrize("sde", SDES)
def test_flow_grpos_ratio_is_the_difference_of_log_probs(sde):  # Eq. 7
    v_new, v_old, eps = velocities()
    x = torch.randn_like(v_old)
    step = a_step(sde)
    x_next = step.a * x + step.b * v_old + step.s * eps
    new, old = (guard.log_prob(x_next, step.a * x + step.b * v, step.s) for v in (v_new, v_old))
    ratio = guard.log_ratio(v_new, v_old, eps, step.b, step.s, "flow-grpo")
    torch.testing.assert_close(ratio, new - old, rtol=1e-9, atol=1e-12)


def test_the_other_ratios_follow_from_it():
    v_new, v_old, eps = velocities()
    step = a_step()
    raw, tempered, revised, norm, guarded, masked = (
        guard.log_ratio(v_new, v_old, eps, step.b, step.s, method) for method in guard.METHODS)
    shift = ((step.b * (v_new - v_old)) ** 2).mean(1) / (2 * step.s**2)
    assert torch.equal(tempered, raw)
    torch.testing.assert_close(revised, raw + shift)
    torch.testing.assert_close(norm, step.s * (raw + shift))  # Eq. 8
    torch.testing.assert_close(guarded, norm)
    torch.testing.assert_close(masked, step.s * raw)


@pytest.mark.parametrize("method", guard.METHODS)
def test_an_unchanged_policy_has_ratio_exactly_1_and_samples_do_not_touch_each_other(method):
    v_new, v_old, eps = velocities(dtype=torch.float32)
    step = a_step()
    assert torch.equal(guard.log_ratio(v_old, v_old, eps, step.b, step.s, method), torch.zeros(6))
    one_moved = v_old.clone()
    one_moved[2] = v_new[2]
    excess = torch.expm1(guard.log_ratio(one_moved, v_old, eps, step.b, step.s, method))
    assert excess[2] != 0 and torch.equal(excess[[0, 1, 3, 4, 5]], torch.zeros(5))


def test_ratio_norm_removes_the_left_shift():
    """Over the noise, log r has mean -KL / D, sqrt(KL / 2) of its standard deviations; Eq. 8 has mean 0.

    And E[r] = exp(KL / D² - KL / D), below 1.
    """
    count, dims, step = 20000, 64, a_step()
    torch.manual_seed(0)
    v_old = torch.randn(1, dims, dtype=torch.float64)
    v_new = v_old + 0.4 * torch.randn(1, dims, dtype=torch.float64)
    eps = torch.randn(count, dims, dtype=torch.float64)
    both = "flow-grpo", "guard"
    raw, norm = (guard.log_ratio(v_new, v_old, eps, step.b, step.s, method) for method in both)
    kl = ((step.b * (v_new - v_old)) ** 2).sum().item() / (2 * step.s**2)  # summed over D

    def within_3_errors(values, expected):
        return abs(values.mean().item() - expected) < 3 * values.std().item() / math.sqrt(count)

    assert within_3_errors(raw, -kl / dims) and not within_3_errors(raw, 0)
    assert within_3_errors(raw.exp(), math.exp(kl / dims**2 - kl / dims))
    assert -raw.mean().item() / raw.std().item() == pytest.approx(math.sqrt(kl / 2), abs=3 / math.sqrt(count))
    assert within_3_errors(norm, 0)


def test_a_clip_range_in_nats_goes_as_1_over_D():
    """At a given KL of the step, summed over D, Eq. 8 has a standard deviation of s sqrt(2 KL) / D."""
    step, kl = a_step(), 0.5
    for dims in (512, 8192):
        _, v_old, eps = velocities(batch=2000, dims=dims)
        moved = torch.randn(1, dims, dtype=torch.float64)
        moved *= step.s * math.sqrt(2 * kl) / abs(step.b) / moved.norm()
        log_r = guard.log_ratio(v_old + moved, v_old, eps, step.b, step.s, "guard")
        assert log_r.std().item() == pytest.approx(step.s * math.sqrt(2 * kl) / dims, rel=0.1)


def test_log_ratio_keeps_digits_that_the_difference_of_log_probs_loses():
    """Root mean square error over 32 samples of SD3.5's size, in fp32, against float64."""
    dims, step = guard.PAPER_D, a_step(index=8)
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
# The objective


class OneWeight(torch.nn.Module):
    """A backbone of D = 4 whose velocity is x times its one weight; without its LoRA it is x."""

    shape = (1, 2, 2)

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight, self.adapted = torch.nn.Parameter(torch.tensor(weight)), True
        self.transformer = self

    def encode(self, prompts):
        return {prompt: [] for prompt in prompts}

    def velocity(self, x, sigma, embeddings):
        return x * self.weight if self.adapted else x

    def decode(self, x):
        return list(x)

    def disable_adapters(self):
        self.adapted = False

    def enable_adapters(self):
        self.adapted = True


def one_update(weight=1.0, A=((1.0, -1.0),), v_old=1.0, **settings):
    """The line of the log of an update of groups of two on one trained step; x = eps = 1."""
    clip = 0.02 * 4 / guard.PAPER_D  # 0.02 at D = 4
    args = guard.Args(group_size=2, dtype="float32", clip=clip, **settings)
    backbone = OneWeight(weight)
    step = guard.Step(sigma=0.5, dt=0.1, a=1.0, b=-0.12, s=0.2)
    x = torch.ones(2, 1, 2, 2)
    kept = [torch.stack([x, v_old * x, x])]
    groups = list(range(len(A)))
    batches = [guard.Batch([2 * group, 2 * group + 1], None, None, kept, None) for group in groups]
    learner = guard.Learner(backbone, args)
    return guard.update(backbone, learner, args, [step], batches, torch.tensor(A), groups)[0]


def test_the_objective_is_ppos_with_delta():  # Eq. 12
    """ratio - 1 = expm1(b (w - 1)). A good or a bad sample is blocked where it is beyond the clip range."""
    b, delta = -0.12, 1 / 0.1
    line = one_update(weight=1.0)
    assert line["excess_mean"] == [0.0] and line["loss"] == 0.0 and line["clip"] == pytest.approx(0.02)
    for weight, blocked in ((0.9, 0), (0.5, 1), (1.5, 1)):  # excess is about 0.012, 0.06, -0.06
        excess = math.expm1(b * (weight - 1))
        line = one_update(weight=weight)
        assert line["excess_mean"] == pytest.approx([excess], rel=1e-5)
        clipped = max(-0.02, min(0.02, excess))
        objective = [delta * min(excess * A, clipped * A) for A in (1.0, -1.0)]
        assert line["loss"] == pytest.approx(-sum(objective) / 2, rel=1e-4, abs=1e-9)
        assert line["blocked"] == [blocked / 2]
    # Both bad, far above the range: nothing is blocked, and the gradient is that of the mean.
    line = one_update(weight=0.5, A=((-1.0, -2.0),))
    assert line["blocked"] == [0.0] and line["clip_high"] == [1.0]
    assert line["grad_norm"] == pytest.approx(delta * 1.5 * abs(b) * math.exp(0.06), rel=1e-4)
    # Both good, above the range: no gradient at all.
    line = one_update(weight=0.5, A=((1.0, 2.0),))
    assert line["blocked"] == [1.0] and line["grad_norm"] == 0


def test_the_mask_blocks_beyond_a_kl_and_has_no_clip():
    """The step's KL is 4 (b (w - 1))² / (2 s²) = 0.72 (w - 1)² nats: 0.58 and 0.72 here."""
    good, bad = ((1.0, 2.0),), ((-1.0, -2.0),)
    for weight, A, blocked in ((0.1, good, 0), (0.0, good, 1), (0.0, bad, 0), (2.0, bad, 1), (2.0, good, 0)):
        line = one_update(weight=weight, A=A, method="guard-mask")
        assert line["blocked"] == [blocked] and (line["grad_norm"] == 0) == blocked


def test_dead_groups_count_in_the_mean_of_the_loss_and_in_nothing_else():
    alone = one_update(weight=0.9, A=((1.0, 2.0),))
    line = one_update(weight=0.9, A=((0.0, 0.0), (1.0, 2.0)))
    assert (line["loss"], line["grad_norm"]) == pytest.approx((alone["loss"] / 2, alone["grad_norm"] / 2))
    assert alone["loss"] < 0 and line["excess_mean"] == alone["excess_mean"] and line["live"] == 2


def test_the_kl_is_that_of_two_normal_distributions_and_outside_of_delta():
    weight, s, b, beta_dt = 1.3, 0.2, -0.12, 0.5 * 0.1
    line = one_update(weight=weight, v_old=weight, kl_beta=0.5)
    means = torch.full((4,), b * weight), torch.full((4,), b)
    new, base = (torch.distributions.Normal(mean, s) for mean in means)
    expected = torch.distributions.kl_divergence(new, base).mean().item()  # over D
    assert line["kl"] == pytest.approx([expected], rel=1e-5)
    assert line["loss"] == pytest.approx(beta_dt * expected, rel=1e-4)  # the ratio is 1
    slope = beta_dt * b**2 * (weight - 1) / s**2
    assert line["grad_norm"] == pytest.approx(slope, rel=1e-4)
    # A dead group has the gradient of its KL, and none without.
    dead = dict(weight=weight, A=((0.0, 0.0),))
    assert one_update(**dead, kl_beta=0.5)["grad_norm"] == pytest.approx(slope, rel=1e-4)
    assert one_update(**dead)["grad_norm"] == 0


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("method", guard.METHODS)
def test_the_weight_of_each_step(method, sde):
    """At ratio 1 the gradient of delta * excess with respect to v is w eps / D. Guard's w is constant."""
    v_old, eps = velocities(batch=1)[1:]
    for step in guard.make_schedule(sd3_sigmas(), ETA, sde)[:-1]:
        v_new = v_old.clone().requires_grad_()
        excess = torch.expm1(guard.log_ratio(v_new, v_old, eps, step.b, step.s, method))
        (guard.reweighting(step, ETA, sde, method) * excess).sum().backward()
        w = {"flow-grpo": step.b / step.s, "temp-reweight": step.b, "mean-revised": step.b / step.s,
             "rationorm": step.b}.get(method, -(1 + ETA**2 / 2))
        if method.startswith("guard") and (sde, step.sigma) == ("flow", 1):
            w = -1  # see `reweighting`
        torch.testing.assert_close(v_new.grad, w * eps / 512)


@pytest.mark.parametrize("sde, eta, expected", [
    ("flow", 0.7, (0.66, 0.87, 1.31, 1.43)), ("cps", 0.7, (0.04, 1.15, 1.66, 1.84)),
    ("dance", 0.3, (0.30, 0.28, 0.28, 0.30))])
def test_the_signal_to_noise_ratios_of_the_weights(sde, eta, expected):
    """The table of `reweighting`: sum(w s) / sqrt(sum(w²)) of Flow-GRPO, RatioNorm, Guard and the best."""
    schedule = guard.make_schedule(sd3_sigmas(), eta, sde)[:-1]
    s, b = (np.array([getattr(step, name) for step in schedule]) for name in "sb")
    of_guard = [abs(step.b) * guard.reweighting(step, eta, sde, "guard") for step in schedule]
    for w, signal in zip((abs(b) / s, abs(b), of_guard, s), expected, strict=True):
        assert np.dot(w, s) / np.linalg.norm(w) == pytest.approx(signal, abs=0.01)
    if sde == "flow":  # |b| varies 8-fold over the steps, |b| / s 26-fold
        assert [np.ptp(np.log(-w)) for w in (b, b / s)] == pytest.approx(np.log([8.4, 26]), abs=0.02)


def test_advantages_compare_with_the_own_group_and_dead_groups_have_none():
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    A = guard.advantages(scores)
    torch.testing.assert_close(A[0], (scores[0] - 1.5) / (math.sqrt(1.25) + 1e-4))
    assert torch.equal(A[1], torch.zeros(4, dtype=torch.float64))
    lonely = torch.zeros(1, 100, dtype=torch.float64)
    lonely[0, 7] = 1
    assert guard.advantages(lonely).max() == 5


def test_the_clip_blocks_only_what_pushes_further_away():
    """A good sample above 1 + clip, a bad one below 1 - clip. Dead groups do not count."""
    excess = torch.tensor([[2.0, 2.0, -2.0, -2.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)[..., None]
    A = torch.tensor([[1.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    line = guard.clip_statistics(excess, A, torch.ones_like(excess))
    assert line["live"] == 4 and line["excess_mean"] == 0 and line["excess_std"] == 2
    assert (line["clip_high"], line["clip_low"], line["blocked"]) == (0.5, 0.5, 0.75)


def test_the_moving_average_moves_at_every_eighth_update():
    """By 1 - min(0.9, 9 / 18) of the way at update 8, by 1 - min(0.9, 17 / 26) at update 16."""
    backbone, seen = OneWeight(0.0), {}
    learner = guard.Learner(backbone, guard.Args(dtype="float32"))
    for updates in range(1, 801):
        backbone.weight.data.fill_(updates)
        learner.update_average(updates, 0.9)
        seen[updates] = learner.average.item()
    assert (seen[7], seen[8], seen[15]) == (0, 4, 4)
    assert seen[16] == pytest.approx(4 + (16 - 4) * (1 - 17 / 26))
    assert seen[800] == pytest.approx(0.9 * seen[799] + 0.1 * 800)
    learner.swap_average()
    assert (backbone.weight, learner.average) == (seen[800], 800)
    learner.update_average(801, 0.0)  # no average
    assert learner.average == backbone.weight


# ------------------------------------------------------------------------------------------------------------
# What is drawn


def test_prompts_are_drawn_without_replacement():
    args, prompts = guard.Args(groups=4, seed=3), list(range(10))
    drawn = [prompt for epoch in range(5) for prompt in guard.prompts_of_epoch(args, epoch, prompts)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == prompts and drawn[:10] != drawn[10:]


def noise(epoch=0, **settings):
    """(x, eps): the noise that 2 members of 2 groups start from, (4, D), and that of 2 steps, (2, 4, D)."""
    args = guard.Args(**dict(micro_batch=2) | settings)
    schedule = guard.make_schedule([1.0, 0.6, 0.3, 0.0], ETA, "dance")
    batches = guard.rollout(OneWeight(), args, schedule, [("a card", {})] * 2, 2, epoch, [])
    kept = torch.cat([torch.stack(batch.kept) for batch in batches], 2).flatten(3)  # (2, 3, 4, D)
    return kept[0, 0], kept[:, 2]


def test_noise_depends_on_seed_epoch_group_member_and_step_alone():
    drawn = [torch.cat([x, *eps]) for x, eps in (noise(), noise(seed=1), noise(epoch=1))]  # (12, D) each
    assert len(torch.cat(drawn).unique(dim=0)) == 36
    for mine, theirs in zip(noise(), noise(micro_batch=1), strict=True):
        assert torch.equal(mine, theirs)


def test_a_group_can_share_the_noise_it_starts_from():
    x, eps = noise(same_noise=True)
    alone = noise()[0]
    assert torch.equal(x, alone[[0, 0, 2, 2]])
    assert len(eps.flatten(0, 1).unique(dim=0)) == 8


def test_a_latent_that_is_not_finite_is_no_picture():
    with pytest.raises(FloatingPointError, match="bfloat16"):
        guard.sample(OneWeight(math.inf), guard.make_schedule([1.0, 0.0], ETA, "flow"), [], [(0, 0, 0, 0)])
