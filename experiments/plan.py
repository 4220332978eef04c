"""What a run of guard.py needs, without its weights: memory, arithmetic, disk, hours.

    python experiments/plan.py --model flux.1-dev --micro_batch 8 --offload --grad_checkpoint
    python experiments/plan.py --markdown            # both models, as the README's table
    python experiments/plan.py --check               # the counting itself, against a real run of tiny/sd3

Every flag of guard.py is taken and means the same. The models are built from their true configurations, first
on torch's meta device and then as fake tensors, which have shapes and types but no numbers, and go through
guard.py's own code: load_backbone, Policy, encode, sample, decode, slice_loss. While they do, this counts

    peak    bytes of all tensors that are alive at once, beyond the weights (`Counter`)
    saved   bytes that autograd keeps for the backward pass, the weights aside (`saved_for_backward`)
    FLOPs   of every matrix product, convolution and attention, two per multiply-add (torch's formulas)

so gradient checkpointing, guidance's second pass, the LoRA's fp32 and the KL's extra pass are in by
themselves. The fake tensors are CPU ones: attention is the fused kernel, which keeps no B x heads x L x L
matrix, as on a GPU. Not in: what the rewards need, the workspace of kernels, fragmentation (see SPARE).
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import guard  # noqa: E402
from rewards import BadInput  # noqa: E402
from tiny import make  # noqa: E402

GIB = 2**30
SPARE = 1.5 * GIB  # bytes for CUDA's context, kernels' workspace and fragmentation: an assumption

VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
    use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip
CLIP_L = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
)
CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    projection_dim=1280, hidden_act="gelu")  # fmt: skip
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


# ------------------------------------------------------------------------------------------------------------
# The models


def pipeline(model):
    """The diffusers pipeline of TRUE[model] on the meta device, in fp32, with small stand-in tokenizers."""
    config = TRUE[model]
    clip, t5 = make.clip_tokenizer(), make.t5_tokenizer()
    clip.model_max_length, t5.model_max_length = 77, 512  # CLIP's and T5's own; guard cuts T5's to 128
    scheduler = FlowMatchEulerDiscreteScheduler(**config["scheduler"])
    with torch.device("meta"):
        vae, t5_xxl = AutoencoderKL(**config["vae"]), T5EncoderModel(T5Config(**T5_XXL))
        if model == "flux.1-dev":
            clip_l = CLIPTextModel(CLIPTextConfig(**CLIP_L))
            transformer = FluxTransformer2DModel(**config["transformer"])
            return FluxPipeline(scheduler, vae, clip_l, clip, t5_xxl, t5, transformer)
        clip_l, clip_g = (CLIPTextModelWithProjection(CLIPTextConfig(**size)) for size in (CLIP_L, CLIP_G))
        transformer = SD3Transformer2DModel(**config["transformer"])
    return StableDiffusion3Pipeline(transformer, scheduler, vae, clip_l, clip, clip_g, clip, t5_xxl, t5)


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
        mock.patch.object(DiffusionPipeline, "from_pretrained", from_pretrained),
        mock.patch.object(guard, "DEVICE", torch.device("meta")),
    ):
        return fake(guard.load_backbone(replace(args, offload=False, compile=False)))


def fake(backbone):
    """In place, fake CPU tensors for all weights. From then on it runs in `faking` only."""
    with faking():
        for module in (backbone.transformer, backbone.encoders, backbone.pipe.vae):
            for part in module.modules():
                for name, p in part.named_parameters(recurse=False):
                    new = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                    part._parameters[name] = new
                for name, buffer in part.named_buffers(recurse=False):
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        backbone.negative = tuple(torch.empty(part.shape, dtype=part.dtype) for part in backbone.negative)
    backbone.pipe.image_processor = SimpleNamespace(postprocess=lambda pixels: pixels)  # no pictures of them
    return backbone


FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # one, since another would take its tensors for real ones


@contextlib.contextmanager
def faking():
    """Operations make fake tensors. Modules stay where they are: all that is fake is on one device."""
    stay = mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self)
    with FAKE, stay:
        yield


# ------------------------------------------------------------------------------------------------------------
# Counting


aten = torch.ops.aten
FLOPS = flop_registry | {  # torch's formulas, which leave out the CPU's fused attention
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dy, q, k, v, *_, **__: (
        sdpa_backward_flop_count(dy.shape, q.shape, k.shape, v.shape)
    ),
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


@contextlib.contextmanager
def saved_for_backward(backbone):
    """Yields a dict that fills with the bytes of every storage that autograd keeps, weights left out."""
    weights = {storage_of(p) for p in (*backbone.transformer.parameters(), *backbone.transformer.buffers())}
    kept = {}

    def pack(tensor):
        if storage_of(tensor) not in weights:
            kept[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def counted(function, *args):
    """The function's value; {"peak": bytes, "left": bytes that its value holds, "flops"} of calling it."""
    with Counter() as counter:
        value = function(*args)
    return value, dict(peak=counter.peak, left=counter.live, flops=counter.flops)


