"""Prompt sets and rewards: all that guard.py knows about a task.

A reward is a function `reward(images, prompts, metadata) -> list of float`, one finite number per image,
larger is better:

- images: list of N RGB PIL images
- prompts: list of N strings
- metadata: list of N dicts, each prompt's own line of a `.jsonl` set (empty for prompts from a text file)

It raises where it cannot score: a failure is never a zero. A loader is a function without arguments that
builds a reward, and only then imports what it needs. `REWARDS` at the end names some loaders. Any other is
named `module:function`, so a reward of your own needs no edit of this file:

    # mine.py, beside guard.py; then --reward mine:load_brightness
    import numpy as np

    def load_brightness():
        def reward(images, prompts, metadata):
            return [np.asarray(image.convert("L")).mean() / 255 for image in images]
        return reward

If it needs something of its prompts, give the loader an attribute `check`, a function of a prompt and its
metadata that raises ValueError. Then a prompt that cannot be scored is refused before any model is loaded.
Where GRPO_GUARD_<NAME>_URL is set, the reward of that name is read from there: see scorers/README.md.
"""

import functools
import importlib
import json
import math
import os
import re
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein
from safetensors import SafetensorError

HERE = Path(__file__).resolve().parent


class BadInput(ValueError):
    """Something the user can mend. guard.py prints it as one line and exits with code 2."""


class RewardError(RuntimeError):
    """A reward did not return what it must. The run stops; its last checkpoint stays."""


# ------------------------------------------------------------------------------------------------------------
# Prompt sets


def prompt_files(path):
    """(training file, evaluation file) of a prompt set, both the same one if it is a file.

    path: a file, or a folder in Flow-GRPO's layout, which holds `train.txt` and `test.txt` or
    `train_metadata.jsonl` and `test_metadata.jsonl`. It is looked for here, then beside this file. Raises
    BadInput if there is no such thing.
    """
    for place in (Path(path), HERE / path):
        if place.is_file():
            return place, place
        for ending in (".txt", "_metadata.jsonl"):
            train, test = place / f"train{ending}", place / f"test{ending}"
            if train.is_file() and test.is_file():
                return train, test
    wanted = "a file, or a folder with train.txt and test.txt, or both as _metadata.jsonl"
    raise BadInput(f"--prompts {path}: expected {wanted}")


def read_prompts(file, reward_names=()):
    """List of (prompt, metadata) of a file, .txt or .jsonl. Blank lines are skipped.

    reward_names: of the rewards that will score pictures of these prompts. Raises BadInput, with file and
    line number, for a line that cannot be used or that one of these rewards cannot score.
    """
    suffix = file.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise BadInput(f"{file}: expected .txt, a prompt a line, or .jsonl, an object with a prompt a line")
    checks = [loader.check for loader in map(find_loader, reward_names) if hasattr(loader, "check")]
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: expected UTF-8 text ({error})") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            metadata = read_metadata(line) if suffix == ".jsonl" else {}
            prompt = metadata.get("prompt", line).strip()
            for check in checks:
                check(prompt, metadata)
        except ValueError as error:
            raise BadInput(f"{file}, line {number}: {error}") from None
        prompts.append((prompt, metadata))
    if not prompts:
        raise BadInput(f"{file}: holds no prompt; expected one per line")
    return prompts


def read_metadata(line):
    """The JSON object of a line of a `.jsonl` set. Raises ValueError unless it has a prompt."""
    try:
        metadata = json.loads(line)
    except (ValueError, RecursionError):
        metadata = None
    prompt = metadata.get("prompt") if isinstance(metadata, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'expected a JSON object with a non-empty "prompt"; got {line[:80]!r}')
    return metadata


# ------------------------------------------------------------------------------------------------------------
# OCR: is the text there that the prompt asks for?

ONE_FORM = str.maketrans("‘’‛`´“”„‐‑‒–—−", "'''''\"\"\"------")  # of quotes and of dashes


def quoted_text(prompt):
    """The text between the prompt's two double quotes. Raises ValueError unless there are two with a text."""
    parts = prompt.split('"')
    if len(parts) != 3 or not comparable(parts[1]):
        raise ValueError(f'expected exactly one text in double quotes, like "OPEN"; got {prompt[:80]!r}')
    return parts[1]


def comparable(text):
    """The text with composed accents, one form of quotes and dashes, in lower case, without spaces."""
    return re.sub(r"\s", "", unicodedata.normalize("NFC", text).translate(ONE_FORM)).lower()


def text_score(found, target):
    """1 if the target is contained in what was read, else 1 - min(edit distance, len) / len, in [0, 1].

    This is Flow-GRPO's OCR reward, on `comparable` texts.
    """
    found, target = comparable(found), comparable(target)
    if target in found:
        return 1.0
    return 1 - min(Levenshtein.distance(found, target), len(target)) / len(target)


