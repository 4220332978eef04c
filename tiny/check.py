"""Measure the embedded world: `python tiny/check.py` (minutes). Writes `world.png`, `sd3.png` and `flux.png`.

`python tiny/check.py world ocr detector pickscore sd3 flux` does some of it.
"""

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from rewards import load_ocr  # noqa: E402
from scorers import geneval  # noqa: E402
from tiny import cards, judges, make  # noqa: E402
from tiny import rewards as tiny_rewards  # noqa: E402

CONTRASTS = 0.3, 0.4, 0.55, 0.7, 0.85, 1.0


def rendered_words(contrast, count=256):
    """(images, prompts) of held-out words."""
    prompts, rng, images = cards.word_splits()[1][:count], random.Random(0), []
    for prompt in prompts:
        card, place = cards.parse(prompt), (rng.randint(-1, 1), rng.randint(-1, 1))
        picture = cards.draw_word(card.colour, card.pattern, card.word, *place, contrast)
        images.append(cards.as_image(picture))
    return images, prompts


def rendered_shapes(contrast, count=600):
    """(images, their shapes) of the 300 held-out cards with shapes, twice each, or the first so many."""
    rng, images, shapes = random.Random(0), [], []
    for prompt in (2 * cards.shape_splits()[1])[:count]:
        card = cards.parse(prompt)
        shapes.append([dataclasses.replace(one, contrast=contrast) for one in cards.place(card, rng)])
        images.append(cards.as_image(cards.draw_shapes(card.colour, card.pattern, shapes[-1])))
    return images, shapes


def read_exactly(images, shapes):
    """Share of the images whose counts, classes and colours the detector and CLIP read exactly."""
    settings = geneval.settings_of(tiny_rewards.JUDGES["detector"])
    detect = geneval.load_detector(tiny_rewards.JUDGES["detector"], settings)
    colours_of = geneval.load_colour_judge(tiny_rewards.JUDGES["clip"], settings)
    right = []
    for image, placed in zip(images, shapes, strict=True):
        found = {name: group for name, group in detect(image, settings.threshold).items() if group}
        kinds = [(name, colour) for name in found for colour in colours_of(image, name, found[name])]
        right.append(sorted(kinds) == sorted((one.shape, one.colour) for one in placed))
    return np.mean(right)


def check_world():
    rng, prompts = random.Random(0), cards.word_splits()[1][:24] + cards.shape_splits()[1][:24]
    pictures = [cards.draw_at_random(cards.parse(prompt), rng) for prompt in prompts]
    save_sheet([cards.as_image(picture) for picture in pictures], HERE / "world.png")


def check_ocr():
    ocr = load_ocr()
    for contrast in CONTRASTS:
        images, prompts = rendered_words(contrast)
        print(f"OCR, 256 rendered words at contrast {contrast}: {np.mean(ocr(images, prompts, [])):.3f}")


def check_detector():
    for contrast in CONTRASTS:
        share = read_exactly(*rendered_shapes(contrast))
        print(f"detector, 300 held-out cards, twice each, at contrast {contrast}: all right on {share:.3f}")


def correlation_within(one, other, members):
    """Of two scores, after the mean over each prompt's `members` pictures has been taken off."""
    one, other = (np.reshape(scores, (-1, members)) for scores in (one, other))
    one, other = (scores - scores.mean(1, keepdims=True) for scores in (one, other))
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


def check_pickscore(count=60, members=8):
    """Within a prompt, on a model's own pictures: does the judge go by what it was taught?"""
    judge = tiny_rewards.pickscore()
    for name in make.DRAWERS:
        pipe = make.pipeline(name)
        for kind, splits in (("words", cards.word_splits()), ("shapes", cards.shape_splits())):
            images = make.draw(pipe, splits[1][:count], seed=1, number=members)
            prompts = [prompt for prompt in splits[1][:count] for _ in range(members)]
            scores = judge(images, prompts, [])
            pairs = list(zip(images, prompts, strict=True))
            gold, liking = ([measure(*pair) for pair in pairs] for measure in (judges.gold, judges.liking))
            spread = np.reshape(scores, (count, members)).std(1).mean()
            print(
                f"pickscore on {name}'s {kind}, {members} pictures of {count} prompts, within a prompt: "
                f"deviation {spread:.4f}; correlation with gold + legibility "
                f"{correlation_within(scores, liking, members):.2f}, with gold alone "
                f"{correlation_within(scores, gold, members):.2f}"
            )


def check_pipeline(name, count=128):
    """What a base model draws for the held-out prompts of each task, scored by its rewards and by gold."""
    pipe, sheet = make.pipeline(name), []
    tasks = {
        "words": (cards.word_splits(), {"OCR": load_ocr}),
        "shapes": (
            cards.shape_splits(),
            {"GenEval": tiny_rewards.geneval, "GenEval, strict": tiny_rewards.geneval_strict},
        ),
        "both": (cards.mixed_splits(), {"pickscore": tiny_rewards.pickscore}),
    }
    for task, (splits, loaders) in tasks.items():
        prompts = splits[1][:count]
        metadata = [cards.metadata_of(cards.parse(prompt)) for prompt in prompts] if task == "shapes" else []
        images = make.draw(pipe, prompts, seed=0)
        scores = {reward: load()(images, prompts, metadata) for reward, load in loaders.items()}
        parts = [cards.fidelity(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        scores["gold"] = [np.mean(list(one.values())) for one in parts]
        scores |= {part: [one[part] for one in parts] for part in cards.PARTS}
        scores["legibility"] = [cards.legibility(*pair) for pair in zip(images, prompts, strict=True)]
        means = ", ".join(f"{what} {np.mean(values):.3f}" for what, values in scores.items())
        print(f"{name}, {task}, {count} held-out prompts: {means}")
        sheet += [] if task == "both" else images[:24]
    save_sheet(sheet, HERE / f"{name}.png")


def save_sheet(images, path, columns=6, scale=2):
    width, height = scale * cards.WIDTH + 4, scale * cards.HEIGHT + 4
    sheet = Image.new("RGB", (columns * width - 4, -(-len(images) // columns) * height - 4), "white")
    for i, image in enumerate(images):
        large = image.resize((scale * cards.WIDTH, scale * cards.HEIGHT), Image.Resampling.NEAREST)
        sheet.paste(large, (i % columns * width, i // columns * height))
    sheet.save(path)


def main():
    checks = dict(world=check_world, ocr=check_ocr, detector=check_detector, pickscore=check_pickscore)
    for name in sys.argv[1:] or [*checks, *make.DRAWERS]:
        if name in checks:
            checks[name]()
        else:
            check_pipeline(name)


if __name__ == "__main__":
    main()
