"""GenEval: are the objects there that the prompt asks for, as many, in those colours and places?

A detector, Mask2Former, finds the objects, and a CLIP model names their colours; both run in process. The
rules are GenEval's (Ghosh et al. 2023, https://github.com/djghosh13/geneval, evaluate_images.py), the score
to train on is Flow-GRPO's.

A judge is a detector and a CLIP model, each a folder or a hub id. By default it is GenEval's own, for the
classes of COCO. Any other says what differs in a file `geneval.json` in the detector's folder, a JSON object
whose keys are fields of `Settings`. `--reward mine:load` then takes such a judge from a file mine.py:

    load = functools.partial(scorers.geneval.load, detector="FOLDER", clip="FOLDER")
    load.check = functools.partial(scorers.geneval.check, detector="FOLDER")
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rewards import BadInput, RewardError, from_hub, load_clip, model_from_hub

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"

# COCO's 80 classes in its order, by the names that GenEval's prompts use.
CLASSES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, "
    "backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, "
    "baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, "
    "knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, "
    "chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, "
    "computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
).split(", ")
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
COLOUR_PROMPTS = ["a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object"]
RELATIONS = ("left of", "right of", "above", "below")
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels: the short side is scaled to 800, the long one to 1333 at most
MOST_OBJECTS = 16  # of one class


class Settings(NamedTuple):
    """What belongs to a judge. The defaults are GenEval's."""

    classes: list = CLASSES  # in the order of the detector's labels
    colours: list = COLOURS
    colour_prompts: list = COLOUR_PROMPTS  # {0} is the colour, {1} the class
    threshold: float = 0.3  # confidence above which an object is there
    counting_threshold: float = 0.9  # the same where the tag is "counting"
    size: list = []  # [height, width] in pixels to which every picture is scaled, else by SHORT_SIDE
    largest_component: bool = False  # keep only the largest connected part of each mask


@functools.cache
def settings_of(detector):
    """The Settings of a judge, by the `geneval.json` in its detector's folder if there is one.

    Raises BadInput for a file that is not a JSON object with some of these keys and values of their kinds.
    """
    file = Path(detector) / "geneval.json"
    if not file.is_file():
        return Settings()
    try:
        settings = Settings(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{file}: expected an object with {', '.join(Settings._fields)}; {error}") from None
    for key, default in Settings._field_defaults.items():
        if type(getattr(settings, key)) is not type(default):
            raise BadInput(f"{file}: expected {key} like {default}, got {getattr(settings, key)!r}")
    if not 0 <= settings.threshold <= 1 or not 0 <= settings.counting_threshold <= 1:
        raise BadInput(f"{file}: expected thresholds from 0 to 1")
    return settings


# ------------------------------------------------------------------------------------------------------------
# The rules


def check(prompt, metadata, detector=DETECTOR):
    """Raise BadInput unless the metadata is GenEval's, with classes and colours that the judge knows."""
    settings = settings_of(detector)
    include, exclude = metadata.get("include"), metadata.get("exclude", [])
    lists = isinstance(include, list) and include and isinstance(exclude, list)
    if not lists or not isinstance(metadata.get("tag"), str):
        raise BadInput(f'expected a "tag", a list "include" and, if any, "exclude"; got {metadata!s:.100}')
    for number, clause in enumerate(include + exclude):
        if not fits(clause, number, settings):
            wanted = f'a "class" of {settings.classes!s:.80}, a "count" from 1 to {MOST_OBJECTS} and, if any,'
            wanted += f' a "color" of {settings.colours!s:.80} or a "position" [relation, earlier clause]'
            raise BadInput(f"expected {wanted}; got {clause!r:.100}")


def fits(clause, number, settings):
    """Whether this is a clause of GenEval's that the judge knows; `number` others stand before it."""
    positions = [[relation, earlier] for relation in RELATIONS for earlier in range(number)]
    return (
        isinstance(clause, dict)
        and clause.keys() <= {"class", "count", "color", "position"}
        and clause.get("class") in settings.classes
        and type(clause.get("count")) is int
        and 1 <= clause["count"] <= MOST_OBJECTS
        and ("color" not in clause or clause["color"] in settings.colours)
        and ("position" not in clause or clause["position"] in positions)
    )


def relative_position(box, target):
    """The set of RELATIONS, none to two, in which `box` stands to `target`; each is (x0, y0, x1, y1, ...).

    The offset of the centres counts as far as it exceeds a tenth of both sizes, and if that is more than half
    of the distance between the centres. This is GenEval's rule.
    """
    corners, of_target = np.reshape(box[:4], (2, 2)), np.reshape(target[:4], (2, 2))  # two points (x, y) each
    offset = corners.mean(axis=0) - of_target.mean(axis=0)
    margin = 0.1 * (np.abs(corners[1] - corners[0]) + np.abs(of_target[1] - of_target[0]))
    beyond = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, far in zip(RELATIONS, (-x, x, -y, y), strict=True) if far > 0.5}


