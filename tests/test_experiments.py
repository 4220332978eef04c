"""experiments/: the figures and tables come from the CSVs, and the scripts read what guard.py writes."""

import csv
import shutil
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch

from experiments import figures, plot, problem, random_weights, run, snr

HERE = Path(__file__).resolve().parent.parent


def test_figures_are_drawn_from_the_csvs(tmp_path):
    figures.main(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"long.png", "parts.png"}


def test_the_figure_of_the_problem_shows_what_its_caption_says():
    """Flow-GRPO's ratios leave the range below alone, Guard's on both sides alike."""
    flow, guard = ([text.get_text() for text in axis.texts] for axis in problem.draw().axes)
    assert set(flow[1::2]) == {" 0% "} and flow[-2] == " 87% "
    assert guard[::2] == guard[1::2] and " 0% " not in guard[-2:]


def test_the_tables_of_the_page_are_those_of_the_csvs():
    page, first_page = ((HERE / path).read_text() for path in ("experiments/README.md", "README.md"))
    for table in figures.tables():
        assert table in page
    assert figures.first_page_table() in first_page


def test_signal_to_noise_is_that_of_the_gradients():
    """Two steps and three parameters, with a known signal and noise of size 1."""
    signal, weights = np.array([[1.2, 0, 0], [0, 0.6, 0]]), np.array([1.0, 2.0])
    gradients = signal + np.random.default_rng(0).standard_normal((1000, 2, 3))
    products = np.einsum("itp,jup->ijtu", gradients, gradients)
    true = np.sum((weights @ signal) ** 2) / (3 * (weights**2).sum())
    assert abs(snr.measured(products, weights) - true) < 0.02
    found, error = snr.with_error(lambda part: snr.measured(part, weights), products[:100, :100])
    assert abs(found - true) < 3 * error and 0.02 < error < 0.1


BRIGHTNESS = "--model tiny/sd3 --reward experiments.random_weights:load_brightness"
BRIGHTNESS += " --group_size 4 --micro_batch 4 --steps 3"


def test_the_steps_gradients_of_a_model_become_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(snr, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["snr.py", *BRIGHTNESS.split(), "--groups", "3"])
    snr.main()
    rows = {row["weights"]: row for row in csv.DictReader((tmp_path / "snr.csv").open())}
    assert set(rows) == {"0", "1", "flow-grpo", "rationorm", "guard", "snr"}
    columns = ("predicted", "with_noise", "share")
    assert [float(rows["snr"][column]) for column in columns] == [1, 1, 1]
    assert all(0 < float(rows[name]["predicted"]) < 1 for name in ("0", "1", "guard"))
    assert np.mean([float(rows[step]["noise"]) for step in "01"]) == pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the run a-s0 of three epochs, and the CSVs of `run.collect`."""
    folder = tmp_path_factory.mktemp("made")
    flags = f"{BRIGHTNESS} --groups 2 --eval_steps 2 --eval_prompts 4 --epochs 3 --eval_every 3"
    with patch.multiple(run, RUNS=folder, RESULTS=folder):
        run.make("a-s0", flags)
        assert run.is_done("a-s0") and not run.is_done("b-s0")
        assert [card.size for card in run.pictures("a-s0", -1, 64)] == [(64, 32)] * 4
        run.collect()
    return folder


def test_runs_become_rows(made):
    rows = {name: list(csv.DictReader((made / f"{name}.csv").open())) for name in ("evals", "updates")}
    assert [(row["run"], row["update"], row["clip"]) for row in rows["evals"]] == [
        ("a-s0", "0", "2e-06"), ("a-s0", "6", "2e-06")]
    assert [(row["step"], row["updates"]) for row in rows["updates"]] == [("0", "3"), ("1", "3")]


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
