"""What an epoch of guard.py costs beside the transformer passes that it cannot do without.

    python experiments/bench.py --model tiny-sd3          # also tiny-flux; every flag of guard.py is taken
    python experiments/bench.py --model sd3.5-medium --groups 4 --peak_tflops 989          # on a GPU

One epoch's worth of each of these, in one process, one after the other, --rounds times over and every second
time in reverse, so that whatever else the machine does falls on all of them:

    bare sampling         the transformer's forward passes of an epoch and nothing else: no noise, no SDE
    bare training         its forward and backward passes, to the LoRA alone, with a sum for a loss
    sampling, training    guard.rollout with a reward that costs nothing; every guard.update of the epoch
    encoding, decoding    of sampling the text encoders, once a prompt, and the VAE
    reward                the reward alone, on the pictures of an epoch
    sampling + reward     guard.rollout with the reward on a thread beside it, as guard.train does
    tail                  of it the seconds spent waiting for rewards after the last picture
    drawing               guard.sample and decode for the slices of an epoch, their texts already encoded
    diffusers             the same by diffusers' own pipe(...): same batch, steps and guidance, texts already
                          encoded, PIL pictures, the same LoRA, not merged; it draws by the ODE

Printed: medians; the ratios that matter, as median and range over the rounds, each from the numbers of one
round; images and tokens per second; FLOP/s of the transformer as a share of --peak_tflops; memory at the peak
of sampling and training. A token is 2 x 2 latents of an image in one pass of the transformer; guidance's
second pass counts again.

Other questions, each a run of its own:

    --growth              seconds of sampling and training against the prompts of an epoch, the denoising
                          steps, the group size and the pixels of an image, each at half, once and twice its
                          value, and the straight line through them; and what --sde_window 3 saves
    --processes           two processes of one thread against one: seconds of an epoch, from metrics.jsonl
    --memory 200          memory of a small run after each of so many epochs
    --merged              what merging the LoRA into the weights while sampling would save, and what it would
                          do to the ratio of the first update
    --beside              seconds of sampling alone, and while the reward is read without a pause on a thread
                          or in another process: what of its cost is Python's lock
    --start               seconds from the start of the process to the first rollout, without evaluation

Numbers go to bench.csv, bench_growth.csv and so on beside this file, one a row; a new run takes the place of
the rows that have its model, device, dtype and reward. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import contextlib
import copy
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402
import rewards  # noqa: E402

MIB = 2**20


# ------------------------------------------------------------------------------------------------------------
# The parts of an epoch


class Epoch:
    """An epoch of a backbone by some settings; its methods are the parts that are timed."""

    def __init__(self, backbone, policy, args):
        self.backbone, self.policy, self.args = copy.copy(backbone), policy, args
        self.sides = guard.resolution_of(args)
        scale = backbone.pipe.vae_scale_factor
        self.backbone.shape = (backbone.shape[0], *(side // scale for side in self.sides))
        prompts, _ = rewards.read_set(args.prompts)
        self.prompts = [prompts[i] for i in guard.prompt_order(args, 0, len(prompts))]
        noisy = guard.noisy_steps(args, 0)
        self.steps = guard.schedule(self.backbone.sigmas(args.steps), args.eta, args.sde, noisy)
        slices = args.groups * args.group_size // args.micro_batch
        self.passes = dict(sampling=slices * args.steps, training=slices * len(noisy))
        torch.manual_seed(0)
        self.advantage = torch.randn(args.groups, args.group_size, dtype=torch.float64)  # no dead groups
        self.inputs = self.capture()
        self.tokens = len(self.inputs[0][0]) * self.backbone.shape[1] * self.backbone.shape[2] // 4  # a pass

    def capture(self):
        """What guard.py gives the transformer for a slice: (args, kwargs)."""
        calls = []
        hook = self.backbone.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        x = torch.randn(self.args.micro_batch, *self.backbone.shape, device=guard.DEVICE)
        with torch.no_grad():
            self.backbone.velocity(x, self.steps[0].sigma, self.encoding()[0])
        hook.remove()
        return calls[0]

    def forward(self):
        args, kwargs = self.inputs
        return self.backbone.transformer(*args, **kwargs)[0]

    def forward_and_backward(self):
        self.forward().float().sum().backward()

    def bare_sampling(self):
        with torch.no_grad():
            for _ in range(self.passes["sampling"]):
                self.forward()

    def bare_training(self):
        for _ in range(self.passes["training"]):
            self.forward_and_backward()

    def sampling(self, score=None):
        self.slices = None  # an epoch's are gone when guard.py samples the next ones
        self.slices, _, self.tail = guard.rollout(
            self.backbone, self.args, 0, self.steps, self.prompts, score or free_reward)

    def training(self):
        self.policy.optimizer.zero_grad(set_to_none=False)  # of what bare_training left
        for slots in guard.slots_of(self.args).flatten(1).tolist():
            guard.update(
                self.backbone, self.policy, self.args, self.steps, self.slices, slots, self.advantage)

    def encoding(self):
        return self.backbone.encode([prompt for prompt, _ in self.prompts])

    def drawing(self):
        """(latents, pictures) of every slice."""
        drawn = []
        for slot, members, text, _ in self.slices:
            keys = [(self.args.seed, 0, slot, member) for member in members]
            x, _ = guard.sample(self.backbone, self.steps, text, keys)
            drawn.append((x, self.backbone.decode(x)))
        return drawn

    def rewarding(self, scorer, drawn):
        for piece, (_, pictures) in zip(self.slices, drawn, strict=True):
            scorer(pictures, *zip(*[self.prompts[piece.slot]] * len(pictures), strict=True))

    def diffusers(self):
        """guard.py's VAE is in fp32 whatever the model is; so it is here, with the latents cast to it."""
        pipe, (height, width), decode = self.backbone.pipe, self.sides, self.backbone.pipe.vae.decode
        cast = mock.patch.object(pipe.vae, "decode", lambda x, **rest: decode(x.to(pipe.vae.dtype), **rest))
        with cast:
            for piece in self.slices:
                tokens, pooled, no_tokens, no_pooled = (
                    part.expand(len(piece.members), *part.shape[1:])
                    for part in (*piece.text, *self.backbone.negative))
                pipe(prompt_embeds=tokens, pooled_prompt_embeds=pooled, negative_prompt_embeds=no_tokens,
                     negative_pooled_prompt_embeds=no_pooled, height=height, width=width, output_type="pil",
                     num_inference_steps=self.args.steps, guidance_scale=self.args.guidance)


