"""How coarsely a transformer rounds, beside Guard's clip range: a LoRA that moves by nothing to speak of.

    python experiments/rounding.py --model big/flux --height 128 --width 128 --dtype bfloat16

Draws lora_B so that the LoRA moves the velocity by 1 %, multiplies it by 1 + 1e-7, and prints the root mean
square of the excess by which that moves the ratio, of 2 samples, at each trained step: in clip ranges at
this size, and at 512 x 512. There it is sqrt(65,536 / D) times as large, since the rounding of one number
knows nothing of the next one's and the clip range goes as 1 / D. Without rounding it would be 1e-9 or so.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guard


@torch.no_grad()
def main():
    args = guard.parse_args()
    backbone = guard.load_backbone(args)
    D = math.prod(backbone.shape)
    lora_b = [weight for name, weight in backbone.transformer.named_parameters() if "lora_B" in name]
    generator = torch.Generator().manual_seed(args.seed)
    x, eps = torch.randn(2, 2, *backbone.shape, generator=generator).to(guard.DEVICE)
    embeddings = [part.repeat_interleave(2, 0) for part in backbone.empty]
    schedule = guard.make_schedule(backbone.sigmas(args.steps), args.eta, args.sde)[:-1]
    v_base = backbone.velocity(x, schedule[0].sigma, embeddings)
    for weight in lora_b:
        weight.normal_(std=1e-3)
    moved = (backbone.velocity(x, schedule[0].sigma, embeddings) - v_base).norm() / v_base.norm()
    for weight in lora_b:
        weight.mul_(0.01 / moved)
    ranges = []
    for step in schedule:
        v_old = backbone.velocity(x, step.sigma, embeddings)
        for weight in lora_b:
            weight.mul_(1 + 1e-7)
        v_new = backbone.velocity(x, step.sigma, embeddings)
        excess = torch.expm1(guard.log_ratio(v_new, v_old, eps, step.b, step.s, args.method))
        ranges.append(excess.square().mean().sqrt().item() / (args.clip * guard.PAPER_D / D))
    for name, scale in (("this size", 1), ("512 x 512", math.sqrt(guard.PAPER_D / D))):
        print(f"{args.model}, {args.dtype}, {name}:", *(f"{scale * value:.2g}" for value in ranges))


if __name__ == "__main__":
    main()
