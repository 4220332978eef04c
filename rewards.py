"""Prompt sets and rewards: all that guard.py knows about a task.

A reward is a function `reward(images, prompts, metadata) -> list of float`, one finite number per image,
larger is better:

- images: list of N RGB PIL images
- prompts: list of N strings
- metadata: list of N dicts, each prompt's own line of a `.jsonl` set (empty for prompts from a text file)

It raises where it cannot score: a failure is never a zero. `REWARDS`, at the end, maps a name to a loader, a
function without arguments that builds the reward and only then imports what it needs. One more reward is one
more entry:

    def load_brightness():
        def reward(images, prompts, metadata):
            return [float(np.asarray(image.convert("L")).mean()) / 255 for image in images]
        return reward
"""

import json
import math
import os
import re
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rapidfuzz.distance import Levenshtein


class BadInput(ValueError):
    """Something the user can mend. guard.py prints it as one line and exits with code 2."""


class RewardError(RuntimeError):
    """A reward did not return what it must. The run stops; its last checkpoint stays."""


# ------------------------------------------------------------------------------------------------------------
# Prompt sets


def prompt_files(path):
    """(training file, evaluation file) of a prompt set, both the same one if only one was given.

    path: a file, or a folder in Flow-GRPO's layout, which holds `train.txt` and `test.txt` or
    `train_metadata.jsonl` and `test_metadata.jsonl`. Raises BadInput if there is no such thing.
    """
    path = Path(path)
    if path.is_file():
        return path, path
    for names in (("train.txt", "test.txt"), ("train_metadata.jsonl", "test_metadata.jsonl")):
        pair = tuple(path / name for name in names)
        if all(file.is_file() for file in pair):
            return pair
    what = "a folder without them" if path.is_dir() else "not there"
    raise BadInput(
        f"--prompts {path}: expected a file, or a folder with train.txt and test.txt, or with "
        f"train_metadata.jsonl and test_metadata.jsonl; it is {what}"
    )


def read_prompts(file, quoted):
    """List of (prompt, metadata). Blank lines are skipped; in a text file every metadata is `{}`.

    quoted: whether every prompt must have exactly one non-empty text in double quotes, as the OCR task needs.
    Raises BadInput, with file and line number, for anything that cannot be used.
    """
    file = Path(file)
    try:
        lines = file.read_bytes().decode("utf-8-sig").replace("\r", "").split("\n")
    except OSError as error:
        raise BadInput(
            f"{file}: cannot be read ({error.strerror}); expected a text file of prompts"
        ) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: byte {error.start} is not UTF-8; save the prompts as UTF-8 text") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        about = parse_metadata(line, f"{file}, line {number}") if file.suffix == ".jsonl" else {}
        prompt = about.get("prompt", line).strip()
        if quoted and quoted_text(prompt) is None:
            raise BadInput(
                f"{file}, line {number}: expected exactly one text in double quotes, like a sign that says "
                f'"OPEN"; got {prompt[:80]!r}'
            )
        prompts.append((prompt, about))
    if not prompts:
        raise BadInput(f"{file}: holds no prompt; expected one per line")
    return prompts


def parse_metadata(line, where):
    try:
        about = json.loads(line)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("prompt"), str) or not about["prompt"].strip():
        raise BadInput(f'{where}: expected a JSON object with a non-empty "prompt"; got {line[:80]!r}')
    return about


def quoted_text(prompt):
    """The text between the prompt's two double quotes; None if there are not two, or if it is blank."""
    parts = prompt.split('"')
    return parts[1] if len(parts) == 3 and parts[1].strip() else None


# ------------------------------------------------------------------------------------------------------------
# OCR

CARD_PARTS = ("colour", "frame", "gradient", "glyph")
CARD_HEIGHT = 64  # pixels; pictures lower than this are one line of text and need no text detection


