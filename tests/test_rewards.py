"""Rewards: what is scored, and that a failure is never a zero."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import rewards
from tiny import cards


def picture(word="CAT", colour="red", frame=True, gradient=True, dx=1, dy=-1):
    """A card with parts left out, as a PIL image."""
    ground = cards.background(colour).copy()
    if not gradient:
        ground[:] = ground.mean((0, 1))
    card = np.where(frame & cards.frame_mask()[..., None], 1, ground)
    cover = cards.glyphs(word, dx, dy)[..., None] if word else 0
    return Image.fromarray(np.uint8(np.round((card + cover * (1 - card)) * 255)))


PROMPT = cards.prompt_of("CAT", "red")


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
    prompts = [cards.prompt_of(word, "red") for word in words]
    assert ocr(images, prompts, [{}] * 5) == [1.0] * 5
    wrong = ocr(images, [cards.prompt_of("DUST", "red")] * 5, [{}] * 5)
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
    with pytest.raises(RuntimeError, match="engine broke"):
        rewards.load("ocr")([picture()], [PROMPT], [{}])


@pytest.mark.parametrize(
    "scores, message", [([1.0, math.nan], "nan"), ([1.0, math.inf], "inf"), ([1.0], "1 scores for 2")]
)
def test_a_reward_that_returns_nonsense_stops_the_run(monkeypatch, scores, message):
    monkeypatch.setitem(rewards.REWARDS, "broken", lambda: lambda images, prompts, metadata: scores)
    with pytest.raises(rewards.RewardError, match=message):
        rewards.load("broken")([picture()] * 2, [PROMPT] * 2, [{}] * 2)


def test_a_perfect_card_scores_1_and_each_fault_shows_in_its_own_part():
    perfect = cards.fidelity(picture(), PROMPT)
    assert tuple(perfect) == cards.PARTS == rewards.CARD_PARTS
    assert min(perfect.values()) > 0.98
    faults = {
        "colour": picture(colour="blue"),
        "frame": picture(frame=False),
        "gradient": picture(gradient=False),
        "glyph": picture(word=""),
    }
    for part, image in faults.items():
        assert cards.fidelity(image, PROMPT)[part] < 0.1
    for part in ("frame", "gradient", "glyph"):
        others = cards.fidelity(faults[part], PROMPT)
        assert min(value for name, value in others.items() if name != part) > 0.85
    assert cards.fidelity(picture(word="DOG"), PROMPT)["glyph"] < 0.6


def test_every_layout_of_the_renderer_is_perfect():
    for dx in range(-cards.JITTER_X, cards.JITTER_X + 1):
        for dy in range(-cards.JITTER_Y, cards.JITTER_Y + 1):
            assert min(cards.fidelity(picture(dx=dx, dy=dy), PROMPT).values()) > 0.97


def test_the_cards_reward_is_the_mean_of_its_parts():
    images, prompts = [picture(frame=False), picture()], [PROMPT] * 2
    parts = [rewards.load(f"cards-{part}")(images, prompts, [{}] * 2) for part in rewards.CARD_PARTS]
    assert rewards.load("cards")(images, prompts, [{}] * 2) == pytest.approx(np.mean(parts, axis=0).tolist())
    with pytest.raises(ValueError, match="not a card's prompt"):
        cards.fidelity(picture(), 'a sign that says "CAT"')
    with pytest.raises(ValueError, match="64 x 32"):
        cards.fidelity(Image.new("RGB", (32, 32)), PROMPT)


def test_the_sheet_holds_every_picture_with_its_caption():
    page = np.array(rewards.sheet([picture()] * 8, [PROMPT] * 8, [0.5] * 8))
    assert page.shape == (2 * (128 + 48), 4 * 256, 3)
    assert (page[128:176].min(axis=(0, 2)) < 100).any() and (page[176 + 128 :].min(axis=(0, 2)) < 100).any()
