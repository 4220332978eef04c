"""SD3.5-M and FLUX.1-dev at true size, without weights; pictures of diffusers; LoRAs; the optimizer."""

import shutil
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
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from helpers import HERE
from safetensors.torch import load_file, save_file

import guard
from experiments.random_weights import DYNAMIC, FLUX, SD3
from rewards import BadInput

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


@pytest.mark.parametrize("kind, more, steps", [(guard.SD3, {}, 10), (guard.Flux, DYNAMIC, 6)])
def test_noise_levels_are_those_of_the_pipelines_of_diffusers(kind, more, steps):
    """At 512 x 512, which is 1024 tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **more)
    backbone = kind.__new__(kind)
    backbone.pipe, backbone.shape = SimpleNamespace(scheduler=scheduler), (16, 64, 64)
    ours, theirs = backbone.sigmas(steps), FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    shifted = dict(sigmas=np.linspace(1, 1 / steps, steps), mu=calculate_shift(1024, 256, 4096, 0.5, 1.15))
    retrieve_timesteps(theirs, steps, "cpu", **(shifted if more else {}))
    assert ours == theirs.sigmas.tolist()
    assert ours[0] == 1 and ours[-1] == 0 and len(ours) == steps + 1


# ------------------------------------------------------------------------------------------------------------
# Against the pipelines of diffusers

PROMPTS = (HERE / "prompts/cards/test.txt").read_text().splitlines()[:2]


def load(model="sd3", more=""):
    args = guard.parse_args(f"--model tiny/{model} --gold none {more}".split())
    return guard.load_backbone(args), args


@pytest.mark.parametrize("model, guidance", [("sd3", 4.5), ("flux", 3.5)])
def test_guidance_and_pictures_are_those_of_diffusers(model, guidance):
    """By the ODE sampler. With another guidance they differ."""
    backbone, args = load(model, f"--guidance {guidance}")
    schedule = guard.make_schedule(backbone.sigmas(6), 0.0, "flow")
    prompts = [(prompt, {}) for prompt in PROMPTS]
    (batch,) = guard.rollout(backbone, args, schedule, prompts, 1, guard.EVALUATION, [])
    keys = [(0, guard.EVALUATION, i, 0, 0) for i in range(2)]
    noise = [guard.rng(*key).standard_normal(backbone.shape, np.float32) for key in keys]
    noise = torch.from_numpy(np.stack(noise))
    if model == "flux":
        noise = FluxPipeline._pack_latents(noise, 2, *backbone.shape)
    backbone.pipe.set_progress_bar_config(disable=True)
    size = dict(height=32, width=64, num_inference_steps=6, max_sequence_length=18)
    for scale, is_ours in ((guidance, True), (20.0, False)):
        images = backbone.pipe(PROMPTS, latents=noise, guidance_scale=scale, **size).images
        difference = np.abs(np.stack(batch.images).astype(int) - np.stack(images)).max()  # levels of 256
        assert (difference <= 1) == is_ours


# ------------------------------------------------------------------------------------------------------------
# LoRAs, and a model that is not whole


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Folder of a LoRA that diffusers has saved, with ranks and scales of its own; the model with it."""
    folder = tmp_path_factory.mktemp("lora")
    transformer = SD3Transformer2DModel.from_pretrained(HERE / "tiny/sd3/transformer")
    some, others = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"
    transformer.add_adapter(peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, alpha_pattern={some: 32}, rank_pattern={others: 2},
        lora_dropout=0.5, target_modules=["to_q", "to_k"], init_lora_weights=False))
    StableDiffusion3Pipeline.save_lora_weights(
        folder, peft.get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict())
    return folder, transformer.eval()


