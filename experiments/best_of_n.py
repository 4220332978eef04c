"""Best of n: what the base model reaches without training, by drawing n pictures and keeping the best.

    python experiments/best_of_n.py            # 10 minutes on one core

64 pictures of each of the first 128 held-out prompts of `--task ocr --model tiny-sd3`, by the ODE sampler.
Of n of them the one with the largest reward is kept, by chance among equals. The mean is exact over all
choices of n from the 64. KL = log n - (n - 1) / n (Gao et al., arXiv 2210.10760). Writes best_of_n.csv.
"""

import math
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402
import rewards  # noqa: E402
from experiments.run import RESULTS, write  # noqa: E402

PROMPTS, DRAWN, SEED = 128, 64, 21


def best_of(n, reward, gold):
    """Expected reward and gold of the best of n by reward. reward, gold: (N,) arrays of one prompt."""
    N, place = len(reward), np.argsort(reward)
    chance = np.array([math.comb(i, n - 1) for i in range(N)]) / math.comb(N, n)  # to be the best
    _, tied = np.unique(reward, return_inverse=True)
    gold = (np.bincount(tied, gold) / np.bincount(tied))[tied]  # equals have their mean
    return chance @ reward[place], chance @ gold[place]


def scores_of_base():
    """(prompts, pictures) of the reward and of gold."""
    with tempfile.TemporaryDirectory() as folder:
        args = guard.parse_args(f"--task ocr --model tiny-sd3 --seed {SEED} --run_dir {folder}".split())
        backbone = guard.load_backbone(args)
        names = [args.reward, "cards"]
        scorers = guard.Scorers(names, guard.DEVICE, backbone.patch)
        ode = guard.schedule(backbone.sigmas(args.eval_steps), 0.0, args.sde)
        prompts = rewards.read_set(args.prompts)[1][:PROMPTS]
        _, scores, _ = guard.rollout(backbone, args, ode, prompts, DRAWN, guard.EVALUATION, names, scorers)
    return scores.view(2, PROMPTS, DRAWN).numpy()


def main():
    reward, gold = scores_of_base()
    rows = []
    for n in 2 ** np.arange(7):
        each = np.array([best_of(int(n), *of_prompt) for of_prompt in zip(reward, gold, strict=True)])
        proxy, kept = each.mean(0)
        kl = math.log(n) - (n - 1) / n
        rows.append(dict(n=n, kl=f"{kl:.4f}", proxy=f"{proxy:.4f}", gold=f"{kept:.4f}"))
    write(RESULTS / "best_of_n.csv", rows)


if __name__ == "__main__":
    main()
