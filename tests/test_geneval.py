"""GenEval: the rules on scenes worked by hand, and the judge on pictures by the tiny detector and CLIP."""

import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import rewards
from rewards import BadInput, RewardError
from scorers import geneval

TINY = Path(__file__).resolve().parent.parent / "tiny"
DETECTOR, CLIP = str(TINY / "detector"), str(TINY / "clip")


def at(x, y=0, colour="red", size=10):
    """An object centred at (x, y). Its mask is the colour that is then read from it."""
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2, 0.9), colour


def row(*colours):
    return [at(20 * i, colour=colour) for i, colour in enumerate(colours)]


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


DOG, CAT, LEFT = clause("dog"), clause("cat"), clause("cat", position=["left of", 0])
ABOVE = [clause("dog", 2), clause("cat", 2, position=["above", 0])]
THREE, FOUR = clause("cat", 3), clause("cat", 4)
RED_CARS, RED_DOG = clause("car", 2, color="red"), clause("dog", color="red")


@pytest.mark.parametrize(
    "objects, include, exclude, strict, score",
    [
        # Counts: partial by the distance. More than asked is right for GenEval, unless that is excluded.
        ({}, [THREE], [FOUR], False, 0),
        (dict(cat=row(*["red"] * 3)), [THREE], [FOUR], True, 1),
        (dict(cat=row(*["red"] * 4)), [THREE], [FOUR], False, 2 / 3),
        (dict(cat=row(*["red"] * 7)), [THREE], [FOUR], False, -1 / 3),
        (dict(cat=row(*["red"] * 4)), [THREE], [], True, 2 / 3),
        (dict(cat=row("red"), dog=row("red")), [CAT], [clause("bus"), DOG], False, 1),
        # Two objects; others do not matter.
        (dict(dog=[at(0)], cat=[at(9)], bus=row("red", "red")), [DOG, CAT], [], True, 1),
        (dict(dog=[at(0)]), [DOG, CAT], [], False, 1 / 2),
        # Colours: a part more, the share that is right, but 0 unless the count is exact.
        (dict(car=row("red", "red")), [RED_CARS], [], True, (1 + 1) / 2),
        (dict(car=row("red", "blue")), [RED_CARS], [], False, (1 + 1 / 2) / 2),
        (dict(car=row("red", "red", "blue")), [RED_CARS], [], True, (1 / 2 + 0) / 2),  # the two surest
        (dict(car=row("blue", "red", "red")), [RED_CARS], [], False, (1 / 2 + 0) / 2),
        # Positions: a part more, but 0 unless both counts are exact and the target is what was asked for.
        (dict(dog=[at(0)], cat=[at(-40)]), [DOG, LEFT], [], True, 1),
        # The departure: Flow-GRPO's server adds a part of 1 here, which would be 3/4.
        (dict(dog=[at(0)], cat=[at(40)]), [DOG, LEFT], [], False, (1 + 1 + 0) / 3),
        (dict(cat=[at(-40)]), [DOG, LEFT], [], False, (0 + 1 + 0) / 3),
        (dict(dog=[at(0), at(-90)], cat=[at(-40)]), [DOG, LEFT], [], True, (0 + 1 + 0) / 3),
        (dict(dog=[at(0)], cat=[at(-40), at(90)]), [DOG, LEFT], [], True, (1 + 0 + 0) / 3),
        (dict(dog=[at(0), at(10)], cat=[at(0, -80), at(10, -80)]), ABOVE, [], True, 1),
        (dict(dog=[at(0), at(10)], cat=[at(0, -80), at(10, 80)]), ABOVE, [], False, 2 / 3),  # every pair
        (dict(dog=[at(0), at(0, -160)], cat=[at(0, -80), at(10, -80)]), ABOVE, [], False, 2 / 3),
        (dict(dog=row("blue"), cat=[at(-40)]), [RED_DOG, LEFT], [], False, (1 + 0 + 1 + 0) / 4),
    ],
)
def test_the_verdict_and_the_partial_score(objects, include, exclude, strict, score):
    colour_of = lambda name, group: [colour for _, colour in group]  # noqa: E731
    verdict = geneval.geneval_score(objects, dict(include=include, exclude=exclude), colour_of)
    assert verdict == (strict, pytest.approx(score))


