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

A reward that needs a machine or an environment of its own is served there and read from here:

    python rewards.py serve imagereward --port 8000 --host 0.0.0.0   # there
    export GRPO_GUARD_IMAGEREWARD_URL=http://that-machine:8000       # here

Environment variables:

- GRPO_GUARD_<NAME>_URL: where to read the reward of that name (upper case, `-` as `_`) instead of building it
- GRPO_GUARD_HTTP_URL: where the reward `http` reads, whatever is served there
- GRPO_GUARD_UNIFIEDREWARD_API, _MODEL, _KEY: for `unifiedreward`, the base URL of an OpenAI-compatible
  server, like http://127.0.0.1:8000/v1; its model, the first that it lists unless given; its key if any
"""

import argparse
import base64
import functools
import io
import json
import math
import operator
import os
import re
import textwrap
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    names = "train.txt and test.txt, or with train_metadata.jsonl and test_metadata.jsonl"
    raise BadInput(f"--prompts {path}: expected a file, or a folder with {names}")


def read_prompts(file, names=()):
    """List of (prompt, metadata), of a Path. Blank lines are skipped; in a text file every metadata is `{}`.

    names: the rewards that will score pictures of these prompts. Raises BadInput, with file and line number,
    for anything that cannot be used, or that one of them cannot score: see CHECKS.
    """
    try:
        lines = file.read_bytes().decode("utf-8-sig").replace("\r", "").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: cannot be read; expected prompts as UTF-8 text ({error})") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            metadata = parse_metadata(line) if file.suffix == ".jsonl" else {}
            prompt = metadata.get("prompt", line).strip()
            for kind in sorted(CHECKS.keys() & {name.split("-")[0] for name in names}):
                CHECKS[kind](prompt, metadata)
        except ValueError as error:
            raise BadInput(f"{file}, line {number}: {error}") from None
        prompts.append((prompt, metadata))
    if not prompts:
        raise BadInput(f"{file}: holds no prompt; expected one per line")
    return prompts


def read_set(path, names=()):
    """(training prompts, evaluation prompts) of a prompt set: `read_prompts` of both its files."""
    return tuple(read_prompts(file, names) for file in prompt_files(path))


def parse_metadata(line):
    try:
        about = json.loads(line)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("prompt"), str) or not about["prompt"].strip():
        raise BadInput(f'expected a JSON object with a non-empty "prompt"; got {line[:80]!r}')
    return about


def quoted_text(prompt):
    """The text between the prompt's two double quotes. Raises BadInput unless there are two with a text."""
    parts = prompt.split('"')
    if len(parts) != 3 or not parts[1].strip():
        wanted = 'exactly one text in double quotes, like a sign that says "OPEN"'
        raise BadInput(f"expected {wanted}; got {prompt[:80]!r}")
    return parts[1]


# ------------------------------------------------------------------------------------------------------------
# OCR

CARD_PARTS = ("colour", "frame", "gradient", "glyph")  # of tiny/cards.py, which only the tiny models need
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
    """How well the text in double quotes can be read, by RapidOCR. An engine for each core but one."""
    from rapidocr import RapidOCR

    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1  # one for sampling
    pool = ThreadPoolExecutor(max(1, min(8, cores)), thread_name_prefix="ocr")
    load = threading.Lock()

    @functools.cache
    def engine(thread, card):
        """Recognition pads to a width: 96 holds a card, in a third of the time that the usual 320 takes."""
        params = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
        params["Rec.rec_img_shape"] = [3, 48, 96 if card else 320]
        with load:
            return RapidOCR(params=params)

    def read(image):
        card = image.height < CARD_HEIGHT
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # the engine takes BGR
        # All three switches at every call: the engine keeps those of its last one.
        seen = engine(threading.get_ident(), card)(pixels, use_det=not card, use_cls=False, use_rec=True)
        return "".join(seen.txts or ())

    def reward(images, prompts, metadata):
        texts = pool.map(read, images)
        return [text_score(text, quoted_text(prompt)) for text, prompt in zip(texts, prompts, strict=True)]

    return reward


