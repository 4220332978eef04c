"""Rewards: what is scored, and that a failure is never a zero; what pictures look like."""

import math
import os

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import rewards
from scorers import background
from tiny import cards


def picture(word="CAT", colour="red", pattern="dots", dx=1, dy=-1):
    """A card, as a PIL image; word "" is none."""
    return cards.as_image(cards.draw_word(colour, pattern, word, dx, dy))


def prompt_of(word):
    return f'a red card with dots that says "{word}"'


PROMPT = prompt_of("CAT")


def test_text_score_is_one_minus_the_normalised_edit_distance():
    assert rewards.text_score("Cat", "CAT") == 1
    assert rewards.text_score("the c at sat", "CAT") == 1  # contained, spaces and case aside
    assert rewards.text_score("car", "CAT") == pytest.approx(2 / 3)
    assert rewards.text_score("", "CAT") == 0
    assert rewards.text_score("something else entirely", "CAT") == 0  # more edits than letters


def test_ocr_reads_cards_and_misses_wrong_words():
    ocr = rewards.load("ocr")
    words = ["CAT", "WOLF", "JAZZ", "QUEEN"[:4], "MOON"]
    images = [picture(word, colour) for word, colour in zip(words, cards.COLOURS, strict=False)]
    prompts = [prompt_of(word) for word in words]
    assert ocr(images, prompts, [{}] * 5) == [1.0] * 5
    wrong = ocr(images, [prompt_of("DUST")] * 5, [{}] * 5)
    assert max(wrong) <= 0.5
    assert ocr([picture("")], [PROMPT], [{}]) == [0.0]


def test_ocr_finds_text_in_a_full_size_picture():
    image = Image.new("RGB", (512, 512), (40, 90, 60))
    ImageDraw.Draw(image).text((60, 380), "Fresh Bread", font=ImageFont.load_default(60), fill="white")
    ocr = rewards.load("ocr")
    scores = ocr([image, picture("CAT"), image], ['says "Fresh Bread"', PROMPT, 'says "Car Wash"'], [{}] * 3)
    assert scores[:2] == [1.0, 1.0] and scores[2] < 0.6


def test_an_engine_that_fails_is_not_a_zero(monkeypatch):
    rapidocr = pytest.importorskip("rapidocr")

    def broken(*args, **kwargs):
        raise RuntimeError("engine broke")

    monkeypatch.setattr(rapidocr.RapidOCR, "__call__", broken)
    with pytest.raises(rewards.RewardError, match="reward 'ocr' failed: RuntimeError: engine broke"):
        rewards.load("ocr")([picture()], [PROMPT], [{}])


@pytest.mark.parametrize(
    "limit, cores",
    [
        (None, 8),  # no such file
        ("max 100000", 8),
        ("what", 8),
        ("300000 100000", 3),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 8),
    ],
)
def test_a_containers_limit_is_not_exceeded(monkeypatch, tmp_path, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(rewards, "CPU_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert rewards.usable_cores() == cores


def test_without_affinity_all_cores_count(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(rewards, "CPU_LIMIT", tmp_path / "cpu.max")
    assert rewards.usable_cores() == 64


@pytest.mark.parametrize(
    "scores", [[1.0, math.nan], [1.0, math.inf], [1.0], [1.0] * 3, [], [1.0, "high"], 5, None]
)
def test_a_reward_that_returns_nonsense_stops_the_run(monkeypatch, scores):
    monkeypatch.setitem(rewards.REWARDS, "broken", lambda: lambda images, prompts, metadata: scores)
    with pytest.raises(rewards.RewardError, match="reward 'broken' failed: ") as error:
        rewards.load("broken")([picture()] * 2, [PROMPT] * 2, [{}] * 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\nlines"),
        KeyError("x"),
        MemoryError(),
        StopIteration(),
        rewards.BadInput("bad"),
        rewards.RewardError("no"),
        OSError(5, "disk"),
        AssertionError("a" * 10**6),
    ],
)
def test_whatever_a_reward_raises_is_one_line_that_names_it(monkeypatch, error):
    def reward(images, prompts, metadata):
        raise error

    monkeypatch.setitem(rewards.REWARDS, "broken", lambda: reward)
    with pytest.raises(rewards.RewardError) as raised:
        rewards.load("broken")([picture()], [PROMPT], [{}])
    assert str(raised.value).startswith(f"reward 'broken' failed: {type(error).__name__}:")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert raised.value.__cause__ is error


def test_ctrl_c_is_not_a_failed_reward(monkeypatch):
    def reward(images, prompts, metadata):
        raise KeyboardInterrupt

    monkeypatch.setitem(rewards.REWARDS, "broken", lambda: reward)
    with pytest.raises(KeyboardInterrupt):
        rewards.load("broken")([picture()], [PROMPT], [{}])


def test_the_parts_of_gold_have_one_name_everywhere():
    assert tuple(cards.fidelity(picture(), PROMPT)) == cards.PARTS == rewards.CARD_PARTS


def test_the_cards_reward_is_the_mean_of_its_parts():
    images, prompts = [picture(colour="blue"), picture()], [PROMPT] * 2
    parts = [rewards.load(f"cards-{part}")(images, prompts, [{}] * 2) for part in rewards.CARD_PARTS]
    assert rewards.load("cards")(images, prompts, [{}] * 2) == pytest.approx(np.mean(parts, axis=0).tolist())
    with pytest.raises(rewards.RewardError, match="reward 'cards' failed: .*not a card's prompt"):
        rewards.load("cards")(images, ["a cat"] * 2, [{}] * 2)


def test_the_sheet_holds_every_picture_with_its_caption():
    page = np.array(background.sheet([picture()] * 8, [PROMPT] * 8, [0.5] * 8))
    assert page.shape == (2 * (128 + 48), 4 * 256, 3)
    assert (page[128:176].min(axis=(0, 2)) < 100).any() and (page[176 + 128 :].min(axis=(0, 2)) < 100).any()


# ------------------------------------------------------------------------------------------------------------
# What pictures look like


def checks(period, height=192, width=192):
    """Black and white squares, so that rows and columns repeat after `period` pixels."""
    y, x = np.mgrid[:height, :width] // (period // 2)
    return Image.fromarray(np.uint8((x + y) % 2 * 255)).convert("RGB")


def static(seed, height, width):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    "value, near_black, near_white",
    [(0, 1, 0), (12, 1, 0), (13, 0, 0), (128, 0, 0), (242, 0, 0), (243, 0, 1), (255, 0, 1)],
)
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (64, 32), (200, 120)])
def test_looks_of_one_colour(value, near_black, near_white, size):
    seen = rewards.looks(Image.new("RGB", size, (value,) * 3))
    assert tuple(seen) == rewards.LOOKS and all(type(number) is float for number in seen.values())
    expected = [value / 255, near_black, near_white, 0, 0, 1]
    assert list(seen.values()) == pytest.approx(expected, abs=1e-6)


