"""The full-size paths without weights: SD3.5-M and FLUX.1-dev as fake tensors, FLUX against diffusers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from transformers import CLIPTextModel

import guard
from experiments import plan
from rewards import BadInput
from tiny import make

FIT = ["--offload", "--grad_checkpoint"]
SIZES = {  # parameters, of the LoRA; type; passes for a velocity; text tokens, width of pooled; GPU's bytes
    "sd3.5-medium": (2_243_171_520, 18_776_064, torch.float16, 2, 205, 2048, 24e9),
    "flux.1-dev": (11_901_408_320, 52_297_728, torch.bfloat16, 1, 128, 768, 80e9),
}


def look(tensor):
    return tuple(tensor.shape), tensor.dtype


@pytest.fixture(scope="module", params=SIZES)
def run(request):
    """A slice of the preset's micro batch at 512 px through all phases, and the transformer's inputs."""
    args = plan.resolve(["--model", request.param, *FIT])
    backbone, passes, velocities = plan.load(args), [], []

    def note(_, given, made):
        passes.append([look(tensor) for tensor in (*given[:3], made[0])])

    def velocity(*given, plain=backbone.velocity):
        v = plain(*given)
        velocities.append(look(v))
        return v

    backbone.transformer.register_forward_hook(note)
    backbone.velocity = velocity
    it = plan.plan(backbone, args)
    return SimpleNamespace(**it, backbone=backbone, passes=passes, velocities=velocities)


def test_true_sizes(run):
    base, lora, dtype, *_ = SIZES[run.args.model]
    named = dict(run.backbone.transformer.named_parameters())
    assert run.lora == lora and sum(p.numel() for p in named.values()) == base + lora
    assert {p.dtype for name, p in named.items() if "lora_" not in name} == {dtype}
    assert {p.dtype for p in named.values() if p.requires_grad} == {torch.float32}
    assert not any("attn2" in name for name, p in named.items() if p.requires_grad)
    assert run.args.resolution == "512" and run.args.micro_batch == 8


def test_a_slice_is_sampled_decoded_and_learnt_from(run):
    _, _, dtype, guided, length, width, _ = SIZES[run.args.model]
    tensors, latents = run.count["tensors"], (16, 64, 64)
    assert [look(part) for part in tensors["text"]] == [((1, length, 4096), dtype), ((1, width), dtype)]
    inside = latents if run.args.model == "sd3.5-medium" else (1024, 64)
    shapes = (8, *inside), (8, length, 4096), (8, width), (8, *inside)
    assert run.passes == [[(shape, dtype) for shape in shapes]] * 3 * guided
    assert run.velocities == [((8, *latents), torch.float32)] * 3  # two of sampling, one of training
    assert look(tensors["x"]) == ((8, *latents), torch.float32)
    assert look(tensors["kept"]) == ((1, 3, 8, *latents), torch.float32)
    assert look(tensors["pixels"]) == ((8, 3, 512, 512), torch.float32)
    assert [look(part) for part in tensors["loss"]] == [((8,), torch.float32)] * 3


def test_every_lora_parameter_gets_a_gradient(run):
    touched = run.count["tensors"]["touched"]
    named = [(name, p) for name, p in run.backbone.transformer.named_parameters() if p.requires_grad]
    assert [p.shape for _, p in named] == [p.grad.shape for _, p in named]
    assert {p.grad.dtype for _, p in named} == {torch.float32}
    assert [name for name, p in named if id(p) not in touched] == []


def test_it_fits(run):
    """With --offload --grad_checkpoint at a micro batch of 8: SD3.5-M on 24 GB, FLUX.1-dev on 80 GB."""
    assert run.transformer + run.encoders < run.total < SIZES[run.args.model][-1]
    assert run.total == max(run.phases.values()) + plan.SPARE
    assert run.count["state"]["left"] == pytest.approx(4 * run.lora_bytes, rel=1e-4)


def test_an_epoch_is_the_sum_of_its_passes(run):
    """48 x 24 images in slices of 8, each sampled and learnt from; kept are 3 fp32 tensors a trained step."""
    steps, count, epoch = run.args.steps, run.count, run.flops["epoch"]
    assert run.rollout_image == (steps - 1) * 3 * 4 * 16 * 64 * 64
    assert run.rollout == 1152 * run.rollout_image
    assert epoch["sample"] == 144 * steps * count["sample"]["flops"] / 2
    assert epoch["train"] == 144 * (steps - 1) * count["train"]["flops"]
    # Forward, again for the checkpoints, and backward without dL/dweights.
    assert 3 < run.flops["ratio"] < 3.3
    assert run.flops["run"] > 240 * sum(epoch.values()) and plan.hours(7.2e17, 100) == 2
    table = dict(plan.rows(vars(run), 150))
    assert table["trained parameters"] == f"{run.lora:,}" and all(table.values())


def test_the_arithmetic_of_a_pass(run):
    """FLOPs by hand: twice the weights that a token meets, and 4 L² C for attention; without the LoRA."""
    if run.args.model == "flux.1-dev":
        C, image, words = 3072, 1024, 128
        streams = 19 * 12 * C**2 * (image + words) + 38 * 12 * C**2 * (image + words)
        modulation = (19 * 12 + 38 * 3) * C**2
        attention = 57 * 2 * (image + words) ** 2 * C
        expected = 2 * (streams + modulation + attention)
    else:
        C, image, words = 1536, 1024, 205
        streams = 24 * 12 * C**2 * (image + words) - 9 * C**2 * words + 13 * 4 * C**2 * image
        attention = 24 * 2 * (image + words) ** 2 * C + 13 * 2 * image**2 * C
        expected = 2 * 2 * (streams + attention + 4096 * C * words)
    assert run.flops["image"] == pytest.approx(expected, rel=0.03)


def test_precisions_are_those_of_loading():
    """The plan casts its models as from_pretrained does, T5's exceptions included."""
    folder = guard.MODELS["tiny-sd3"].place
    dtype = {"default": torch.float16, "vae": torch.float32}
    loaded = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    ours = plan.cast(DiffusionPipeline.from_pretrained(folder, dtype=torch.float32), dtype)
    for name, module in loaded.components.items():
        if isinstance(module, torch.nn.Module):
            expected = {key: value.dtype for key, value in module.state_dict().items()}
            assert {key: value.dtype for key, value in ours.components[name].state_dict().items()} == expected
    assert loaded.text_encoder_3.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32


