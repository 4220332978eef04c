"""Figure 11: at which denoising step does an over-optimized model break?

    python experiments/predictions.py          # 2 minutes; needs the runs of experiments/run.py

Along the deterministic trajectory of held-out prompts every step gives a prediction of the final picture,
x0 = x - sigma v. Base model, Flow-GRPO and Guard draw the same prompts from the same noise; each prediction
is decoded and scored. Writes results/predictions.csv, figures/fig11.png and figures/samples.png.
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
from experiments.run import FIRST_SEED, RUNS, write  # noqa: E402

STEPS, COUNT, SHOWN, COLUMNS, WIDTH = 10, 64, 3, 8, 128


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


def draw(table, held_out):
    """samples.png: what each model draws of some prompts. fig11.png: every step's x0 of fewer."""
    words = [prompt.replace("a ", "", 1).replace(" card that says", "") for prompt, _ in held_out]
    label = {name: name.removesuffix(f"-s{FIRST_SEED}") for name in table}
    grid("samples", words[:COLUMNS], [(label[name], table[name][-1][:COLUMNS]) for name in table])
    rows = [
        (f"{label[name]}\n{words[i]}", [x0[i] for x0 in table[name]]) for i in range(SHOWN) for name in table
    ]
    grid("fig11", [f"step {t}" for t in range(STEPS)], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs", nargs="*", default=[f"{label}-s{FIRST_SEED}" for label in ("flow-grpo", "guard")]
    )
    names = ["base", *parser.parse_args().runs]
    held_out = rewards.read_set(rewards.CARD_PROMPTS)[1][:COUNT]
    table = {name: predictions(name, held_out, FIRST_SEED) for name in names}
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
