"""What a run of guard.py needs, without its weights: memory, arithmetic, disk, hours.

    python experiments/plan.py --model flux.1-dev --micro_batch 8 --offload --grad_checkpoint
    ... --csv                  # keeps the numbers as a column of plan.csv, the table of README.md

Every flag of guard.py is taken and means the same. The models are built from their true configurations, first
on torch's meta device and then as fake tensors, which have shapes and types but no numbers, and go through
guard.py's own code. `Counter` counts the bytes of all tensors that are alive at once, and the FLOPs of every
matrix product, convolution and attention, two per multiply-add. The fake tensors are CPU ones: attention is
the fused kernel, which keeps no B x heads x L x L matrix, as on a GPU. Of the reward models the weights are
counted and nothing else. Not in: the workspace of kernels and fragmentation (see SPARE).
"""

import argparse
import contextlib
import math
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all that is fake is on the CPU; said before torch is imported

import diffusers
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402
from experiments.run import read, write  # noqa: E402
from rewards import BadInput  # noqa: E402
from tiny import make  # noqa: E402

GIB = 2**30
SPARE = 1.5 * GIB  # bytes for CUDA's context, kernels' workspace and fragmentation: an assumption

VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
    use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip


def clip_size(width, layers, heads, projection, **more):
    return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=heads, projection_dim=projection, **more)


CLIP_L = clip_size(768, 12, 12, 768)
CLIP_G = clip_size(1280, 32, 20, 1280, hidden_act="gelu")
T5_XXL = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
    feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)  # fmt: skip
TRUE = {  # alias -> the published configurations, as far as they differ from the classes' defaults
    "sd3.5-medium": dict(
        transformer=dict(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
            attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        vae=VAE | dict(scaling_factor=1.5305, shift_factor=0.0609),
        scheduler=dict(shift=3.0)),
    "flux.1-dev": dict(
        transformer=dict(
            patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
            guidance_embeds=True, axes_dims_rope=(16, 56, 56)),
        vae=VAE | dict(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=dict(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096)),
}  # fmt: skip
CLIP_VIT_L = transformers.CLIPConfig(
    projection_dim=768, text_config=CLIP_L, vision_config=clip_size(1024, 24, 16, 768, patch_size=14))
CLIP_VIT_H = transformers.CLIPConfig(
    projection_dim=1024, text_config=clip_size(1024, 24, 16, 1024),
    vision_config=clip_size(1280, 32, 16, 1024, patch_size=14))
SWIN_S = transformers.Mask2FormerConfig(num_labels=80)  # its default backbone
REWARD_MODELS = {  # reward -> its models, which rewards.py loads in fp32
    "geneval": [
        (transformers.Mask2FormerForUniversalSegmentation, SWIN_S), (transformers.CLIPModel, CLIP_VIT_L)],
    "pickscore": [(transformers.CLIPModel, CLIP_VIT_H)],  # the same as hpsv2's
}


# ------------------------------------------------------------------------------------------------------------
# The models


def pipeline(model):
    """The diffusers pipeline of TRUE[model] on the meta device, in fp32, with small stand-in tokenizers."""
    config = TRUE[model]
    clip, t5 = make.clip_tokenizer(), make.t5_tokenizer()
    clip.model_max_length, t5.model_max_length = 77, 512  # CLIP's and T5's own; guard cuts T5's to 128
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config["scheduler"])
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**config["vae"])
        t5_xxl = transformers.T5EncoderModel(transformers.T5Config(**T5_XXL))
        if model == "flux.1-dev":
            clip_l = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_L))
            transformer = diffusers.FluxTransformer2DModel(**config["transformer"])
            return diffusers.FluxPipeline(scheduler, vae, clip_l, clip, t5_xxl, t5, transformer)
        clip_l, clip_g = (
            transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**size))
            for size in (CLIP_L, CLIP_G))
        transformer = diffusers.SD3Transformer2DModel(**config["transformer"])
    return diffusers.StableDiffusion3Pipeline(
        transformer, scheduler, vae, clip_l, clip, clip_g, clip, t5_xxl, t5)


def cast(pipe, dtype):
    """In place, the precisions that DiffusionPipeline.from_pretrained(dtype=dtype) loads a pipeline in."""
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            module.to(dtype.get(name, dtype["default"]))
            kept = getattr(module, "_keep_in_fp32_modules", None) or ()  # of T5, the second half of its MLPs
            for part, layer in module.named_modules() if module.dtype == torch.float16 else ():
                if part.split(".")[-1] in kept:
                    layer.float()
    return pipe


def load(args):
    """guard.load_backbone(args), with fake tensors for weights."""
    if args.model not in TRUE:
        raise BadInput(f"--model {args.model}: expected {' or '.join(TRUE)}")

    def from_pretrained(*_, dtype, **__):
        return cast(pipeline(args.model), dtype)

    with (
        mock.patch.object(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained),
        mock.patch.object(guard, "DEVICE", torch.device("meta")),
    ):
        return fake(guard.load_backbone(replace(args, offload=False)))