def test_a_model_without_a_configuration_is_refused():
    with pytest.raises(BadInput, match="--model tiny-sd3: expected sd3.5-medium or flux.1-dev"):
        plan.load(plan.resolve(["--model", "tiny-sd3"]))


def test_weights_that_two_modules_share_are_counted_once(run):
    """T5's embeddings."""
    t5 = run.backbone.encoders[-1]
    assert t5.shared.weight is t5.encoder.embed_tokens.weight


@pytest.fixture
def small(monkeypatch):
    """SD3.5-M's configuration, with small numbers in it, and the flags of a small measurement."""
    true = plan.TRUE["sd3.5-medium"]
    sizes = dict(
        num_layers=2,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        dual_attention_layers=(0,),
    )
    monkeypatch.setitem(plan.TRUE, "sd3.5-medium", true | dict(
        transformer=true["transformer"] | sizes, vae=true["vae"] | dict(block_out_channels=(32,) * 4)))
    monkeypatch.setattr(plan, "CLIP_L", plan.clip_size(64, 2, 2, 64))
    monkeypatch.setattr(plan, "CLIP_G", plan.clip_size(64, 2, 2, 64))
    monkeypatch.setattr(plan, "T5_XXL", plan.T5_XXL | dict(d_model=64, d_kv=16, d_ff=128, num_heads=4))
    return "--model sd3.5-medium --dtype float32 --guidance 1 --steps 3 --resolution 64 --encoders 1".split()


@pytest.mark.parametrize("micro_batch, size", [(1, 2), (3, 3)])
def test_a_measurement_stands_beside_its_plan(small, tmp_path, monkeypatch, capsys, micro_batch, size):
    """Whole path on small numbers: every phase, a checkpoint that is read back, and the first ratio."""
    monkeypatch.setattr(plan, "HERE", tmp_path)
    flags = ["--measure", "--csv", "--micro_batch", str(micro_batch), *small]
    monkeypatch.setattr("sys.argv", ["plan.py", *flags])
    monkeypatch.setattr(plan, "matmul_peak", lambda dtype: 1e12)
    seen, measure = {}, plan.measure

    def noting(args, layers):
        seen.update(measure(args, layers), args=args)
        return seen

    monkeypatch.setattr(plan, "measure", noting)
    plan.main()
    assert seen["args"].group_size == size and seen["args"].groups == 1
    lines = plan.read(tmp_path / "measured.csv")
    _, column = lines[0]
    assert column.endswith("--resolution 64 --encoders 1")
    rows = {line["what"]: line[column] for line in lines}
    assert rows["first update: ratio - 1 and its deviation"] == "0.0e+00, 0.0e+00"
    assert len(seen["first"]["ratio_mean"]) == 2 and seen["first"]["live"] == size
    planned, saved = (float(part.split()[0]) for part in rows["a checkpoint: planned, measured"].split(", "))
    assert saved == pytest.approx(planned, abs=1e-3)
    for phase in ("encode", "sample", "decode", "train", "evaluate"):
        # Not from below: earlier tests leave free memory in this process.
        assert seen[phase]["peak"] < 2**31 and seen[phase]["seconds"] > 0
    assert "`train`: planned, measured" in capsys.readouterr().out


def test_too_little_memory_is_one_line_before_anything_is_allocated(small, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan.py", "--measure", *small])
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    monkeypatch.setattr(plan, "measure", lambda *_: pytest.fail("it went on"))
    with pytest.raises(BadInput, match=r"needs 1\.\d GiB and 1\.0 GiB are free; try --offload"):
        plan.main()


# ------------------------------------------------------------------------------------------------------------
# FLUX against diffusers


def bare(kind, model, shape):
    """A backbone with a scheduler and nothing else."""
    scheduler = FlowMatchEulerDiscreteScheduler(**plan.TRUE[model]["scheduler"])
    backbone = kind.__new__(kind)
    backbone.pipe, backbone.shape = SimpleNamespace(scheduler=scheduler), shape
    return backbone, FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)


