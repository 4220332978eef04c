"""Figure 11: at which denoising step does an over-optimized model break?

    python experiments/predictions.py          # seconds; needs the runs of experiments/run.py

Along the deterministic trajectory of held-out prompts every step gives a prediction of the final picture,
x0 = x - sigma v. Base model, Flow-GRPO and Guard draw the same prompts from the same noise. Writes
figures/fig11.png, every step's prediction of some prompts, and figures/samples.png, the last one of more.
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402
import rewards  # noqa: E402
from experiments.run import FIRST_SEED, RUNS  # noqa: E402

STEPS, PROMPTS, SHOWN, WIDTH = 10, 8, 3, 128
NAMES = ("base", f"flow-grpo-s{FIRST_SEED}", f"guard-s{FIRST_SEED}")


@torch.no_grad()
def predictions(name, held_out):
    """STEPS lists of pictures: every step's x0 of every prompt."""
    flags = []  # of the base: a fresh LoRA, which changes nothing
    if name != "base":
        flags = ["--init_lora", str(guard.checkpoints(guard.Args(run_dir=str(RUNS / name)))[-1])]
    with tempfile.TemporaryDirectory() as folder:
        args = guard.parse_args(["--model", "tiny-sd3", "--run_dir", folder, *flags])
        backbone = guard.load_backbone(args)
    steps = guard.schedule(backbone.sigmas(STEPS), 0.0, "flow")
    pictures = [[] for _ in steps]
    for i, (prompt, _) in enumerate(held_out):
        texts = [backbone.encode([prompt])[prompt]]
        x, _ = guard.sample(backbone, [], texts, [(FIRST_SEED, guard.EVALUATION, i, 0)])  # evaluation's noise
        for t, step in enumerate(steps):
            v = backbone.velocity(x, step.sigma, texts)
            pictures[t] += backbone.decode(x - step.sigma * v)
            x = step.a * x + step.b * v
    return pictures


def grid(name, top, rows):
    """A picture of pictures. top: what stands over the columns; rows: (what stands before it, pictures)."""
    height, left, above = WIDTH // 2, 150, 20
    sheet = Image.new("RGB", (left + len(top) * WIDTH, above + len(rows) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, text in enumerate(top):
        pen.text((left + column * WIDTH + 4, 2), text, "black", font)
    for row, (text, pictures) in enumerate(rows):
        pen.text((4, above + row * height + 14), text, "black", font)
        for column, picture in enumerate(pictures):
            picture = picture.resize((WIDTH - 2, height - 2), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + column * WIDTH, above + row * height))
    sheet.save(HERE / "figures" / f"{name}.png")


def main():
    held_out = rewards.read_set(rewards.PROMPTS / "cards")[1][:PROMPTS]
    table = {name: predictions(name, held_out) for name in NAMES}
    words = [prompt.replace("a ", "", 1).replace(" card that says", "") for prompt, _ in held_out]
    label = {name: name.removesuffix(f"-s{FIRST_SEED}") for name in NAMES}
    grid("samples", words, [(label[name], table[name][-1]) for name in NAMES])
    rows = [(f"{label[n]}\n{words[i]}", [x0[i] for x0 in table[n]]) for i in range(SHOWN) for n in NAMES]
    grid("fig11", [f"step {t}" for t in range(STEPS)], rows)


if __name__ == "__main__":
    main()
