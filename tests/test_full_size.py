"""SD3.5-M and FLUX.1-dev at their true sizes, without weights; pictures of diffusers; the optimizer."""

from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from helpers import HERE

import guard
from experiments.random_weights import DYNAMIC, FLUX, SD3

# ------------------------------------------------------------------------------------------------------------
# True sizes


@pytest.mark.parametrize("kind, config, count", [
    (SD3Transformer2DModel, SD3, 18_776_064), (FluxTransformer2DModel, FLUX, 52_297_728)])
def test_the_lora_has_as_many_parameters_as_the_papers(kind, config, count):
    with torch.device("meta"):
        transformer = kind(**config).requires_grad_(False)
        transformer.add_adapter(peft.LoraConfig(r=32, lora_alpha=64, target_modules=guard.LORA_TARGETS))
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    assert not any("attn2" in name for name in trained)


@pytest.mark.parametrize("kind, more, steps", [
    (guard.SD3, {}, 10), (guard.SD3, {}, 40), (guard.Flux, DYNAMIC, 6), (guard.Flux, DYNAMIC, 28)])
def test_noise_levels_are_those_of_the_pipelines_of_diffusers(kind, more, steps):
    """At 512 x 512, which is 1024 tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **more)
    backbone = kind.__new__(kind)
    backbone.pipe, backbone.shape = SimpleNamespace(scheduler=scheduler), (16, 64, 64)
    ours, theirs = backbone.sigmas(steps), FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    if more:
        mu = calculate_shift(1024, 256, 4096, 0.5, 1.15)
        retrieve_timesteps(theirs, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        retrieve_timesteps(theirs, steps, "cpu")
    assert ours == theirs.sigmas.tolist()
    assert ours[0] == 1 and ours[-1] == 0 and len(ours) == steps + 1


# ------------------------------------------------------------------------------------------------------------
# Against the pipelines of diffusers


def load(model, guidance):
    flags = f"--model {HERE}/tiny/{model} --gold none --guidance {guidance}"
    return guard.load_backbone(guard.parse_args(flags.split()))


def draw(backbone, prompts):
    """By the ODE sampler: images and the noise that they were drawn from."""
    keys = [(0, guard.EVALUATION, i, 0) for i in range(len(prompts))]
    embeddings = backbone.encode(set(prompts))
    schedule = guard.make_schedule(backbone.sigmas(6), 0.0, "flow")
    x, kept = guard.sample(backbone, schedule, [embeddings[prompt] for prompt in prompts], keys)
    assert kept == []
    noise = [guard.rng(*key, 0).standard_normal(backbone.shape, np.float32) for key in keys]
    return backbone.decode(x), torch.from_numpy(np.stack(noise))


def draw_by_pipeline(backbone, prompts, guidance, latents):
    backbone.pipe.set_progress_bar_config(disable=True)
    tokenizer = backbone.pipe.tokenizer_2 if isinstance(backbone, guard.Flux) else backbone.pipe.tokenizer_3
    return backbone.pipe(
        prompts, height=32, width=64, num_inference_steps=6, guidance_scale=guidance, latents=latents,
        max_sequence_length=tokenizer.model_max_length).images


def difference(ours, theirs):
    """The largest, in levels of 256."""
    pairs = zip(ours, theirs, strict=True)
    return max(np.abs(np.array(one, int) - np.array(other, int)).max() for one, other in pairs)


PROMPTS = [line for line in (HERE / "prompts/cards/test.txt").read_text().splitlines() if line][:2]


def test_sd3_with_guidance_draws_what_diffusers_draws():
    backbone = load("sd3", 4.5)
    ours, noise = draw(backbone, PROMPTS)
    assert difference(ours, draw_by_pipeline(backbone, PROMPTS, 4.5, noise)) <= 1
    assert difference(ours, draw_by_pipeline(backbone, PROMPTS, 1.0, noise)) > 10


def test_flux_draws_what_diffusers_draws_with_guidance_inside_and_without():
    """FLUX.1-schnell's transformer has no input for it."""
    backbone = load("flux", 3.5)
    ours, noise = draw(backbone, PROMPTS)
    packed = FluxPipeline._pack_latents(noise, 2, *backbone.shape)
    assert difference(ours, draw_by_pipeline(backbone, PROMPTS, 3.5, packed)) <= 1
    assert difference(ours, draw_by_pipeline(backbone, PROMPTS, 20.0, packed)) > 1
    config = dict(backbone.transformer.config) | dict(guidance_embeds=False)
    schnell = FluxTransformer2DModel.from_config(config)
    schnell.load_state_dict(load("flux", 3.5).pipe.transformer.state_dict(), strict=False)
    backbone.transformer = backbone.pipe.transformer = schnell
    ours, _ = draw(backbone, PROMPTS)
    assert difference(ours, draw_by_pipeline(backbone, PROMPTS, 3.5, packed)) <= 1


