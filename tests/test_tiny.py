"""The embedded world: its cards and their gold score, and the models and judges that are made from them."""

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

import rewards
from scorers import geneval
from tiny import cards, check, judges, make

TINY = Path(__file__).resolve().parent.parent / "tiny"
WORD = 'a red card with stripes that says "CAT"'
SHAPES = "a teal card with checks that shows a yellow circle left of a black square"
PLACED = [cards.Placed("circle", "yellow", 10, 8, 10), cards.Placed("square", "black", 9, 40, 12)]


def gold(picture, prompt):
    return cards.fidelity(cards.as_image(picture), prompt)


@pytest.mark.parametrize("prompts", [cards.word_splits()[1][:60], cards.shape_splits()[1][:60]])
def test_a_rendered_card_is_perfect(prompts):
    rng = random.Random(0)
    for prompt in prompts:
        scores = gold(cards.draw_at_random(cards.parse(prompt), rng), prompt)
        assert tuple(scores) == cards.PARTS and min(scores.values()) > 0.97, prompt


def without_frame(picture, colour, pattern):
    return np.where(cards.frame_mask()[..., None], cards.background(colour, pattern), picture)


def faults_of_word():
    perfect = cards.draw_word("red", "stripes", "CAT")
    return {
        "colour": cards.draw_word("blue", "stripes", "CAT"),
        "frame": without_frame(perfect, "red", "stripes"),
        "pattern": cards.draw_word("red", None, "CAT"),
        "content": cards.draw_shapes("red", "stripes", []),
    }


def faults_of_shapes():
    perfect = cards.draw_shapes("teal", "checks", PLACED)
    return {
        "colour": cards.draw_shapes("pink", "checks", PLACED),
        "frame": without_frame(perfect, "teal", "checks"),
        "pattern": cards.draw_shapes("teal", None, PLACED),
        "content": cards.draw_shapes("teal", "checks", []),
    }


@pytest.mark.parametrize("prompt, faults", [(WORD, faults_of_word()), (SHAPES, faults_of_shapes())])
@pytest.mark.parametrize("part", cards.PARTS)
def test_each_fault_lowers_its_own_part(prompt, faults, part):
    scores = gold(faults[part], prompt)
    assert scores.pop(part) < 0.3
    assert min(scores.values()) > 0.9


def test_the_content_of_words():
    assert gold(cards.draw_word("red", "stripes", "CAT", 1, -1, contrast=0.4), WORD)["content"] > 0.97
    assert gold(cards.draw_word("red", "stripes", "DOG"), WORD)["content"] < 0.6
    assert 0.6 < gold(cards.draw_word("red", "stripes", "CAR"), WORD)["content"] < 0.9


def test_the_content_of_shapes():
    """Of three parts, circle, square and relation, each fault takes away its share."""
    circle, square = PLACED
    wrong = {
        "class": ([cards.Placed("star", "yellow", 10, 8, 10), square], 0.2),
        "colour": ([cards.Placed("circle", "red", 10, 8, 10), square], 0.2),
        "place": (
            [cards.Placed("circle", "yellow", 10, 50, 10), cards.Placed("square", "black", 9, 8, 12)],
            0.7,
        ),
        "one more": ([circle, square, cards.Placed("heart", "red", 10, 24, 10)], 0.7),
        "one less": ([square], 0.35),
    }
    for name, (placed, most) in wrong.items():
        score = gold(cards.draw_shapes("teal", "checks", placed), SHAPES)["content"]
        assert most - 0.21 < score < most, (name, score)


def test_washing_the_pattern_out_costs_gold_in_proportion():
    perfect, plain = (cards.draw_word("red", pattern, "CAT") for pattern in ("stripes", None))
    scores = [gold(w * perfect + (1 - w) * plain, WORD)["pattern"] for w in (1, 0.75, 0.5, 0.25, 0)]
    assert scores == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=0.06)


def test_bad_prompts_and_pictures_are_refused():
    for prompt in (
        "a cat",
        "a red card with stripes that says CAT",
        'a red card with spots that says "CAT"',
        "a red card with dots that shows five stars",
        "a red card with dots that shows a red dog",
    ):
        with pytest.raises(ValueError, match="not a card's prompt"):
            cards.parse(prompt)
    with pytest.raises(ValueError, match="64 x 32"):
        cards.fidelity(cards.as_image(np.zeros((64, 64, 3))), WORD)


def test_prompts_are_read_as_they_are_written():
    for splits in (cards.word_splits(), cards.shape_splits()):
        for prompt in splits[0] + splits[1]:
            assert str(cards.parse(prompt)) == prompt


def test_training_and_evaluation_are_apart():
    for train, test in (cards.word_splits(), cards.shape_splits(), cards.mixed_splits()):
        assert not set(train) & set(test) and len(set(test)) == len(test)
        assert not any(cards.is_held_out(cards.parse(prompt)) for prompt in train)
        assert all(cards.is_held_out(cards.parse(prompt)) for prompt in test)
    words = {cards.parse(prompt).word for prompt in cards.word_splits()[0]}
    assert words == set(cards.SEEN_WORDS)
    tags = [cards.tag_of(cards.parse(prompt)) for prompt in cards.shape_splits()[1]]
    assert tags == list(cards.TAGS) * 50


def test_pretraining_draws_nothing_that_is_held_out():
    drawn = {prompt for step in range(20) for prompt in make.examples(step, 64)[1]}
    assert len(drawn) > 1000 and not any(cards.is_held_out(cards.parse(prompt)) for prompt in drawn)


