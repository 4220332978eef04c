"""The ratios of single samples by an update's place in its epoch, and what a clip range does to an update.

    python experiments/ratio.py --method flow-grpo [flags of guard.py]

Trains as guard.py does, and keeps ratio - 1, the excess, of each sample of a live group and each trained
step, of epoch 2 and later. It adds to two files of results:

- ratio.csv, a row for each place, step and sign of A: the number of samples; 10 %, median and 90 % of the
  excess in clip ranges; the step's mean KL in nats; and its mean log-ratio in standard deviations, which is
  to be -sqrt(KL/2) with Flow-GRPO's ratio. The last two are of good and bad samples together.
- push.csv, of second updates, a row for each of several clip ranges: the share of the samples outside, and
  what those that PPO does not block push along the first update. That is the sum of delta A excess over them,
  divided by the sum of delta |A excess| over all.

The committed rows were recorded by an earlier version, at commit 90417fb. It took the KL from d, and the mean
log-ratio was that of Flow-GRPO's ratio, whatever the method.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guard
from experiments.run import RESULTS, write

EPOCHS_SKIPPED = 2
CLIPS = (2e-7, 5.4687e-7, 2e-6, 5.4687e-6, 2e-5, 1e9)  # at D = 65,536; two were 7e-5 and 7e-4 at D = 512


def kl_and_shift(log_ratio, D, s, method):
    """Of a step, from the log-ratios of its samples: see `guard.log_ratio`."""
    mean, deviation = log_ratio.mean(), log_ratio.std()
    if method in ("flow-grpo", "temp-reweight"):
        kl = -D * mean
    else:  # the deviation is sqrt(2 KL) / D, with RatioNorm s times that
        kl = (D * deviation / (1 if method == "mean-revised" else s)) ** 2 / 2
    return kl, mean / deviation if deviation else 0.0


def push(A, excess, delta, clip):
    """A (samples, 1), excess (samples, T), delta (T,), and the clip range at this D."""
    outside, terms = abs(excess) > clip, delta * A * excess
    blocked = outside & (terms > 0)
    along = terms[~blocked].sum() / abs(terms).sum()
    return dict(outside=float(outside.mean()), blocked=float(blocked.mean()), along=float(along))


def main(argv=None):
    args = guard.parse_args(argv)
    plain_update, calls = guard.update, []

    def update(backbone, learner, args, schedule, batches, A, group_ids):
        line, excess = plain_update(backbone, learner, args, schedule, batches, A, group_ids)
        live = A[group_ids].any(1)
        samples = A[group_ids][live].view(-1, 1).numpy(), excess[live].flatten(0, 1).numpy()
        calls.append((samples, [step for step in schedule if step.s > 0], line["clip"]))
        return line, excess

    with patch.object(guard, "update", update):
        guard.train(args)
    _, trained, clip = calls[0]
    scale = clip / args.clip  # 65,536 / D
    run = f"{args.method}, lr {args.lr:g}, {args.updates_per_epoch} updates an epoch, seed {args.seed}"
    rows = []
    for place in range(args.updates_per_epoch):
        found = calls[EPOCHS_SKIPPED * args.updates_per_epoch + place :: args.updates_per_epoch]
        A, excess = (np.concatenate([samples[i] for samples, *_ in found]) for i in (0, 1))
        for t, step in enumerate(trained):
            kl, shift = kl_and_shift(np.log1p(excess[:, t]), guard.PAPER_D / scale, step.s, args.method)
            for name, chosen in (("good", A[:, 0] > 0), ("bad", A[:, 0] < 0)):
                q10, median, q90 = np.quantile(excess[chosen, t] / clip, (0.1, 0.5, 0.9)).tolist()
                row = dict(run=run, place=place, step=t, samples=name, count=int(chosen.sum()), q10=q10)
                rows.append(row | dict(median=median, q90=q90, kl=float(kl), shift=float(shift)))
        if place == 1:
            delta = np.array([guard.reweighting(step, args.eta, args.sde, args.method) for step in trained])
            shares = [dict(run=run, clip=own) | push(A, excess, delta, own * scale) for own in CLIPS]
            write(RESULTS / "push.csv", shares)
    write(RESULTS / "ratio.csv", rows)


if __name__ == "__main__":
    main()
