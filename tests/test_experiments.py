"""experiments/: the figures and tables come from the CSVs, and the two tools do what they say."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch

from experiments import figures, plot, random_weights, snr

HERE = Path(__file__).resolve().parent.parent


def test_figures_are_drawn_from_the_csvs(tmp_path):
    figures.main(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"long.png", "ratio.png", "places.png", "snr.png"}


def test_the_tables_of_the_page_are_those_of_the_csvs():
    page, first_page = ((HERE / path).read_text() for path in ("experiments/README.md", "README.md"))
    for table in figures.tables():
        assert table in page
    assert figures.readme_table() in first_page
    assert figures.snr_table(("flow-grpo", "guard")) in first_page


def test_signal_to_noise_is_that_of_the_gradients():
    """Two steps and three parameters, with a known signal and noise of size 1."""
    signal, weights = np.array([[1.2, 0, 0], [0, 0.6, 0]]), np.array([1.0, 2.0])
    gradients = signal + np.random.default_rng(0).standard_normal((1000, 2, 3))
    products = np.einsum("itp,jup->ijtu", gradients, gradients)
    true = np.linalg.norm(weights @ signal) / np.sqrt(3 * (weights**2).sum())
    assert abs(snr.signal_to_noise(products, weights) - true) < 0.02
    ratio, error = snr.with_error(lambda part: snr.signal_to_noise(part, weights), products[:100, :100])
    assert abs(ratio - true) < 3 * error and 0.03 < error < 0.15


def write_run(folder):
    """A run of three epochs, in whose last one no sample was live."""
    folder.mkdir()
    lines = [dict(kind="start"), dict(kind="eval", update=0, reward=0.5, gold=dict(cards=0.9))]
    for epoch in range(3):
        lines.append(dict(kind="rollout", epoch=epoch, reward_mean=0.5 + epoch / 10))
        for first in (True, False):
            rows = [0.0, 0.0] if first else [1e-5, -2e-5]
            rows = rows if epoch < 2 else None
            update = dict(kind="update", epoch=epoch, update=2 * epoch + 2 - first, first=first)
            lines.append(update | dict(rho_mean=rows, rho_std=rows, blocked=rows))
    lines.append(dict(kind="eval", update=6, reward=0.7, gold=dict(cards=0.8)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = dict(clip=1e-5, method="guard", updates_per_epoch=2)
    (folder / "config.json").write_text(json.dumps(args))
    return lines


def plot_of(folder, *runs):
    command = [sys.executable, HERE / "experiments" / "plot.py", *runs]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_plot_draws_one_run_and_several(tmp_path):
    lines = write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    assert plot.later_updates(lines, "rho_mean").tolist() == [[1e-5, -2e-5]] * 2
    assert plot_of(tmp_path, "a").stdout == "a/plot.png\n" and (tmp_path / "a" / "plot.png").exists()
    assert plot_of(tmp_path, "a", "b").stdout == "plot.png\n" and (tmp_path / "plot.png").exists()


def test_plot_refuses_a_folder_that_is_no_run(tmp_path):
    refused = plot_of(tmp_path, ".")
    assert refused.returncode and "metrics.jsonl" in refused.stderr and refused.stderr.count("\n") == 1


def test_random_weights_have_the_true_sizes():
    sizes = {"sd3.5-medium": 2_243_171_520, "flux.1-dev": 11_901_408_320}
    for model, size in sizes.items():
        with torch.device("meta"):
            transformer = random_weights.build(model).transformer
        assert sum(p.numel() for p in transformer.parameters()) == size


def test_random_weights_make_a_folder_that_diffusers_draws_with(tmp_path, monkeypatch):
    smaller = dict(  # so that it takes seconds and little disk
        T5_XXL=dict(d_ff=8, num_heads=2, vocab_size=100),
        CLIP_L=dict(vocab_size=600),
        CLIP_G=dict(vocab_size=600),
        VAE=dict(block_out_channels=(32,) * 4),
        SD3=dict(pos_embed_max_size=8, num_attention_heads=2, caption_projection_dim=128),
    )
    for name, change in smaller.items():
        monkeypatch.setattr(random_weights, name, getattr(random_weights, name) | change)
    random_weights.build("sd3.5-medium", layers=1, encoder_layers=3).save_pretrained(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert [block.use_dual_attention for block in pipe.transformer.transformer_blocks] == [True, False]
    assert len(pipe.text_encoder_2.text_model.encoder.layers) == pipe.text_encoder_3.config.num_layers == 3
    pixels = pipe('a "CAT"', height=16, width=16, num_inference_steps=1, output_type="pt").images
    assert pixels.shape == (1, 3, 16, 16) and pixels.isfinite().all()