def check_cards(prompt, metadata):
    """Raise ValueError unless the prompt is that of a card."""
    from tiny import cards

    cards.parse(prompt)


def load_cards(part=None):
    """The exact gold score of the tiny models' cards, or one part of it: see `fidelity` in tiny/cards.py."""
    from tiny import cards

    def reward(images, prompts, metadata):
        scores = [cards.fidelity(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [score[part] if part else sum(score.values()) / len(score) for score in scores]

    return reward


# ------------------------------------------------------------------------------------------------------------
# GenEval: its rules

# The detector's 80 classes in its order, by the names that GenEval's prompts use.
CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack,
umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven,
toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
CLASSES = re.split(r",\s", CLASSES.strip())
COLOURS = "red orange yellow green blue purple pink brown black white".split()
COLOUR_PROMPTS = "a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object"
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence above which an object is there; the second to count
MOST_OBJECTS = 16  # of one class
POSITION_MARGIN = 0.1  # of both objects' sizes: offsets up to this are no position


def check_geneval(prompt, metadata, where=""):
    """Raise BadInput, beginning with `where`, unless `metadata` is a line of GenEval's."""
    include, exclude = metadata.get("include"), metadata.get("exclude", [])
    lists = isinstance(include, list) and include and isinstance(exclude, list)
    if not lists or not isinstance(metadata.get("tag"), str):
        raise BadInput(f'{where}expected a "tag", a non-empty list "include" and, if any, a list "exclude"')
    for number, clause in enumerate(include + exclude):
        more = dict(clause) if isinstance(clause, dict) else {}
        name, count, colour = more.pop("class", None), more.pop("count", None), more.pop("color", "red")
        places = [None, *([relation, index] for relation in RELATIONS for index in range(number))]
        fits = more.pop("position", None) in places and colour in COLOURS and name in CLASSES and not more
        if not fits or type(count) is not int or not 1 <= count <= MOST_OBJECTS:
            wanted = f"a class of COCO by GenEval's name, count 1 to {MOST_OBJECTS}, if any color or"
            raise BadInput(f"{where}expected {wanted} position [relation, earlier clause]; got {clause}")


def relative_position(box, target):
    """The set of RELATIONS, none to two, in which `box` stands to `target`; each is (x0, y0, x1, y1, ...).

    The offset of the centres counts as far as it exceeds a tenth of both sizes, and if that is more than half
    of the distance between the centres. This is GenEval's rule.
    """
    box, target = np.reshape(box[:4], (2, 2)), np.reshape(target[:4], (2, 2))  # corners by (x, y)
    offset = box.mean(0) - target.mean(0)
    margin = POSITION_MARGIN * (np.abs(box[1] - box[0]) + np.abs(target[1] - target[0]))
    beyond = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, far in zip(RELATIONS, (-x, x, -y, y), strict=True) if far > 0.5}


def geneval_score(objects, metadata, colour_of):
    """(strict, score, reason): GenEval's own verdict, Flow-GRPO's partial score, and what was wrong.

    objects: class name -> list of (box, mask), the surest first; box: (x0, y0, x1, y1, confidence), in pixels
    metadata: GenEval's: "include", clauses that must all hold, and "exclude", of which none may
    colour_of: (class name, list of (box, mask)) -> list of as many names of colours

    strict is `correct` of GenEval's evaluate_images.py: there are at least `count` of each class, and the
    surest `count` of them have the colour and stand, each to each of the target, in the position asked for.
    score is the mean over parts. Each clause has one, 1 - |count - found| / count, where all found count, so
    it may be negative. If it asks for a colour or a position it has one more: the share rightly coloured, or
    whether the position holds, but 0 where the count, its own or the target's, is not met exactly.
    """
    parts, reasons, groups = [], [], []
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])
        group, exact = found[:count], len(found) == count
        holds, more = len(group) == count, []
        if "color" in clause and holds:
            more.append(colour_of(name, group).count(clause["color"]) / count)
            holds = more[0] == 1
        if "position" in clause and holds:
            relation, (target, target_exact) = clause["position"][0], groups[clause["position"][1]]
            pairs = [(box, other) for box, _ in group for other, _ in target or ()]
            holds = target is not None and all(relation in relative_position(*pair) for pair in pairs)
            # A departure: where the position fails, Flow-GRPO's server adds a part of 1 after that of 0.
            more.append(float(holds and target_exact))
        parts.append(1 - abs(count - len(found)) / count)
        if "color" in clause or "position" in clause:
            parts += more if exact else [0.0]
        groups.append((group if holds else None, exact and min(more, default=1) == 1))
        reasons += [] if holds else [f"found {len(found)}, expected {clause}"]
    for clause in metadata.get("exclude", []):
        found = len(objects.get(clause["class"], []))
        reasons += [f"found {found}, excluded {clause}"] if found >= clause["count"] else []
    return not reasons, sum(parts) / len(parts), "; ".join(reasons)