def test_metadata_is_genevals():
    about = cards.metadata_of(cards.parse(SHAPES))
    assert about == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1, "color": "black"},
            {"class": "circle", "count": 1, "color": "yellow", "position": ["left of", 0]},
        ],
        "prompt": SHAPES,
    }
    counting = cards.metadata_of(cards.parse("a red card with dots that shows two stars"))
    assert counting["tag"] == "counting" and counting["exclude"] == [{"class": "star", "count": 3}]
    for prompt in cards.shape_splits()[1]:
        geneval.check_geneval(prompt, cards.metadata_of(cards.parse(prompt)), judges.CLASSES, judges.COLOURS)


def test_the_renderer_places_shapes_as_asked():
    """GenEval's own rule of relations agrees, and no two shapes overlap."""
    rng = random.Random(0)
    for prompt in cards.shape_splits()[1]:
        card = cards.parse(prompt)
        placed = cards.place(card, rng)
        taken = np.zeros((cards.HEIGHT, cards.WIDTH), dtype=int)
        for one in placed:
            taken[one.box()] += 1
        assert taken.max() == 1 and not taken[~cards.inside_mask()].any()
        if card.relation:
            box = {one.shape: (one.x, one.y, one.x + one.size, one.y + one.size) for one in placed}
            one, other = (clause.shape for clause in card.clauses)
            assert card.relation in geneval.relative_position(box[one], box[other])


def test_prompts_fit_and_words_are_spelled_letter_by_letter():
    clip, t5 = make.clip_tokenizer(), make.t5_tokenizer()
    prompts = [prompt for splits in (cards.word_splits(), cards.shape_splits()) for prompt in sum(splits, [])]
    for tokenizer in (clip, t5):
        ids = tokenizer(prompts).input_ids
        assert max(map(len, ids)) <= make.TEXT_LENGTH == tokenizer.model_max_length
        assert not any(tokenizer.unk_token_id in row[:-1] for row in ids)
    tokens = clip.convert_ids_to_tokens(clip(WORD).input_ids)
    assert tokens[-6:-2] == ['"</w>', "c", "a", "t</w>"]
    assert t5.convert_ids_to_tokens(t5(WORD).input_ids)[-5:-2] == list("CAT")


@pytest.mark.parametrize("radius, least", [(0, 0.95), (1, 0.85)])
def test_the_detector_reads_rendered_cards(radius, least):
    """Count, class and colour, all exactly, as rendered and blurred by a pixel."""
    counted, coloured = check.read_cards(*check.rendered_shapes(radius))
    assert least <= coloured <= counted


def test_ocr_reads_loud_words_and_not_faint_ones():
    prompts = cards.word_splits()[1][:60]
    parsed = [cards.parse(prompt) for prompt in prompts]
    ocr = rewards.load("ocr")

    def score(contrast):
        pictures = [
            cards.draw_word(card.colour, card.pattern, card.word, contrast=contrast) for card in parsed
        ]
        return np.mean(ocr([cards.as_image(picture) for picture in pictures], prompts, [{}] * 60))

    assert score(1.0) >= 0.95 and score(0.4) < 0.5


def test_the_preference_model_prefers_the_better_card():
    """By the path of PickScore, on pairs that differ clearly in gold."""
    rng, pairs = random.Random("a test"), []
    while len(pairs) < 60:
        prompt = rng.choice(cards.mixed_splits()[1])
        images = [judges.attempt(cards.parse(prompt), rng) for _ in range(2)]
        better = judges.gold(images[0], prompt) - judges.gold(images[1], prompt)
        if abs(better) > 0.2:
            pairs.append((prompt, images if better > 0 else images[::-1]))
    prompts = [prompt for prompt, _ in pairs]
    good, bad = ([images[i] for _, images in pairs] for i in (0, 1))
    score = rewards.load("tiny-pickscore")
    right = np.array(score(good, prompts, [{}] * 60)) > np.array(score(bad, prompts, [{}] * 60))
    assert right.mean() >= 0.8


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_plain_diffusers_draws_cards(name):
    """The base models, with room for a reward to improve them."""
    pipe = make.pipeline(name)
    config = pipe.transformer.config
    if name == "sd3":
        assert isinstance(pipe, StableDiffusion3Pipeline)
        assert config.qk_norm == "rms_norm" and config.dual_attention_layers
    else:
        assert isinstance(pipe, FluxPipeline) and config.guidance_embeds
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 4 and all(module.dtype == torch.float32 for module in modules)
    for prompts, reward in (
        (cards.word_splits()[1][:32], "ocr"),
        (cards.shape_splits()[1][:30], "tiny-geneval"),
    ):
        images = make.draw(pipe, prompts, seed=0)
        metadata = [{}] * 32 if reward == "ocr" else [cards.metadata_of(cards.parse(p)) for p in prompts]
        assert 0.1 < np.mean(rewards.load(reward)(images, prompts, metadata)) < 0.95
        assert np.mean(rewards.load("cards-colour")(images, prompts, metadata)) > 0.85


@pytest.mark.parametrize(
    "name, most", [("sd3", 12), ("flux", 12), ("detector", 4), ("clip", 4), ("pickscore", 4)]
)
def test_a_folder_is_small_and_holds_no_pickle(name, most):
    files = [file for file in (TINY / name).rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) < most * 1e6
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_making_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """One start gives the same weights as two, of which the first was killed after its checkpoint."""

    class Killed(Exception):
        pass

    def run(folder, die_at=None):
        monkeypatch.setattr(make, "WORK", folder)
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)

        def loss_of(step):
            if step == die_at:
                raise Killed
            return model(torch.randn(8, 4)).square().mean()

        make.train("toy", model, 300, 1e-2, loss_of)
        return model.weight.detach()

    whole = run(tmp_path / "whole")
    with contextlib.suppress(Killed):
        run(tmp_path / "killed", die_at=260)
    assert torch.equal(run(tmp_path / "killed"), whole)