def geneval_score(objects, metadata, colour_of):
    """(strict, score): GenEval's own verdict, True or False, and Flow-GRPO's partial score.

    objects: class name -> list of (box, mask), the surest first; box: (x0, y0, x1, y1, confidence), in pixels
    metadata: GenEval's: "include", clauses that must all hold, and "exclude", of which none may
    colour_of: (class name, list of (box, mask)) -> list of as many names of colours

    strict is `correct` of GenEval's evaluate_images.py: there are at least `count` of each class, and the
    surest `count` of them have the colour and stand, each to each of the target, in the position asked for.
    score is the mean over parts. Each clause has one, 1 - |count - found| / count, where all found count, so
    it may be negative. If it asks for a colour or a position it has one more: the share rightly coloured, or
    whether the position holds, but 0 where the count, its own or the target's, is not met exactly.
    """
    correct, parts, groups = True, [], []
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])
        group = found[:count]
        exact = len(found) == count  # Flow-GRPO's condition for any further part
        holds = len(group) == count  # GenEval's
        more = []
        if "color" in clause and holds:
            right = colour_of(name, group).count(clause["color"])
            more.append(right / count)
            holds = right == count
        if "position" in clause and holds:
            relation, index = clause["position"]
            target, target_right = groups[index]
            pairs = [(box, of_target) for box, _ in group for of_target, _ in target]
            holds = all(relation in relative_position(*pair) for pair in pairs)
            # A departure: where the position fails, Flow-GRPO's server adds a part of 1 after that of 0.
            more.append(float(holds and target_right))
        parts.append(1 - abs(count - len(found)) / count)
        if "color" in clause or "position" in clause:
            parts += more if exact else [0.0]
        groups.append((group, exact and all(part == 1 for part in more)))
        correct = correct and holds
    for clause in metadata.get("exclude", []):
        correct = correct and len(objects.get(clause["class"], [])) < clause["count"]
    return correct, sum(parts) / len(parts)


# ------------------------------------------------------------------------------------------------------------
# The judge


def scaled_size(image, settings):
    """{"height", "width"} in pixels of the picture that the detector sees."""
    if settings.size:
        height, width = settings.size
        return dict(height=height, width=width)
    width, height = image.size
    scale = min(SHORT_SIDE / min(width, height), LONG_SIDE / max(width, height))
    # In multiples of 32, so that nothing is padded.
    return {side: max(1, round(n * scale / 32)) * 32 for side, n in (("height", height), ("width", width))}


