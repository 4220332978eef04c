"""Prompt sets and rewards: all that guard.py knows about a task.

A reward is a function `reward(images, prompts, metadata) -> list of float`, one finite number per image,
larger is better:

- images: list of N RGB PIL images
- prompts: list of N strings
- metadata: list of N dicts, each prompt's own line of a `.jsonl` set (empty for prompts from a text file)

It raises where it cannot score: a failure is never a zero. `REWARDS`, near the end, maps a name to a loader,
a function without arguments that builds the reward and only then imports what it needs. One more reward is
one more entry:

    def load_brightness():
        def reward(images, prompts, metadata):
            return [float(np.asarray(image.convert("L")).mean()) / 255 for image in images]
        return reward

If it needs something of its prompts, add a function to `CHECKS` too: then a prompt that it cannot score is
refused before any model is loaded. Rewards that take more than a page are in `scorers/`, whose README says
how to run one on another machine: where GRPO_GUARD_<NAME>_URL is set (the reward's name in upper case, `-`
as `_`), the reward of that name is read from that URL and not built here.
"""

import functools
import json
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein


class BadInput(ValueError):
    """Something the user can mend. guard.py prints it as one line and exits with code 2."""


class RewardError(RuntimeError):
    """A reward did not return what it must. The run stops; its last checkpoint stays."""


# ------------------------------------------------------------------------------------------------------------
# Prompt sets


def prompt_files(path, flag="prompts"):
    """(training file, evaluation file) of a prompt set, both the same one if only one was given.

    path: a file, or a folder in Flow-GRPO's layout, which holds `train.txt` and `test.txt` or
    `train_metadata.jsonl` and `test_metadata.jsonl`. Raises BadInput if there is no such thing.
    """
    path = Path(path)
    if path.is_file():
        return path, path
    for ending in (".txt", "_metadata.jsonl"):
        train, test = path / f"train{ending}", path / f"test{ending}"
        if train.is_file() and test.is_file():
            return train, test
    wanted = "a file, or a folder with train.txt and test.txt, or both as _metadata.jsonl"
    raise BadInput(f"--{flag} {path}: expected {wanted}")


def read_prompts(file, names=()):
    """List of (prompt, metadata), of a Path. Blank lines are skipped; in a text file every metadata is `{}`.

    names: the rewards that will score pictures of these prompts. Raises BadInput, with file and line number,
    for anything that cannot be used, or that one of them cannot score: see CHECKS.
    """
    try:
        lines = file.read_bytes().decode("utf-8-sig").replace("\r", "").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: cannot be read; expected prompts as UTF-8 text ({error})") from None
    checks = dict.fromkeys(CHECKS[name] for name in names if name in CHECKS)  # each of them once
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            metadata = parse_metadata(line) if file.suffix == ".jsonl" else {}
            prompt = metadata.get("prompt", line).strip()
            for check in checks:
                check(prompt, metadata)
        except ValueError as error:
            raise BadInput(f"{file}, line {number}: {error}") from None
        prompts.append((prompt, metadata))
    if not prompts:
        raise BadInput(f"{file}: holds no prompt; expected one per line")
    return prompts


def read_set(path, names=(), flag="prompts"):
    """(training prompts, evaluation prompts) of a prompt set: `read_prompts` of both its files."""
    return tuple(read_prompts(file, names) for file in prompt_files(path, flag))


def parse_metadata(line):
    """The JSON object of a line of a `.jsonl` set. Raises BadInput unless it has a prompt."""
    try:
        about = json.loads(line)
        prompt = about["prompt"].strip()
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        prompt = ""
    if not prompt:
        raise BadInput(f'expected a JSON object with a non-empty "prompt"; got {line[:80]!r}')
    return about


# ------------------------------------------------------------------------------------------------------------
# OCR: is the text there that the prompt asks for?

CPU_LIMIT = "/sys/fs/cgroup/cpu.max"  # cgroup v2: "200000 100000" is two cores, "max 100000" no limit


def quoted_text(prompt):
    """The text between the prompt's two double quotes. Raises BadInput unless there are two with a text."""
    parts = prompt.split('"')
    if len(parts) != 3 or not parts[1].strip():
        raise BadInput(f'expected exactly one text in double quotes, like "OPEN"; got {prompt[:80]!r}')
    return parts[1]


