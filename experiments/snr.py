"""Measure the signal-to-noise ratio of the steps' gradients at the base model, which `reweighting` predicts.

    python experiments/snr.py --groups 64 [flags of guard.py]    # adds to experiments/results/snr.csv

It draws one epoch's groups of images. Of each group and trained step it takes the LoRA's gradient with the
weight w = 1 for the step's eps. The signal is the mean gradient. Its square is estimated from products of
different groups alone, so that noise does not add to it. The noise is what a group's gradient has beside it.

It writes a row for each step, of its own ratio, and for each method, of the weighted sum of the steps. Ratios
are squared, since the root of a small number has no useful error. `noise` is a step's, 1 on average.
`measured` is the ratio of a group, `share` that as a share of that of w = s; both have a jackknife error over
groups. As shares of that of w = s, too: `predicted`, the square of sum(w s) / sqrt(sum(w²)), `with_noise`,
that of sum(w s) / sqrt(sum(w² noise²)).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guard
from experiments.run import RESULTS, write


def gradients(args):
    """(groups, T, parameters) gradients of mean(A mean(v eps)), and the T trained steps."""
    backbone = guard.load_backbone(args)
    params = guard.Learner(backbone, args).params
    schedule = guard.make_schedule(backbone.sigmas(args.steps), args.eta, args.sde)
    training_set, _, judges = guard.load_task(args)
    prompts = guard.prompts_of_epoch(args, 0, training_set)
    batches = guard.rollout(backbone, args, schedule, prompts, args.group_size, 0, judges[:1])
    A = guard.advantages(guard.collect(batches, 1, args.groups * args.group_size).view(args.groups, -1))
    trained = [step for step in schedule if step.s > 0]
    rows = []
    # A batch is a group.
    for batch, advantage in zip(tqdm(batches, desc="gradients"), A.float(), strict=True):
        for (x, _, eps), step in zip(batch.kept, trained, strict=True):
            v = backbone.velocity(x, step.sigma, batch.embeddings)
            found = torch.autograd.grad((advantage * guard.mean(v * eps)).mean(), params)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows).unflatten(0, (args.groups, len(trained))), trained


def signal_and_noise(products, weights):
    """The squares of both, of products (n, n, T, T) of two groups' and steps' gradients, weighted (T,)."""
    n = len(products)
    of_groups = np.einsum("ijtu,t,u->ij", products, weights, weights)
    same = np.trace(of_groups) / n
    signal = (of_groups.sum() - n * same) / (n * (n - 1))
    return signal, same - signal


def measured(products, weights):
    signal, noise = signal_and_noise(products, weights)
    return signal / noise


def predicted(weights, s, noise):
    """Up to a factor, where a step's gradient is s in signal and noise in noise."""
    return (weights @ s) ** 2 / (weights**2 @ noise**2)


def with_error(statistic, products):
    """A statistic of the groups and its jackknife standard error."""
    n = len(products)
    without = [np.delete(np.delete(products, i, 0), i, 1) for i in range(n)]
    parts = np.array([statistic(part) for part in without])
    return statistic(products), np.sqrt((n - 1) * parts.var())


def main():
    args = guard.parse_args([*sys.argv[1:], "--updates_per_epoch", "1"])
    args.micro_batch = args.group_size
    found, trained = gradients(args)
    products = torch.einsum("itp,jup->ijtu", found, found).double().numpy()
    T = len(trained)
    s, b = (np.array([getattr(step, name) for step in trained]) for name in "sb")
    delta = [guard.reweighting(step, args.eta, args.sde, "guard") for step in trained]
    weights = {str(t): np.eye(T)[t] for t in range(T)}
    weights |= {"flow-grpo": abs(b) / s, "rationorm": abs(b), "guard": abs(b) * delta, "snr": s}
    noise = np.array([signal_and_noise(products, weights[str(t)])[1] for t in range(T)]) ** 0.5
    noise /= noise.mean()
    rows = []
    for name, w in weights.items():
        row = dict(run=f"{args.sde} on {args.model}, seed {args.seed}", groups=args.groups, weights=name)
        row["noise"] = float(noise[int(name)]) if name.isdigit() else ""
        for column, of_steps in (("predicted", np.ones(T)), ("with_noise", noise)):
            row[column] = float(predicted(w, s, of_steps) / predicted(s, s, of_steps))
        row["measured"], row["error"] = with_error(lambda part, w=w: measured(part, w), products)
        share = with_error(lambda part, w=w: measured(part, w) / measured(part, s), products)
        rows.append(row | dict(zip(("share", "share_error"), share, strict=True)))
    write(RESULTS / "snr.csv", rows)


if __name__ == "__main__":
    main()
