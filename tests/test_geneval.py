"""GenEval and CLIP scores: the rules on scenes worked by hand, the models on small ones of random weights."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

import rewards
from rewards import BadInput, RewardError
from scorers import geneval
from scorers.geneval import geneval_score, relative_position

HERE = Path(__file__).resolve().parent.parent


def at(x, y, size=10, colour="red", score=0.9):
    """An object centred at (x, y). Its mask is the colour that `seen` then reads from it."""
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2, score), colour


def seen(name, group):
    return [colour for _, colour in group]


def never(name, group):
    raise AssertionError("no colour was asked for")


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def judged(objects, include, exclude=(), colour_of=seen):
    return geneval_score(objects, {"tag": "x", "include": include, "exclude": list(exclude)}, colour_of)


@pytest.mark.parametrize(
    "found, strict, score",
    [
        (0, False, 0),
        (1, False, 1 / 3),
        (2, False, 2 / 3),
        (3, True, 1),
        (4, False, 2 / 3),
        (7, False, -1 / 3),
    ],
)
def test_counting_is_exact_by_its_exclusion_and_partial_by_the_distance(found, strict, score):
    objects = {"cat": [at(20 * i, 0) for i in range(found)]}
    verdict = judged(objects, [clause("cat", 3)], [clause("cat", 4)], never)
    assert verdict[0] is strict and verdict[1] == pytest.approx(score)
    assert (verdict[2] == "") == strict


def test_more_than_asked_is_right_for_geneval_unless_excluded():
    objects = {"dog": [at(0, 0), at(50, 0), at(90, 0)]}
    assert judged(objects, [clause("dog", 2)], colour_of=never)[:2] == (True, 0.5)
    strict, score, reason = judged(objects, [clause("dog", 2)], [clause("dog", 3)], never)
    assert (strict, score) == (False, 0.5) and reason == f"found 3, excluded {clause('dog', 3)}"
    assert judged(objects, [clause("dog", 2)], [clause("cat", 1)], never)[:2] == (True, 0.5)
    assert judged(objects, [clause("dog", 2)], [clause("cat", 1), clause("dog", 1)], never)[0] is False


def test_two_objects_must_both_be_there():
    include = [clause("dog"), clause("cat")]
    assert judged({"dog": [at(0, 0)], "cat": [at(9, 9)]}, include) == (True, 1.0, "")
    strict, score, reason = judged({"dog": [at(0, 0)]}, include)
    assert (strict, score) == (False, 0.5) and reason == f"found 0, expected {clause('cat')}"
    assert judged({}, include)[:2] == (False, 0.0)
    assert judged({"dog": [at(0, 0)], "cat": [at(9, 9)], "bus": [at(5, 5)] * 9}, include)[:2] == (True, 1.0)


@pytest.mark.parametrize(
    "colours, strict, score",
    [
        (["red", "red"], True, (1 + 1) / 2),
        (["red", "blue"], False, (1 + 1 / 2) / 2),
        (["blue", "green"], False, (1 + 0) / 2),
        (["red"], False, (1 / 2 + 0) / 2),  # too few: no colour is looked at
        (["red", "red", "red"], True, (1 / 2 + 0) / 2),  # strict looks at the two surest
        (["red", "red", "blue"], True, (1 / 2 + 0) / 2),
        (["blue", "red", "red"], False, (1 / 2 + 0) / 2),
        ([], False, (0 + 0) / 2),
    ],
)
def test_colours(colours, strict, score):
    objects = {"car": [at(20 * i, 0, colour=colour) for i, colour in enumerate(colours)]}
    assert judged(objects, [clause("car", 2, color="red")])[:2] == (strict, pytest.approx(score))


def test_colours_of_two_classes_are_not_swapped():
    include = [clause("car", color="red"), clause("bus", color="blue")]
    right = {"car": [at(0, 0, colour="red")], "bus": [at(50, 0, colour="blue")]}
    swapped = {"car": [at(0, 0, colour="blue")], "bus": [at(50, 0, colour="red")]}
    assert judged(right, include) == (True, 1.0, "")
    assert judged(swapped, include)[:2] == (False, 0.5)
    assert judged(right | {"bus": [at(50, 0, colour="red")]}, include)[:2] == (False, 0.75)


@pytest.mark.parametrize(
    "x, y, relations",
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (-30, -30, {"left of", "above"}),  # (28, 28) of 42.4: 0.66 each
        (30, 30, {"right of", "below"}),
        (30, 16, {"right of"}),  # (28, 14) of 34: 0.41 below
        (2, 0, set()),  # no more than a tenth of 10 + 10
        (3.9, 0, set()),  # 1.9 of 3.9 is less than half
        (4.1, 0, {"right of"}),  # 2.1 of 4.1 is more
        (-3.9, 0, set()),
        (-4.1, 0, {"left of"}),
        (0, 0, set()),
    ],
)
def test_positions_and_their_margin(x, y, relations):
    assert relative_position(at(x, y)[0], at(0, 0)[0]) == relations


def test_a_larger_object_has_a_larger_margin():
    # The margin is 0.1 * (40 + 10) = 5, so half of the distance is left from 10 on.
    assert relative_position(at(9.9, 0, size=40)[0], at(0, 0)[0]) == set()
    assert relative_position(at(10.1, 0, size=40)[0], at(0, 0)[0]) == {"right of"}


@pytest.mark.parametrize("relation", geneval.RELATIONS)
def test_every_position_holds_one_way_round_only(relation):
    x, y = {"left of": (-40, 0), "right of": (40, 0), "above": (0, -40), "below": (0, 40)}[relation]
    include = [clause("dog"), clause("cat", position=[relation, 0])]
    assert judged({"dog": [at(0, 0)], "cat": [at(x, y)]}, include) == (True, 1.0, "")
    # Parts 1, 1, 0: the reference server would add 1 more, which is 3/4.
    assert judged({"dog": [at(0, 0)], "cat": [at(-x, -y)]}, include)[:2] == (False, pytest.approx(2 / 3))


def test_a_position_needs_its_target_and_exact_counts():
    include = [clause("dog"), clause("cat", position=["left of", 0])]
    dog, cat = at(0, 0), at(-40, 0)
    assert judged({"cat": [cat]}, include)[:2] == (False, pytest.approx((0 + 1 + 0) / 3))
    assert judged({"dog": [dog]}, include)[:2] == (False, pytest.approx((1 + 0 + 0) / 3))
    # One too many: GenEval looks at the surest, the partial score gives the position nothing.
    assert judged({"dog": [dog, at(-90, 0)], "cat": [cat]}, include)[:2] == (
        True,
        pytest.approx((0 + 1 + 0) / 3),
    )
    assert judged({"dog": [dog], "cat": [cat, at(90, 0)]}, include)[:2] == (
        True,
        pytest.approx((1 + 0 + 0) / 3),
    )
    assert judged({"dog": [dog], "cat": [at(90, 0), cat]}, include)[:2] == (False, pytest.approx(1 / 3))


def test_every_pair_must_stand_in_the_position():
    include = [clause("dog", 2), clause("cat", 2, position=["above", 0])]
    dogs, cats = [at(0, 0), at(10, 0)], [at(0, -80), at(10, -80)]
    assert judged({"dog": dogs, "cat": cats}, include) == (True, 1.0, "")
    assert judged({"dog": dogs, "cat": [cats[0], at(0, 80)]}, include)[:2] == (False, pytest.approx(2 / 3))
    assert judged({"dog": [dogs[0], at(0, -160)], "cat": cats}, include)[:2] == (False, pytest.approx(2 / 3))


def test_a_target_with_the_wrong_colour_is_no_target():
    include = [clause("dog", color="red"), clause("cat", position=["left of", 0])]
    objects = {"dog": [at(0, 0, colour="blue")], "cat": [at(-40, 0)]}
    assert judged(objects, include)[:2] == (False, (1 + 0 + 1 + 0) / 4)


GOOD = {"tag": "colors", "prompt": "a red car", "include": [clause("car", color="red")]}


@pytest.mark.parametrize(
    "change",
    [
        {"tag": 3},
        {"include": []},
        {"include": "car"},
        {"include": ["car"]},
        {"include": ["two\nlines"]},
        {"include": [{"class": "car"}]},
        {"include": [clause("automobile")]},
        {"include": [clause("mouse")]},  # GenEval calls it a computer mouse
        {"include": [clause(["car"])]},
        {"include": [clause("car", 0)]},
        {"include": [clause("car", 17)]},
        {"include": [clause("car", 1.0)]},
        {"include": [clause("car", True)]},
        {"include": [clause("car", color="teal")]},
        {"include": [clause("car", colour="red")]},
        {"include": [clause("car", position=["left of", 0])]},  # no earlier clause
        {"include": [clause("car"), clause("bus", position=["left of", 1])]},
        {"include": [clause("car"), clause("bus", position=["left of", -1])]},
        {"include": [clause("car"), clause("bus", position=["beside", 0])]},
        {"include": [clause("car"), clause("bus", position="left of")]},
        {"exclude": {"class": "car"}},
        {"exclude": [clause("automobile")]},
    ],
)
def test_metadata_that_geneval_cannot_use_is_refused_with_its_line(tmp_path, change):
    file = tmp_path / "train_metadata.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(BadInput, match=f"{file}, line 2: expected ") as error:
        rewards.read_prompts(file, ["geneval-strict"])
    assert "\n" not in str(error.value)


def test_metadata_of_every_kind_is_read(tmp_path):
    lines = [
        GOOD,
        GOOD | {"include": [clause("car", 4)], "exclude": [clause("car", 5)]},
        GOOD | {"include": [clause("tv remote"), clause("computer mouse", position=["below", 0])]},
    ]
    file = tmp_path / "train_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert rewards.read_prompts(file, ["geneval-strict"]) == [("a red car", line) for line in lines]


def test_there_are_80_classes_and_10_colours():
    assert len(set(geneval.CLASSES)) == 80 and len(set(geneval.COLOURS)) == 10
    assert [geneval.CLASSES[i] for i in (0, 2, 5, 15, 56, 64, 79)] == [
        "person", "car", "bus", "cat", "chair", "computer mouse", "toothbrush",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Small models of the true classes, loaded from disk as users load the large ones


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz-"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=40
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(tokens), max_position_embeddings=40, eos_token_id=len(tokens) - 1, **size)
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config=dict(image_size=32, patch_size=8, **size), projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


DOG, CAT = geneval.CLASSES.index("dog"), geneval.CLASSES.index("cat")


def save_detector(folder, classes, likely):
    """Ten queries with random masks; the class of each is learnt by nobody, and set here by `likely`."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, mlp_ratio=1, out_features=stages
    )
    torch.manual_seed(1)
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, dim_feedforward=16, num_queries=10,
        num_labels=len(classes),
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.normal_(0, 0.3)
        for name, bias in likely.items():
            model.class_predictor.bias[classes.index(name)] = bias
        model.model.transformer_module.queries_embedder.weight.normal_(0, 3)
        model.model.transformer_module.queries_features.weight.normal_(0, 3)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A judge of COCO that looks at small pictures, which is quicker."""
    folder = tmp_path_factory.mktemp("detector")
    (folder / "geneval.json").write_text('{"short_side": 256, "long_side": 416}')
    return save_detector(folder, geneval.CLASSES, dict(dog=7.0, cat=6.5))


@pytest.fixture(scope="module")
def detect(detector):
    return geneval.load_detector(detector, geneval.settings_of(detector))


def noise(seed, width=64, height=48):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


PROMPTS = ["a red dog", "two green cats on a mat"]


@pytest.mark.parametrize("divisor", [None, 26])
def test_clip_scores_are_those_of_clip(clip, divisor):
    images = [noise(0), noise(1, 40, 80)]
    scores = rewards.load_clip_score(clip, clip, divisor)(images, tuple(PROMPTS), [{}] * 2)
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        output = model(**processor(text=PROMPTS, images=images, padding=True, return_tensors="pt"))
    logits = output.logits_per_image.diagonal()  # logit scale * cosine
    expected = logits / 26 if divisor else logits / model.logit_scale.exp()
    assert scores == pytest.approx(expected.tolist(), abs=1e-6) and abs(scores[0] - scores[1]) > 1e-4


def test_clip_cuts_a_prompt_that_is_too_long(clip):
    score = rewards.load_clip_score(clip, clip)
    assert score([noise(0)], ["dog " * 100], [{}]) == pytest.approx(score([noise(0)], ["dog " * 99], [{}]))


def test_the_registered_clip_scores(monkeypatch, clip):
    asked = {}
    for cls in (CLIPModel, CLIPProcessor):

        def from_pretrained(name, cls=cls, real=cls.from_pretrained, **options):
            asked[cls.__name__, name] = options
            return real(clip)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    picked, preferred = (
        rewards.load(name)([noise(0)], [PROMPTS[0]], [{}]) for name in ("pickscore", "hpsv2")
    )
    scale = CLIPModel.from_pretrained("any").logit_scale.exp().item()
    assert picked[0] == pytest.approx(preferred[0] * scale / 26, abs=1e-6)
    laion, pick = "1c2b8495b28150b8a4922ee1c8edee224c284c0c", "a4e4367c6dfa7288a00c550414478f865b875800"
    safe = dict(use_safetensors=True, dtype=torch.float32)
    del asked["CLIPModel", "any"]
    assert asked == {
        ("CLIPProcessor", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"): dict(revision=laion),
        ("CLIPModel", "yuvalkirstain/PickScore_v1"): safe | dict(revision=pick),
        ("CLIPModel", "adams-story/HPSv2-hf"): safe | dict(revision="refs/pr/2"),
    }


def test_detections_are_those_of_transformers_post_processing(detector):
    """On a picture of 384 x 384, where its grid is the picture's own."""
    from transformers import AutoImageProcessor

    image = noise(2, 384, 384)
    objects = geneval.load_detector(detector, geneval.Settings(size=[256, 256]))(image, 0.3)
    processor = AutoImageProcessor.from_pretrained(detector)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector)
    with torch.no_grad():
        inputs = processor(images=image, size=dict(width=256, height=256), return_tensors="pt")
        output = model(**inputs)
    (expected,) = processor.post_process_instance_segmentation(
        output, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
    )
    assert {"dog", "cat"} == set(objects)
    found = [(name, box[4], mask) for name in objects for box, mask in objects[name]]
    infos = sorted(
        zip(expected["segments_info"], expected["segmentation"].bool().numpy(), strict=True),
        key=lambda pair: -pair[0]["score"],
    )
    found.sort(key=lambda one: -one[1])
    assert len(found) == len(infos) >= 5
    for (name, score, mask), (info, other) in zip(found, infos, strict=True):
        assert name == geneval.CLASSES[info["label_id"]] and score == pytest.approx(info["score"], abs=2e-6)
        assert mask.shape == (384, 384) and mask.any() and (mask == other).all()