def measure(backbone, args):
    """One slice through encode, sample (two steps), decode and the update: {phase: as `counted`}.

    Also "state": what Policy holds; "saved": bytes; and "tensors": what a test may look at.
    """
    steps = guard.schedule([1.0, 0.5, 0.0], args.eta, args.sde)
    keys = [(0, 0, 0, member) for member in range(args.micro_batch)]
    count = {}
    policy, count["state"] = counted(guard.Policy, backbone, args)
    text, count["encode"] = counted(lambda: backbone.encode(["a prompt"])[0])
    (x, kept), count["sample"] = counted(guard.sample, backbone, steps, text, keys)
    pixels, count["decode"] = counted(backbone.decode, x)
    piece = guard.Slice(0, range(args.micro_batch), text, kept)

    def learn():
        with saved_for_backward(backbone) as saved:
            loss = guard.slice_loss(backbone, args, steps[0], 0, piece, torch.ones(args.micro_batch))
        of_loss = [part.detach() for part in loss]
        (loss[0].sum() * math.prod(backbone.shape)).backward()
        return of_loss, sum(saved.values())

    touched = set()  # ids of the parameters that the backward pass has reached
    hooks = [p.register_post_accumulate_grad_hook(lambda p: touched.add(id(p))) for p in policy.params]
    (loss, saved), count["train"] = counted(learn)
    for hook in hooks:
        hook.remove()
    tensors = dict(text=text, x=x, kept=kept, pixels=pixels, loss=loss, touched=touched)
    return count | dict(saved=saved, tensors=tensors)


# ------------------------------------------------------------------------------------------------------------
# The plan


def size_of(module):
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def plan(backbone, args, processes=1):
    """All numbers: bytes, FLOPs of all processes together, and the peak of each phase on one GPU."""
    with faking():
        count = measure(backbone, args)
    images = args.groups * args.group_size
    trained = args.sde_window or args.steps - 1
    lora = [p.numel() for p in backbone.transformer.parameters() if p.requires_grad]
    modules = (backbone.transformer, backbone.encoders, backbone.pipe.vae)
    transformer, encoders, vae = (size_of(module) for module in modules)
    rollout = trained * 3 * 4 * math.prod(backbone.shape) * images // processes
    always = transformer + count["state"]["left"]
    resting = 0 if args.offload else encoders + vae
    on_gpu = 0 if args.offload else rollout
    slice_kept = 2 * trained * count["sample"]["left"]  # a slice of all steps, and again while it is stacked
    phases = dict(
        encode=always + (resting or encoders) + count["encode"]["peak"],
        sample=always + resting + on_gpu + slice_kept + count["sample"]["peak"],
        decode=always + (resting or vae) + on_gpu + slice_kept + count["decode"]["peak"],
        train=always + resting + on_gpu + count["train"]["peak"],
    )
    return dict(
        args=args, processes=processes, count=count, phases=phases, total=max(phases.values()) + SPARE,
        lora=sum(lora), lora_bytes=4 * sum(lora), transformer=transformer, encoders=encoders, vae=vae,
        rollout=rollout, rollout_image=rollout * processes // images,
        host=encoders + vae + rollout if args.offload else 0,
        flops=flops_of(args, count, trained), **disk_of(args, modules, sum(lora)),
    )  # fmt: skip


