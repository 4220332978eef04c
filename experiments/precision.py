"""How many digits of the log-ratio are left, at SD3.5's latent size and for a small change of the policy.

    python experiments/precision.py                       # under a minute on a CPU; also --samples, --moved

The velocity of a step changes by 1e-4 (then 1e-2) of its size. Its log-ratio is computed in float64, and then

    kept          as here: guard.log_ratio on the velocities kept from sampling, in fp32
    difference    as a difference of log-probabilities, in fp32: guard.log_prob of the new less the old;
                  for guard s (log p_new - log p_old + mean(d²) / (2 s²)), which is Eq. 8 as it is written

once with the velocities as they are ("float32"), once rounded to fp16 or bf16 first, as a transformer of that
precision returns them. For every trained step of SD3.5's 10-step schedule (shift 3, eta 0.7):

    spread        root mean square of the log-ratio itself over the samples
    kept, ...     root mean square of the error, against float64 on velocities that were not rounded
    kept fp32     the same against float64 on the rounded velocities: what the fp32 arithmetic alone loses
    clip          the clip range, which says what errors matter

Prints the first, middle and last step as a table, and writes all of them to experiments/precision.csv.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402

SHAPE, STEPS, SHIFT, ETA = (16, 64, 64), 10, 3.0, 0.7  # SD3.5's at 512 pixels
CLIP = {"guard": 2e-6, "flow-grpo": 1e-4}
PRECISIONS = ("float32", "float16", "bfloat16")
HEADER = ("method", "velocity", "moved", "step", "sigma", "s", "spread",
          "kept", "difference", "kept fp32", "difference fp32", "clip")


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
    """The five numbers of a row. tensors: x, v_old, eps and the change of v, (B, *SHAPE) of float64 each."""
    x, v_old, eps, change = tensors
    v_new = v_old + moved * change
    rounded = [v.to(getattr(torch, precision)) for v in (v_new, v_old)]
    exact = guard.log_ratio(v_new, v_old, eps, step.b, step.s, method)
    exact_of_rounded = guard.log_ratio(*(v.double() for v in rounded), eps, step.b, step.s, method)
    new, old, x, eps = (tensor.float() for tensor in (*rounded, x, eps))
    results = (guard.log_ratio(new, old, eps, step.b, step.s, method),
               difference(x, new, old, eps, step, method))
    errors = [result.double() - truth for truth in (exact, exact_of_rounded) for result in results]
    return [values.square().mean().sqrt().item() for values in (exact, *errors)]


def main():
    parser = argparse.ArgumentParser(description="Errors of the log-ratio; see the head of this file.")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--moved", type=float, nargs="+", default=[1e-4, 1e-2], help="change of the velocity")
    own = parser.parse_args()
    torch.manual_seed(0)
    tensors = torch.randn(4, own.samples, *SHAPE, dtype=torch.float64)
    steps = trained_steps()
    with open(HERE / "precision.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(HEADER)
        print("| " + " | ".join(HEADER) + " |\n" + "|-" * len(HEADER) + "|")
        for moved in own.moved:
            for method, clip in CLIP.items():
                for precision in PRECISIONS:
                    for i, step in enumerate(steps):
                        numbers = measure(tensors, step, method, precision, moved)
                        row = [method, precision, f"{moved:g}", i, f"{step.sigma:.3f}", f"{step.s:.3f}"]
                        row += [*(f"{number:.1e}" for number in numbers), f"{clip:.0e}"]
                        table.writerow(row)
                        if i in (0, len(steps) // 2, len(steps) - 1):
                            print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