@pytest.mark.parametrize(
    "settings, width, height, scaled",
    [
        ({}, 512, 512, (800, 800)),
        ({}, 1024, 1024, (800, 800)),
        ({}, 1024, 768, (800, 1056)),  # 800 and 1066.7, to the nearest multiple of 32
        ({}, 768, 1024, (1056, 800)),
        ({}, 1000, 200, (256, 1344)),  # 266.6 and 1333
        ({}, 2000, 10, (32, 1344)),
        (dict(short_side=64, long_side=128), 64, 32, (64, 128)),
        (dict(size=[64, 128]), 64, 32, (64, 128)),
        (dict(size=[64, 128]), 512, 512, (64, 128)),
    ],
)
def test_pictures_are_scaled_as_mmdetection_or_the_judge_does(settings, width, height, scaled):
    size = geneval.scaled_size(Image.new("RGB", (width, height)), geneval.Settings(**settings))
    assert (size["height"], size["width"]) == scaled


def test_boxes_hug_their_masks_and_the_surest_come_first(detect):
    for image in (noise(3), noise(4, 100, 30)):
        objects = detect(image, 0.3)
        assert sum(map(len, objects.values())) >= 3
        for found in objects.values():
            scores = [box[4] for box, _ in found]
            assert scores == sorted(scores, reverse=True) and all(0.3 < score <= 1 for score in scores)
            for (x0, y0, x1, y1, _), mask in found:
                assert mask.shape == (image.height, image.width) and mask.dtype == bool
                assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
                assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


