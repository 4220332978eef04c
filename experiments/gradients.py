"""Figure 3: the gradient of an on-policy update, one denoising step at a time.

    python experiments/gradients.py            # 10 minutes on one core; also --seeds

The first epoch of `--task ocr --model tiny-sd3`, for three seeds and the samplers of Flow-GRPO and DanceGRPO:
sample, score, then one backward pass per step and method through guard.py's own slice_loss, over all of the
epoch's groups. rho is 0 there, so nothing is clipped, and the methods differ by a factor per step alone. So
the weight that others print for DanceGRPO, (1 + eta²/2) / dt, is a factor too. Writes gradients.csv.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402
import rewards  # noqa: E402
from experiments.run import RESULTS, SEEDS, write  # noqa: E402
from experiments.study import PRINTED  # noqa: E402

METHODS = ("flow-grpo", "rationorm", "guard")


def gradient_norms(seed, sde, folder):
    """Rows of (sde, seed, method, step, norm of the LoRA's gradient)."""
    flags = f"--task ocr --model tiny-sd3 --gold none --sde {sde} --seed {seed} --run_dir {folder}"
    args = guard.parse_args(flags.split())
    backbone = guard.load_backbone(args)
    policy = guard.Policy(backbone, args)
    prompts, _ = rewards.read_set(args.prompts)
    chosen = [prompts[i] for i in guard.prompt_order(args, 0, len(prompts))]
    steps = guard.schedule(backbone.sigmas(args.steps), args.eta, args.sde)
    scorers = guard.Scorers([args.reward], guard.DEVICE, backbone.patch)
    slices, scores, _ = guard.rollout(
        backbone, args, steps, chosen, args.group_size, 0, [args.reward], scorers)
    advantage = guard.advantages(scores.view(args.groups, args.group_size)).flatten().float()
    for args.method in METHODS:
        for t, step in enumerate(steps[:-1]):
            for piece in slices:
                A = advantage[piece.numbers].to(guard.DEVICE)
                loss, rho, _ = guard.slice_loss(backbone, args, step, t, piece, A)
                assert rho.abs().max() <= (args.clip / 10 if guard.ON_GPU else 0)  # the weights are unchanged
                loss.sum().backward()
            gradient = torch.nn.utils.parameters_to_vector(p.grad for p in policy.params)
            norm = gradient.norm().item() / advantage.numel()
            row = dict(sde=sde, seed=seed, method=args.method, step=t)
            yield row | dict(grad_norm=f"{norm:.6e}")
            if (sde, args.method) == ("dance", "rationorm"):
                norm *= (1 + args.eta**2 / 2) / step.dt
                yield row | dict(method=PRINTED, grad_norm=f"{norm:.6e}")
            policy.optimizer.zero_grad(set_to_none=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS["cost"])
    own = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for sde in ("flow", "dance"):
            for seed in own.seeds:
                rows += gradient_norms(seed, sde, folder)
    write(RESULTS / "gradients.csv", rows)


if __name__ == "__main__":
    main()