# ------------------------------------------------------------------------------------------------------------
# Models from the Hugging Face hub


def from_hub(cls, name, **options):
    """`cls.from_pretrained`; one line of BadInput if `name`, a folder or a hub id, cannot be loaded."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else missing weights ask a service to convert them
    try:
        return cls.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        why = re.split(r"\.\s|\n", str(error).strip())[0] + "; expected safetensors"
        raise BadInput(f"{name}: {why}; offline, `hf download` first; if gated, `hf auth login`") from None


def model_from_hub(cls, name, **options):
    """The model in float32 on the current GPU, if there is one."""
    import torch

    model = from_hub(cls, name, use_safetensors=True, dtype=torch.float32, **options)
    return model.cuda() if torch.cuda.is_available() else model


def load_clip(name, processor, **options):
    """(embed, logit scale) of a CLIP model. embed: N strings or N PIL images -> (N, D) unit vectors."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    processor = from_hub(CLIPProcessor, processor)
    model = model_from_hub(CLIPModel, name, **options)

    @torch.no_grad()
    def embed(items):
        kind = "text" if isinstance(items[0], str) else "images"
        inputs = processor(**{kind: list(items)}, padding=True, truncation=True, return_tensors="pt")
        features = model.get_text_features if kind == "text" else model.get_image_features
        return torch.nn.functional.normalize(features(**inputs.to(model.device)).pooler_output, dim=-1)

    return embed, model.logit_scale.exp().item()


