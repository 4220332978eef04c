"""experiments/: the figures and tables come from the CSVs, and the scripts read what guard.py writes."""

import csv
import itertools
import shutil
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch

import guard
from experiments import figures, plot, random_weights, ratio, run, snr

HERE = Path(__file__).resolve().parent.parent


def test_figures_are_drawn_from_the_csvs(tmp_path):
    figures.main(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"long.png", "problem.png", "snr.png"}


def test_the_tables_of_the_page_are_those_of_the_csvs():
    page, first_page = ((HERE / path).read_text() for path in ("experiments/README.md", "README.md"))
    for table in figures.tables():
        assert table in page
    assert figures.readme_table() in first_page


def test_signal_to_noise_is_that_of_the_gradients():
    """Two steps and three parameters, with a known signal and noise of size 1."""
    signal, weights = np.array([[1.2, 0, 0], [0, 0.6, 0]]), np.array([1.0, 2.0])
    gradients = signal + np.random.default_rng(0).standard_normal((1000, 2, 3))
    products = np.einsum("itp,jup->ijtu", gradients, gradients)
    true = np.linalg.norm(weights @ signal) / np.sqrt(3 * (weights**2).sum())
    assert abs(snr.signal_to_noise(products, weights) - true) < 0.02
    ratio, error = snr.with_error(lambda part: snr.signal_to_noise(part, weights), products[:100, :100])
    assert abs(ratio - true) < 3 * error and 0.03 < error < 0.15


def test_kl_and_shift_are_found_in_the_log_ratios():
    """Of samples whose velocity has moved by a KL of 2 nats, so Eq. 7 is 1 = sqrt(KL/2) to the left."""
    D, s, b = 256, 0.3, -0.1
    d = torch.randn(4000, D)
    d *= s * 2 / d.norm(dim=1, keepdim=True)  # sum(d²) / (2 s²) = 2
    for method in guard.METHODS:
        log_ratio = guard.log_ratio(d / b, torch.zeros(()), torch.randn(d.shape), b, s, method)
        kl, shift = ratio.kl_and_shift(log_ratio.numpy(), D, s, method)
        assert abs(kl - 2) < 0.3
        assert abs(shift - (-1 if method in ("flow-grpo", "temp-reweight") else 0)) < 0.1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the run a-s0, three epochs by ratio.py, and results of ratio.py and of `run.collect`."""
    folder = tmp_path_factory.mktemp("made")
    flags = "--model tiny/sd3 --reward experiments.random_weights:load_brightness --epochs 3 --eval_every 3"
    flags += " --groups 2 --group_size 4 --micro_batch 4 --steps 3 --eval_steps 2 --eval_prompts 4"
    with patch.object(ratio, "RESULTS", folder), patch.multiple(run, RUNS=folder, RESULTS=folder):
        ratio.main(f"{flags} --run_dir {folder}/a-s0".split())
        assert run.is_done("a-s0") and not run.is_done("b-s0")
        assert [card.size for card in run.pictures("a-s0", -1, 64)] == [(64, 32)] * 4
        run.collect()
    return folder


def test_runs_become_rows(made):
    names = ("evals", "updates", "ratio", "push")
    rows = {name: list(csv.DictReader((made / f"{name}.csv").open())) for name in names}
    assert [(row["run"], row["update"], row["clip"]) for row in rows["evals"]] == [
        ("a-s0", "0", "2e-06"), ("a-s0", "6", "2e-06")]
    assert [(row["step"], row["updates"]) for row in rows["updates"]] == [("0", "3"), ("1", "3")]
    about = [(row["place"], row["step"], row["samples"]) for row in rows["ratio"]]
    assert about == list(itertools.product("01", "01", ("good", "bad")))
    assert sum(int(row["count"]) for row in rows["ratio"]) == 16  # two places and steps, a group of 4 each
    shares = [float(row["outside"]) for row in rows["push"]]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] == 0


def test_plot_draws_one_run_and_several(made, tmp_path, capsys):
    one, other = (shutil.copytree(made / "a-s0", tmp_path / name) for name in ("one", "other"))
    shutil.rmtree(other / "lora-000006")  # with one evaluation there is no before and after
    expected = ([one], ["plot", "before_after"]), ([other], ["plot"]), ([one, other], ["one-and-other"])
    for runs, files in expected:
        plot.main(list(map(str, runs)))
        assert capsys.readouterr().out.split() == [f"{runs[0]}/{file}.png" for file in files]
        assert all((runs[0] / f"{file}.png").exists() for file in files)
    with pytest.raises(SystemExit, match=r"^\S+: no metrics.jsonl, .*$"):
        plot.main([str(tmp_path)])


def test_random_weights_have_the_true_sizes():
    sizes = {"sd3.5-medium": 2_243_171_520, "flux.1-dev": 11_901_408_320}
    for model, size in sizes.items():
        with torch.device("meta"):
            transformer = random_weights.build(model).transformer
        assert sum(p.numel() for p in transformer.parameters()) == size


def test_random_weights_make_a_folder_that_diffusers_draws_with(tmp_path, monkeypatch):
    smaller = dict(  # so that it takes seconds and little disk
        T5_XXL=dict(d_ff=8, num_heads=2, vocab_size=100), CLIP_L=dict(vocab_size=600),
        CLIP_G=dict(vocab_size=600), VAE=dict(block_out_channels=(32,) * 4),
        SD3=dict(pos_embed_max_size=8, num_attention_heads=2, caption_projection_dim=128))
    for name, change in smaller.items():
        monkeypatch.setattr(random_weights, name, getattr(random_weights, name) | change)
    random_weights.build("sd3.5-medium", layers=1, encoder_layers=3).save_pretrained(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert [block.use_dual_attention for block in pipe.transformer.transformer_blocks] == [True, False]
    assert len(pipe.text_encoder_2.text_model.encoder.layers) == pipe.text_encoder_3.config.num_layers == 3
    pixels = pipe('a "CAT"', height=16, width=16, num_inference_steps=1, output_type="pt").images
    assert pixels.shape == (1, 3, 16, 16) and pixels.isfinite().all()
