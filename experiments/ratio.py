"""The ratios of single samples by an update's place in its epoch.

    python experiments/ratio.py --method flow-grpo [flags of guard.py]    # adds to results/third/ratio.csv

Trains as guard.py does. Of epoch 2 and later it keeps, for each sample of a live group and each trained step,
rho / clip and the terms of Eq. 7. It writes a row for each place, step and sign of A: the number of samples;
10 %, median and 90 % of rho / clip; the mean KL of the step in nats; and the mean of the log-ratio of Eq. 7 in
standard deviations of its noise term, which should be -sqrt(KL/2).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guard
from run import RESULTS, write

EPOCHS_SKIPPED = 2


def main():
    args = guard.parse_args()
    lock = guard.claim_folder(args)  # noqa: F841
    plain_ratio, plain_update = guard.log_ratio, guard.update
    terms, found = [], {}  # of one update; (place, step) -> arrays (4, samples): A, rho / clip, noise term, KL
    epoch = -1

    def log_ratio(v_new, v_old, eps, b, s, method):
        of_step = plain_ratio(v_new, v_old, eps, b, s, method)
        d = (b * (v_new - v_old)).detach()
        kl = d.flatten(1).square().sum(1) / (2 * s**2)
        terms.append([of_step.detach().expm1() / args.clip, guard.mean(d * eps) / s, kl])
        return of_step

    def update(backbone, policy, args, schedule, slices, A, group_ids):
        nonlocal epoch
        terms.clear()
        line = plain_update(backbone, policy, args, schedule, slices, A, group_ids)
        place = group_ids[0] // len(group_ids)
        epoch += place == 0
        learning = [group for group in group_ids if A[group].any()]
        numbers = [piece.numbers for piece in slices if piece.numbers[0] // args.group_size in learning]
        T = len(terms) // max(len(numbers), 1)
        for i, of_step in enumerate(terms if epoch >= EPOCHS_SKIPPED else []):
            of_samples = np.stack([A.flatten()[numbers[i // T]], *(term.double().numpy() for term in of_step)])
            found.setdefault((place, i % T), []).append(of_samples)
        return line

    guard.log_ratio, guard.update = log_ratio, update
    guard.train(args)
    D = np.prod(guard.latent_shape(args))
    rows = []
    for (place, step), pieces in sorted(found.items()):
        A, rho, noise, kl = np.concatenate(pieces, 1)
        # The log-ratio of Eq. 7 is the noise term less KL / D. In the first update both are 0.
        shift = (noise - kl / D).mean() / noise.std() if place else 0.0
        for name, chosen in (("good", A > 0), ("bad", A < 0)):
            about = dict(run=f"{args.method}, seed {args.seed}", place=place, step=step, samples=name)
            q10, median, q90 = np.quantile(rho[chosen], (0.1, 0.5, 0.9))
            values = dict(q10=q10, median=median, q90=q90, kl=kl.mean(), shift=shift)
            rows.append(about | dict(count=int(chosen.sum())) | {k: float(x) for k, x in values.items()})
    write(RESULTS / "ratio.csv", rows)


if __name__ == "__main__":
    main()
