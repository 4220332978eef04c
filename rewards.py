"""Prompt sets and rewards: all that guard.py knows about a task.

A reward is a function `reward(images, prompts, metadata) -> list of float`, one finite number per image,
larger is better:

- images: list of N RGB PIL images
- prompts: list of N strings
- metadata: list of N dicts, each prompt's own line of a `.jsonl` set (empty for prompts from a text file)

These are copies, which it may change. A tuple, a 1-D array or a 1-D tensor will do for the list. It raises
where it cannot score: a failure is never a zero. A loader is a function without arguments that builds a
reward, and only then imports what it needs. `REWARDS` at the end names some loaders. Any other is named
`module:function`, so a reward of your own needs no edit of this file:

    # mine.py, beside guard.py; then --reward mine:load_brightness
    import numpy as np

    def load_brightness():
        def reward(images, prompts, metadata):
            return [np.asarray(image.convert("L")).mean() / 255 for image in images]
        return reward

If it needs something of its prompts, give the loader an attribute `check`, a function of a prompt and its
metadata that raises ValueError. Then a prompt that cannot be scored is refused before any model is loaded.
A reward that another process serves is named by its URL: see scorers/README.md.
"""

import copy
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

from rapidfuzz.distance import Levenshtein

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
    raise BadInput(f"--prompts {path}: no file, nor a folder with train and test .txt or _metadata.jsonl")


def read_prompts(file, reward_names=()):
    """List of (prompt, metadata) of a file, .txt or .jsonl. Blank lines are skipped.

    reward_names: of the rewards that will score pictures of these prompts. Raises BadInput, with file and
    line number, for a line that cannot be used or that one of these rewards cannot score.
    """
    suffix = file.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise BadInput(f"{file}: expected .txt, a prompt a line, or .jsonl, an object with a prompt a line")
    checks = [loader.check for loader in map(find_loader, reward_names) if hasattr(loader, "check")]
    prompts = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            line = line.decode("utf-8-sig").strip()
            if not line:
                continue
            metadata = read_metadata(line) if suffix == ".jsonl" else {}
            prompt = metadata.get("prompt", line).strip()
            for check in checks:
                check(prompt, metadata)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{file}, line {number}: {error}") from None
        prompts.append((prompt, metadata))
    if not prompts:
        raise BadInput(f"{file}: holds no prompt; expected one per line")
    return prompts


def read_metadata(line):
    """The JSON object of a line of a `.jsonl` set. Raises ValueError unless it has a prompt."""
    metadata = json.loads(line)
    prompt = metadata.get("prompt") if isinstance(metadata, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'expected a JSON object with a non-empty "prompt"; got {line[:80]!r}')
    prompt.encode()  # ValueError for half a surrogate pair: JSON can hold it, tokenizers and logs cannot
    return metadata


# ------------------------------------------------------------------------------------------------------------
# OCR: is the text there that the prompt asks for?

# To one form: quotes, dashes and slashes that look alike, and selectors of an emoji's style, which go.
ONE_FORM = str.maketrans("‘’‛`´′ʻʼ“”„″‐‑‒–—―−⁄", "'" * 8 + '"' * 4 + "-" * 7 + "/", "\ufe0e\ufe0f")


def quoted_text(prompt):
    """The text between the prompt's two double quotes. Raises ValueError unless there are two with a text."""
    parts = prompt.split('"')
    if len(parts) != 3 or not comparable(parts[1]):
        raise ValueError(f'expected exactly one text in double quotes, like "OPEN"; got {prompt[:80]!r}')
    return parts[1]


def comparable(text):
    """The text in one form: Unicode's NFKC, ONE_FORM, lower case, no spaces and no format characters."""
    seen = "".join(char for char in text.translate(ONE_FORM) if unicodedata.category(char) != "Cf")
    # ONE_FORM comes first, since NFKC makes an accent of ´, and again, since NFKC makes 1⁄3 of ⅓.
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", seen).translate(ONE_FORM)).lower()


def text_score(found, target):
    """1 if the target is contained in what was read, else 1 - min(edit distance, len) / len, in [0, 1].

    This is Flow-GRPO's OCR reward, on `comparable` texts.
    """
    found, target = comparable(found), comparable(target)
    if target in found:
        return 1.0
    return 1 - min(Levenshtein.distance(found, target), len(target)) / len(target)


