"""GenEval: the rules on scenes worked by hand, and the judge on pictures by the tiny detector and CLIP."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity

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
        (dict(cat=row(*["red"] * 3)), [THREE], [FOUR], True, 1),
        (dict(cat=row(*["red"] * 7)), [THREE], [FOUR], False, -1 / 3),
        (dict(cat=row(*["red"] * 4)), [THREE], [], True, 2 / 3),
        (dict(cat=row("red"), dog=row("red")), [CAT], [clause("bus"), DOG], False, 1),
        # Two objects; others do not matter.
        (dict(dog=[at(0)], bus=row("red", "red")), [DOG, CAT], [], False, 1 / 2),
        # Colours: a part more, the share that is right, but 0 unless the count is exact.
        (dict(car=row("red", "red")), [RED_CARS], [], True, (1 + 1) / 2),
        (dict(car=row("red", "blue")), [RED_CARS], [], False, (1 + 1 / 2) / 2),
        (dict(car=row("red", "red", "blue")), [RED_CARS], [], True, (1 / 2 + 0) / 2),  # the two surest
        # Positions: a part more, but 0 unless both counts are exact and the target is what was asked for.
        (dict(dog=[at(0)], cat=[at(-40)]), [DOG, LEFT], [], True, 1),
        # The departure: Flow-GRPO's server adds a part of 1 here, which would be 3/4.
        (dict(dog=[at(0)], cat=[at(40)]), [DOG, LEFT], [], False, (1 + 1 + 0) / 3),
        (dict(dog=[at(0), at(-90)], cat=[at(-40)]), [DOG, LEFT], [], True, (0 + 1 + 0) / 3),
        (dict(dog=[at(0)], cat=[at(-40), at(90)]), [DOG, LEFT], [], True, (1 + 0 + 0) / 3),
        (dict(dog=[at(0), at(10)], cat=[at(0, -80), at(10, 80)]), ABOVE, [], False, 2 / 3),  # every pair
        (dict(dog=[at(0), at(0, -160)], cat=[at(0, -80), at(10, -80)]), ABOVE, [], False, 2 / 3),
        (dict(dog=row("blue"), cat=[at(-40)]), [RED_DOG, LEFT], [], False, (1 + 0 + 1 + 0) / 4),
    ],
)
def test_the_verdict_and_the_partial_score(objects, include, exclude, strict, score):
    colour_of = lambda name, group: [colour for _, colour in group]  # noqa: E731
    verdict = geneval.geneval_score(objects, dict(include=include, exclude=exclude), colour_of)
    assert verdict == (strict, pytest.approx(score))


def test_positions_and_their_margin():
    def relations(x, y, size=10):
        return geneval.relative_position(at(x, y, size=size)[0], at(0)[0])

    assert relations(-30, 0) == {"left of"} and relations(0, -30) == {"above"}
    assert relations(30, 30) == {"right of", "below"}  # (28, 28) of 42.4: 0.66 each
    assert relations(30, 16) == {"right of"}  # (28, 14) of 34: 0.41 below
    assert relations(0, 0) == set()
    assert relations(9.9, 0, 40) == set()  # the margin is a tenth of 40 + 10, and 4.9 of 9.9 is under a half
    assert relations(10.1, 0, 40) == {"right of"}


GOOD = {"tag": "colors", "prompt": "a red car", "include": [clause("car", color="red")]}
BAD = [{"tag": 3}, {"include": []}, {"include": "car"}, {"exclude": DOG}, {"exclude": [clause("mouse")]}]
BAD_CLAUSES = ["car", {"class": "car"}, clause("mouse")]  # which GenEval calls a computer mouse
BAD_CLAUSES += [clause("car", 0), clause("car", 17), clause("car", 1.0), clause("car", color="teal")]
BAD_CLAUSES += [clause("car", position=["left of", 1]), clause("car", position=["beside", 0])]
BAD_CLAUSES += [clause("car", colour="red")]


@pytest.mark.parametrize("change", BAD + [{"include": [clause("car", 4), bad]} for bad in BAD_CLAUSES])
def test_metadata_that_cannot_be_used_is_refused_with_its_line(tmp_path, change):
    more = [clause("car", 16), clause("tv remote", position=["below", 0])]
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
        (ONE, [clause("square"), clause("circle", position=["right of", 0])], 2 / 3, 0),
        (TWO, [clause("circle", 2, color="black")], (1 + 1 / 2) / 2, 0),
        (TWO, [clause("circle")], 0, 1),
    ],
)
def test_pictures_are_judged(image, include, score, strict):
    metadata = [{"tag": "x", "include": include}]
    assert geneval.load(detector=DETECTOR, clip=CLIP)([image], ["x"], metadata) == pytest.approx([score])
    assert geneval.load_strict(detector=DETECTOR, clip=CLIP)([image], ["x"], metadata) == [strict]


def test_what_the_judge_does_not_know_is_not_a_zero():
    with pytest.raises(BadInput, match="a .class. of .'circle', .*a .color. of .'white', .*got .*'cat'"):
        geneval.load(detector=DETECTOR, clip=CLIP)([ONE], ["x"], [{"tag": "x", "include": [CAT]}])


def test_an_object_is_there_above_0_3_and_counts_above_0_9(monkeypatch):
    def detect(image, threshold):
        return {"cat": [at(0) for confidence in (0.91, 0.89, 0.31, 0.29) if confidence > threshold]}

    monkeypatch.setattr(geneval, "load_detector", lambda *names: detect)
    monkeypatch.setattr(geneval, "load_colour_judge", lambda *names: print)  # no colour is asked for
    metadata = [{"tag": tag, "include": [THREE]} for tag in ("two_object", "counting")]
    assert geneval.load(detector="a", clip="b")([ONE] * 2, ["x"] * 2, metadata) == pytest.approx([1, 1 / 3])


def test_the_surest_16_of_a_class_are_found(monkeypatch):
    detect = geneval.load_detector(DETECTOR, geneval.settings_of(DETECTOR))
    boxes = [box for box, _ in detect(TWO, 0)["circle"]]
    assert geneval.MOST_OBJECTS == 16
    monkeypatch.setattr(geneval, "MOST_OBJECTS", 5)  # the tiny detector proposes only 12
    assert [box for box, _ in detect(TWO, 0)["circle"]] == sorted(boxes, key=lambda box: -box[4])[:5]


def test_a_colour_is_the_nearest_mean_of_three_prompts(monkeypatch):
    def unit(seed, count):
        numbers = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
        return torch.nn.functional.normalize(numbers, dim=-1)

    def embed(items):
        if isinstance(items[0], Image.Image):
            return unit(0, 300)
        return torch.cat([unit(zlib.crc32(text.encode()), 1) for text in items])

    monkeypatch.setattr(geneval, "load_clip", lambda *names: (embed, 1))
    colours_of = geneval.load_colour_judge("x", geneval.Settings())
    found = colours_of(ONE, "car", [((0, 0, 64, 32), np.ones((32, 64), bool))])
    forms = ["a photo of a {} car", "a photo of a {}-colored car", "a photo of a {} object"]
    means = [embed([form.format(colour) for form in forms]).mean(0) for colour in geneval.COLOURS]
    nearest = cosine_similarity(unit(0, 300)[:, None], torch.stack(means), dim=-1).argmax(-1)
    assert found == [geneval.COLOURS[index] for index in nearest]


def test_pictures_are_scaled_as_mmdetection_does_or_the_judge_asks():
    def scaled(*size, **settings):
        return geneval.scaled_size(Image.new("RGB", size), geneval.Settings(**settings))

    assert scaled(1024, 768) == dict(height=800, width=1056)  # 1066.7, to the nearest multiple of 32
    assert scaled(1000, 200) == dict(height=256, width=1344)  # 266.6 and 1333
    assert scaled(512, 512, size=[64, 128]) == dict(height=64, width=128)


@pytest.mark.parametrize("largest", [True, False])
def test_a_mask_is_its_largest_part_if_the_judge_says_so(largest):
    settings = geneval.settings_of(DETECTOR)._replace(largest_component=largest)
    objects = geneval.load_detector(DETECTOR, settings)(TWO, 0.3)
    masks = [mask for found in objects.values() for _, mask in found]
    assert all((geneval.largest_part(mask) == mask).all() for mask in masks) == largest


def test_the_largest_part_of_a_mask_and_what_is_cut_out_by_it():
    mask = np.zeros((20, 30), bool)
    assert not geneval.largest_part(mask).any()
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


@pytest.mark.parametrize("content, message", [
    ('{"klasses": ["star"]}', "expected an object with classes, .*'klasses'"),
    ('{"classes": "star"}', "expected classes like .*, got 'star'"),
    ('{"threshold": 30.0}', "expected thresholds from 0 to 1"),
    ("{}", "has 6 labels; expected a geneval.json with them, not 80"),
])  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(tmp_path, content, message):
    shutil.copytree(DETECTOR, tmp_path, dirs_exist_ok=True)
    (tmp_path / "geneval.json").write_text(content)
    with pytest.raises(BadInput, match=f"^{tmp_path}(/geneval.json)?: {message}"):
        geneval.load(detector=str(tmp_path), clip=CLIP)
