"""What a run of guard.py needs, without its weights: memory, arithmetic, disk, hours.

    python experiments/plan.py --model flux.1-dev --micro_batch 8 --offload --grad_checkpoint
    ... --csv                  # keeps the numbers as a column of plan.csv, the table of README.md
    ... --measure              # does one update, with random weights, and prints planned beside measured
    ... --measure --encoders 1   # with so many of T5's 24 layers, where memory is short
    ... --measure --csv        # keeps that as a column of measured.csv

Every flag of guard.py is taken and means the same. The models are built from their true configurations, first
on torch's meta device and then as fake tensors, which have shapes and types but no numbers, and go through
guard.py's own code. `Counter` counts the bytes of all tensors that are alive at once, and the FLOPs of every
matrix product, convolution and attention, two per multiply-add. The fake tensors are CPU ones: attention is
the fused kernel, which keeps no B x heads x L x L matrix, as on a GPU. Of the reward models the weights are
counted and nothing else. Not in: the workspace of kernels and fragmentation (see SPARE).

What is measured is one prompt's group, by guard.py's own functions, on the GPU if there is one. Weights are
random, so the pictures are noise, but bytes, time and kernels are those of the true model.
"""

import argparse
import contextlib
import ctypes
import math
import os
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if "--measure" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is fake is on the CPU; said before torch is imported

import diffusers
import psutil
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


def pipeline(model, layers, dtype, device, resting):
    """The diffusers pipeline of TRUE[model] with random weights and small stand-in tokenizers.

    layers: of T5; dtype: as for `cast`; device: of the transformer; resting: of the encoders and the VAE.
    """
    config, flux = TRUE[model], model == "flux.1-dev"
    clip, t5 = make.clip_tokenizer(), make.t5_tokenizer()
    clip.model_max_length, t5.model_max_length = 77, 512  # CLIP's and T5's own; guard cuts T5's to 128
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config["scheduler"])
    with building(resting, dtype["vae"]):
        vae = diffusers.AutoencoderKL(**config["vae"])
    with building(resting, dtype["default"]):
        t5_xxl = transformers.T5EncoderModel(transformers.T5Config(**T5_XXL | dict(num_layers=layers)))
        kind = transformers.CLIPTextModel if flux else transformers.CLIPTextModelWithProjection
        clip_l = kind(transformers.CLIPTextConfig(**CLIP_L))
        clip_g = None if flux else kind(transformers.CLIPTextConfig(**CLIP_G))
    with building(device, dtype["default"]):
        if flux:
            transformer = diffusers.FluxTransformer2DModel(**config["transformer"])
            return diffusers.FluxPipeline(scheduler, vae, clip_l, clip, t5_xxl, t5, transformer)
        transformer = diffusers.SD3Transformer2DModel(**config["transformer"])
    return diffusers.StableDiffusion3Pipeline(
        transformer, scheduler, vae, clip_l, clip, clip_g, clip, t5_xxl, t5)


