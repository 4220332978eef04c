"""Rewards: what OCR and the CLIP models score, how a reward is found by its name, and what is refused."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import rapidocr
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

import rewards
from rewards import BadInput, RewardError

PICKSCORE = str(Path(__file__).resolve().parent.parent / "tiny" / "pickscore")
PICTURE = Image.new("RGB", (64, 32))


@pytest.mark.parametrize(
    "found, target, score",
    [
        ("the c at sat", "CAT", 1),  # contained; spaces and case do not count
        ("car", "CAT", 2 / 3),
        ("", "CAT", 0),
        ("something else entirely", "CAT", 0),  # more edits than letters
        ("don't", "don’t", 1),
        ("‘tis", "'tis", 1),
        ("say “no”", 'say "no"', 1),
        ("cafe\u0301", "caf\u00e9", 1),  # an accent of its own, and a letter that has it
        ("caf\u00e9", "cafe\u0301", 1),
        ("9-5", "9–5", 1),
        ("A — B", "a-b", 1),
    ],
)
def test_text_score(found, target, score):
    assert rewards.text_score(found, target) == pytest.approx(score)


@pytest.mark.parametrize("prompt", ["no text", 'an "A" and a "B"', 'open "A', 'blank "  "', "single 'A'"])
def test_a_prompt_without_exactly_one_quoted_text_is_refused(prompt):
    assert rewards.quoted_text('a sign that says "Öl’s 5"') == "Öl’s 5"
    with pytest.raises(ValueError, match="expected exactly one text in double quotes"):
        rewards.quoted_text(prompt)


def written(text, size, font, place, ink=(240, 240, 240)):
    image = Image.new("RGB", size, (100, 100, 100))
    ImageDraw.Draw(image).text(place, text, font=ImageFont.load_default(font), fill=ink)
    return image


def test_ocr_reads_small_and_large_pictures_in_any_order(monkeypatch):
    """One thread reads them all. In a large picture the text is searched first; a small one is one line."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    small = written("CAT", (64, 32), 20, (8, 4), ink=(130, 130, 130))  # too faint for the search
    large = written("Fresh Bread", (512, 512), 60, (60, 380))
    images = [small, large, small, Image.new("RGB", (512, 512)), large]
    texts = ["CAT", "Fresh Bread", "DOG", "CAT", "Car Wash"]
    scores = rewards.load("ocr")(images, [f'says "{text}"' for text in texts], [{}] * 5)
    assert scores[:2] == [1, 1] and scores[3] == 0
    assert scores[2] <= 1 / 3 and scores[4] < 0.6


def test_an_ocr_engine_that_fails_is_not_a_zero(monkeypatch):
    monkeypatch.setattr(rapidocr, "RapidOCR", lambda params: lambda *args, **switches: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rewards.load("ocr")([PICTURE], ['"A"'], [{}])


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_clip_scores_are_those_of_clip(monkeypatch, name):
    """PickScore is logit scale * cosine / 26, HPSv2 the cosine. A prompt that is too long is cut."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    images = [Image.fromarray(pixels).resize((64, 32)) for pixels in coarse]
    prompts = ["a red card", "two green stars on a blue card", "red " * 99]
    model, processor = CLIPModel.from_pretrained(PICKSCORE).float(), CLIPProcessor.from_pretrained(PICKSCORE)
    inputs = processor(text=prompts, images=images, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()  # logit scale * cosine
        expected = logits / 26 if name == "pickscore" else logits / model.logit_scale.exp()
    for cls in (CLIPModel, CLIPProcessor):
        real = cls.from_pretrained  # of the folder, whatever is asked for, so long as its revision is pinned
        pinned = lambda name, revision, real=real, **o: real(PICKSCORE, **o) if revision != "main" else 1 / 0  # noqa: E731
        monkeypatch.setattr(cls, "from_pretrained", pinned)
    scores = rewards.load(name)(images, tuple(prompts), [{}] * 3)
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert max(scores) - min(scores) > 1e-3


def without_a_tensor(weights):
    save_file({n: t for n, t in load_file(weights).items() if n != "logit_scale"}, weights, {"format": "pt"})


def pickled(weights):
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without_a_tensor, "has no weights for logit_scale"),
        (pickled, "expected safetensors"),
        (lambda weights: weights.unlink(), "expected safetensors.*`hf download`.*`hf auth login`"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(tmp_path, spoil, message):
    shutil.copytree(PICKSCORE, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=f"^{tmp_path}: .*{message}") as error:
        rewards.load_clip_score(str(tmp_path), PICKSCORE)
    assert "\n" not in str(error.value)


MINE = """
def load():
    return lambda images, prompts, metadata: [image.width / 100 for image in images]

def check(prompt, metadata):
    if "cat" not in prompt:
        raise ValueError("expected a cat")

load.check = check
"""


def test_a_reward_of_ones_own_is_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards.load("my_reward:load")([PICTURE] * 2, ["a cat"] * 2, [{}] * 2) == [0.64] * 2
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a cat that says "A"\na dog that says "B"\n')
    assert len(rewards.read_prompts(prompts, ["ocr"])) == 2
    with pytest.raises(BadInput, match="prompts.txt, line 2: expected a cat"):
        rewards.read_prompts(prompts, ["ocr", "my_reward:load"])


@pytest.mark.parametrize("name", ["orc", "no_such_module:load", "json:no_such_function"])
def test_an_unknown_reward_is_refused_with_the_choices(name):
    with pytest.raises(BadInput, match=f"reward {name}: expected module:function or one of ocr, geneval, "):
        rewards.load(name)


@pytest.mark.parametrize("scores", [[1, math.nan], [1, math.inf], [1], [1, 1, 1], []])
def test_a_result_that_is_no_finite_number_an_image_is_refused(monkeypatch, scores):
    monkeypatch.setitem(rewards.REWARDS, "broken", lambda: lambda images, prompts, metadata: scores)
    with pytest.raises(RewardError, match="reward broken: expected 2 finite numbers, got "):
        rewards.load("broken")([PICTURE] * 2, ["a"] * 2, [{}] * 2)
