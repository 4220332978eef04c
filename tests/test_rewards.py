"""Rewards: what OCR and the CLIP models score, how a reward is found by its name, and what is refused."""

import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

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
        ("something else entirely", "CAT", 0),  # more edits than letters
        ("‘tis 5′ don´t", "'tis 5' don’t", 1),
        ("say “no”", 'say "no"', 1),
        ("A — B", "a-b", 1),
        ("cafe\u0301", "caf\u00e9", 1),  # an accent of its own, and a letter that has it
        ("OPEN ⅓ ﬁne", "ＯＰＥＮ 1/3 fine", 1),
        ("cafe\u200b\u0301 ❤", "ca\u00adf\u00e9\u200e ❤\ufe0f", 1),  # what nobody sees
    ],
)
def test_text_score(found, target, score):
    assert rewards.text_score(found, target) == pytest.approx(score)


def written(text, size, font, place, ink):
    image = Image.new("RGB", size, "#646464")
    ImageDraw.Draw(image).text(place, text, font=ImageFont.load_default(font), fill=ink)
    return image


def test_ocr_reads_small_and_large_pictures_in_any_order(monkeypatch):
    """One thread reads them all. In a large picture the text is searched first; a small one is one line."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    small = written("CAT", (64, 32), 20, (8, 4), "#828282")  # too faint for the search
    large = written("Fresh Bread", (512, 512), 60, (60, 380), "#f0f0f0")
    images = [small, large, small, Image.new("RGB", (512, 512)), large]
    texts = ["CAT", "Fresh Bread", "DOG", "CAT", "Car Wash"]
    scores = rewards.load("ocr")(images, [f'says "{text}"' for text in texts], [{}] * 5)
    assert scores[:2] == [1, 1] and scores[3] == 0
    assert scores[2] <= 1 / 3 and scores[4] < 0.6


def test_an_ocr_engine_that_fails_is_not_a_zero(monkeypatch):
    monkeypatch.setattr(rapidocr, "RapidOCR", lambda params: lambda *args, **switches: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rewards.load("ocr")([PICTURE], ['"A"'], [{}])


PINNED = {  # the weights and the processor of each, by the hub's id and commit
    "pickscore": ("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"),
    "hpsv2": ("adams-story/HPSv2-hf", "refs/pr/2"),
}
PROCESSOR = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")


@pytest.mark.parametrize("name", PINNED)
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
    asked, real = {}, {cls: cls.from_pretrained for cls in (CLIPModel, CLIPProcessor)}
    for cls in real:

        def local(name, revision, cls=cls, **options):
            asked[cls] = (name, revision)
            return real[cls](PICKSCORE, **options)

        monkeypatch.setattr(cls, "from_pretrained", local)
    scores = rewards.load(name)(images, tuple(prompts), [{}] * 3)
    assert asked == {CLIPModel: PINNED[name], CLIPProcessor: PROCESSOR}
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert max(scores) - min(scores) > 1e-3


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", POINTER),
    ("model.safetensors", (Path(PICKSCORE) / "model.safetensors").read_bytes()[:99999]),
    ("tokenizer.json", POINTER),
    ("tokenizer.json", b"{}"),  # of which transformers makes a KeyError
])  # fmt: skip
def test_a_model_whose_files_are_not_whole_is_one_line(tmp_path, name, content):
    shutil.copytree(PICKSCORE, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"^{tmp_path}: .*expected safetensors, all files whole") as error:
        rewards.load_clip_score(str(tmp_path), str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_without_a_weight_or_a_tokenizer_is_refused(tmp_path):
    """Of the one transformers makes up a random number, of the other a tokenizer that knows no word."""
    shutil.copytree(PICKSCORE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=f"^{tmp_path}: has no tokenizer"):
        rewards.load_clip_score(PICKSCORE, str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=f"^{tmp_path}: has no weights for logit_scale"):
        rewards.load_clip_score(str(tmp_path), PICKSCORE)


def load(reward):
    """The reward as `load` gives it for the name `mine:load`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mine", SimpleNamespace(load=lambda: reward))
        return rewards.load("mine:load")


def test_a_reward_of_ones_own_is_module_and_function_and_gets_copies():
    def edit(images, prompts, metadata):
        images[0].paste((9, 9, 9), (0, 0, 64, 32))
        metadata[0]["n"].append(1)
        prompts.clear()
        return [image.getpixel((0, 0))[0] for image in images]

    reward, asked = load(edit), ([PICTURE, PICTURE.copy()], ["a", "b"], [{"n": []}, {}])
    assert reward.name == "load" and reward(*asked) == reward(*asked) == [9, 0]
    assert asked[0][0].getpixel((0, 0)) == (0, 0, 0) and asked[1:] == (["a", "b"], [{"n": []}, {}])


@pytest.mark.parametrize("name", ["orc", "no_such_module:load", "json:no_such_function"])
def test_an_unknown_reward_is_refused_with_the_choices(name):
    with pytest.raises(BadInput, match=f"reward {name}: .*expected a URL, module:function or one of ocr, "):
        rewards.load(name)


PICTURES = [PICTURE] * 2, ["a"] * 2, [{}] * 2
LISTS = (1, 0.5), np.array([1, 0.5]), torch.tensor([1, 0.5]).bfloat16(), [torch.tensor(1.0), np.half(0.5)]
NOT_NUMBERS = [[1, math.nan], [1, math.inf], [1, None], ["1", "2"], "12", ([1, 2], {}), {0: 1, 1: 2}, None]
NOT_TWO = [[], [1], 1.5, np.ones((2, 1)), torch.ones(2, 1), np.float32(2)]


@pytest.mark.parametrize("result", LISTS)
def test_a_list_of_numbers_may_be_an_array(result):
    assert load(lambda *asked: result)(*PICTURES) == [1, 0.5]


@pytest.mark.parametrize("result", NOT_NUMBERS + NOT_TWO)
def test_a_result_that_is_no_finite_number_an_image_is_refused(result):
    with pytest.raises(RewardError, match="^reward mine:load: expected 2 finite numbers, got ."):
        load(lambda *asked: result)(*PICTURES)