def fake(backbone):
    """In place, fake CPU tensors for all weights. From then on it runs in `faking` only."""
    with faking():
        for module in (backbone.transformer, backbone.encoders, backbone.pipe.vae):
            for part in module.modules():
                for name, p in part.named_parameters(recurse=False):
                    part._parameters[name] = torch.nn.Parameter(fresh(p), p.requires_grad)
                for name, buffer in part.named_buffers(recurse=False):
                    part._buffers[name] = fresh(buffer)
        backbone.empty = tuple(fresh(part) for part in backbone.empty)
    backbone.pipe.image_processor = SimpleNamespace(postprocess=lambda pixels: pixels)  # no pictures of them
    return backbone


def fresh(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype)


FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # one, since another would take its tensors for real ones


@contextlib.contextmanager
def faking():
    """Operations make fake tensors. Modules stay where they are: all that is fake is on one device."""
    stay = mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self)
    with FAKE, stay:
        yield


def reward_bytes(name):
    """Bytes of the weights of a reward's models, in fp32."""
    with torch.device("meta"):
        return sum(size_of(kind(config)) for kind, config in REWARD_MODELS[name])


def size_of(module):
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


# ------------------------------------------------------------------------------------------------------------
# Counting


aten = torch.ops.aten
FLOPS = flop_registry | {  # torch's formulas, which leave out the CPU's fused attention
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda dy, q, k, v, *_, **__: sdpa_backward_flop_count(dy.shape, q.shape, k.shape, v.shape),
}


class Counter(TorchDispatchMode):
    """`live`: bytes of the tensors that operations have made and that still exist. `peak`: the most so far.
    `flops`: two for every multiply-add."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        old = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = {storage_of(t): t for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        for key in made.keys() - old:  # neither a view nor in place
            storage = made[key].untyped_storage()
            self.change(storage.nbytes())
            weakref.finalize(storage, self.change, -storage.nbytes())
        return out

    def change(self, amount):
        self.live += amount
        self.peak = max(self.peak, self.live)


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def counted(function, *args):
    """The function's value; {"peak": bytes, "left": bytes that its value holds, "flops"} of calling it."""
    with Counter() as counter:
        value = function(*args)
    return value, dict(peak=counter.peak, left=counter.live, flops=counter.flops)


def measure(backbone, args):
    """One slice through encode, sample (two steps), decode and the update: {phase: as `counted`}.

    Also "state": what Policy holds when it has made an update; and "tensors": what a test may look at.
    """
    steps = guard.schedule([1.0, 0.5, 0.0], args.eta, args.sde)
    numbers = list(range(args.micro_batch))
    keys = [(0, 0, 0, number) for number in numbers]
    count = {}
    policy, count["state"] = counted(trained_policy, backbone, args)
    texts, count["encode"] = counted(backbone.encode, ["a prompt"])
    texts = [texts["a prompt"]] * len(numbers)
    (x, kept), count["sample"] = counted(guard.sample, backbone, steps, texts, keys)
    pixels, count["decode"] = counted(backbone.decode, x)
    piece = guard.Slice(numbers, keys, texts, pixels, kept)

    def learn():
        loss = guard.slice_loss(backbone, args, steps[0], 0, piece, torch.ones(args.micro_batch))
        (loss[0].sum() * math.prod(backbone.shape)).backward()
        return [part.detach() for part in loss]

    touched = set()  # ids of the parameters that the backward pass has reached
    hooks = [p.register_post_accumulate_grad_hook(lambda p: touched.add(id(p))) for p in policy.params]
    loss, count["train"] = counted(learn)
    for hook in hooks:
        hook.remove()
    tensors = dict(text=texts[0], x=x, kept=torch.stack(kept), pixels=pixels, loss=loss, touched=touched)
    return count | dict(tensors=tensors)


def trained_policy(backbone, args):
    """With what AdamW makes in its first step, which fake tensors cannot do."""
    policy = guard.Policy(backbone, args)
    for p in policy.params:
        policy.optimizer.state[p] = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return policy


# ------------------------------------------------------------------------------------------------------------
# The plan