def text_score(found, target):
    """1 if the target is contained in what was read, else 1 - min(edit distance, len) / len, in [0, 1].

    Case and spaces do not count. This is Flow-GRPO's OCR reward.
    """
    found, target = (re.sub(r"\s", "", text).lower() for text in (found, target))
    if target in found:
        return 1.0
    return 1 - min(Levenshtein.distance(found, target), len(target)) / len(target)


def load_ocr():
    """How well the text in double quotes can be read, by RapidOCR. One engine a thread, one thread a core."""
    import logging

    from rapidocr import RapidOCR

    local = threading.local()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // processes)), thread_name_prefix="ocr")
    load = threading.Lock()

    def engine(is_card):
        """Recognition pads to a width: 96 holds a card, in a third of the time that the usual 320 takes."""
        engines = local.__dict__.setdefault("engines", {})
        if is_card not in engines:
            params = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
            if is_card:
                params["Rec.rec_img_shape"] = [3, 48, 96]
            with load:
                engines[is_card] = RapidOCR(params=params)
                logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        return engines[is_card]

    def read(image):
        is_card = image.height < CARD_HEIGHT
        pixels = np.asarray(image.convert("RGB"))[:, :, ::-1]  # the engine takes BGR
        # All three switches at every call: the engine keeps those of its last one.
        result = engine(is_card)(
            np.ascontiguousarray(pixels), use_det=not is_card, use_cls=False, use_rec=True
        )
        return "".join(result.txts or ())

    def reward(images, prompts, metadata):
        targets = [quoted_text(prompt) for prompt in prompts]
        if None in targets:
            raise RewardError(f"ocr: no text in double quotes in {prompts[targets.index(None)]!r}")
        return [text_score(*pair) for pair in zip(pool.map(read, images), targets, strict=True)]

    return reward


def load_cards(part=None):
    """The exact gold score of the tiny models' cards, or one part of it: see `fidelity` in tiny/cards.py."""
    from tiny import cards

    def reward(images, prompts, metadata):
        scores = [cards.fidelity(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [score[part] if part else sum(score.values()) / len(score) for score in scores]

    return reward


# ------------------------------------------------------------------------------------------------------------
# By name

REWARDS = {
    "ocr": load_ocr,
    "cards": load_cards,
    "cards-colour": lambda: load_cards("colour"),
    "cards-frame": lambda: load_cards("frame"),
    "cards-gradient": lambda: load_cards("gradient"),
    "cards-glyph": lambda: load_cards("glyph"),
}


PROMPTS = Path(__file__).resolve().parent / "prompts"
CARD_PROMPTS = str(PROMPTS / "cards")  # of the tiny models
TASKS = {"ocr": dict(prompts=str(PROMPTS / "ocr"), reward="ocr", gold=[])}


def load(name):
    """The reward of that name; it returns one finite float per image, or raises RewardError."""
    reward = REWARDS[name]()

    def checked(images, prompts, metadata):
        scores = [float(score) for score in reward(images, prompts, metadata)]
        if len(scores) != len(images):
            raise RewardError(f"reward {name!r} returned {len(scores)} scores for {len(images)} images")
        for score, prompt in zip(scores, prompts, strict=True):
            if not math.isfinite(score):
                raise RewardError(f"reward {name!r} returned {score} for an image of {prompt!r}")
        return scores

    return checked


# ------------------------------------------------------------------------------------------------------------
# To look at


def sheet(images, prompts, scores, width=256):
    """One picture of many, under each its prompt and score."""
    cells = []
    for image, prompt, score in zip(images, prompts, scores, strict=True):
        image = image.resize((width, width * image.height // image.width), Image.Resampling.LANCZOS)
        cells.append(ImageOps.expand(image, (0, 0, 0, 48), "white"))
        text = "\n".join(textwrap.wrap(f"{prompt}  {score:.2f}", 42)[:3])
        ImageDraw.Draw(cells[-1]).text((4, image.height + 2), text, "black", ImageFont.load_default(12))
    columns = math.gcd(len(cells), 4)
    from diffusers.utils import make_image_grid

    return make_image_grid(cells, len(cells) // columns, columns)
