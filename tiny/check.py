"""Measure the embedded world: `python tiny/check.py` (minutes). Writes `world.png`, `sd3.png` and `flux.png`.

`python tiny/check.py detector ocr pickscore sd3 flux world` does some of it.
"""

import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import rewards  # noqa: E402
from scorers import geneval  # noqa: E402
from tiny import cards, judges, make  # noqa: E402


def mean(numbers):
    return float(np.mean(numbers))


def rendered(prompts, seed):
    rng = random.Random(seed)
    return [cards.draw_at_random(cards.parse(prompt), rng) for prompt in prompts]


def read_cards(pictures, shapes):
    """Share of the pictures whose counts and classes, and colours too, the detector and CLIP read exactly."""
    judge = rewards.TINY_GENEVAL
    settings = geneval.settings_of(judge["detector"])
    detect = geneval.load_detector(judge["detector"], settings)
    colours_of = geneval.load_colour_judge(judge["clip"], settings)
    counted, coloured = [], []
    for picture, placed in zip(pictures, shapes, strict=True):
        image = cards.as_image(picture)
        found = detect(image, settings.threshold)
        names = [name for name, group in found.items() for _ in group]
        full = {name: group for name, group in found.items() if group}
        kinds = [(name, colour) for name in full for colour in colours_of(image, name, full[name])]
        counted.append(sorted(names) == sorted(one.shape for one in placed))
        coloured.append(sorted(kinds) == sorted((one.shape, one.colour) for one in placed))
    return mean(counted), mean(coloured)


def rendered_shapes(radius=0):
    """(pictures, their shapes) of the 300 held-out cards with shapes, twice each; radius: of a blur."""
    rng, pictures, shapes = random.Random(0), [], []
    for prompt in 2 * cards.shape_splits()[1]:
        card = cards.parse(prompt)
        shapes.append(cards.place(card, rng))
        pictures.append(cards.draw_shapes(card.colour, card.pattern, shapes[-1]))
    if radius:
        pictures = [judges.blurred(picture, radius) for picture in pictures]
    return pictures, shapes


def check_detector():
    for name, radius in (("as rendered", 0), ("blurred by a pixel", 1)):
        counted, coloured = read_cards(*rendered_shapes(radius))
        print(
            f"detector, 300 held-out cards, each drawn twice, {name}: "
            f"class and count {counted:.3f}, colour too {coloured:.3f}"
        )


def check_ocr():
    ocr = rewards.load("ocr")
    prompts, rng = cards.word_splits()[1][:256], random.Random(0)
    for contrast in (0.3, 0.4, 0.55, 0.7, 0.85, 1.0):
        images = []
        for prompt in prompts:
            card, place = cards.parse(prompt), (rng.randint(-1, 1), rng.randint(-1, 1))
            images.append(
                cards.as_image(cards.draw_word(card.colour, card.pattern, card.word, *place, contrast))
            )
        print(f"OCR, 256 rendered words at contrast {contrast}: {mean(ocr(images, prompts, [{}] * 256)):.3f}")


def check_pickscore(count=400):
    """Agreement with gold on pairs that differ by more than a tenth: rendered, and drawn by sd3."""
    score = rewards.load("tiny-pickscore")
    rng = random.Random("unseen")
    cases = {"rendered": [], "by sd3": []}
    held_out = cards.mixed_splits()[1]
    for _ in range(count):
        prompt = rng.choice(held_out)
        cases["rendered"].append((prompt, [judges.attempt(cards.parse(prompt), rng) for _ in range(2)]))
    pipe = make.pipeline("sd3")
    for start in range(0, 256, 64):
        some = held_out[start : start + 64]
        images = make.draw(pipe, some, seed=start, number=2)
        cases["by sd3"] += [(prompt, images[2 * i : 2 * i + 2]) for i, prompt in enumerate(some)]
    for name, pairs in cases.items():
        prompts = [prompt for prompt, _ in pairs for _ in range(2)]
        images = [image for _, two in pairs for image in two]
        gold = np.array([judges.gold(image, prompt) for image, prompt in zip(images, prompts, strict=True)])
        scores = np.array(score(images, prompts, [{}] * len(images)))
        overall = np.std(scores)
        gold, scores = np.diff(gold.reshape(-1, 2)).ravel(), np.diff(scores.reshape(-1, 2)).ravel()
        clear = np.abs(gold) > 0.1
        agree = ((gold > 0) == (scores > 0))[clear]
        print(f"pickscore, unseen pairs {name}: agrees on {mean(agree):.3f} of {clear.sum()} clear ones")
        within = np.sqrt(np.mean(scores**2) / 2)  # half of the squared difference is the variance of two
        print(f"    deviation of the scores: {overall:.4f}, within a prompt {within:.4f}")


def check_pipeline(name, count=128):
    pipe, sheet = make.pipeline(name), []
    sets = {"ocr": "cards", "tiny-geneval": "cards-geneval", "tiny-pickscore": "cards-pickscore"}
    for reward, folder in sets.items():
        pairs = rewards.read_set(rewards.PROMPTS / folder)[1][:count]
        prompts, metadata = [prompt for prompt, _ in pairs], [about for _, about in pairs]
        images = make.draw(pipe, prompts, seed=0)
        gold = [cards.fidelity(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        parts = ", ".join(f"{part} {mean([one[part] for one in gold]):.3f}" for part in cards.PARTS)
        names = [reward, "tiny-geneval-strict"] if reward == "tiny-geneval" else [reward]
        for each in names:
            scores = rewards.load(each)(images, prompts, metadata)
            print(f"{name}, {count} held-out prompts: {each} {mean(scores):.3f} ± {np.std(scores):.3f}")
        print(f"    gold {mean([mean(list(one.values())) for one in gold]):.3f}: {parts}")
        sheet += [] if reward == "tiny-pickscore" else images[:24]
    save_sheet(sheet, HERE / f"{name}.png")


def save_sheet(images, path, columns=6, scale=2):
    width, height = scale * cards.WIDTH + 4, scale * cards.HEIGHT + 4
    sheet = Image.new("RGB", (columns * width - 4, -(-len(images) // columns) * height - 4), "white")
    for i, image in enumerate(images):
        large = image.resize((scale * cards.WIDTH, scale * cards.HEIGHT), Image.Resampling.NEAREST)
        sheet.paste(large, (i % columns * width, i // columns * height))
    sheet.save(path)


def check_world():
    prompts = cards.word_splits()[1][:24] + cards.shape_splits()[1][:24]
    save_sheet([cards.as_image(picture) for picture in rendered(prompts, 0)], HERE / "world.png")


def main():
    checks = dict(world=check_world, ocr=check_ocr, detector=check_detector, pickscore=check_pickscore)
    for name in sys.argv[1:] or [*checks, "sd3", "flux"]:
        if name in checks:
            checks[name]()
        else:
            check_pipeline(name)


if __name__ == "__main__":
    main()
