"""What the flags promise, in short real runs of the tiny models."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import guard
import rewards

torch.set_num_threads(1)
SMALL = (  # the cards' own score as the reward: no group is dead
    "--groups 2 --group_size 4 --micro_batch 4 --steps 4 --eval_steps 2 --eval_prompts 4 --epochs 1 "
    "--reward cards --gold none"
)


def train(folder, flags="", model="tiny-sd3"):
    given = f"{SMALL} --model {model} --run_dir {folder} {flags}"
    guard.train(guard.parse_args(given.split()))
    return lines_of(folder)


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {kind: [line for line in lines if line["kind"] == kind] for kind in ("eval", "update", "rollout")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folder of a run without any option."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train(folder)
    return folder


def weights_of(folder):
    return load_file(folder / "checkpoint-000002" / "pytorch_lora_weights.safetensors")


def test_kl_pulls_towards_the_model_without_its_lora(plain, tmp_path):
    """It is 0 in the very first update and positive after it; without --kl_beta it is not computed."""
    assert [line["kl"] for line in lines_of(plain)["update"]] == [None, None]
    first, second = train(tmp_path / "run", "--kl_beta 1000")["update"]
    assert first["kl"] == [0.0] * 3
    assert all(value > 0 for value in second["kl"])
    assert second["loss"] > 1e3 * sum(second["kl"]) / 3 * 0.5  # the penalty is in the loss
    far, near = (lines_of(folder)["eval"][-1]["kl_to_base"] for folder in (plain, tmp_path / "run"))
    assert 0 < near < far


def test_only_the_steps_of_the_window_are_trained(tmp_path):
    for sde in ("flow", "cps"):
        lines = train(tmp_path / sde, f"--sde_window 2 --sde {sde}")
        first, second = lines["update"]
        assert first["ratio_mean"] == [0.0, 0.0] and first["ratio_std"] == [0.0, 0.0]
        assert len(second["ratio_mean"]) == 2 and all(value > 0 for value in second["ratio_std"])


@pytest.mark.parametrize("model", ["tiny-sd3", "tiny-flux"])
def test_what_only_saves_memory_changes_no_number(model, plain, tmp_path):
    """Checkpointing recomputes the same activations, and parking encoders and rollout moves them alone."""
    one = plain if model == "tiny-sd3" else tmp_path / "one"
    if one is not plain:
        train(one, model=model)
    other = train(tmp_path / "other", "--grad_checkpoint --offload", model)
    for line, same in zip(lines_of(one)["update"], other["update"], strict=True):
        assert line == same
    states = weights_of(one), weights_of(tmp_path / "other")
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains(dtype, plain, tmp_path):
    """The same pass rounds the same way on a CPU: the first ratio is 1 even here. Gradients do not vanish."""
    lines = train(tmp_path / "run", f"--dtype {dtype}")
    first, second = lines["update"]
    assert first["ratio_mean"] == [0.0] * 3
    exact = lines_of(plain)["update"][0]["grad_norm"]
    assert 0.5 < first["grad_norm"] / exact < 2
    assert math.isfinite(second["grad_norm"]) and second["grad_norm"] > 0
    assert all(weight.dtype == torch.float32 for weight in weights_of(tmp_path / "run").values())


def test_training_starts_from_the_lora_given(plain, tmp_path):
    """Its rank and alpha hold, not the flags' or the preset's, and config.json has them."""
    small = tmp_path / "small"
    train(small, "--lora_rank 4 --lora_alpha 12")
    lines = train(tmp_path / "run", f"--init_lora {small / 'checkpoint-000002'}")
    assert lines["eval"][0]["kl_to_base"] == lines_of(small)["eval"][-1]["kl_to_base"] > 0
    assert lines["update"][0]["ratio_mean"] == [0.0] * 3
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert (saved["lora_rank"], saved["lora_alpha"]) == (4, 12)
    assert weights_of(tmp_path / "run").keys() == weights_of(small).keys()
    assert {min(weight.shape) for weight in weights_of(tmp_path / "run").values()} == {4}
    guard.train(guard.parse_args(["--resume", str(tmp_path / "run"), "--epochs", "2"]))
    assert len(lines_of(tmp_path / "run")["update"]) == 4


def test_evaluation_prompts_are_encoded_once(tmp_path, monkeypatch):
    """The second evaluation, of another process too, finds them beside the run's folder, the same numbers."""
    encoded = []
    original = guard.SD3.encode

    def counting(self, prompts):
        encoded.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(guard.SD3, "encode", counting)
    folder = tmp_path / "run"
    train(folder)
    held_out = tuple(prompt for prompt, _ in rewards.read_set(rewards.CARD_PROMPTS)[1][:4])
    assert [encoded.count(prompt) for prompt in held_out] == [1] * 4
    guard.train(guard.parse_args(["--resume", str(folder), "--epochs", "2"]))
    assert [encoded.count(prompt) for prompt in held_out] == [1] * 4
    args = guard.parse_args(["--resume", str(folder)])
    backbone = guard.load_backbone(args)
    kept = guard.encode_once(backbone, args, held_out)
    args.run_dir = str(tmp_path / "elsewhere" / "run")
    fresh = guard.encode_once(backbone, args, held_out)
    assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))
    assert [encoded.count(prompt) for prompt in held_out] == [2] * 4


def test_a_resumed_run_remembers_its_new_length(plain, tmp_path):
    folder = tmp_path / "run"
    train(folder)
    guard.train(guard.parse_args(["--resume", str(folder), "--epochs", "2", "--save_every", "1"]))
    again = guard.parse_args(["--resume", str(folder)])
    assert (again.epochs, again.save_every) == (2, 1)
    assert not list(folder.glob("*.partial"))
