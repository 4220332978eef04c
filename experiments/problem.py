"""Draw figures/problem.png: exact densities of the log ratio at SD3.5's size, if v moves alike at all steps.

    python experiments/problem.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guard

HERE = Path(__file__).resolve().parent
KL = 12  # of the last trained step, in nats


def draw():
    """A row a step. The range is shaded; at the sides stand the shares below and above it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    steps = guard.make_schedule(scheduler.sigmas.tolist(), 0.7, "flow")[:-1]
    b, s = (np.array([getattr(step, name) for step in steps]) for name in "bs")
    kl = KL * (b / s) ** 2 / (b[-1] / s[-1]) ** 2  # nats
    noise = np.sqrt(2 * kl) / guard.PAPER_D
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    panels = (("Flow-GRPO, clip 1e-4", 1e-4, -kl / guard.PAPER_D, noise, 5),
              ("GRPO-Guard, clip 2e-6", 2e-6, np.zeros(9), s * noise, 40))  # fmt: skip
    for axis, (title, clip, centre, deviation, widest) in zip(axes, panels, strict=True):
        axis.axvspan(-1, 1, color="0.85", lw=0)
        x = np.linspace(-widest, widest, 4001)
        for i, of_step in enumerate(norm(mean, std) for mean, std in zip(centre, deviation, strict=True)):
            density = of_step.pdf(x * clip) / of_step.pdf(of_step.mean())
            axis.fill_between(x, i, i + 0.85 * density, color=plt.cm.viridis(i / 9), lw=0)
            shares = ((-widest, "left", of_step.cdf(-clip)), (widest, "right", of_step.sf(clip)))
            for place, side, share in shares:
                axis.text(place, i + 0.1, f" {share:.0%} ", ha=side, fontsize=8)
        axis.set(title=title, xlim=(-widest, widest), xlabel="log ratio / clip range")
    axes[0].set(ylabel="denoising step, 1 is the noisiest", yticks=range(9), yticklabels=range(1, 10))
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "figures" / "problem.png", dpi=110)