def flops_of(args, count, trained):
    """FLOPs of an epoch by part, of an evaluation and of a run, all processes together; no dead groups."""
    images, slices = args.groups * args.group_size, args.groups * args.group_size // args.micro_batch
    one_pass, one_update = count["sample"]["flops"] / 2, count["train"]["flops"]  # of a slice
    picture = count["decode"]["flops"] / args.micro_batch
    epoch = dict(
        encode=args.groups * count["encode"]["flops"],
        sample=slices * args.steps * one_pass,
        decode=images * picture,
        train=slices * trained * one_update,
    )
    held_out = args.eval_prompts * (
        args.eval_steps * one_pass / args.micro_batch + picture + count["encode"]["flops"]
    )
    evaluations = 1 + math.ceil(args.epochs / args.eval_every)
    run = args.epochs * sum(epoch.values()) + evaluations * held_out
    return dict(image=one_pass / args.micro_batch, ratio=one_update / one_pass, epoch=epoch,
                evaluation=held_out, run=run)  # fmt: skip


def disk_of(args, modules, lora):
    """Bytes: weights at two a parameter; checkpoints of the LoRA, live, EMA and AdamW's two, all in fp32."""
    own = sum(p.numel() for module in modules for p in module.parameters()) - lora
    return dict(download=2 * own, checkpoint=5 * 4 * lora, checkpoints=(args.keep + 1) * 5 * 4 * lora)


def hours(flops, tflops):
    """GPU hours at an assumed speed in 1e12 FLOP/s per GPU."""
    return flops / (tflops * 1e12) / 3600