@contextlib.contextmanager
def building(device, dtype):
    """Modules that are made meanwhile are there and of that precision."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(usual)


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


def load(args, layers=24):
    """guard.load_backbone(args), with fake tensors for weights. layers: of T5."""
    with mock.patch.object(guard, "DEVICE", torch.device("meta")):
        return fake(load_random(replace(args, offload=False), layers))


def load_random(args, layers):
    """guard.load_backbone(args), with random weights, on guard.DEVICE."""
    if args.model not in TRUE:
        raise BadInput(f"--model {args.model}: expected {' or '.join(TRUE)}")
    resting = "cpu" if args.offload else guard.DEVICE

    def from_pretrained(*_, dtype, **__):
        return cast(pipeline(args.model, layers, dtype, guard.DEVICE, resting), dtype)

    with mock.patch.object(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained):
        return guard.load_backbone(args)


def fake(backbone):
    """In place, fake CPU tensors for all weights. From then on it runs in `faking` only."""
    fakes = {}  # of every weight; T5's embeddings are one that is in two places
    with faking():
        for module in (backbone.transformer, backbone.encoders, backbone.pipe.vae):
            for part in module.modules():
                for name, p in part.named_parameters(recurse=False):
                    if p not in fakes:
                        fakes[p] = torch.nn.Parameter(fresh(p), p.requires_grad)
                    part._parameters[name] = fakes[p]
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


def count_slice(backbone, args):
    """One slice through encode, sample (two steps), decode and the update: {phase: as `counted`}.

    Also "state": what Policy holds when it has made an update; and "tensors": what a test may look at.
    """
    steps = guard.schedule([1.0, 0.5, 0.0], args.eta, args.sde)
    policy, state = counted(trained_policy, backbone, args)
    piece, x, count = draw_slice(counted, backbone, args, steps, range(args.micro_batch))
    count["state"] = state

    def learn():
        loss = guard.slice_loss(backbone, args, steps[0], 0, piece, torch.ones(args.micro_batch))
        (loss[0].sum() * math.prod(backbone.shape)).backward()
        return [part.detach() for part in loss]

    touched = set()  # ids of the parameters that the backward pass has reached
    hooks = [p.register_post_accumulate_grad_hook(lambda p: touched.add(id(p))) for p in policy.params]
    loss, count["train"] = counted(learn)
    for hook in hooks:
        hook.remove()
    tensors = dict(text=piece.texts[0], x=x, kept=torch.stack(piece.kept), pixels=piece.images, loss=loss,
                   touched=touched)
    return count | dict(tensors=tensors)


def draw_slice(meter, backbone, args, steps, numbers):
    """(Slice, its latents, {phase: what `meter` says of it}) of the samples of these numbers, of one prompt.

    meter: `counted` or `watched`.
    """
    keys, found = [(args.seed, 0, 0, number) for number in numbers], {}
    texts, found["encode"] = meter(backbone.encode, ["a prompt"])
    texts = [texts["a prompt"]] * len(numbers)
    (x, kept), found["sample"] = meter(guard.sample, backbone, steps, texts, keys)
    pixels, found["decode"] = meter(backbone.decode, x)
    return guard.Slice(list(numbers), keys, texts, pixels, kept), x, found


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
    with faking(), mock.patch.object(guard, "DEVICE", torch.device("cpu")):
        count = count_slice(backbone, args)
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


# ------------------------------------------------------------------------------------------------------------
# Measured


def in_use():
    """Bytes: of the GPU's tensors, or of this process."""
    return torch.cuda.memory_allocated() if guard.ON_GPU else psutil.Process().memory_info().rss


def watched(function, *args):
    """The function's value, and dict(peak=bytes in use at most, seconds) of calling it."""
    if guard.ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    seen, done = [in_use()], threading.Event()

    def look():
        while not done.wait(0.002):
            seen.append(in_use())

    looking, started = threading.Thread(target=look), time.perf_counter()
    looking.start()
    try:
        value = function(*args)
        if guard.ON_GPU:
            torch.cuda.synchronize()
            seen.append(torch.cuda.max_memory_allocated())
    finally:
        done.set()
        looking.join()
    return value, dict(peak=max(seen), seconds=time.perf_counter() - started)


def one_group(args):
    """The settings of a run with one prompt, one update and one picture in an evaluation, by this process."""
    size = max(2, args.micro_batch)
    return replace(args, groups=1, group_size=size, updates_per_epoch=1, eval_prompts=1, gold=[],
                   eval_steps=args.steps)


def check_room(planned):
    """Raises BadInput, before anything is allocated."""
    free = torch.cuda.mem_get_info()[0] if guard.ON_GPU else psutil.virtual_memory().available
    if planned["total"] > free:
        raise BadInput(f"this needs {planned['total'] / GIB:.1f} GiB and {free / GIB:.1f} GiB are free; try "
                       "--offload --grad_checkpoint, smaller --micro_batch or --resolution, or --encoders 1")


