"""What an epoch of guard.py costs beside the transformer passes that it cannot do without.

    python experiments/bench.py --model tiny-sd3          # also tiny-flux; every flag of guard.py is taken

One epoch's worth of each of these, in one process, one after the other, --rounds times over and every second
time in reverse, so that whatever else the machine does falls on all of them:

    bare sampling         the transformer's forward passes of an epoch and nothing else: no noise, no SDE
    bare training         its forward and backward passes, to the LoRA alone, with a sum for a loss
    sampling, training    guard.rollout with a reward that costs nothing; every guard.update of the epoch
    sampling + reward     guard.rollout with the reward on a thread beside it, as guard.train does
    tail                  of it the seconds spent waiting for rewards after the last picture

Seconds go to bench.csv, one a row; a new run takes the place of the rows of its model, device, dtype and
reward. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402
import rewards  # noqa: E402
from experiments import run, tables  # noqa: E402

CSV = HERE / "bench.csv"


class Epoch:
    """The first epoch of a run; its methods are the parts that are timed."""

    def __init__(self, args):
        self.args, self.backbone = args, guard.load_backbone(args)
        # The learning rate is nearly 0, so that the policy stays where it is.
        self.policy = guard.Policy(self.backbone, replace(args, lr=1e-12))
        self.scorers = guard.Scorers([args.reward], guard.DEVICE, self.backbone.patch)
        self.scorers.rewards["free"] = lambda images, prompts, metadata: [0.0] * len(images)
        prompts, _ = rewards.read_set(args.prompts)
        self.prompts = [prompts[i] for i in guard.prompt_order(args, 0, len(prompts))]
        noisy = guard.noisy_steps(args, 0)
        self.steps = guard.schedule(self.backbone.sigmas(args.steps), args.eta, args.sde, noisy)
        slices = args.groups * args.group_size // args.micro_batch
        self.passes = dict(sampling=slices * args.steps, training=slices * len(noisy))
        torch.manual_seed(0)
        self.advantage = torch.randn(args.groups, args.group_size, dtype=torch.float64)  # no dead groups
        self.calls = self.capture()

    def capture(self):
        """What guard.py gives the transformer for a slice: (args, kwargs) of every pass."""
        calls = []
        hook = self.backbone.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        x = torch.randn(self.args.micro_batch, *self.backbone.shape, device=guard.DEVICE)
        text = self.backbone.encode(["a card"])["a card"]
        with torch.no_grad():
            self.backbone.velocity(x, self.steps[0].sigma, [text] * len(x))
        hook.remove()
        return calls

    def forward(self):
        return sum(self.backbone.transformer(*args, **kwargs)[0] for args, kwargs in self.calls)

    def bare_sampling(self):
        with torch.no_grad():
            for _ in range(self.passes["sampling"]):
                self.forward()

    def bare_training(self):
        for _ in range(self.passes["training"]):
            self.forward().float().sum().backward()

    def sampling(self, reward="free"):
        self.slices = None  # an epoch's are gone when guard.py samples the next ones
        self.slices, _, self.tail = guard.rollout(
            self.backbone, self.args, self.steps, self.prompts, self.args.group_size, 0, [reward],
            self.scorers)

    def training(self):
        self.policy.optimizer.zero_grad(set_to_none=False)  # of what bare_training left
        share = self.args.groups // self.args.updates_per_epoch
        for start in range(0, self.args.groups, share):
            groups = range(start, start + share)
            guard.update(
                self.backbone, self.policy, self.args, self.steps, self.slices, self.advantage, groups)


def write(args, rows):
    """Rows, dicts, into bench.csv, in place of those of the same model, device, dtype and reward."""
    device = torch.cuda.get_device_name() if guard.ON_GPU else f"cpu, {torch.get_num_threads()} threads"
    own = dict(model=args.model, device=device, dtype=args.dtype, reward=args.reward)
    kept = [row for row in run.read(CSV) if any(row[key] != own[key] for key in own)]
    run.write(CSV, kept + [own | row for row in rows])


def synchronise():
    if guard.ON_GPU:
        torch.cuda.synchronize()


def bench(args, rounds):
    """The parts of an epoch against each other. Each runs once before it is timed."""
    epoch = Epoch(args)
    functions = {
        "bare sampling": epoch.bare_sampling, "sampling": epoch.sampling,
        "bare training": epoch.bare_training, "training": epoch.training,
        "sampling + reward": lambda: epoch.sampling(args.reward)}
    for function in functions.values():
        function()
    rows = []
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            synchronise()
            started = time.perf_counter()
            functions[name]()
            synchronise()
            seconds = {name: time.perf_counter() - started}
            if name == "sampling + reward":
                seconds["tail"] = epoch.tail
            where = dict(images=args.groups * args.group_size, round=number)
            rows += [where | dict(what=what, seconds=round(s, 4)) for what, s in seconds.items()]
    write(args, rows)
    print(tables.table_of_speed())


def main():
    parser = argparse.ArgumentParser(description="All other flags are guard.py's.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    own, flags = parser.parse_known_args()
    if guard.ON_GPU:
        torch.cuda.set_device(guard.DEVICE)
    bench(guard.parse_args(flags), own.rounds)


if __name__ == "__main__":
    try:
        main()
    except rewards.BadInput as error:
        sys.exit(f"bench.py: error: {error}")
