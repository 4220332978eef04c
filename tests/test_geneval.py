"""GenEval and CLIP scores: the rules on scenes worked by hand, the models on small ones of random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
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
from rewards import BadInput, geneval_score, relative_position

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


@pytest.mark.parametrize("relation", rewards.RELATIONS)
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
    assert len(set(rewards.CLASSES)) == 80 and len(set(rewards.COLOURS)) == 10
    assert [rewards.CLASSES[i] for i in (0, 2, 5, 15, 56, 64, 79)] == [
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


DOG, CAT = rewards.CLASSES.index("dog"), rewards.CLASSES.index("cat")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Ten queries with random masks; the class of each is learnt by nobody, and set here."""
    folder = tmp_path_factory.mktemp("detector")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, mlp_ratio=1, out_features=stages
    )
    torch.manual_seed(1)
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, dim_feedforward=16, num_queries=10,
        num_labels=80,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.normal_(0, 0.3)
        model.class_predictor.bias[DOG], model.class_predictor.bias[CAT] = 7.0, 6.5
        model.model.transformer_module.queries_embedder.weight.normal_(0, 3)
        model.model.transformer_module.queries_features.weight.normal_(0, 3)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


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

    def from_hub(cls, name, **options):
        asked[cls.__name__, name] = options
        return cls.from_pretrained(clip)

    monkeypatch.setattr(rewards, "from_hub", from_hub)
    picked, preferred = (
        rewards.load(name)([noise(0)], [PROMPTS[0]], [{}]) for name in ("pickscore", "hpsv2")
    )
    scale = CLIPModel.from_pretrained(clip).logit_scale.exp().item()
    assert picked[0] == pytest.approx(preferred[0] * scale / 26, abs=1e-6)
    safe = dict(use_safetensors=True, dtype=torch.float32)
    assert asked == {
        ("CLIPProcessor", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"): {},
        ("CLIPModel", "yuvalkirstain/PickScore_v1"): safe,
        ("CLIPModel", "adams-story/HPSv2-hf"): safe | dict(revision="refs/pr/2"),
    }


def test_detections_are_those_of_transformers_post_processing(detector, monkeypatch):
    """On a picture of 384 x 384, where its grid is the picture's own."""
    from transformers import AutoImageProcessor

    image = noise(2, 384, 384)
    objects = rewards.load_detector(detector)(image, 0.3)
    processor = AutoImageProcessor.from_pretrained(detector)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector)
    with torch.no_grad():
        inputs = processor(images=image, size=dict(width=800, height=800), return_tensors="pt")
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
        assert name == rewards.CLASSES[info["label_id"]] and score == pytest.approx(info["score"], abs=2e-6)
        assert mask.shape == (384, 384) and mask.any() and (mask == other).all()


def test_boxes_hug_their_masks_and_the_surest_come_first(detector):
    detect = rewards.load_detector(detector)
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


def test_a_higher_threshold_keeps_the_surest_and_a_class_at_most_16(detector, monkeypatch):
    detect, image = rewards.load_detector(detector), noise(3)
    scores = sorted((box[4] for found in detect(image, 0.1).values() for box, _ in found), reverse=True)
    middle = (scores[2] + scores[3]) / 2
    kept = [box[4] for found in detect(image, middle).values() for box, _ in found]
    assert sorted(kept, reverse=True) == pytest.approx(scores[:3])
    assert not any(detect(image, 0.9999).values())
    monkeypatch.setattr(rewards, "MOST_OBJECTS", 1)
    assert max(map(len, detect(image, 0.1).values())) == 1


def test_a_cut_out_is_gray_outside_of_its_mask():
    mask = np.zeros((48, 64), bool)
    mask[10:20, 30:40] = True
    mask[10, 30] = False
    crop = np.array(rewards.cut_out(Image.new("RGB", (64, 48), (200, 10, 20)), (29, 10, 40, 20, 0.9), mask))
    assert crop.shape == (10, 11, 3)
    assert (crop[:, 0] == 0x99).all() and (crop[0, 1] == 0x99).all()
    assert (crop[1:, 1:] == (200, 10, 20)).all()


def test_geneval_from_picture_to_score(clip, detector):
    """The whole reward, against its own parts put together by hand."""
    image = noise(3)
    objects = rewards.load_detector(detector)(image, 0.3)
    wanted = {name: len(found) for name, found in objects.items() if found}
    name, count = max(wanted.items(), key=lambda item: item[1])
    embed, _ = rewards.load_clip(clip, clip)
    crops = [rewards.cut_out(image, *one) for one in objects[name]]
    templates = [f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object"]
    similar = [
        sum(embed([template.format(colour)])[0] for template in templates) for colour in rewards.COLOURS
    ]
    similar = torch.stack([vector / vector.norm() for vector in similar])
    colours = [rewards.COLOURS[i] for i in (embed(crops) @ similar.T).argmax(-1)]
    most = max(colours, key=colours.count)
    other = next(colour for colour in rewards.COLOURS if colour not in colours)

    def line(tag, count, **more):
        return {"tag": tag, "prompt": "x", "include": [clause(name, count, **more)]}

    metadata = [line("colors", count), line("colors", count + 1), line("colors", count, color=most),
                line("colors", count, color=other), line("counting", count)]  # fmt: skip
    models = dict(detector=detector, clip=clip)
    partial = rewards.load_geneval(**models)([image] * 5, ["x"] * 5, metadata)
    share = colours.count(most) / count
    sure = sum(box[4] > 0.9 for box, _ in objects[name])
    assert partial == pytest.approx([1, count / (count + 1), (1 + share) / 2, 0.5, sure / count])
    strict = rewards.load_geneval(strict=True, **models)([image] * 5, ["x"] * 5, metadata)
    assert strict == [1, 0, float(share == 1), 0, float(sure == count)]
    assert rewards.judge_by(**models) is rewards.judge_by(**models)  # one set of models for both


def test_geneval_needs_its_metadata(clip, detector):
    with pytest.raises(BadInput, match='geneval, metadata .*expected a "tag", a non-empty list "include"'):
        rewards.load_geneval(detector=detector, clip=clip)([noise(0)], ["a dog"], [{}])


def test_a_model_that_returns_nan_is_not_a_zero(detector, tmp_path):
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector)
    with torch.no_grad():
        model.class_predictor.bias[DOG] = torch.nan
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(rewards.RewardError, match="not finite"):
        rewards.load_detector(str(tmp_path))(noise(0), 0.3)


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


def test_weights_that_are_not_there_are_one_line(tmp_path):
    code = """import rewards
for name in ("pickscore", "geneval"):
    try:
        rewards.load(name)
    except rewards.BadInput as error:
        print(error)"""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=offline, cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "facebook/mask2former-swin-small-coco-instance",
    ]  # fmt: skip
    assert all("`hf download`" in line and "`hf auth login`" in line for line in lines)


def test_importing_rewards_imports_no_framework():
    code = "import sys, rewards; print({m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60)
    loaded = eval(done.stdout)
    assert "rapidfuzz" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "diffusers",
        "rapidocr",
        "onnxruntime",
        "scipy",
        "huggingface_hub",
    }