@functools.cache
def readable():
    """The characters that RapidOCR can return, as `comparable` writes them, from its recognition model."""
    import onnxruntime
    import rapidocr

    file = Path(rapidocr.__file__).parent / "models" / "PP-OCRv6_rec_small.onnx"
    model = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return set("".join(map(comparable, model.get_modelmeta().custom_metadata_map["character"])))


def check_ocr(prompt, metadata):
    """Raise ValueError unless the prompt has one text in double quotes, all of which can be read."""
    for char in comparable(quoted_text(prompt)):
        if char not in readable():
            raise ValueError(f"expected what the OCR engine can read; got {char!r} in {prompt[:60]!r}")


def load_ocr():
    """How well the text in double quotes can be read, by RapidOCR."""
    from rapidocr import RapidOCR

    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of each process
    pool = ThreadPoolExecutor(max(1, min(8, cores - 1)))  # one core is left for the sampling

    @functools.cache
    def engine(thread, one_line):
        """One a thread. Recognition pads to a width: 96 takes a third of the time of the usual 320."""
        params = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
        params["Rec.rec_img_shape"] = [3, 48, 96 if one_line else 320]
        return RapidOCR(params=params)

    def read(image):
        one_line = image.height < 64  # pixels: too small for more, so that no text needs to be found first
        # All three switches at every call, since the engine keeps those of its last one.
        read_by = engine(threading.get_ident(), one_line)
        result = read_by(image, use_det=not one_line, use_cls=False, use_rec=True)
        return "".join(result.txts or ())

    def reward(images, prompts, metadata):
        texts = pool.map(read, images)
        return [text_score(text, quoted_text(prompt)) for text, prompt in zip(texts, prompts, strict=True)]

    return reward


load_ocr.check = check_ocr


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
    except Exception as error:  # the libraries raise any kind for a Git LFS pointer or a file that is cut off
        why = re.split(r"\.\s|\n", f"{type(error).__name__}: {error}")[0]
        how = "expected safetensors, all files whole; offline, `hf download` first; if gated, `hf auth login`"
        raise BadInput(f"{name}: {why}; {how}") from None


def model_from_hub(cls, name):
    """The model in float32 on the current GPU, if there is one. Raises BadInput if it is not whole."""
    import torch

    model, info = from_hub(cls, name, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise BadInput(f"{name}: has no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    return model.cuda() if torch.cuda.is_available() else model


def load_clip(name, processor_name):
    """(embed, logit scale) of a CLIP model. embed: N strings or N PIL images -> (N, D) unit vectors."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    processor = from_hub(CLIPProcessor, processor_name)
    if len(processor.tokenizer) < 20:  # without its files transformers makes a stub
        raise BadInput(f"{processor_name}: has no tokenizer")
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
}


def find_loader(name):
    """The loader of a reward by its URL, its name in REWARDS or `module:function`. Raises BadInput."""
    if name.startswith(("http://", "https://")):
        return functools.partial(find_loader("scorers.remote:load_http"), name)
    loader = REWARDS.get(name, name)
    if callable(loader):
        return loader
    module, _, function = loader.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        known = ", ".join(REWARDS)
        raise BadInput(f"reward {name}: {error}; expected a URL, module:function or one of {known}") from None


def load(name):
    """The reward of that name. It gives the reward copies, and checks the result: a list of N finite floats.

    Its attribute `name` is what its scores are logged under. Raises BadInput if it cannot be built, and then
    RewardError for any other result. What the reward itself raises comes through as it is.
    """
    reward = find_loader(name)()

    def checked(images, prompts, metadata):
        result = plain(reward(*copy.deepcopy([list(images), list(prompts), list(metadata)])))
        scores = [plain(score) for score in result] if isinstance(result, (list, tuple)) else []
        numbers = all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores)
        if len(scores) != len(images) or not numbers:
            raise RewardError(f"reward {name}: expected {len(images)} finite numbers, got {result!r:.200}")
        return [float(score) for score in scores]

    checked.name = getattr(reward, "name", name.rpartition(":")[2])  # a served reward knows its own
    return checked


def plain(result):
    """A tensor, an array or a number of theirs as Python's own lists and numbers; anything else as it is."""
    return result.tolist() if hasattr(result, "tolist") else result