def load_clip_score(name, processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", divisor=None, **options):
    """Cosine of image and prompt in a CLIP model; with a divisor, logit scale * cosine / divisor.

    PickScore is the latter with 26, as in Flow-GRPO; HPSv2 is the cosine itself, about 0.2 to 0.3.
    """
    embed, logit_scale = load_clip(name, processor, **options)
    scale = logit_scale / divisor if divisor else 1

    return lambda images, prompts, metadata: (scale * (embed(images) * embed(prompts)).sum(-1)).tolist()


def load_detector(name):
    """detect(image, threshold) -> objects as `geneval_score` takes them, by a Mask2Former trained on COCO.

    Sizes, scores and boxes are those of MMDetection, which GenEval uses: transformers' own post-processing
    brings every mask to 384 x 384 pixels first.
    """
    import torch
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    processor = from_hub(AutoImageProcessor, name)
    model = model_from_hub(Mask2FormerForUniversalSegmentation, name)

    @torch.no_grad()
    def detect(image, threshold):
        # The short side becomes 800 pixels and the long one 1333 at most, in multiples of 32, so no padding.
        scale = min(800 / min(image.size), 1333 / max(image.size))
        size = {side: max(1, round(getattr(image, side) * scale / 32)) * 32 for side in ("width", "height")}
        output = model(**processor(images=image, size=size, return_tensors="pt").to(model.device))
        sure = output.class_queries_logits[0].softmax(-1)[:, :-1]  # (queries, classes) without "nothing"
        if not (sure.isfinite().all() and output.masks_queries_logits.isfinite().all()):
            raise RewardError(f"geneval: {name} returned numbers that are not finite")
        queries, labels = (sure > threshold).nonzero(as_tuple=True)  # K candidates; a mask only lowers them
        masks = output.masks_queries_logits[0, queries, None]  # (K, 1, height / 4, width / 4)
        masks = torch.nn.functional.interpolate(masks, image.size[::-1], mode="bilinear")[:, 0]  # (K, H, W)
        inside = masks > 0
        scores = sure[queries, labels] * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        objects = {}
        for index in scores.argsort(descending=True).tolist():
            found = objects.setdefault(CLASSES[labels[index]], [])
            if scores[index] > threshold and len(found) < MOST_OBJECTS:
                mask = inside[index].cpu().numpy()
                (x0, x1), (y0, y1) = (mask.any(axis).nonzero()[0][[0, -1]].tolist() for axis in (0, 1))
                found.append(((x0, y0, x1 + 1, y1 + 1, scores[index].item()), mask))
        return objects

    return detect


def cut_out(image, box, mask):
    """The box of the image, with the gray #999 wherever its mask, (H, W) of bool, is not."""
    return Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(mask)).crop(box[:4])


@functools.cache  # geneval and geneval-strict share their models
def judge_by(detector="facebook/mask2former-swin-small-coco-instance", clip="openai/clip-vit-large-patch14"):
    """judge(image, metadata) -> (strict, score, reason) of `geneval_score`."""
    import torch

    detect, (embed, _) = load_detector(detector), load_clip(clip, clip)

    @functools.cache
    def colour_vectors(name):
        """(colours, D): the mean of each colour's three prompts, normalised."""
        prompts = [prompt.format(colour, name) for colour in COLOURS for prompt in COLOUR_PROMPTS]
        return torch.nn.functional.normalize(embed(prompts).unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)

    def judge(image, metadata):
        def colour_of(name, group):
            vectors = embed([cut_out(image, box, mask) for box, mask in group])
            return [COLOURS[index] for index in (vectors @ colour_vectors(name).T).argmax(-1).tolist()]

        check_geneval("", metadata, f"geneval, metadata {str(metadata)[:80]}: ")
        objects = detect(image, COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD)
        return geneval_score(objects, metadata, colour_of)

    return judge


def load_geneval(strict=False, **models):
    """GenEval by Flow-GRPO's partial score, at most 1, or strict, 0 or 1. In process, with no server."""
    judge, field = judge_by(**models), 0 if strict else 1
    return lambda images, prompts, metadata: [float(found[field]) for found in map(judge, images, metadata)]


# ------------------------------------------------------------------------------------------------------------
# Over HTTP: a reward in another environment or on another machine, and a language model as a judge

TIMEOUT, TRIES, WAIT = 120, 4, 1  # seconds for an answer; attempts; waits in between of 1, 3, 7 times WAIT s
REQUEST_LIMIT, ANSWER_LIMIT = 2**28, 2**20  # bytes
OPENER = urllib.request.OpenerDirector()  # follows no redirect, which would take a key elsewhere
for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    OPENER.add_handler(handler())


def server_url(variable):
    """The URL in an environment variable, without a slash at its end. Raises BadInput."""
    url = os.environ.get(variable, "").strip().rstrip("/")
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):  # not quoted: it may hold a password
        raise BadInput(f"{variable}: expected a URL like http://127.0.0.1:8000 without user or query")
    return url


