"""The embedded model: a whole pipeline in diffusers layout, and a script that makes it the same again."""

import contextlib
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline

import rewards
from tiny import cards, make

TINY = Path(__file__).resolve().parent.parent / "tiny"


@pytest.mark.parametrize("name, least", [("sd3", 0.5), ("flux", 0.2)])
def test_plain_diffusers_draws_legible_cards(name, least):
    """The base models' OCR reward, with room for a reward to improve it."""
    pipe = DiffusionPipeline.from_pretrained(TINY / name)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    if name == "sd3":
        assert isinstance(pipe, StableDiffusion3Pipeline)
        assert config.qk_norm == "rms_norm" and config.dual_attention_layers
    else:
        assert isinstance(pipe, FluxPipeline) and config.guidance_embeds
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 4 and all(module.dtype == torch.float32 for module in modules)
    prompts = cards.splits()[1][:32]
    images = pipe(
        prompts,
        height=32,
        width=64,
        num_inference_steps=10,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
    ).images
    scores = rewards.load("ocr")(images, prompts, [{}] * 32)
    assert least < sum(scores) / 32 < 0.85
    assert sum(rewards.load("cards-colour")(images, prompts, [{}] * 32)) / 32 > 0.9


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_folder_is_small_and_holds_no_pickle(name):
    files = [file for file in (TINY / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_words_are_spelled_letter_by_letter():
    clip, t5 = make.clip_tokenizer(), make.t5_tokenizer()
    for word in cards.WORDS:
        prompt = cards.prompt_of(word, "purple")
        tokens = clip.convert_ids_to_tokens(clip(prompt).input_ids)
        assert (
            tokens[7:-2] == [*word[:-1].lower(), word[-1].lower() + "</w>"]
            and len(tokens) <= make.TEXT_LENGTH
        )
        tokens = t5.convert_ids_to_tokens(t5(prompt).input_ids)
        assert tokens[6:-2] == list(word) and len(tokens) <= make.TEXT_LENGTH


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


def test_no_held_out_word_is_ever_drawn_in_pretraining():
    examples = make.Examples()
    held_out = {cards.parse(prompt) for prompt in cards.splits()[1]}
    drawn = set()
    for step in range(20):
        _, prompts = examples.batch(step, 64)
        drawn |= {cards.parse(prompt) for prompt in prompts}
    assert len(drawn) > 500 and not drawn & held_out
