"""Pictures of the base model, of Flow-GRPO and of Guard at about equal reward, and a second reader of them.

    pip install ddddocr==1.6.1                 # the second reader; its weights are in its wheel
    python experiments/predictions.py          # needs the frontier and main runs of experiments/run.py

Of every main run the checkpoint of the evaluation nearest to a gain of 0.2 draws the held-out prompts from
the evaluation's noise. Writes figures/samples.png, the first eight prompts, and readers.csv, the reward of
all of them as RapidOCR and ddddocr see it, on words that are in a training prompt and on words that are in
none. figures/fig11.png shows what every denoising step predicts of the final picture, x0 = x - sigma v, of
the runs of the frontier that end with the least gold.
"""

import io
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import guard  # noqa: E402
import rewards  # noqa: E402
from experiments.run import RESULTS, RUNS, SEEDS, write  # noqa: E402
from experiments.study import MAIN, NAMES, nearest, words_unseen  # noqa: E402
from experiments.tables import runs_of  # noqa: E402
from tiny import cards  # noqa: E402

STEPS, PROMPTS, SHOWN, WIDTH = 10, 8, 4, 128
SEED = SEEDS["main"][0]  # of the runs in the first figure
HACKED = {  # each method's with the least gold in the end
    "flow-grpo-lr0.002-clip0.0011": "Flow-GRPO\nlr 2e-3, clip 1.1e-3",
    "guard-lr0.002-clip0.00021": "Guard\nlr 2e-3, clip 2.1e-4"}


def checkpoint(label, seed):
    """Of the evaluation nearest to the gain at which runs are set side by side."""
    update, _ = nearest(runs_of(label)[seed])
    return RUNS / f"{label}-s{seed}" / f"checkpoint-{update:06d}"


def load(lora, seed):
    """(args, backbone) of the base model or with a LoRA."""
    flags = ["--init_lora", str(lora)] if lora else []
    with tempfile.TemporaryDirectory() as folder:
        flags = [*"--task ocr --model tiny-sd3 --seed".split(), str(seed), "--run_dir", folder, *flags]
        args = guard.parse_args(flags)
        return args, guard.load_backbone(args)


@torch.no_grad()
def predictions(lora, held_out, seed):
    """STEPS lists of pictures: every step's x0 of every prompt."""
    _, backbone = load(lora, seed)
    steps = guard.schedule(backbone.sigmas(STEPS), 0.0, "flow")
    pictures = [[] for _ in steps]
    for i, (prompt, _) in enumerate(held_out):
        texts = [backbone.encode([prompt])[prompt]]
        x, _ = guard.sample(backbone, [], texts, [(seed, guard.EVALUATION, i, 0)])  # evaluation's noise
        for t, step in enumerate(steps):
            v = backbone.velocity(x, step.sigma, texts)
            pictures[t] += backbone.decode(x - step.sigma * v)
            x = step.a * x + step.b * v
    return pictures


def second_reader():
    """A reward like that of `ocr`, by ddddocr."""
    from ddddocr import DdddOcr

    engine = DdddOcr(show_ad=False)

    def read(image):
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        return engine.classification(file.getvalue())

    def reward(images, prompts, metadata):
        texts = map(read, images)
        return [rewards.text_score(t, rewards.quoted_text(p)) for t, p in zip(texts, prompts, strict=True)]

    return reward


def read_twice(lora, seed):
    """Means of both readers over the held-out prompts of an evaluation, seen and unseen words apart."""
    args, backbone = load(lora, seed)
    held_out = rewards.read_set(args.prompts)[1][: args.eval_prompts]
    ode = guard.schedule(backbone.sigmas(args.eval_steps), 0.0, args.sde)
    scorers = guard.Scorers([], guard.DEVICE, backbone.patch)  # the readers come after
    slices, _, _ = guard.rollout(
        backbone, args, ode, held_out, 1, guard.EVALUATION, ["brightness"], scorers)
    images, prompts = [image for piece in slices for image in piece.images], [p for p, _ in held_out]
    row = {}
    for name, reader in (("rapidocr", rewards.load("ocr")), ("ddddocr", second_reader())):
        scores = {"seen": [], "unseen": []}
        for is_new, score in zip(words_unseen(), reader(images, prompts, None), strict=True):
            scores["unseen" if is_new else "seen"].append(score)
        row |= {f"{name}, {words}": f"{statistics.mean(found):.4f}" for words, found in scores.items()}
    return row


def grid(name, top, rows, left):
    """A picture of pictures. top: what stands over the columns; rows: (what stands before it, pictures)."""
    height, above = WIDTH // 2, 20
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


def hacked_by_step(held_out):
    """Figure 11."""
    (seed,) = SEEDS["frontier"]
    loras = {"base": None}
    for label, name in HACKED.items():
        run = guard.Args(run_dir=str(RUNS / f"{label}-s{seed}"))
        loras[name] = guard.checkpoints(run)[-1]
    table = {name: predictions(lora, held_out, seed) for name, lora in loras.items()}
    rows = [(name, [x0[i] for x0 in table[name]]) for i in range(SHOWN) for name in loras]
    grid("fig11", [f"step {t}" for t in range(STEPS)], rows, left=150)


def side_by_side(held_out):
    """What stands below the main README's figure."""
    loras = {"base": None} | {NAMES[label]: checkpoint(label, SEED) for label in MAIN}
    rows = [(name.replace(", ", "\n"), predictions(lora, held_out, SEED)[-1]) for name, lora in loras.items()]
    grid("samples", [caption(prompt) for prompt, _ in held_out], rows, left=80)


def two_readers():
    """readers.csv."""
    rows = []
    for label in ("base", *MAIN):
        for seed in runs_of(MAIN[0]):
            lora = None if label == "base" else checkpoint(label, seed)
            rows.append(dict(run=label, seed=seed) | read_twice(lora, seed))
    write(RESULTS / "readers.csv", rows)


def main():
    held_out = rewards.read_set(rewards.PROMPTS / "cards")[1][:PROMPTS]
    side_by_side(held_out)
    hacked_by_step(held_out)
    two_readers()


if __name__ == "__main__":
    main()