def text_score(found, target):
    """1 if the target is contained in what was read, else 1 - min(edit distance, len) / len, in [0, 1].

    Case and spaces do not count. This is Flow-GRPO's OCR reward.
    """
    found = re.sub(r"\s", "", found).lower()
    target = re.sub(r"\s", "", target).lower()
    if target in found:
        return 1.0
    return 1 - min(Levenshtein.distance(found, target), len(target)) / len(target)


def usable_cores():
    """How many CPU cores this process may use, which in a container can be fewer than there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path(CPU_LIMIT).read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit in it
        return cores


def load_ocr():
    """How well the text in double quotes can be read, by RapidOCR. An engine for each core but one."""
    from rapidocr import RapidOCR

    cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of each process on this machine
    pool = ThreadPoolExecutor(max(1, min(8, cores - 1)), thread_name_prefix="ocr")  # one core for sampling
    load = threading.Lock()

    @functools.cache
    def engine(thread, card):
        """Recognition pads to a width: 96 holds a card, in a third of the time that the usual 320 takes."""
        params = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
        params["Rec.rec_img_shape"] = [3, 48, 96 if card else 320]
        with load:
            return RapidOCR(params=params)

    def read(image):
        card = image.height < 64  # pixels: one line of text, in which no text needs to be found
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # the engine takes BGR
        # All three switches at every call: the engine keeps those of its last one.
        seen = engine(threading.get_ident(), card)(pixels, use_det=not card, use_cls=False, use_rec=True)
        return "".join(seen.txts or ())

    def reward(images, prompts, metadata):
        texts = pool.map(read, images)
        return [text_score(text, quoted_text(prompt)) for text, prompt in zip(texts, prompts, strict=True)]

    return reward


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
    except (OSError, ValueError, ImportError) as error:
        why = re.split(r"\.\s|\n", str(error).strip())[0] + "; expected safetensors"
        raise BadInput(f"{name}: {why}; offline, `hf download` first; if gated, `hf auth login`") from None


def model_from_hub(cls, name):
    """The model in float32 on the current GPU, if there is one. Raises BadInput if it cannot be loaded."""
    import torch

    model = from_hub(cls, name, use_safetensors=True, dtype=torch.float32)
    return model.cuda() if torch.cuda.is_available() else model


def load_clip(name, processor):
    """(embed, logit scale) of a CLIP model. embed: N strings or N PIL images -> (N, D) unit vectors."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    processor = from_hub(CLIPProcessor, processor)
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
# By name


def scorer(module, function, *args, **options):
    """Call a function of scorers/<module>.py, which is imported only when it is needed."""
    return getattr(import_module(f"scorers.{module}"), function)(*args, **options)


# The tiny world: the judges that tiny/make.py trained, and the parts of the gold score in tiny/cards.py
HERE = Path(__file__).resolve().parent
TINY_GENEVAL = dict(detector=str(HERE / "tiny" / "detector"), clip=str(HERE / "tiny" / "clip"))
TINY_PICKSCORE = str(HERE / "tiny" / "pickscore")
CARD_PARTS = ("colour", "frame", "pattern", "content")

REWARDS = {
    "ocr": load_ocr,
    "geneval": functools.partial(scorer, "geneval", "load"),  # Flow-GRPO's partial score
    "geneval-strict": functools.partial(scorer, "geneval", "load", strict=True),  # GenEval's own, 0 or 1
    "pickscore": functools.partial(load_clip_score, "yuvalkirstain/PickScore_v1", divisor=26),
    "tiny-geneval": functools.partial(scorer, "geneval", "load", **TINY_GENEVAL),
    "tiny-geneval-strict": functools.partial(scorer, "geneval", "load", strict=True, **TINY_GENEVAL),
    "tiny-pickscore": functools.partial(load_clip_score, TINY_PICKSCORE, TINY_PICKSCORE, divisor=26),
    "hpsv2": functools.partial(load_clip_score, "adams-story/HPSv2-hf"),
    "imagereward": functools.partial(scorer, "remote", "load_imagereward"),
    "unifiedreward": functools.partial(scorer, "remote", "load_unifiedreward"),
    "http": functools.partial(scorer, "remote", "load_http", "http"),
    "cards": functools.partial(scorer, "cards", "load"),
    **{f"cards-{part}": functools.partial(scorer, "cards", "load", part) for part in CARD_PARTS},
}