def test_a_higher_threshold_keeps_the_surest_and_a_class_at_most_16(detect, monkeypatch):
    image = noise(3)
    scores = sorted((box[4] for found in detect(image, 0.1).values() for box, _ in found), reverse=True)
    middle = (scores[2] + scores[3]) / 2
    kept = [box[4] for found in detect(image, middle).values() for box, _ in found]
    assert sorted(kept, reverse=True) == pytest.approx(scores[:3])
    assert not any(detect(image, 0.9999).values())
    monkeypatch.setattr(geneval, "MOST_OBJECTS", 1)
    assert max(map(len, detect(image, 0.1).values())) == 1


def test_the_largest_part_of_a_mask():
    mask = np.zeros((20, 30), bool)
    assert not geneval.largest_part(mask).any()
    mask[2:5, 2:5] = True
    assert (geneval.largest_part(mask) == mask).all()
    mask[8:12, 20:24] = True
    mask[12, 24] = True  # touches by a corner alone
    largest = np.zeros_like(mask)
    largest[8:12, 20:24] = True
    assert (geneval.largest_part(mask) == largest).all()
    assert geneval.box_of(largest) == (20, 8, 24, 12)


def test_a_cut_out_is_gray_outside_of_its_mask():
    mask = np.zeros((48, 64), bool)
    mask[10:20, 30:40] = True
    mask[10, 30] = False
    crop = np.array(geneval.cut_out(Image.new("RGB", (64, 48), (200, 10, 20)), (29, 10, 40, 20, 0.9), mask))
    assert crop.shape == (10, 11, 3)
    assert (crop[:, 0] == 0x99).all() and (crop[0, 1] == 0x99).all()
    assert (crop[1:, 1:] == (200, 10, 20)).all()