def largest_part(mask):
    """The largest connected part of a mask, (H, W) of bool."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask)  # 1, 2, ... in the mask, 0 outside of it
    return mask & (labels == np.bincount(labels[mask], minlength=1).argmax())


def box_of(mask):
    """(x0, y0, x1, y1) in pixels, the last two exclusive, of a mask, (H, W) of bool, that is not empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def load_detector(name, settings):
    """detect(image, threshold) -> objects as `geneval_score` takes them, by a Mask2Former.

    Sizes, scores and boxes are those of MMDetection, which GenEval uses: transformers' own post-processing
    brings every mask to 384 x 384 pixels first. Raises BadInput if the model has other classes than the
    settings; `detect` raises RewardError where the model returns a number that is not finite.
    """
    import torch
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    processor = from_hub(AutoImageProcessor, name)
    model = model_from_hub(Mask2FormerForUniversalSegmentation, name)
    labels, classes = model.config.num_labels, len(settings.classes)
    if labels != classes:
        raise BadInput(f"{name}: has {labels} labels; expected a geneval.json with them, not {classes}")

    @torch.no_grad()
    def detect(image, threshold):
        inputs = processor(images=image, size=scaled_size(image, settings), return_tensors="pt")
        output = model(**inputs.to(model.device))
        sure = output.class_queries_logits[0].softmax(-1)[:, :-1]  # (queries, classes) without "nothing"
        if not (sure.isfinite().all() and output.masks_queries_logits.isfinite().all()):
            raise RewardError(f"{name} returned numbers that are not finite")
        queries, labels = (sure > threshold).nonzero(as_tuple=True)  # K candidates; a mask only lowers them
        masks = output.masks_queries_logits[0, queries, None]  # (K, 1, height / 4, width / 4)
        masks = torch.nn.functional.interpolate(masks, image.size[::-1], mode="bilinear")[:, 0]  # (K, H, W)
        inside = masks > 0
        if settings.largest_component:
            for index, mask in enumerate(inside.cpu().numpy()):
                inside[index] = torch.from_numpy(largest_part(mask))
        scores = sure[queries, labels] * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        objects = {}
        for index in scores.argsort(descending=True).tolist():
            found = objects.setdefault(settings.classes[labels[index]], [])
            if scores[index] > threshold and len(found) < MOST_OBJECTS:
                mask = inside[index].cpu().numpy()
                found.append(((*box_of(mask), scores[index].item()), mask))
        return objects

    return detect


def cut_out(image, box, mask):
    """The box of the image, with the gray #999 wherever its mask, (H, W) of bool, is not."""
    return Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(mask)).crop(box[:4])


def load_colour_judge(clip, settings):
    """colours_of(image, class name, list of (box, mask)) -> as many names of colours, by a CLIP model."""
    import torch

    embed, _ = load_clip(clip, clip)

    @functools.cache
    def vectors_of(name):
        """(colours, D): the mean of each colour's prompts, normalised."""
        texts = settings.colour_prompts
        prompts = [text.format(colour, name) for colour in settings.colours for text in texts]
        vectors = embed(prompts).unflatten(0, (-1, len(texts)))  # (colours, prompts, D)
        return torch.nn.functional.normalize(vectors.mean(1), dim=-1)

    def colours_of(image, name, group):
        vectors = embed([cut_out(image, box, mask) for box, mask in group])  # (N, D)
        nearest = (vectors @ vectors_of(name).T).argmax(-1)
        return [settings.colours[index] for index in nearest.tolist()]

    return colours_of


@functools.cache  # geneval and geneval-strict share their models
def judge_by(detector=DETECTOR, clip=CLIP):
    """judge(image, metadata) -> (strict, score) of `geneval_score`. Raises BadInput, as `check`."""
    settings = settings_of(detector)
    detect = load_detector(detector, settings)
    colours_of = load_colour_judge(clip, settings)

    def judge(image, metadata):
        check("", metadata, detector)
        counting = metadata["tag"] == "counting"
        objects = detect(image, settings.counting_threshold if counting else settings.threshold)
        return geneval_score(objects, metadata, functools.partial(colours_of, image))

    return judge


def load(strict=False, detector=DETECTOR, clip=CLIP):
    """GenEval by Flow-GRPO's partial score, at most 1, or strict, 0 or 1. In process, with no server."""
    judge = judge_by(detector, clip)

    def reward(images, prompts, metadata):
        return [float(correct) if strict else score for correct, score in map(judge, images, metadata)]

    return reward


load_strict = functools.partial(load, strict=True)
load.check = load_strict.check = check