def free_reward(images, prompts, metadata):
    future = Future()
    future.set_result([0.0] * len(images))
    return future


def load(args):
    """(backbone, policy); the learning rate is nearly 0, so that the policy stays where it is."""
    backbone = guard.load_backbone(args)
    backbone.pipe.set_progress_bar_config(disable=True)
    return backbone, guard.Policy(backbone, replace(args, lr=1e-12))


# ------------------------------------------------------------------------------------------------------------
# Clocks and counters


def synchronise():
    if guard.ON_GPU:
        torch.cuda.synchronize()


def alternate(parts, rounds):
    """{name: function} -> {name: its seconds in each round}. Each runs once before, not timed."""
    for function in parts.values():
        function()
    seconds = {name: [] for name in parts}
    for number in range(rounds):
        for name in list(parts)[:: -1 if number % 2 else 1]:
            synchronise()
            started = time.perf_counter()
            parts[name]()
            synchronise()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def flops_of(function):
    """Of one call, two for every multiply-add. By plain attention, since that of CPUs is not counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def peak_memory():
    """MiB so far: of the GPU, or of this process (ru_maxrss is in KiB on Linux)."""
    if guard.ON_GPU:
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device():
    if guard.ON_GPU:
        return torch.cuda.get_device_name(guard.DEVICE)
    return f"cpu, {torch.get_num_threads()} threads"


def write(name, args, rows):
    """Rows, dicts, into experiments/NAME.csv, in place of those of the same model, device, dtype, reward."""
    path = HERE / f"{name}.csv"
    own = dict(model=args.model, device=device(), dtype=args.dtype, reward=args.reward)
    rows = [own | row for row in rows]
    kept = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    kept = [row for row in kept if any(row[key] != own[key] for key in own)]
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(kept + rows)
    print(f"-> {path.name}")


def show(what, values):
    print(f"{what:58} {np.median(values):9.4g}   ({min(values):.4g} to {max(values):.4g})")


# ------------------------------------------------------------------------------------------------------------
# What is measured


def bench(args, own):
    """The parts of an epoch against each other."""
    backbone, policy = load(args)
    epoch = Epoch(backbone, policy, args)
    epoch.sampling()
    epoch.training()
    peak = peak_memory()
    scorer, tails = rewards.load(args.reward), []
    drawn = epoch.drawing()
    score = partial(ThreadPoolExecutor(1).submit, scorer)

    def sampling_and_reward():
        epoch.sampling(score)
        tails.append(epoch.tail)

    seconds = alternate({
        "bare sampling": epoch.bare_sampling, "sampling": epoch.sampling,
        "bare training": epoch.bare_training, "training": epoch.training,
        "encoding": epoch.encoding, "decoding": lambda: [backbone.decode(x) for x, _ in drawn],
        "reward": lambda: epoch.rewarding(scorer, drawn), "sampling + reward": sampling_and_reward,
        "drawing": epoch.drawing, "diffusers": epoch.diffusers,
    }, own.rounds)
    seconds["tail"] = tails[1:]
    work = {"sampling": ("bare sampling", "sampling", "sampling + reward", "drawing", "diffusers"),
            "training": ("bare training", "training")}
    one_pass = dict(sampling=flops_of(epoch.forward), training=flops_of(epoch.forward_and_backward))
    rows = []
    for what, values in seconds.items():
        phase = next((phase for phase, parts in work.items() if what in parts), None)
        for number, value in enumerate(values):
            tokens = share = ""
            if phase:
                tokens = round(epoch.passes[phase] * epoch.tokens / value)
            if phase and own.peak_tflops:
                share = round(epoch.passes[phase] * one_pass[phase] / value / own.peak_tflops / 1e12, 4)
            row = dict(what=what, round=number, seconds=round(value, 4))
            rows.append(row | dict(tokens_per_second=tokens, share_of_peak=share))

    def ratio(above, below):
        each = [np.sum([seconds[name] for name in names.split(", ")], 0) for names in (above, below)]
        show(f"({above}) / ({below})", each[0] / each[1])

    print(f"{args.model}, {device()}, {args.dtype}\n{guard.arithmetic(args)}\n\nseconds")
    for what, values in seconds.items():
        show(what, values)
    print("\nratios")
    ratio("sampling", "bare sampling")
    ratio("training", "bare training")
    ratio("sampling, training", "bare sampling, bare training")
    ratio("drawing", "diffusers")
    ratio("sampling + reward", "sampling")
    ratio("tail", "sampling + reward")
    ratio("reward", "sampling")
    print()
    images = args.groups * args.group_size
    show("images/s, sampled", images / np.array(seconds["sampling"]))
    show("images/s, sampled and trained on", images / np.add(seconds["sampling"], seconds["training"]))
    for what in (*work["sampling"], *work["training"]):
        of_part = [row for row in rows if row["what"] == what]
        show(f"tokens/s, {what}", [row["tokens_per_second"] for row in of_part])
        if own.peak_tflops:
            show(f"share of {own.peak_tflops:g} TFLOP/s, {what}", [row["share_of_peak"] for row in of_part])
    print(f"GFLOP of a pass of the transformer: {one_pass['sampling'] / 1e9:.3f} in sampling, "
          f"{one_pass['training'] / 1e9:.3f} in training\n"
          f"MiB at the peak of sampling and training: {peak:.0f}")
    write("bench", args, rows)


def growth(args, own):
    """Seconds of an epoch by its size."""
    (height, width), half = guard.resolution_of(args), args.group_size // 2
    points = {  # what grows -> [(its value, settings)]
        "prompts": [(n, dict(groups=n)) for n in (args.groups // 2, args.groups, args.groups * 2)],
        "steps": [(n, dict(steps=n)) for n in (args.steps // 2, args.steps, args.steps * 2)],
        "group size": [(n, dict(group_size=n, micro_batch=half)) for n in (half, 2 * half, 4 * half)],
        "pixels": [(h * w, dict(resolution=f"{h}x{w}"))
                   for h, w in ((height, width // 2), (height, width), (height * 2, width))],
        "trained steps": [(n, dict(sde_window=n)) for n in (3, args.steps - 1)],
    }
    backbone, policy = load(args)
    parts = {}
    for what, of_it in points.items():
        for value, settings in of_it:
            epoch = Epoch(backbone, policy, replace(args, **settings))
            parts |= {(what, value, "sampling"): epoch.sampling, (what, value, "training"): epoch.training}
    seconds = alternate(parts, own.rounds)
    print(f"{args.model}, {device()}, {args.dtype}\n{guard.arithmetic(args)}\n")
    for what, of_it in points.items():
        for phase in ("sampling", "training"):
            x = [value for value, _ in of_it]
            y = np.array([np.median(seconds[what, value, phase]) for value in x])
            numbers = ", ".join(f"{s:.3f} at {n}" for n, s in zip(x, y, strict=True))
            if what == "trained steps":
                found = f"{x[0]} take {y[0] / y[1]:.2f} of {x[1]}"
            else:
                slope, start = np.polyfit(x, y, 1)
                off = np.abs(y / (slope * np.array(x) + start) - 1).max()
                found = f"line {start:.3f} + {slope:.3g} n, at most {off:.1%} off"
            print(f"{phase}, s, by {what}: {numbers}; {found}")
    write("bench_growth", args, [
        dict(what=what, value=value, phase=phase, round=number, seconds=round(s, 4))
        for (what, value, phase), of_it in seconds.items() for number, s in enumerate(of_it)])


def processes(args, own):
    """Seconds of an epoch by processes. The first epoch, in which much is done once, is left out."""
    epochs, rows = own.rounds + 1, []
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                 "guard.py", *own.flags, "--run_dir", folder, "--epochs", str(epochs), "--eval_prompts", "2",
                 "--eval_every", str(epochs), "--save_every", str(epochs)],
                cwd=HERE.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
            lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
            rows += [dict(processes=count, epoch=line["epoch"]) | line["seconds"]
                     for line in lines if line["kind"] == "rollout" and line["epoch"] > 0]
    print(f"{args.model}, one thread each\n{guard.arithmetic(args)}\n")
    parts = {"sampling": ["sample"], "waiting": ["reward"], "training": ["train"],
             "epoch": ["sample", "reward", "train"]}
    for what, names in parts.items():
        one, two = ([sum(row[name] for name in names) for row in rows if row["processes"] == count]
                    for count in (1, 2))
        show(f"{what}, s, 1 process", one)
        show(f"{what}, s, 2 processes", two)
        if what != "waiting":
            print(f"{'':58} {np.median(one) / np.median(two):9.4g} times as fast")
    write("bench_processes", args, rows)


def memory(args, own):
    """Of this process after every epoch of a small run, its evaluations and checkpoints included."""
    small = ("--groups 2 --group_size 4 --micro_batch 4 --updates_per_epoch 1 --eval_prompts 4 "
             f"--eval_every 20 --save_every 20 --epochs {own.memory}")
    rows, train_epoch = [], guard.train_epoch

    def watched(backbone, policy, args, epoch, *rest):
        finished = train_epoch(backbone, policy, args, epoch, *rest)
        used = dict(mib=psutil.Process().memory_info().rss, gpu_mib=torch.cuda.memory_allocated())
        rows.append(dict(epoch=epoch) | {name: round(size / MIB, 2) for name, size in used.items()})
        return finished

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(guard, "train_epoch", watched):
        guard.train(guard.parse_args([*own.flags, *small.split(), "--run_dir", folder]))
    after = rows[min(20, len(rows) // 2):]
    for column in ("mib", "gpu_mib") if guard.ON_GPU else ("mib",):
        slope, _ = np.polyfit([row["epoch"] for row in after], [row[column] for row in after], 1)
        first, last = after[0], after[-1]
        print(f"{args.model}, {column}: {first[column]:.1f} after epoch {first['epoch']}, {last[column]:.1f} "
              f"after epoch {last['epoch']}; {100 * slope:+.2f} per 100 epochs")
    write("bench_memory", args, rows)


def merged(args, own):
    """Forward passes with the LoRA merged into the weights, and the ratio of a first update after them.

    The LoRA is a random one of the size of a trained one, since a new one changes nothing.
    """
    backbone, policy = load(args)
    torch.manual_seed(0)
    for p in policy.params:
        torch.nn.init.normal_(p, std=0.02)
    epoch = Epoch(backbone, policy, args)
    plain, other = epoch.backbone.transformer, copy.deepcopy(epoch.backbone.transformer)
    other.fuse_lora()
    other.unload_lora()

    def passes(transformer):
        epoch.backbone.transformer = transformer
        epoch.bare_sampling()

    seconds = alternate({"as it is": lambda: passes(plain), "merged": lambda: passes(other)}, own.rounds)
    show("merged / as it is", np.divide(seconds["merged"], seconds["as it is"]))
    trained, advantage = [step for step in epoch.steps if step.s > 0], torch.zeros(1, device=guard.DEVICE)
    for transformer in (plain, other):
        epoch.backbone.transformer = transformer
        epoch.sampling()
        epoch.backbone.transformer = plain
        with torch.no_grad():
            rho = torch.cat([
                guard.slice_loss(epoch.backbone, args, step, t, piece, advantage)[1]
                for piece in epoch.slices for t, step in enumerate(trained)])
        print(f"sampled {'as it is' if transformer is plain else 'merged'}: abs(rho) of the first update at "
              f"most {rho.abs().max():.1e}; clip range {args.clip:.1e}")
    write("bench_merged", args, [
        dict(what=what, round=number, seconds=round(s, 4))
        for what, of_it in seconds.items() for number, s in enumerate(of_it)])


READER = """
import base64, io, json, sys
from PIL import Image
import rewards
read, (files, prompts, metadata) = rewards.load(sys.argv[1]), json.load(sys.stdin)
pictures = [Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB") for file in files]
print("reading", flush=True)
while True:
    read(pictures, prompts, metadata)
"""


def beside(args, own):
    """Sampling beside a reward that never rests."""
    backbone, policy = load(args)
    epoch = Epoch(backbone, policy, args)
    epoch.sampling()
    pictures = epoch.drawing()[0][1]
    work = (pictures, *zip(*[epoch.prompts[0]] * len(pictures), strict=True))
    scorer, resting = rewards.load(args.reward), threading.Event()

    @contextlib.contextmanager
    def on_a_thread():
        def read():
            while not resting.is_set():
                scorer(*work)

        resting.clear()
        reader = threading.Thread(target=read)
        reader.start()
        yield
        resting.set()
        reader.join()

    @contextlib.contextmanager
    def in_a_process():
        reader = subprocess.Popen([sys.executable, "-c", READER, args.reward], cwd=HERE.parent, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        json.dump([[rewards.png(picture) for picture in pictures], *work[1:]], reader.stdin)
        reader.stdin.close()
        reader.stdout.readline()
        yield
        reader.kill()
        reader.wait()

    company = {"alone": contextlib.nullcontext, "thread": on_a_thread, "process": in_a_process}
    seconds = {what: [] for what in company}
    for _ in range(own.rounds):
        for what, begin in company.items():
            with begin():
                started = time.perf_counter()
                epoch.sampling()
                synchronise()
                seconds[what].append(time.perf_counter() - started)
    for what, of_it in seconds.items():
        show(f"sampling, reward read without a pause: {what} / alone", np.divide(of_it, seconds["alone"]))
    write("bench_beside", args, [
        dict(beside=what, round=number, seconds=round(s, 4))
        for what, of_it in seconds.items() for number, s in enumerate(of_it)])


DRIVER = """
import os, time, guard
guard.evaluate = lambda *_: None
guard.rollout = lambda *_: (print("\\nstarted", time.time(), flush=True), os._exit(0))
guard.main()
"""


def start(args, own):
    """Seconds from the start of the process to its first rollout, every round a new process."""
    rows = []
    for number in range(own.rounds):
        with tempfile.TemporaryDirectory() as folder:
            started = time.time()
            done = subprocess.run([sys.executable, "-c", DRIVER, *own.flags, "--run_dir", folder],
                                  cwd=HERE.parent, check=True, capture_output=True, text=True)
        ended = float(done.stdout.split("started")[-1])
        rows.append(dict(round=number, seconds=round(ended - started, 3)))
    show(f"{args.model}: start to first rollout, s", [row["seconds"] for row in rows])
    write("bench_start", args, rows)


def main():
    parser = argparse.ArgumentParser(description="All other flags are guard.py's.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak_tflops", type=float, help="1e12 FLOP/s of the device in --dtype")
    parser.add_argument("--growth", action="store_true", help="seconds by the size of an epoch")
    parser.add_argument("--processes", action="store_true", help="two processes against one")
    parser.add_argument("--memory", type=int, metavar="EPOCHS", help="memory over a small run")
    parser.add_argument("--merged", action="store_true", help="the LoRA merged while sampling")
    parser.add_argument("--beside", action="store_true", help="sampling beside a reward that never rests")
    parser.add_argument("--start", action="store_true", help="seconds to the first rollout")
    own, own.flags = parser.parse_known_args()
    args = guard.parse_args(own.flags)
    if args.offload:
        raise rewards.BadInput("--offload: not measured; diffusers' pipeline has offloading of its own")
    if guard.ON_GPU:
        torch.cuda.set_device(guard.DEVICE)
    measures = (growth, processes, memory, merged, beside, start)
    for measure in [each for each in measures if getattr(own, each.__name__)] or [bench]:
        measure(args, own)


if __name__ == "__main__":
    try:
        main()
    except rewards.BadInput as error:
        sys.exit(f"bench.py: error: {error}")