def test_geneval_from_picture_to_score(clip, detector, detect):
    """The whole reward, against its own parts put together by hand."""
    image = noise(3)
    objects = detect(image, 0.3)
    wanted = {name: len(found) for name, found in objects.items() if found}
    name, count = max(wanted.items(), key=lambda item: item[1])
    embed, _ = rewards.load_clip(clip, clip)
    crops = [geneval.cut_out(image, *one) for one in objects[name]]
    templates = [f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object"]
    similar = [
        sum(embed([template.format(colour)])[0] for template in templates) for colour in geneval.COLOURS
    ]
    similar = torch.stack([vector / vector.norm() for vector in similar])
    colours = [geneval.COLOURS[i] for i in (embed(crops) @ similar.T).argmax(-1)]
    most = max(colours, key=colours.count)
    other = next(colour for colour in geneval.COLOURS if colour not in colours)

    def line(tag, count, **more):
        return {"tag": tag, "prompt": "x", "include": [clause(name, count, **more)]}

    metadata = [line("colors", count), line("colors", count + 1), line("colors", count, color=most),
                line("colors", count, color=other), line("counting", count)]  # fmt: skip
    models = dict(detector=detector, clip=clip)
    partial = geneval.load(**models)([image] * 5, ["x"] * 5, metadata)
    share = colours.count(most) / count
    sure = sum(box[4] > 0.9 for box, _ in objects[name])
    assert partial == pytest.approx([1, count / (count + 1), (1 + share) / 2, 0.5, sure / count])
    strict = geneval.load(strict=True, **models)([image] * 5, ["x"] * 5, metadata)
    assert strict == [1, 0, float(share == 1), 0, float(sure == count)]
    assert geneval.judge_by(**models) is geneval.judge_by(**models)  # one set of models for both


def test_geneval_needs_its_metadata(clip, detector):
    wanted = 'expected a "tag", a non-empty list "include" .*; got the metadata .*my cat'
    with pytest.raises(BadInput, match=wanted):
        geneval.load(detector=detector, clip=clip)([noise(0)], ["a dog"], [{"tag": "my cat"}])


def test_a_model_that_returns_nan_is_not_a_zero(detector, tmp_path):
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector)
    with torch.no_grad():
        model.class_predictor.bias[DOG] = torch.nan
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="not finite"):
        geneval.load_detector(str(tmp_path), geneval.Settings())(noise(0), 0.3)