@pytest.mark.parametrize(
    "x, y, size, relations",
    [
        (-30, 0, 10, {"left of"}),
        (0, -30, 10, {"above"}),
        (30, 30, 10, {"right of", "below"}),  # (28, 28) of 42.4: 0.66 each
        (30, 16, 10, {"right of"}),  # (28, 14) of 34: 0.41 below
        (0, 0, 10, set()),
        (3.9, 0, 10, set()),  # the margin is a tenth of 10 + 10, and 1.9 of 3.9 is less than half
        (4.1, 0, 10, {"right of"}),
        (9.9, 0, 40, set()),  # here it is a tenth of 40 + 10
        (10.1, 0, 40, {"right of"}),
    ],
)
def test_positions_and_their_margin(x, y, size, relations):
    assert geneval.relative_position(at(x, y, size=size)[0], at(0)[0]) == relations


GOOD = {"tag": "colors", "prompt": "a red car", "include": [clause("car", color="red")]}
BAD_CLAUSES = [
    "car",
    {"class": "car"},
    clause("mouse"),  # GenEval calls it a computer mouse
    *[clause("car", count) for count in (0, 17, 1.0)],
    clause("car", color="teal"),
    clause("car", colour="red"),
    *[clause("car", position=position) for position in (["left of", 1], ["left of", -1], ["beside", 0])],
]
BAD = [{"tag": 3}, {"include": []}, {"include": "car"}, {"exclude": DOG}, {"exclude": [clause("mouse")]}]


@pytest.mark.parametrize("change", BAD + [{"include": [clause("car", 4), bad]} for bad in BAD_CLAUSES])
def test_metadata_that_cannot_be_used_is_refused_with_its_line(tmp_path, change):
    more = [clause("car", 4), clause("tv remote", position=["below", 0])]
    lines = [GOOD, GOOD | dict(include=more, exclude=[clause("car", 5)]), GOOD | change]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(BadInput, match=f"^{file}, line 3: expected ") as error:
        rewards.read_prompts(file, ["geneval-strict"])
    assert "\n" not in str(error.value)


def drawing(*circles):
    """A blue card with (x, colour) circles and at the right a yellow square, as the tiny judge knows them."""
    image = Image.new("RGB", (256, 128), (30, 60, 160))
    for x, colour in circles:
        ImageDraw.Draw(image).ellipse((x, 40, x + 50, 90), fill=colour)
    ImageDraw.Draw(image).rectangle((190, 45, 235, 90), fill=(240, 210, 40))
    return image.resize((64, 32), Image.Resampling.BOX)


WHITE, BLACK = (250, 250, 250), (20, 20, 20)
ONE, TWO = drawing((30, WHITE)), drawing((5, WHITE), (95, BLACK))


@pytest.mark.parametrize(
    "image, include, score, strict",
    [
        (ONE, [clause("circle", color="white")], 1, 1),
        (ONE, [clause("circle", color="black")], 1 / 2, 0),
        (ONE, [clause("star")], 0, 0),
        (ONE, [clause("square"), clause("circle", position=["left of", 0])], 1, 1),
        (ONE, [clause("square"), clause("circle", position=["right of", 0])], 2 / 3, 0),
        (TWO, [clause("circle", 2)], 1, 1),
        (TWO, [clause("circle", 2, color="black")], (1 + 1 / 2) / 2, 0),
        (TWO, [clause("circle")], 0, 1),
    ],
)
def test_pictures_are_judged(image, include, score, strict):
    metadata = [{"tag": "x", "include": include}]
    assert geneval.load(detector=DETECTOR, clip=CLIP)([image], ["x"], metadata) == pytest.approx([score])
    assert geneval.load_strict(detector=DETECTOR, clip=CLIP)([image], ["x"], metadata) == [strict]


def test_counting_has_a_threshold_of_its_own(tmp_path):
    """Of two circles, the less sure one does not count where the tag is "counting"."""
    shutil.copytree(DETECTOR, tmp_path, dirs_exist_ok=True)
    settings = geneval.settings_of(DETECTOR)
    more, less = (box[4] for box, _ in geneval.load_detector(DETECTOR, settings)(TWO, 0.8)["circle"])
    settings = settings._replace(threshold=less - 0.01, counting_threshold=(more + less) / 2)
    (tmp_path / "geneval.json").write_text(json.dumps(settings._asdict()))
    metadata = [{"tag": tag, "include": [clause("circle", 2)]} for tag in ("colors", "counting")]
    assert geneval.load(detector=str(tmp_path), clip=CLIP)([TWO] * 2, ["x"] * 2, metadata) == [1, 0.5]