def plan(backbone, args):
    """All numbers of a run by one process: bytes, FLOPs, and the peak of each phase."""
    with faking():
        count = measure(backbone, args)
    images = args.groups * args.group_size
    trained = args.sde_window or args.steps - 1
    lora = sum(p.numel() for p in backbone.transformer.parameters() if p.requires_grad)
    modules = (backbone.transformer, backbone.encoders, backbone.pipe.vae)
    transformer, encoders, vae = (size_of(module) for module in modules)
    parameters = sum(p.numel() for module in modules for p in module.parameters()) - lora
    rollout = trained * 3 * 4 * math.prod(backbone.shape) * images
    slice_kept = trained * count["sample"]["left"]  # a slice of all steps
    sets = 2 if args.gold and args.gold_prompts != args.prompts else 1
    texts = sets * args.eval_prompts * count["encode"]["left"]  # embeddings of an evaluation's prompts
    resting, on_gpu, embedded = (0, 0, 0) if args.offload else (encoders + vae, rollout, texts)
    always = transformer + count["state"]["left"]
    if not args.offload:
        always += args.groups * count["encode"]["left"]
    phases = dict(
        encode=always + (resting or encoders) + embedded + count["encode"]["peak"],
        sample=always + resting + on_gpu + slice_kept + count["sample"]["peak"],
        decode=always + (resting or vae) + on_gpu + slice_kept + count["decode"]["peak"],
        train=always + resting + on_gpu + count["train"]["peak"],
    )
    return dict(
        args=args, count=count, phases=phases, total=max(phases.values()) + SPARE,
        lora=lora, lora_bytes=4 * lora, transformer=transformer, encoders=encoders, vae=vae,
        rollout=rollout, rollout_image=rollout // images,
        host=encoders + vae + rollout + texts if args.offload else 0, download=2 * parameters,
        checkpoint=5 * 4 * lora,  # live, EMA, AdamW's two, and the one for diffusers
        flops=flops_of(args, count, trained),
    )  # fmt: skip


def flops_of(args, count, trained):
    """FLOPs of an epoch by part, of an evaluation and of a run; no dead groups."""
    images, slices = args.groups * args.group_size, args.groups * args.group_size // args.micro_batch
    one_pass, one_update = count["sample"]["flops"] / 2, count["train"]["flops"]  # of a slice
    picture = count["decode"]["flops"] / args.micro_batch
    epoch = dict(
        encode=args.groups * count["encode"]["flops"],
        sample=slices * args.steps * one_pass,
        decode=images * picture,
        train=slices * trained * one_update,
    )
    drawn = args.eval_steps * one_pass / args.micro_batch + picture
    evaluation = args.eval_prompts * (drawn + count["encode"]["flops"])
    run = args.epochs * sum(epoch.values()) + (1 + math.ceil(args.epochs / args.eval_every)) * evaluation
    return dict(image=one_pass / args.micro_batch, ratio=one_update / one_pass, epoch=epoch, run=run)


def hours(flops, tflops):
    """GPU hours at an assumed speed in 1e12 FLOP/s per GPU."""
    return flops / (tflops * 1e12) / 3600


def rows(it, tflops):
    """[(what, value)] of a plan, as text."""
    flops = it["flops"]
    sizes = {
        f"one GPU needs, {SPARE / GIB} GiB of it left free": it["total"],
        **{f"while it runs `{phase}`": size for phase, size in it["phases"].items()},
        "transformer and its LoRA": it["transformer"],
        "gradients, AdamW, EMA of the LoRA, fp32": it["count"]["state"]["left"],
        "text encoders": it["encoders"],
        "VAE, fp32": it["vae"],
        "kept x, v and eps": it["rollout"],
        "parked in the CPU's memory": it["host"],
        **{f"weights of the `{name}` reward, not counted above": reward_bytes(name) for name in REWARD_MODELS}
    }
    found = {what: f"{size / GIB:.1f} GiB" for what, size in sizes.items()}
    found["trained parameters"] = f"{it['lora']:,}"
    found["forward pass of an image, guidance included"] = f"{flops['image'] / 1e12:.2f} TFLOP"
    found["forward and backward, in forward passes"] = f"{flops['ratio']:.2f}"
    for name, size in flops["epoch"].items():
        found[f"an epoch: {name}"] = f"{size / 1e15:.2f} PFLOP"
    found[f"whole run, hours of a GPU at {tflops:g} TFLOP/s (assumed)"] = f"{hours(flops['run'], tflops):.0f}"
    found["weights to download, 2 bytes a parameter"] = f"{it['download'] / 1e9:.1f} GB"
    found["a checkpoint"] = f"{it['checkpoint'] / 1e9:.2f} GB"
    return list(found.items())


def resolve(argv):
    """guard.py's settings for its flags."""
    return guard.parse_args(argv)


def main():
    parser = argparse.ArgumentParser(description="All other flags are guard.py's.", allow_abbrev=False)
    parser.add_argument("--tflops", type=float, default=150, help="assumed 1e12 FLOP/s of a GPU")
    parser.add_argument("--csv", action="store_true", help="keep the numbers as a column of plan.csv")
    own, argv = parser.parse_known_args()
    args = resolve(argv)
    found = rows(plan(load(args), args), own.tflops)
    for what, value in found:
        print(f"{what:66} {value}")
    if own.csv:
        path, column = HERE / "plan.csv", " ".join(argv).removeprefix("--model ")
        known = {row["what"]: row for row in read(path)} if path.exists() else {}
        write(path, [known.get(what, dict(what=what)) | {column: value} for what, value in found])


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"plan.py: error: {error}")