def measure(args, layers):
    """A group through sampling, update, checkpoint, resume and evaluation: {phase: as `watched`}.

    Everything is done twice and the second time is measured: in the first one memory and kernels are warmed
    up and AdamW's state is made. Peaks are over what was in use before the model was loaded.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed leaves the process at once
    before = in_use()
    backbone = load_random(args, layers)
    policy = guard.Policy(backbone, args)
    steps = guard.schedule(backbone.sigmas(args.steps), args.eta, args.sde, guard.noisy_steps(args, 0))
    advantage = torch.linspace(-1, 1, args.group_size)[None]  # as if the later pictures were better
    found = {}
    for _ in range(2):
        slices = []
        for numbers in torch.arange(args.group_size).split(args.micro_batch):
            piece, _, phases = draw_slice(watched, backbone, args, steps, numbers.tolist())
            found |= phases
            slices.append(piece._replace(kept=[tensors.to(backbone.resting) for tensors in piece.kept]))
        update = guard.update, backbone, policy, args, steps, slices, advantage, range(1)
        line, found["train"] = watched(*update)
        found.setdefault("first", line)
    found["tokens"] = args.micro_batch * (math.prod(backbone.shape[1:]) // 4 + piece.texts[0][0].shape[1])
    policy.update_average(1)
    found["checkpoint"] = checkpoint_and_resume(backbone, policy, args)
    scorers = guard.Scorers([args.reward], guard.DEVICE, backbone.patch)
    _, found["evaluate"] = watched(guard.evaluate, backbone, policy, args, scorers, 1)
    for phase in ("encode", "sample", "decode", "train", "evaluate"):
        found[phase]["peak"] -= before
    return found


def checkpoint_and_resume(backbone, policy, args):
    """Bytes of a checkpoint. Raises AssertionError where what is read back is not what was saved."""
    (Path(args.run_dir) / "samples").mkdir(parents=True)
    guard.log(args, kind="update")
    guard.save_checkpoint(backbone, policy, args, 1)
    saved = [p.detach().clone() for p in policy.params]
    for p in policy.params:
        p.data.zero_()
    assert guard.load_checkpoint(policy, args) == 1
    assert all(map(torch.equal, saved, policy.params))
    return sum(path.stat().st_size for path in guard.checkpoints(args)[-1].iterdir())


def matmul_peak(dtype, size=4096):
    """FLOP/s of a large matrix product on this device: the best of five."""
    a = torch.randn(size, size, device=guard.DEVICE, dtype=dtype)
    return max(2 * size**3 / watched(torch.matmul, a, a)[1]["seconds"] for _ in range(5))


def measured_rows(args, planned, found):
    """[(what, value)] of a measurement beside its plan, as text."""
    rows = [("device", torch.cuda.get_device_name() if guard.ON_GPU
             else f"cpu, {torch.get_num_threads()} threads")]
    for phase, size in planned["phases"].items():
        peak = found[phase]["peak"]
        rows.append((f"`{phase}`: planned, measured",
                     f"{size / GIB:.2f}, {peak / GIB:.2f} GiB ({peak / size - 1:+.1%})"))
    rows.append(("`evaluate`: measured", f"{found['evaluate']['peak'] / GIB:.2f} GiB"))
    slices, trained = args.group_size // args.micro_batch, args.sde_window or args.steps - 1
    forward = found["sample"]["seconds"] / args.steps
    backward = found["train"]["seconds"] / (slices * trained)
    flops, peak = planned["count"], matmul_peak(getattr(torch, args.dtype))
    rows += [
        ("a slice forward; forward and backward", f"{forward:.2f} s; {backward:.2f} s"),
        ("tokens a second, image and text; the same", f"{found['tokens'] / forward:,.0f}; "
                                                      f"{found['tokens'] / backward:,.0f}"),
        ("the device's largest matrix product", f"{peak / 1e12:.2f} TFLOP/s"),
        ("share of it, forward", f"{flops['sample']['flops'] / 2 / forward / peak:.0%}"),
        ("share of it, forward and backward", f"{flops['train']['flops'] / backward / peak:.0%}"),
        ("a checkpoint: planned, measured",
         f"{planned['checkpoint'] / 1e9:.3f}, {found['checkpoint'] / 1e9:.3f} GB"),
    ]
    mean, deviation = (max(map(abs, found["first"][f"ratio_{name}"])) for name in ("mean", "std"))
    rows.append(("first update: ratio - 1 and its deviation", f"{mean:.1e}, {deviation:.1e}"))
    rows.append(("the clip range", f"{args.clip:.1e}"))
    return rows


# ------------------------------------------------------------------------------------------------------------
# The command


def resolve(argv):
    """guard.py's settings for its flags."""
    return guard.parse_args(argv)


def main():
    parser = argparse.ArgumentParser(description="All other flags are guard.py's.", allow_abbrev=False)
    parser.add_argument("--tflops", type=float, default=150, help="assumed 1e12 FLOP/s of a GPU")
    parser.add_argument("--csv", action="store_true", help="keep the numbers as a column of a CSV")
    parser.add_argument("--measure", action="store_true", help="do one update, with random weights")
    parser.add_argument("--encoders", type=int, default=24, help="of T5")
    own, argv = parser.parse_known_args()
    args = resolve(argv)
    name, column = "plan.csv", " ".join(argv).removeprefix("--model ")
    if own.encoders != 24:
        column += f" --encoders {own.encoders}"
    if own.measure:
        name, args = "measured.csv", one_group(args)
        planned = plan(load(args, own.encoders), args)
        check_room(planned)
        torch.set_float32_matmul_precision("high" if guard.ON_GPU else "highest")  # as guard.main does
        with tempfile.TemporaryDirectory() as folder:
            args.run_dir = folder
            found = measured_rows(args, planned, measure(args, own.encoders))
    else:
        found = rows(plan(load(args, own.encoders), args), own.tflops)
    for what, value in found:
        print(f"{what:66} {value}")
    if own.csv:
        path = HERE / name
        known = {row["what"]: row for row in read(path)} if path.exists() else {}
        write(path, [known.get(what, dict(what=what)) | {column: value} for what, value in found])


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"plan.py: error: {error}")
