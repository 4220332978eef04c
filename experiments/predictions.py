"""Figure 11: what a model before and after training predicts at every denoising step.

    python experiments/predictions.py          # seconds; needs the runs of experiments/run.py

Along the deterministic trajectory of held-out prompts every step gives a prediction of the final picture,
x0 = x - sigma v. Base model, Flow-GRPO and Guard draw the same prompts from the same noise. Writes
figures/fig11.png, every step's prediction of some prompts, and figures/samples.png, the last one of more. A
run that is not done has no pictures.
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
from experiments.run import BASELINE, GUARD, RESULTS, RUNS  # noqa: E402
from tiny import cards  # noqa: E402

STEPS, PROMPTS, SHOWN, WIDTH = 10, 8, 3, 128
NAMES = {"base": "base", BASELINE: "flow-grpo", GUARD: "guard"}  # a run -> what it is called in the figures
SEED = 0  # theirs


def last_checkpoint(name):
    """Of a run that is done; None if it is not, or if its folder is gone."""
    done = (RESULTS / name / "run.json").exists()
    return max(guard.checkpoints(guard.Args(run_dir=str(RUNS / name))), default=None) if done else None


@torch.no_grad()
def predictions(name, held_out):
    """STEPS lists of pictures: every step's x0 of every prompt."""
    flags = []  # of the base: a fresh LoRA, which changes nothing
    if name != "base":
        flags = ["--init_lora", str(last_checkpoint(name))]
    with tempfile.TemporaryDirectory() as folder:
        args = guard.parse_args(["--task", "ocr", "--model", "tiny-sd3", "--run_dir", folder, *flags])
        backbone = guard.load_backbone(args)
    steps = guard.schedule(backbone.sigmas(STEPS), 0.0, "flow")
    pictures = [[] for _ in steps]
    for i, (prompt, _) in enumerate(held_out):
        texts = [backbone.encode([prompt])[prompt]]
        x, _ = guard.sample(backbone, [], texts, [(SEED, guard.EVALUATION, i, 0)])  # evaluation's noise
        for t, step in enumerate(steps):
            v = backbone.velocity(x, step.sigma, texts)
            pictures[t] += backbone.decode(x - step.sigma * v)
            x = step.a * x + step.b * v
    return pictures


def grid(name, top, rows):
    """A picture of pictures. top: what stands over the columns; rows: (what stands before it, pictures)."""
    height, left, above = WIDTH // 2, 150, 20
    sheet = Image.new("RGB", (left + len(top) * WIDTH, above + len(rows) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, text in enumerate(top):
        pen.text((left + column * WIDTH + 4, 2), text, "black", font)
    for row, (text, pictures) in enumerate(rows):
        pen.text((4, above + row * height + 14), text, "black", font)
        for column, picture in enumerate(pictures):
            picture = picture.resize((WIDTH - 2, height - 2), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + column * WIDTH, above + row * height))
    sheet.save(HERE / "figures" / f"{name}.png")


def caption(prompt):
    """`a red card with stripes that says "CAT"` as `red stripes CAT`."""
    card = cards.parse(prompt)
    return f"{card.colour} {card.pattern} {card.word}"


def main():
    held_out = rewards.read_set(rewards.PROMPTS / "cards")[1][:PROMPTS]
    names = [name for name in NAMES if name == "base" or last_checkpoint(name)]
    table = {name: predictions(name, held_out) for name in names}
    captions = [caption(prompt) for prompt, _ in held_out]
    grid("samples", captions, [(NAMES[name], table[name][-1]) for name in names])
    rows = [(f"{NAMES[n]}\n{captions[i]}", [x0[i] for x0 in table[n]]) for i in range(SHOWN) for n in names]
    grid("fig11", [f"step {t}" for t in range(STEPS)], rows)


if __name__ == "__main__":
    main()
