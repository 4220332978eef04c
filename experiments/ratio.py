"""The ratios of single samples by an update's place in its epoch, and what a clip range does to an update.

    python experiments/ratio.py --method flow-grpo [flags of guard.py]

Trains as guard.py does, and keeps rho of each sample of a live group and each trained step, of epoch 2 and
later. It adds to two files of results:

- ratio.csv, a row for each place, step and sign of A: the number of samples; 10 %, median and 90 % of
  rho / clip; the mean KL of the step in nats; and the mean log-ratio of Eq. 7 in standard deviations of its
  noise term, which should be -sqrt(KL/2).
- push.csv, of second updates, a row for each of several clip ranges: the share of the samples outside, and
  what those that PPO does not block push along the first update. That is the sum of delta A rho over them,
  divided by the sum of delta |A rho| over all.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guard
from experiments.run import RESULTS, write

EPOCHS_SKIPPED = 2
CLIPS = (2.56e-5, 7e-5, 2.56e-4, 7e-4, 2.56e-3, 1e9)


def main():
    args = guard.parse_args()
    guard.claim_folder(args)
    plain_ratio, plain_update = guard.log_ratio, guard.update
    terms, found = [], {}  # of an update; (place, step) -> arrays (5, samples): A, rho, noise, KL, delta
    epoch = -1

    def log_ratio(v_new, v_old, eps, b, s, method):
        of_step = plain_ratio(v_new, v_old, eps, b, s, method)
        d = (b * (v_new - v_old)).detach()
        kl = d.flatten(1).square().sum(1) / (2 * s**2)
        terms.append([of_step.detach().expm1(), guard.mean(d * eps) / s, kl])
        return of_step

    def update(backbone, policy, args, schedule, slices, A, group_ids):
        nonlocal epoch
        terms.clear()
        line = plain_update(backbone, policy, args, schedule, slices, A, group_ids)
        place = group_ids[0] // len(group_ids)
        epoch += place == 0
        learning = [group for group in group_ids if A[group].any()]
        numbers = [piece.numbers for piece in slices if piece.numbers[0] // args.group_size in learning]
        trained = [step for step in schedule if step.s > 0]
        for i, of_step in enumerate(terms if epoch >= EPOCHS_SKIPPED else []):
            piece, t = divmod(i, len(trained))
            delta = guard.reweighting(trained[t], args.eta, args.sde, args.method)
            advantage = A.flatten()[numbers[piece]]
            of_samples = [advantage, *of_step, torch.full_like(advantage, delta)]
            found.setdefault((place, t), []).append(torch.stack(of_samples).double().numpy())
        return line

    guard.log_ratio, guard.update = log_ratio, update
    guard.train(args)
    D = np.prod(guard.latent_shape(args))
    run = f"{args.method}, lr {args.lr:g}, {args.updates_per_epoch} updates an epoch, seed {args.seed}"
    rows = []
    for (place, step), pieces in sorted(found.items()):
        A, rho, noise, kl, _ = np.concatenate(pieces, 1)
        # The log-ratio of Eq. 7 is the noise term less KL / D. In the first update both are 0.
        shift = (noise - kl / D).mean() / noise.std() if place else 0.0
        for name, chosen in (("good", A > 0), ("bad", A < 0)):
            about = dict(run=run, place=place, step=step, samples=name)
            q10, median, q90 = np.quantile(rho[chosen] / args.clip, (0.1, 0.5, 0.9))
            values = dict(q10=q10, median=median, q90=q90, kl=kl.mean(), shift=shift)
            rows.append(about | dict(count=int(chosen.sum())) | {k: float(x) for k, x in values.items()})
    write(RESULTS / "ratio.csv", rows)
    second = np.concatenate([x for (place, _), pieces in found.items() if place == 1 for x in pieces], 1)
    write(RESULTS / "push.csv", [dict(run=run) | push(second, clip) for clip in CLIPS])


def push(samples, clip):
    A, rho, _, _, delta = samples
    outside = abs(rho) > clip
    terms = delta * A * rho
    blocked = outside & (terms > 0)
    along = terms[~blocked].sum() / abs(terms).sum()
    return dict(clip=clip, outside=float(outside.mean()), blocked=float(blocked.mean()), along=float(along))


if __name__ == "__main__":
    main()