# ------------------------------------------------------------------------------------------------------------
# The optimizer, on a model of four numbers


@pytest.fixture
def make_policy():
    def make_policy(**settings):
        transformer = torch.nn.Linear(4, 1, bias=False)
        transformer.weight.data = torch.tensor([[10.0, -20.0, 30.0, 40.0]])
        return guard.Policy(SimpleNamespace(transformer=transformer), guard.Args(**settings))

    return make_policy


def test_an_update_is_a_step_of_adamw_with_the_gradients_norm_cut_to_1(make_policy):
    policy = make_policy(lr=0.1, dtype="float32")
    (weight,) = policy.params
    before, gradient = weight.detach().clone(), torch.tensor([[3.0, 0.0, -4.0, 0.0]])
    weight.grad.copy_(gradient)
    assert policy.apply_gradients() == 5  # the norm before it is cut
    cut = gradient / 5
    # AdamW's first step: weight decay of 1e-4, then lr times the gradient's sign.
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 1e-4) - 0.1 * cut.sign())
    torch.testing.assert_close(policy.optimizer.state[weight]["exp_avg"], 0.1 * cut)
    torch.testing.assert_close(policy.optimizer.state[weight]["exp_avg_sq"], 0.001 * cut**2)
    assert not weight.grad.any()
    weight.grad.copy_(gradient / 50)
    policy.apply_gradients()  # a norm of 0.1 stays as it is
    torch.testing.assert_close(policy.optimizer.state[weight]["exp_avg"], 0.09 * cut + 0.1 * gradient / 50)


def test_in_float16_a_gradient_that_overflows_is_skipped_and_the_scale_halved(make_policy):
    policy = make_policy(dtype="float16")  # as on a rank that has made no backward pass
    (weight,) = policy.params
    before = weight.detach().clone()
    for value, factor in ((float("inf"), 0.5), (float("nan"), 0.25), (1.0, 0.25)):
        weight.grad.fill_(value)
        policy.apply_gradients()
        assert policy.scaler.get_scale() == 2.0**24 * factor
        assert torch.equal(weight, before) == (value != 1)
        assert not weight.grad.any()


def test_the_scale_changes_no_gradient(make_policy):
    policy = make_policy(dtype="float16", lr=0.1)
    (weight,) = policy.params
    policy.scaler.scale((weight * torch.tensor([[0.03, 0.0, -0.04, 0.0]])).sum()).backward()
    assert policy.apply_gradients() == pytest.approx(0.05)


def test_in_float32_a_gradient_that_is_not_finite_ends_the_run(make_policy):
    policy = make_policy(dtype="float32")
    policy.params[0].grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        policy.apply_gradients()


def test_the_moving_average_moves_at_every_eighth_update(make_policy):
    """By 1 - min(0.9, 9/18) at the 8th, by 1 - min(0.9, 17/26) at the 16th."""
    policy = make_policy()
    (weight,) = policy.params
    start = weight.detach().clone()
    for updates in range(1, 18):
        weight.data = start + updates
        policy.update_average(updates, 0.9)
        if updates == 9:
            torch.testing.assert_close(policy.average, start[0] + 8 * 0.5)
    torch.testing.assert_close(policy.average, start[0] + 4 + (16 - 4) * (1 - 17 / 26))
    policy.update_average(1000, 0.9)
    torch.testing.assert_close(policy.average, 0.9 * (start[0] + 4 + 12 * 9 / 26) + 0.1 * (start[0] + 17))
    policy.update_average(1001, 0.0)  # no average
    assert torch.equal(policy.average, weight[0])
    weight.data = start
    policy.swap_average()
    assert torch.equal(weight, start + 17) and torch.equal(policy.average, start[0])