# ------------------------------------------------------------------------------------------------------------
# Another judge: six shapes in place of COCO

SHAPES = {
    "classes": ["circle", "square", "triangle", "star", "cross", "heart"],
    "colours": ["white", "black", "yellow"],
    "threshold": 0.2,
    "counting_threshold": 0.45,
    "size": [64, 128],
    "largest_component": True,
    "colour_prompts": ["a {0} {1}"],
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "geneval.json").write_text(json.dumps(SHAPES))
    return save_detector(folder, SHAPES["classes"], dict(star=6.0, heart=5.5))


@pytest.fixture
def registered(monkeypatch, shapes, clip):
    """As README says: an entry in REWARDS and one in CHECKS."""
    judge = dict(detector=shapes, clip=clip)
    load = functools.partial(rewards.scorer, "geneval", "load", **judge)
    strict = functools.partial(rewards.scorer, "geneval", "load", strict=True, **judge)
    check = functools.partial(rewards.scorer, "geneval", "check", **judge)
    monkeypatch.setattr(rewards, "REWARDS", rewards.REWARDS | {"shapes": load, "shapes-strict": strict})
    monkeypatch.setattr(rewards, "CHECKS", rewards.CHECKS | {"shapes": check, "shapes-strict": check})
    return judge


def shape_line(tag="colors", **more):
    return {"tag": tag, "prompt": "a heart", "include": [clause("heart", **more)]}