def ask(url, *path, data=None, key=None):
    """What lies at `path` in the JSON that the URL answers to a GET, or with data to a POST of it as JSON.

    Connection errors, timeouts and 5xx are tried again, anything else never. Raises RewardError with the URL
    and what came.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data and json.dumps(data).encode(), headers)
    for attempt in range(TRIES):
        time.sleep(WAIT * (2**attempt - 1))
        try:
            with OPENER.open(request, timeout=TIMEOUT) as answer:
                status, text = answer.status, answer.read(ANSWER_LIMIT).decode(errors="replace")
            if status == 200:
                return functools.reduce(operator.getitem, path, json.loads(text))
        except (OSError, HTTPException) as error:
            status, text = None, f"{type(error).__name__}: {error}"
        except (ValueError, LookupError, TypeError):
            break
        if status and status < 500:
            break
    text = (text.replace(key, "***") if key else text)[:300]
    raise RewardError(f"{url}: expected JSON with {path}, got {status or 'no answer'}, {text}")


def png(image):
    """An image as PNG in base64."""
    image.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def url_variable(name):
    return f"GRPO_GUARD_{name.upper().replace('-', '_')}_URL"


def load_http(name="http"):
    """The reward that `python rewards.py serve NAME` serves at GRPO_GUARD_<NAME>_URL.

    The protocol: GET answers {"reward": NAME}. POST of {"images": [base64 PNG], "prompts": [...], "metadata":
    [...]} answers {"scores": [...]}, one number per image. Any status but 200 is a failure.
    """
    url = server_url(url_variable(name))
    served = ask(url, "reward")
    if name not in ("http", served):
        raise BadInput(f"{url}: serves {served!r}; expected {name!r}, by `python rewards.py serve {name}`")

    def reward(images, prompts, metadata):
        data = dict(images=[png(image) for image in images], prompts=prompts, metadata=metadata)
        scores = ask(url, "scores", data=data)
        if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
            raise RewardError(f"{url}: expected {len(images)} numbers, got {str(scores)[:200]}")
        return scores

    return reward


def make_server(name, reward, host, port):
    """An HTTP server of a reward by the protocol of `load_http`; it scores one request at a time."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT  # seconds for a client to send its request

        def answer(self, status, content):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            self.answer(200, {"reward": name})

        def do_POST(self):
            status = 400
            try:
                length = int(self.headers["Content-Length"])
                if not 0 < length <= REQUEST_LIMIT:
                    raise ValueError(f"{length} bytes; expected at most {REQUEST_LIMIT}")
                about = json.loads(self.rfile.read(length))
                files = [io.BytesIO(base64.b64decode(text, validate=True)) for text in about["images"]]
                images = [Image.open(file, formats=["PNG"]).convert("RGB") for file in files]
                prompts, metadata = about["prompts"], about["metadata"]
                if not len(images) == len(prompts) == len(metadata):
                    raise ValueError("expected as many prompts and metadata as images")
                status = 500
                with lock:
                    content = {"scores": reward(images, prompts, metadata)}
                status = 200
            except Exception as error:  # whatever it is, the one who asked is told
                content = {"error": f"{type(error).__name__}: {error}"}
            self.answer(status, content)

    return ThreadingHTTPServer((host, port), Handler)


def load_imagereward():
    """ImageReward-v1.0 by its own package, about -2 to 2.

    The package needs a transformers of 2023 and loads a pickle, which can run code: it lives in an
    environment of its own and is served from there.
    """
    try:
        import ImageReward
    except ImportError as error:
        how = "serve it from an environment with the image-reward package (README.md)"
        raise BadInput(f"imagereward: {error}; {how} and set {url_variable('imagereward')}") from None
    model = ImageReward.load("ImageReward-v1.0").requires_grad_(False)
    return lambda images, prompts, metadata: list(map(model.score, prompts, images))