@pytest.mark.parametrize(
    "settings, width, height, scaled",
    [
        ({}, 512, 512, (800, 800)),
        ({}, 1024, 768, (800, 1056)),  # 800 and 1066.7, to the nearest multiple of 32
        ({}, 1000, 200, (256, 1344)),  # 266.6 and 1333
        (dict(size=[64, 128]), 512, 512, (64, 128)),
    ],
)
def test_pictures_are_scaled_as_mmdetection_does_or_the_judge_asks(settings, width, height, scaled):
    size = geneval.scaled_size(Image.new("RGB", (width, height)), geneval.Settings(**settings))
    assert (size["height"], size["width"]) == scaled


@pytest.mark.parametrize("largest", [True, False])
def test_a_mask_is_its_largest_part_if_the_judge_says_so(largest):
    settings = geneval.settings_of(DETECTOR)._replace(largest_component=largest)
    objects = geneval.load_detector(DETECTOR, settings)(TWO, 0.3)
    masks = [mask for found in objects.values() for _, mask in found]
    assert all((geneval.largest_part(mask) == mask).all() for mask in masks) == largest


def test_the_largest_part_of_a_mask_and_what_is_cut_out_by_it():
    mask = np.zeros((20, 30), bool)
    mask[2:5, 2:5] = mask[8:12, 20:24] = True
    mask[12, 24] = True  # touches by a corner alone
    largest = geneval.largest_part(mask)
    assert geneval.box_of(largest) == (20, 8, 24, 12) and largest.sum() == 16
    cut = np.array(geneval.cut_out(Image.new("RGB", (30, 20), (200, 10, 20)), (19, 8, 24, 12, 0.9), largest))
    assert cut.shape == (4, 5, 3) and (cut[:, 0] == 0x99).all() and (cut[:, 1:] == (200, 10, 20)).all()


def test_a_detector_that_returns_nan_is_not_a_zero(tmp_path):
    shutil.copytree(DETECTOR, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["class_predictor.bias"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match="not finite"):
        geneval.load_detector(str(tmp_path), geneval.settings_of(DETECTOR))(ONE, 0.8)


def test_a_judge_of_ones_own_refuses_what_it_does_not_know(tmp_path, monkeypatch):
    mine = type(sys)("mine")
    monkeypatch.setitem(sys.modules, "mine", mine)
    mine.load = functools.partial(geneval.load, detector=DETECTOR, clip=CLIP)
    mine.load.check = functools.partial(geneval.check, detector=DETECTOR)
    star, car = ({"tag": "x", "prompt": "x", "include": [clause(name)]} for name in ("star", "car"))
    (tmp_path / "set.jsonl").write_text(f"{json.dumps(star)}\n{json.dumps(car)}")
    with pytest.raises(BadInput, match='line 2: expected a "class" of circle, .*"color" of white, black'):
        rewards.read_prompts(tmp_path / "set.jsonl", ["mine:load"])
    with pytest.raises(BadInput, match='line 1: expected a "class" of person, bicycle, '):
        rewards.read_prompts(tmp_path / "set.jsonl", ["geneval"])
    assert rewards.load("mine:load")([ONE], ["a star"], [star]) == [0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1, 2]", "expected a JSON object with keys of classes, colours"),
        ('{"class": ["star"]}', "expected a JSON object .*'class'"),
        ('{"classes": "star"}', "expected classes like .*, got 'star'"),
        ('{"threshold": 30.0}', "expected thresholds from 0 to 1"),
        ("{}", "has 6 labels; expected a geneval.json with them, not 80"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(tmp_path, content, message):
    shutil.copytree(DETECTOR, tmp_path, dirs_exist_ok=True)
    (tmp_path / "geneval.json").write_text(content)
    with pytest.raises(BadInput, match=f"^{tmp_path}(/geneval.json)?: {message}") as error:
        geneval.load(detector=str(tmp_path), clip=CLIP)
    assert "\n" not in str(error.value)