def test_another_judge_scores_by_its_own_classes_colours_and_thresholds(registered, clip, shapes):
    image = noise(5, 64, 32)
    settings = geneval.settings_of(shapes)
    assert settings == geneval.Settings(**SHAPES) and settings.short_side == 800
    objects = geneval.load_detector(shapes, settings)(image, 0.2)
    hearts = objects["heart"]
    assert len(hearts) >= 2 and set(objects) <= set(SHAPES["classes"])
    for found in objects.values():
        for box, mask in found:
            assert (geneval.largest_part(mask) == mask).all() and geneval.box_of(mask) == box[:4]
    sure = [box[4] for box, _ in hearts]
    counted = sum(score > 0.45 for score in sure)
    assert 0 < counted < len(hearts)  # so that the thresholds make a difference
    colours = geneval.load_colour_judge(clip, settings)(image, "heart", hearts)
    assert set(colours) <= set(SHAPES["colours"])
    lines = [shape_line(count=len(hearts)), shape_line("counting", count=len(hearts)),
             shape_line(count=len(hearts), color=colours[0])]  # fmt: skip
    share = colours.count(colours[0]) / len(hearts)
    expected = [1, counted / len(hearts), (1 + share) / 2]
    images, prompts = [image] * 3, ["a heart"] * 3
    assert rewards.load("shapes")(images, prompts, lines) == pytest.approx(expected)
    assert rewards.load("shapes-strict")(images, prompts, lines) == [1, 0, float(share == 1)]