def test_a_lora_to_start_from_keeps_its_rank_and_scaling(lora, tmp_path):
    """The same velocities, without its dropout; and again once guard.py has saved it."""
    folder, transformer = lora
    velocities = []
    for place in (folder, tmp_path):
        backbone, _ = load("sd3", f"--init_lora {place}")
        embeddings = backbone.encode(PROMPTS[:1])[PROMPTS[0]]
        torch.manual_seed(0)
        x = torch.randn(1, *backbone.shape)
        velocities.append(backbone.velocity(x, 0.5, embeddings))
        guard.save_lora(backbone, tmp_path)
    backbone.transformer = transformer
    expected = backbone.velocity(x, 0.5, embeddings)
    assert torch.equal(velocities[0], expected)
    torch.testing.assert_close(velocities[1], expected)
    transformer.disable_adapters()
    assert (backbone.velocity(x, 0.5, embeddings) - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_lora_learns_in_float32_whatever_the_model_is_in(dtype, lora):
    for more in ("", f"--init_lora {lora[0]}"):
        backbone, args = load("sd3", f"--dtype {dtype} {more}")
        transformer = backbone.transformer
        assert {p.dtype for p in guard.Learner(backbone, args).params} == {torch.float32}
        assert {p.dtype for p in transformer.parameters() if not p.requires_grad} == {getattr(torch, dtype)}


def test_a_lora_of_another_model_or_with_nan_is_one_line(lora, tmp_path):
    file = tmp_path / "lora.safetensors"
    weights = load_file(lora[0] / "pytorch_lora_weights.safetensors")
    for changed in (
        {name: weight * torch.nan for name, weight in weights.items()},
        {name.replace("blocks.0", "blocks.99"): weight for name, weight in weights.items()},
        {name: weight[:, :2].contiguous() for name, weight in weights.items()},
        {},
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(BadInput, match=f"^--init_lora {file}: .*expected the safetensors of a LoRA"):
            load("sd3", f"--init_lora {file}")


def test_a_model_without_a_vocabulary_is_one_line(tmp_path):
    shutil.copytree(HERE / "tiny/sd3", tmp_path / "sd3", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(BadInput, match="tokenizer.* has no vocabulary"):
        guard.load_backbone(guard.parse_args(["--model", str(tmp_path / "sd3"), "--gold", "none"]))


# ------------------------------------------------------------------------------------------------------------
# The optimizer, on a model of four numbers


def make_learner(**settings):
    transformer = torch.nn.Linear(4, 1, bias=False)
    transformer.weight.data = torch.tensor([[10.0, -20.0, 30.0, 40.0]])
    return guard.Learner(SimpleNamespace(transformer=transformer), guard.Args(lr=0.1, **settings))


def test_an_update_is_a_step_of_adamw_with_the_gradients_norm_cut_to_1():
    learner = make_learner(dtype="float32")
    (weight,) = learner.params
    before, gradient = weight.detach().clone(), torch.tensor([[3.0, 0.0, -4.0, 0.0]])
    weight.grad.copy_(gradient)
    assert learner.apply_gradients() == 5  # the norm before it is cut
    # AdamW's first step: weight decay of 1e-4, then lr times the gradient's sign.
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 1e-4) - 0.1 * gradient.sign())
    moments = learner.optimizer.state[weight]
    torch.testing.assert_close(moments["exp_avg"], 0.1 * gradient / 5)
    torch.testing.assert_close(moments["exp_avg_sq"], 0.001 * (gradient / 5) ** 2)
    weight.grad.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="non-finite"):
        learner.apply_gradients()


def test_in_float16_an_update_that_overflows_is_skipped_and_the_scale_halved():
    """The scale changes no gradient."""
    learner = make_learner(dtype="float16")  # as on a rank that has made no backward pass
    (weight,) = learner.params
    before = weight.detach().clone()
    weight.grad.fill_(torch.inf)
    learner.apply_gradients()
    assert torch.equal(weight, before) and learner.scaler.get_scale() == 2.0**23 and not weight.grad.any()
    learner.scaler.scale((weight * torch.tensor([[0.03, 0.0, -0.04, 0.0]])).sum()).backward()
    assert learner.apply_gradients() == pytest.approx(0.05)
    assert not torch.equal(weight, before) and learner.scaler.get_scale() == 2.0**23