@pytest.mark.parametrize("steps", [6, 28])
def test_noise_levels_of_flux(steps):
    backbone, scheduler = bare(guard.Flux, "flux.1-dev", (16, 64, 64))
    sizes = [scheduler.config[name] for name in ("base_image_seq_len", "max_image_seq_len")]
    mu = calculate_shift(1024, *sizes, scheduler.config.base_shift, scheduler.config.max_shift)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert backbone.sigmas(steps) == scheduler.sigmas.tolist()
    assert mu == pytest.approx(0.5 + 0.65 * 768 / 3840)
    t = np.linspace(1.0, 1 / steps, steps)
    by_hand = [*(math.exp(mu) / (math.exp(mu) + 1 / t - 1)), 0]
    assert backbone.sigmas(steps) == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("steps", [10, 40])
def test_noise_levels_of_sd3(steps):
    backbone, scheduler = bare(guard.SD3, "sd3.5-medium", (16, 64, 64))
    retrieve_timesteps(scheduler, steps, "cpu")
    assert backbone.sigmas(steps) == scheduler.sigmas.tolist()
    lowest = 3 * (1 / 1000) / (1 + 2 / 1000)  # shifted once, and once more with all that lie between it and 1
    t = np.linspace(1, lowest, steps)
    assert backbone.sigmas(steps) == pytest.approx([*(3 * t / (1 + 2 * t)), 0], abs=1e-6)


def small_flux(folder):
    """A FluxPipeline with small random weights on disk."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.4, shift_factor=0.1)  # fmt: skip
    clip, t5 = make.clip_tokenizer(), make.t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6))  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**plan.TRUE["flux.1-dev"]["scheduler"])
    encoders = make.make_clip(CLIPTextModel, clip, 1), make.make_t5(t5)
    FluxPipeline(scheduler, vae, encoders[0], clip, encoders[1], t5, transformer).save_pretrained(folder)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    small_flux(folder)
    args = guard.parse_args(
        f"--model {folder} --dtype float32 --resolution 32x48 --group_size 2 --micro_batch 2".split()
    )
    assert (args.steps, args.guidance, args.eta) == (6, 3.5, 0.9)  # FLUX.1-dev's preset, by its class
    return guard.load_backbone(args)


def test_packing_of_flux(flux, monkeypatch):
    """What the transformer is given, and the way back, are FluxPipeline's."""
    given = []

    def echo(*args, **_):
        given.append(args)
        return (args[0] + 1,)

    x = torch.randn(2, 4, 16, 24)
    monkeypatch.setattr(flux.transformer, "forward", echo)
    v = flux.velocity(x, 0.7, [flux.encode(["a card"])["a card"]] * 2)
    packed = FluxPipeline._pack_latents(x, 2, 4, 16, 24)
    assert torch.equal(given[0][0], packed)
    assert torch.equal(v, FluxPipeline._unpack_latents(packed + 1, 32, 48, flux.pipe.vae_scale_factor))
    assert torch.equal(v, x + 1)
    _, tokens, pooled, level, image_ids, text_ids, guidance = given[0]
    assert tokens.shape == (2, make.TEXT_LENGTH, 128) and pooled.shape == (2, 64)
    assert level.tolist() == pytest.approx([0.7] * 2) and guidance.tolist() == [3.5] * 2
    assert torch.equal(image_ids, FluxPipeline._prepare_latent_image_ids(2, 8, 12, "cpu", torch.float32))
    assert torch.equal(text_ids, torch.zeros(make.TEXT_LENGTH, 3))


def test_flux_draws_the_same_pictures_as_diffusers(flux):
    """The ODE sampler from the same noise: latents equal but for the order of fp32 sums, pixels equal."""
    keys = [(0, 0, 0, member) for member in range(2)]
    noise = torch.stack(
        [torch.from_numpy(guard.rng(*key, 0).standard_normal(flux.shape, np.float32)) for key in keys]
    )
    ode = guard.schedule(flux.sigmas(6), 0.0, "flow")
    x, kept = guard.sample(flux, ode, [flux.encode(["a red card"])["a red card"]] * 2, keys)
    flux.pipe.set_progress_bar_config(disable=True)

    def draw(output_type):
        return flux.pipe(
            "a red card", height=32, width=48, num_inference_steps=6, guidance_scale=3.5,
            num_images_per_prompt=2, max_sequence_length=make.TEXT_LENGTH, output_type=output_type,
            latents=FluxPipeline._pack_latents(noise, 2, *flux.shape)).images  # fmt: skip

    theirs = FluxPipeline._unpack_latents(draw("latent"), 32, 48, flux.pipe.vae_scale_factor)
    assert kept == [] and (theirs - noise).abs().max() > 0.1
    assert (x - theirs).abs().max() < 1e-5
    for ours, its in zip(flux.decode(x), draw("pil"), strict=True):
        assert np.abs(np.int16(ours) - np.int16(its)).max() == 0