def rows(it, tflops):
    """[(what, value)] of a plan, as text."""
    args, count, flops, phases = it["args"], it["count"], it["flops"], it["phases"]
    gib, each = (lambda size: f"{size / GIB:.2f} GiB"), args.groups * args.group_size
    flags = [f"--{name}" for name in ("offload", "grad_checkpoint") if getattr(args, name)]
    return [
        ("settings", f"{args.resolution} px, micro batch {args.micro_batch}, {args.dtype} {' '.join(flags)}"),
        ("transformer and its LoRA", gib(it["transformer"])),
        ("trained parameters", f"{it['lora']:,}"),
        ("gradients, AdamW, EMA of the LoRA, fp32", gib(count["state"]["left"])),
        (f"text encoders, on the GPU {'while encoding' if args.offload else 'always'}", gib(it["encoders"])),
        (f"VAE, fp32, on the GPU {'while decoding' if args.offload else 'always'}", gib(it["vae"])),
        (f"kept x, v and eps, an image ({'CPU' if args.offload else 'GPU'})",
         f"{it['rollout_image'] / 2**20:.2f} MiB"),
        (f"kept x, v and eps, each of {it['processes']} processes", gib(it["rollout"])),
        ("saved for the backward pass, a slice", gib(count["saved"])),
        ("beyond the weights at the peak of training", gib(count["train"]["peak"])),
        ("beyond the weights at the peak of sampling", gib(count["sample"]["peak"])),
        *((f"peak, {name}", gib(size)) for name, size in phases.items()),
        (f"one GPU needs, with {SPARE / GIB} GiB to spare (assumed)", gib(it["total"])),
        (f"parked in the CPU's memory, each of {it['processes']} processes", gib(it["host"])),
        ("forward pass of an image, guidance included", f"{flops['image'] / 1e12:.2f} TFLOP"),
        ("forward and backward, in forward passes", f"{flops['ratio']:.2f}"),
        *((f"an epoch of {each} images: {name}", f"{size / 1e15:.2f} PFLOP")
          for name, size in flops["epoch"].items()),
        (f"an evaluation of {args.eval_prompts} prompts", f"{flops['evaluation'] / 1e15:.2f} PFLOP"),
        (f"a run of {args.epochs} epochs", f"{flops['run'] / 1e18:.2f} EFLOP"),
        (f"GPU hours at {tflops:g} TFLOP/s (assumed, not measured)", f"{hours(flops['run'], tflops):,.0f}"),
        ("weights to download, 2 bytes a parameter", f"{it['download'] / 1e9:.1f} GB"),
        (f"checkpoint; {args.keep} that stay and one being written",
         f"{it['checkpoint'] / 1e9:.2f} GB; {it['checkpoints'] / 1e9:.2f} GB"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# The counting, checked


def peak_of_profiler(function):
    """Bytes at the highest of CPU allocations less frees, by torch.profiler, which sees the allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    events = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    live = peak = 0
    for _, amount in events:
        live += amount
        peak = max(peak, live)
    return peak


def check(args):
    """Bytes of learning from a slice, of a model on this disk: {"saved": (fake, real), "peak": (fake, real,
    profiler)}, counted on fake tensors, on real ones, and by torch's profiler."""
    backbone = guard.load_backbone(args)
    steps = guard.schedule([1.0, 0.5, 0.0], args.eta, args.sde)
    text = backbone.encode(["a card"])[0]
    kept = torch.zeros(1, 3, args.micro_batch, *backbone.shape)

    def learn():
        piece = guard.Slice(0, range(args.micro_batch), text, kept)
        with saved_for_backward(backbone) as saved:
            loss = guard.slice_loss(backbone, args, steps[0], 0, piece, torch.ones(args.micro_batch))
        loss[0].sum().backward()
        return sum(saved.values())

    guard.Policy(backbone, args)  # gradients that are there already
    saved, count = counted(learn)
    profiler = peak_of_profiler(learn)
    fake(backbone)
    with faking():
        guard.Policy(backbone, args)
        text = tuple(torch.empty(part.shape, dtype=part.dtype) for part in text)
        kept = torch.empty(kept.shape)
        saved_fake, count_fake = counted(learn)
    return dict(saved=(saved_fake, saved), peak=(count_fake["peak"], count["peak"], profiler))


# ------------------------------------------------------------------------------------------------------------


def resolve(argv, processes=1):
    """guard.py's settings for its flags."""
    with mock.patch.object(guard, "WORLD", processes):
        return guard.parse_args(argv)


def main():
    parser = argparse.ArgumentParser(description="All other flags are guard.py's.", allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1, help="GPUs")
    parser.add_argument("--tflops", type=float, default=150, help="assumed 1e12 FLOP/s of a GPU")
    parser.add_argument("--markdown", action="store_true", help="a table")
    parser.add_argument(
        "--check", action="store_true", help="compare the counting with a real run of tiny-sd3"
    )
    own, argv = parser.parse_known_args()
    if own.check:
        for flags in ([], ["--grad_checkpoint"]):
            for what, counts in check(resolve(["--model", "tiny-sd3", *argv, *flags])).items():
                print(*flags, what, *(f"{size:,}" for size in counts))
        return
    models = [[]] if "--model" in argv else [["--model", model] for model in TRUE]
    settings = [resolve(model + argv, own.processes) for model in models]
    plans = [plan(load(args), args, own.processes) for args in settings]
    tables = [rows(it, own.tflops) for it in plans]
    if own.markdown:
        print("| | " + " | ".join(it["args"].model for it in plans) + " |\n|-|" + "-|" * len(plans))
        for cells in zip(*tables, strict=True):
            print(f"| {cells[0][0]} | " + " | ".join(value for _, value in cells) + " |")
        return
    for it, table in zip(plans, tables, strict=True):
        print(f"{it['args'].model}\n" + "\n".join(f"  {what:56} {value}" for what, value in table))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"plan.py: error: {error}")