def load_ocr():
    """How well the text in double quotes can be read, by RapidOCR."""
    from rapidocr import RapidOCR

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of each process
    pool = ThreadPoolExecutor(max(1, min(8, cores - 1)))  # one core is left for the sampling
    load_lock = threading.Lock()

    @functools.cache
    def engine(thread, one_line):
        """One a thread. Recognition pads to a width: 96 takes a third of the time of the usual 320."""
        params = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
        params["Rec.rec_img_shape"] = [3, 48, 96 if one_line else 320]
        with load_lock:
            return RapidOCR(params=params)

    def read(image):
        one_line = image.height < 64  # pixels: too small for more, so that no text needs to be found first
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        # All three switches at every call, since the engine keeps those of its last one.
        read_by = engine(threading.get_ident(), one_line)
        result = read_by(bgr, use_det=not one_line, use_cls=False, use_rec=True)
        return "".join(result.txts or ())

    def reward(images, prompts, metadata):
        texts = pool.map(read, images)
        return [text_score(text, quoted_text(prompt)) for text, prompt in zip(texts, prompts, strict=True)]

    return reward


load_ocr.check = lambda prompt, metadata: quoted_text(prompt)


# ------------------------------------------------------------------------------------------------------------
# Models from the Hugging Face hub: PickScore and HPSv2 are CLIP models

# The commit of each model, so that a reward means the same tomorrow; of any other the newest is taken.
REVISIONS = {
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "adams-story/HPSv2-hf": "refs/pr/2",  # the hub's conversion to safetensors, which was never merged
}


def from_hub(cls, name, **options):
    """`cls.from_pretrained`; one line of BadInput if `name`, a folder or a hub id, cannot be loaded."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else missing weights ask a service to convert them
    try:
        return cls.from_pretrained(name, revision=REVISIONS.get(name, "main"), **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        why = re.split(r"\.\s|\n", str(error).strip())[0] + "; expected safetensors"
        raise BadInput(f"{name}: {why}; offline, `hf download` first; if gated, `hf auth login`") from None


def model_from_hub(cls, name):
    """The model in float32 on the current GPU, if there is one. Raises BadInput if it is not whole."""
    import torch

    model, info = from_hub(cls, name, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise BadInput(f"{name}: has no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    return model.cuda() if torch.cuda.is_available() else model


def load_clip(name, processor):
    """(embed, logit scale) of a CLIP model. embed: N strings or N PIL images -> (N, D) unit vectors."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    folder, processor = processor, from_hub(CLIPProcessor, processor)
    if len(processor.tokenizer) < 20:  # without its files transformers makes a stub
        raise BadInput(f"{folder}: has no tokenizer")
    model = model_from_hub(CLIPModel, name)

    @torch.no_grad()
    def embed(items):
        kind = "text" if isinstance(items[0], str) else "images"
        inputs = processor(**{kind: list(items)}, padding=True, truncation=True, return_tensors="pt")
        features = model.get_text_features if kind == "text" else model.get_image_features
        return torch.nn.functional.normalize(features(**inputs.to(model.device)).pooler_output, dim=-1)

    return embed, model.logit_scale.exp().item()


def load_clip_score(name, processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", divisor=None):
    """Cosine of image and prompt in a CLIP model; with a divisor, logit scale * cosine / divisor.

    PickScore is the latter with 26, as in Flow-GRPO; HPSv2 is the cosine itself, about 0.2 to 0.3.
    """
    embed, logit_scale = load_clip(name, processor)
    scale = logit_scale / divisor if divisor else 1

    def reward(images, prompts, metadata):
        cosines = (embed(images) * embed(prompts)).sum(-1)  # (N,)
        return (scale * cosines).tolist()

    return reward


# ------------------------------------------------------------------------------------------------------------
# By name: a loader, or where to import it from

REWARDS = {
    "ocr": load_ocr,
    "geneval": "scorers.geneval:load",  # Flow-GRPO's partial score
    "geneval-strict": "scorers.geneval:load_strict",  # GenEval's own, 0 or 1
    "pickscore": functools.partial(load_clip_score, "yuvalkirstain/PickScore_v1", divisor=26),
    "hpsv2": functools.partial(load_clip_score, "adams-story/HPSv2-hf"),
    "imagereward": "scorers.remote:load_imagereward",
    "unifiedreward": "scorers.remote:load_unifiedreward",
    "http": "scorers.remote:load_http",
}


def find_loader(name):
    """The loader of a reward by its name in REWARDS or by `module:function`. Raises BadInput."""
    loader = REWARDS.get(name, name)
    if callable(loader):
        return loader
    module, _, function = loader.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        wanted = f"module:function or one of {', '.join(REWARDS)}"
        raise BadInput(f"reward {name}: expected {wanted} ({error})") from None


def url_variable(name):
    """The environment variable that says where the reward of that name is served."""
    return f"GRPO_GUARD_{re.sub(r'[^A-Z0-9]', '_', name.upper())}_URL"


def load(name):
    """The reward of that name. Its result is checked: one finite number per image, else RewardError.

    Raises BadInput if it cannot be built. What the reward itself raises comes through as it is.
    """
    if url_variable(name) in os.environ:
        reward = importlib.import_module("scorers.remote").load_http(name)
    else:
        reward = find_loader(name)()

    def checked(images, prompts, metadata):
        scores = [float(score) for score in reward(images, prompts, metadata)]
        if len(scores) != len(images) or not all(map(math.isfinite, scores)):
            raise RewardError(f"reward {name}: expected {len(images)} finite numbers, got {scores[:9]}")
        return scores

    return checked