QUESTION = """This image was generated from a caption. Judge how well its objects, their attributes and their
relations match the caption, and how good it looks: clarity, detail, colours, composition. Give one mark from
1 (worst) to 5 (best), written after the words "Final Score:".
Caption: {}"""


def final_score(text):
    """The mark from 1 to 5 after the last "Final Score:". Raises RewardError if there is none."""
    marks = re.findall(r"Final Score:[\s*]*(-?\d+(?:\.\d+)?)", str(text))
    if not marks or not 1 <= float(marks[-1]) <= 5:
        raise RewardError(f'unifiedreward: expected "Final Score:" and 1 to 5, got {str(text)[-200:]!r}')
    return float(marks[-1])


def load_unifiedreward():
    """UnifiedReward by a server of OpenAI's chat completions, such as vLLM: its mark / 5, as in Flow-GRPO."""
    api, key = server_url("GRPO_GUARD_UNIFIEDREWARD_API"), os.environ.get("GRPO_GUARD_UNIFIEDREWARD_KEY")
    first = ask(f"{api}/models", "data", 0, "id", key=key)  # which also shows that the server is there
    model = os.environ.get("GRPO_GUARD_UNIFIEDREWARD_MODEL", first)
    pool = ThreadPoolExecutor(8)

    def score(image, prompt):
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}}
        messages = [dict(role="user", content=[picture, dict(type="text", text=QUESTION.format(prompt))])]
        data = dict(model=model, messages=messages, temperature=0, max_tokens=1024)
        path = "choices", 0, "message", "content"
        return final_score(ask(f"{api}/chat/completions", *path, data=data, key=key)) / 5

    return lambda images, prompts, metadata: list(pool.map(score, images, prompts))


# ------------------------------------------------------------------------------------------------------------
# By name

REWARDS = {
    "ocr": load_ocr,
    "geneval": load_geneval,
    "geneval-strict": functools.partial(load_geneval, strict=True),
    "pickscore": functools.partial(load_clip_score, "yuvalkirstain/PickScore_v1", divisor=26),
    # Its safetensors are in a pull request of the hub's converter, which was never merged.
    "hpsv2": functools.partial(load_clip_score, "adams-story/HPSv2-hf", revision="refs/pr/2"),
    "imagereward": load_imagereward,
    "unifiedreward": load_unifiedreward,
    "http": load_http,
    "cards": load_cards,
    **{f"cards-{part}": functools.partial(load_cards, part) for part in CARD_PARTS},
}

# What rewards need of every prompt and its metadata, by their names up to a hyphen; the others take any.
CHECKS = {"ocr": lambda prompt, _: quoted_text(prompt), "geneval": check_geneval, "cards": check_cards}

PROMPTS = Path(__file__).resolve().parent / "prompts"
CARD_PROMPTS = str(PROMPTS / "cards")  # of the tiny models
TASKS = {n: dict(prompts=str(PROMPTS / n), reward=n, gold=[]) for n in ("ocr", "geneval", "pickscore")}


def load(name, here=False):
    """The reward of that name; it returns one finite float per image, or raises RewardError.

    here: build it in this process, whether or not GRPO_GUARD_<NAME>_URL is set. Raises BadInput if it cannot.
    """
    try:
        reward = load_http(name) if url_variable(name) in os.environ and not here else REWARDS[name]()
    except RewardError as error:  # a server that cannot be reached: at the start, the user's to mend
        raise BadInput(str(error)) from None

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
    rows = [np.hstack(cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return Image.fromarray(np.vstack(rows))


def main():
    parser = argparse.ArgumentParser(description="Serve a reward for GRPO_GUARD_<NAME>_URL to read.")
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("name", choices=REWARDS)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every one")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    args = parser.parse_args()
    try:
        server = make_server(args.name, load(args.name, here=True), args.host, args.port)
    except (BadInput, OSError) as error:
        parser.error(str(error))
    print(f"{args.name} at http://{args.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
