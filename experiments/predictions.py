"""Figure 11: at which denoising step does an over-optimized model break?

    python experiments/predictions.py          # 2 minutes; needs the runs of experiments/run.py

Along the deterministic trajectory of held-out prompts every step gives a prediction of the final picture,
x0 = x - sigma v. Base model, Flow-GRPO and Guard draw the same prompts from the same noise; each prediction
is decoded and scored. Writes experiments/results/predictions.csv and experiments/figures/fig11.png.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402
import rewards  # noqa: E402
from experiments.run import RUNS, write  # noqa: E402

STEPS, COUNT, SHOWN, WIDTH = 10, 64, 3, 128


def weights_of(name):
    """Flags that load a run's LoRA; for "base" a fresh one, which changes nothing."""
    if name == "base":
        return []
    last = guard.checkpoints(guard.Args(run_dir=str(RUNS / name)))[-1]
    return ["--init_lora", str(last)]


@torch.no_grad()
def predictions(name, held_out, seed):
    """STEPS lists of pictures: every step's x0 of every prompt."""
    with tempfile.TemporaryDirectory() as folder:
        args = guard.parse_args(["--model", "tiny-sd3", "--run_dir", folder, *weights_of(name)])
        backbone = guard.load_backbone(args)
    steps = guard.schedule(backbone.sigmas(STEPS), 0.0, "flow")
    pictures = [[] for _ in steps]
    for start in range(0, len(held_out), 16):
        index = range(len(held_out))[start : start + 16]
        prompts = [held_out[i][0] for i in index]
        text = [torch.cat(column) for column in zip(*backbone.encode(prompts), strict=True)]
        keys = [(seed, guard.EVALUATION, i, 0) for i in index]
        x = guard.sample(backbone, [], text, keys)[0]  # the noise of guard.py's evaluation
        for t, step in enumerate(steps):
            v = backbone.velocity(x, step.sigma, text)
            pictures[t] += backbone.decode(x - step.sigma * v)
            x = step.a * x + step.b * v
    return pictures


def draw(table, held_out):
    """A row of pictures per prompt and model, a column per step."""
    rows = [(i, name) for i in range(SHOWN) for name in table]
    height, left, top = WIDTH // 2, 150, 20
    sheet = Image.new("RGB", (left + STEPS * WIDTH, top + len(rows) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for t in range(STEPS):
        pen.text((left + t * WIDTH + 4, 2), f"step {t}", "black", font)
    for y, (i, name) in enumerate(rows):
        word = held_out[i][0].replace(" card that says", "")
        pen.text((4, top + y * height + 14), f"{name.removesuffix('-s10')}\n{word}", "black", font)
        for t in range(STEPS):
            picture = table[name][t][i].resize((WIDTH - 2, height - 2), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + t * WIDTH, top + y * height))
    sheet.save(HERE / "figures" / "fig11.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="*", default=["flow-grpo-s10", "guard-s10"])
    names = ["base", *parser.parse_args().runs]
    held_out = rewards.read_set(rewards.CARD_PROMPTS, quoted=True)[1][:COUNT]
    table = {name: predictions(name, held_out, seed=10) for name in names}
    scorers = {n: rewards.load(n) for n in ("ocr", "cards", *(f"cards-{p}" for p in rewards.CARD_PARTS))}
    rows = []
    for name in names:
        for t, pictures in enumerate(table[name]):
            row = dict(run=name, step=t)
            for label, scorer in scorers.items():
                row[label] = f"{sum(scorer(pictures, *zip(*held_out, strict=True))) / COUNT:.4f}"
            rows.append(row)
    write(HERE / "results" / "predictions.csv", rows)
    (HERE / "figures").mkdir(exist_ok=True)
    draw(table, held_out)


if __name__ == "__main__":
    main()