def test_looks_of_a_picture_that_is_half_black():
    halves = Image.new("RGB", (64, 32), "black")
    halves.paste((255, 255, 255), (32, 0, 64, 32))
    seen = rewards.looks(halves, period=8)
    assert (seen["brightness"], seen["near_black"], seen["near_white"]) == (0.5, 0.5, 0.5)
    assert seen["colours"] == 1  # two colours, each on half of the pixels: one bit
    assert seen["edges"] == pytest.approx(2 * 0.5 / 64)  # a half in each of the two columns at the edge
    red = Image.new("RGB", (64, 32), (255, 0, 0))
    assert rewards.looks(red)["near_black"] == rewards.looks(red)["near_white"] == 0  # by every channel
    assert rewards.looks(red)["brightness"] == pytest.approx(1 / 3)


def test_looks_of_noise():
    seen = rewards.looks(static(0, 256, 256))
    assert seen["brightness"] == pytest.approx(0.5, abs=0.01)
    assert 5.99 < seen["colours"] <= 6  # 64 colours, all as frequent
    assert 0.5 < seen["grid"] < 1.5
    assert (
        seen["edges"]
        > 10 * rewards.looks(static(0, 8, 8).resize((256, 256), Image.Resampling.BICUBIC))["edges"]
    )


@pytest.mark.parametrize("period", [8, 16])
def test_a_grid_is_seen_at_its_own_period_only(period):
    assert rewards.looks(checks(period), period)["grid"] > 300
    for other in (12, 32, 6):
        assert rewards.looks(checks(other), period)["grid"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("period, height, width", [(16, 512, 512), (8, 32, 64)])
def test_a_faint_grid_shows_on_a_picture(period, height, width):
    """Lines of 4 levels of 255 at every patch, on a smooth picture with noise of one level."""
    smooth = np.asarray(static(1, 4, 4).resize((width, height), Image.Resampling.BICUBIC), float)
    smooth += np.random.default_rng(2).normal(0, 1, smooth.shape)
    y, x = np.mgrid[:height, :width]
    lines = (y % period == 0) | (x % period == 0)
    of_grid = []
    for levels in (0, 4):
        image = Image.fromarray(np.uint8(np.clip(smooth + levels * lines[..., None], 0, 255)))
        of_grid.append(rewards.looks(image, period)["grid"])
    assert 0.3 < of_grid[0] < 1.5 and of_grid[1] > 3


@pytest.mark.parametrize("height, width", [(16, 16), (16, 500), (31, 17), (47, 33), (100, 64)])
def test_looks_are_finite_whatever_the_size(height, width):
    pictures = [static(3, height, width), checks(16, height, width), Image.new("L", (width, height), 255)]
    for image in pictures:
        for period in (8, 16):
            assert np.isfinite(list(rewards.looks(image, period).values())).all()