# What a reward needs of each prompt and its metadata: a function of both that raises ValueError, in one line.
CHECKS = {
    "ocr": lambda prompt, metadata: quoted_text(prompt),
    "geneval": functools.partial(scorer, "geneval", "check"),
    "geneval-strict": functools.partial(scorer, "geneval", "check"),
    "tiny-geneval": functools.partial(scorer, "geneval", "check", **TINY_GENEVAL),
    "tiny-geneval-strict": functools.partial(scorer, "geneval", "check", **TINY_GENEVAL),
    **{name: functools.partial(scorer, "cards", "check") for name in REWARDS if name.startswith("cards")},
}

PROMPTS = HERE / "prompts"
TASKS = {n: dict(prompts=str(PROMPTS / n), reward=n, gold=[]) for n in ("ocr", "geneval", "pickscore")}


def url_variable(name):
    return f"GRPO_GUARD_{name.upper().replace('-', '_')}_URL"


def load(name):
    """The reward of that name, read from GRPO_GUARD_<NAME>_URL if that is set, else built here.

    It returns one finite float per image, or raises RewardError, in one line that names it, whatever went
    wrong. Raises BadInput if it cannot be built.
    """
    reward = scorer("remote", "load_http", name) if url_variable(name) in os.environ else REWARDS[name]()

    def checked(images, prompts, metadata):
        try:
            scores = [float(score) for score in reward(images, prompts, metadata)]
            if len(scores) != len(images) or not all(map(math.isfinite, scores)):
                raise ValueError(f"expected {len(images)} finite numbers, got {len(scores)}: {scores}")
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise RewardError(f"reward {name!r} failed: {why[:500]}") from error
        return scores

    return checked


# ------------------------------------------------------------------------------------------------------------
# What a picture looks like

LOOKS = ("brightness", "near_black", "near_white", "edges", "colours", "grid")


def looks(image, period=16):
    """What a picture looks like, whatever it shows: {name: float} for the names in LOOKS, all finite.

    Watched, never trained on. A model that hacks its reward often moves these far from the base model's:

    - brightness: mean, 0 to 1
    - near_black, near_white: share of pixels whose channels are all below 0.05, all above 0.95
    - edges: mean length of the gradient of the grey picture, per pixel
    - colours: entropy in bits of a histogram of 4 x 4 x 4 colours, 0 (one colour) to 6
    - grid: power at the transformer's patch period over the mean power at the four nearest frequencies, mean
      over rows and columns; about 1 if there is no grid of that period

    image: PIL image, each side at least `period`. period: pixels that one token covers, the VAE's scale times
    the patch size: 16 for SD3.5 and FLUX.
    """
    pixels = np.asarray(image.convert("RGB")) / 255  # (H, W, 3)
    grey = pixels.mean(axis=2)  # (H, W)
    near_black = (pixels < 0.05).all(axis=2).mean()
    near_white = (pixels > 0.95).all(axis=2).mean()
    edges = np.hypot(*np.gradient(grey)).mean()
    bins = (pixels * 3.999).astype(int) @ (16, 4, 1)  # (H, W), each 0 to 63
    share = np.unique(bins, return_counts=True)[1] / bins.size  # of each colour that there is
    colours = share @ np.log2(1 / share)
    of_grid = (grid(grey, period) + grid(grey.T, period)) / 2
    values = (grey.mean(), near_black, near_white, edges, colours, of_grid)
    return dict(zip(LOOKS, map(float, values), strict=True))


def grid(lines, period):
    """Power at `period` pixels over that of its neighbours in the spectrum, of (lines, pixels) in [0, 1].

    Of the steps from pixel to pixel: in the pixels themselves slow changes would drown a faint grid.
    """
    count = lines.shape[1] // period  # whole periods, so that their frequency is one bin of the spectrum
    steps = np.diff(lines[:, : count * period], axis=1, prepend=lines[:, :1])
    spectrum = np.fft.rfft(steps)  # (lines, count * period // 2 + 1)
    # Plus what rounding to 256 levels adds, so that an even picture has 1 and not 0 / 0.
    power = (np.abs(spectrum) ** 2).mean(axis=0) + 1e-6 * count * period
    near = [bin for bin in range(count - 2, count + 3) if bin > 0 and bin != count]
    return power[count] / power[near].mean()
