"""How many digits of the log-ratio are left, at SD3.5's latent size and for a small change of the policy.

    python experiments/precision.py                       # 23 seconds on a CPU

The velocity of a step changes by 1e-4 (then 1e-2) of its size. Its log-ratio is computed in float64, and then

    kept          as here: guard.log_ratio on the velocities kept from sampling, in fp32
    difference    as a difference of log-probabilities, in fp32: guard.log_prob of the new less the old;
                  for guard s (log p_new - log p_old + mean(d²) / (2 s²)), which is Eq. 8 as it is written

once with the velocities as they are ("float32"), once rounded to fp16 or bf16 first, as a transformer of that
precision returns them. For every trained step of SD3.5's 10-step schedule (shift 3, eta 0.7) "spread" is the
root mean square of the log-ratio over the samples, and the others are that of the error: against float64 on
velocities that were not rounded; "... fp32" on the rounded ones, what the fp32 arithmetic alone loses.

Writes experiments/precision.csv and prints the table of the first, middle and last step.
"""

import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402
from experiments import tables  # noqa: E402
from experiments.run import write  # noqa: E402

SHAPE, STEPS, SHIFT, ETA = (16, 64, 64), 10, 3.0, 0.7  # SD3.5's at 512 pixels
SAMPLES = 32
MOVED = (1e-4, 1e-2)  # change of the velocity
CLIP = {"guard": 2e-6, "flow-grpo": 1e-4}
PRECISIONS = ("float32", "float16", "bfloat16")


def trained_steps():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(STEPS)
    return [step for step in guard.schedule(scheduler.sigmas.tolist(), ETA, "flow") if step.s > 0]


def difference(x, v_new, v_old, eps, step, method):
    """(B,) the log-ratio as a difference of log-probabilities."""
    mu_new, mu_old = (step.a * x + step.b * v for v in (v_new, v_old))
    x_next = mu_old + step.s * eps
    log_r = guard.log_prob(x_next, mu_new, step.s) - guard.log_prob(x_next, mu_old, step.s)
    if method == "flow-grpo":
        return log_r
    return step.s * (log_r + ((mu_new - mu_old) ** 2).flatten(1).mean(1) / (2 * step.s**2))


def measure(tensors, step, method, precision, moved):
    """The numbers of a row. tensors: x, v_old, eps and the change of v, (B, *SHAPE) of float64 each."""
    x, v_old, eps, change = tensors
    v_new = v_old + moved * change
    rounded = [v.to(getattr(torch, precision)) for v in (v_new, v_old)]
    exact = guard.log_ratio(v_new, v_old, eps, step.b, step.s, method)
    exact_of_rounded = guard.log_ratio(*(v.double() for v in rounded), eps, step.b, step.s, method)
    new, old, x, eps = (tensor.float() for tensor in (*rounded, x, eps))
    kept = guard.log_ratio(new, old, eps, step.b, step.s, method).double()
    differed = difference(x, new, old, eps, step, method).double()
    numbers = {"spread": exact, "kept": kept - exact, "difference": differed - exact,
               "kept fp32": kept - exact_of_rounded, "difference fp32": differed - exact_of_rounded}
    return {name: f"{values.square().mean().sqrt().item():.1e}" for name, values in numbers.items()}


def main():
    torch.manual_seed(0)
    tensors = torch.randn(4, SAMPLES, *SHAPE, dtype=torch.float64)
    rows = []
    for moved in MOVED:
        for method, clip in CLIP.items():
            for precision in PRECISIONS:
                for i, step in enumerate(trained_steps()):
                    where = dict(method=method, velocity=precision, moved=f"{moved:g}", step=i,
                                 sigma=f"{step.sigma:.3f}", s=f"{step.s:.3f}")
                    numbers = measure(tensors, step, method, precision, moved)
                    rows.append(where | numbers | dict(clip=f"{clip:.0e}"))
    write(HERE / "precision.csv", rows)
    print(tables.table_of_precision())


if __name__ == "__main__":
    main()