def test_the_largest_component_is_optional(shapes):
    image = noise(5, 64, 32)
    whole = geneval.load_detector(shapes, geneval.Settings(**SHAPES | {"largest_component": False}))(
        image, 0.2
    )
    masks = [mask for found in whole.values() for _, mask in found]
    assert any((geneval.largest_part(mask) != mask).any() for mask in masks)


@pytest.mark.parametrize("name", ["shapes", "shapes-strict"])
@pytest.mark.parametrize(
    "change", [clause("car"), clause("person"), clause("star", color="red"), clause("star", 17)]
)
def test_another_judges_check_names_its_classes_and_loads_no_model(
    registered, tmp_path, monkeypatch, name, change
):
    monkeypatch.setattr(geneval, "model_from_hub", pytest.fail)
    file = tmp_path / "train_metadata.jsonl"
    good = shape_line(color="yellow")
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | {"include": [change]}) + "\n")
    named = 'circle, square, triangle, star, cross, heart; .* "color" of white, black, yellow or'
    with pytest.raises(BadInput, match=f'line 2: expected a "class" of {named} .*; got .*') as error:
        rewards.read_prompts(file, [name])
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    file.write_text(json.dumps(good))
    assert rewards.read_prompts(file, [name]) == [("a heart", good)]
    with pytest.raises(
        BadInput, match='"class" of person, bicycle, car, .* [.][.][.]; a "count" from 1 to 16'
    ):
        rewards.read_prompts(file, ["geneval"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "expected a JSON object with keys of classes, colours"),
        ("[1, 2]", "expected a JSON object"),
        ('{"class": ["star"]}', "expected a JSON object .*'class'"),
        ('{"classes": []}', "non-empty lists of strings"),
        ('{"classes": "star"}', "non-empty lists of strings"),
        ('{"colours": ["red", 3]}', "non-empty lists of strings"),
        ('{"size": 64}', "numbers of pixels"),
        ('{"size": [64]}', "numbers of pixels"),
        ('{"size": [64, 0]}', "numbers of pixels"),
        ('{"short_side": "800"}', "numbers of pixels"),
        ('{"threshold": 30}', "thresholds from 0 to 1, got 30"),
        ('{"counting_threshold": null}', "thresholds from 0 to 1, got None"),
        ('{"largest_component": "no"}', "true or false"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(tmp_path, content, message):
    (tmp_path / "geneval.json").write_text(content)
    with pytest.raises(BadInput, match=f"^{tmp_path}/geneval.json: .*{message}") as error:
        geneval.settings_of(str(tmp_path))
    assert "\n" not in str(error.value)


def test_settings_must_name_every_label(detector, clip):
    with pytest.raises(
        BadInput, match=f"{detector}: has 80 labels; expected a geneval.json with them, not 6"
    ):
        geneval.load_detector(detector, geneval.Settings(**SHAPES))


# ------------------------------------------------------------------------------------------------------------
# Weights that cannot be had


def test_pickled_weights_are_refused(clip, tmp_path):
    for file in Path(clip).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(CLIPModel.from_pretrained(clip).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="model.safetensors.*expected safetensors") as error:
        rewards.load_clip_score(str(tmp_path), clip)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, asked_for",
    [
        ("pickscore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("geneval", "facebook/mask2former-swin-small-coco-instance"),
    ],
)
def test_weights_that_are_not_there_are_one_line(monkeypatch, tmp_path, name, asked_for):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=f"^{asked_for}: .*`hf download`.*`hf auth login`") as error:
        rewards.load(name)
    assert "\n" not in str(error.value)


def test_importing_rewards_imports_no_framework():
    code = "import sys, rewards; print({m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60)
    loaded = eval(done.stdout)
    assert "rapidfuzz" in loaded
    heavy = {"torch", "transformers", "diffusers", "rapidocr", "onnxruntime", "scipy", "huggingface_hub"}
    assert not loaded & (heavy | {"scorers", "tiny"})
