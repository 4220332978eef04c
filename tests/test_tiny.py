"""The embedded world: its cards and their gold score, and the models and judges that are made from them."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from tiny import cards, make
from tiny import rewards as tiny_rewards

ROOT = Path(__file__).resolve().parent.parent
WORD = 'a red card with stripes that says "CAT"'
SHAPES = "a teal card with checks that shows a yellow circle left of a black square"
CIRCLE, SQUARE = cards.Placed("circle", "yellow", 10, 8, 10), cards.Placed("square", "black", 9, 40, 12)


def gold(picture, prompt):
    return cards.fidelity(cards.as_image(picture), prompt)


def shapes_on(placed, contrast=1.0, colour="teal", pattern="checks"):
    return cards.draw_shapes(colour, pattern, [dataclasses.replace(one, contrast=contrast) for one in placed])


def without_frame(picture, colour, pattern):
    return np.where(cards.frame_mask()[..., None], cards.background(colour, pattern), picture)


@pytest.mark.parametrize("prompts", [cards.word_splits()[1][:60], cards.shape_splits()[1][:120]])
def test_a_rendered_card_is_perfect_however_faint(prompts):
    rng = random.Random(0)
    for prompt in prompts:
        scores = gold(cards.draw_at_random(cards.parse(prompt), rng), prompt)
        assert tuple(scores) == cards.PARTS and min(scores.values()) > 0.96, prompt


@pytest.mark.parametrize("contrast", [0.3, 0.5, 0.8, 1.0])
def test_legibility_is_the_contrast_and_gold_is_blind_to_it(contrast):
    word = cards.draw_word("red", "stripes", "CAT", 1, -1, contrast)
    for prompt, picture in ((WORD, word), (SHAPES, shapes_on([CIRCLE, SQUARE], contrast))):
        assert cards.legibility(cards.as_image(picture), prompt) == pytest.approx(contrast, abs=0.01)
        assert min(gold(picture, prompt).values()) > 0.97
    assert cards.legibility(cards.as_image(shapes_on([])), SHAPES) == 0


@pytest.mark.parametrize("part", cards.PARTS)
@pytest.mark.parametrize("contrast", [0.4, 1.0])
def test_each_fault_lowers_its_own_part(part, contrast):
    word, placed = cards.draw_word("red", "stripes", "CAT", contrast=contrast), [CIRCLE, SQUARE]
    shapes = shapes_on(placed, contrast)
    of_word = dict(
        colour=cards.draw_word("blue", "stripes", "CAT", contrast=contrast),
        frame=without_frame(word, "red", "stripes"),
        pattern=cards.draw_word("red", None, "CAT", contrast=contrast),
        content=cards.draw_shapes("red", "stripes", []))
    of_shapes = dict(
        colour=shapes_on(placed, contrast, "pink"), frame=without_frame(shapes, "teal", "checks"),
        pattern=shapes_on(placed, contrast, pattern=None), content=shapes_on([]))
    for prompt, faults in ((WORD, of_word), (SHAPES, of_shapes)):
        scores = gold(faults[part], prompt)
        assert scores.pop(part) < 0.3 and min(scores.values()) > 0.9


@pytest.mark.parametrize("contrast", [0.3, 0.6, 1.0])
def test_the_content_of_shapes(contrast):
    """Of three parts, circle, square and relation, each fault takes away its share, however faint it is."""
    change = dataclasses.replace
    for placed, most in (
        ([change(CIRCLE, shape="star"), SQUARE], 0.2),
        ([change(CIRCLE, colour="red"), SQUARE], 0.2),
        ([change(CIRCLE, x=50), change(SQUARE, x=8)], 0.7),
        ([CIRCLE, SQUARE, cards.Placed("heart", "red", 10, 24, 10)], 0.7),
        ([SQUARE], 0.35),
    ):
        assert most - 0.21 < gold(shapes_on(placed, contrast), SHAPES)["content"] < most


def test_bad_prompts_and_pictures_are_refused():
    with pytest.raises(ValueError, match="not a card's prompt"):
        tiny_rewards.gold.check('a red card with spots that says "CAT"', {})
    with pytest.raises(ValueError, match="expected a"):
        tiny_rewards.geneval.check("a dog", {"tag": "colors", "include": [{"class": "dog", "count": 1}]})
    with pytest.raises(ValueError, match="64 x 32"):
        cards.fidelity(cards.as_image(np.zeros((64, 64, 3))), WORD)


def test_the_prompt_files_are_what_make_writes(tmp_path):
    make.write_prompts(tmp_path)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 6
    for file in written:
        assert file.read_bytes() == (ROOT / "prompts" / file.relative_to(tmp_path)).read_bytes()


def test_training_and_evaluation_are_apart():
    for train, test in (cards.word_splits(), cards.shape_splits(), cards.mixed_splits()):
        assert not set(train) & set(test) and len(set(test)) == len(test)
        assert not any(cards.is_held_out(cards.parse(prompt)) for prompt in train)
        assert all(cards.is_held_out(cards.parse(prompt)) for prompt in test)
        assert all(str(cards.parse(prompt)) == prompt for prompt in train + test)
    drawn = {prompt for step in range(5) for prompt in make.examples(step, 64)[1]}
    assert len(drawn) > 250 and not any(cards.is_held_out(cards.parse(prompt)) for prompt in drawn)
    for prompt in cards.shape_splits()[1]:
        tiny_rewards.geneval.check(prompt, cards.metadata_of(cards.parse(prompt)))


@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_plain_diffusers_draws_cards(model):
    """The base models, with room for a reward to improve them."""
    prompts = cards.shape_splits()[1][:24]
    images = make.draw(make.pipeline(model), prompts, seed=0)
    metadata = [cards.metadata_of(cards.parse(prompt)) for prompt in prompts]
    assert 0.1 < np.mean(tiny_rewards.geneval()(images, prompts, metadata)) < 0.7
    assert np.mean(tiny_rewards.colour()(images, prompts, metadata)) > 0.9
