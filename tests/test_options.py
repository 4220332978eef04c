"""What the flags promise, in short real runs of the tiny models."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import lines_of, state_of
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

import guard
import rewards
from scorers import background

CARDS = Path(__file__).resolve().parent.parent / "prompts" / "cards" / "test.txt"  # few: soon read
SMALL = (  # the cards' own score as the reward: no group is dead
    "--groups 2 --group_size 2 --micro_batch 2 --steps 3 --eval_steps 2 --eval_prompts 2 --epochs 1 "
    f"--reward cards --gold none --prompts {CARDS} --gold_prompts {CARDS}"
)


def arguments(folder, flags="", model="tiny-sd3"):
    return guard.parse_args(f"{SMALL} --model {model} --run_dir {folder} {flags}".split())


def train(folder, flags="", model="tiny-sd3"):
    guard.train(arguments(folder, flags, model))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folder of a run without any option."""
    return train(tmp_path_factory.mktemp("runs") / "plain")


def weights_of(folder):
    return load_file(folder / "checkpoint-000002" / "pytorch_lora_weights.safetensors")


def test_no_gpu_is_seen():
    """conftest.py hides it before it imports torch, so that on any machine the tests are those of a CPU."""
    lines = (Path(__file__).parent / "conftest.py").read_text().splitlines()
    hidden = [i for i, line in enumerate(lines) if "CUDA_VISIBLE_DEVICES" in line]
    imports = [i for i, line in enumerate(lines) if line.startswith(("import", "from"))]
    assert [i for i in imports if i < hidden[0]] == [lines.index("import os")]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    assert guard.DEVICE.type == "cpu"


# ------------------------------------------------------------------------------------------------------------
# KL and dead groups


def test_kl_pulls_towards_the_model_without_its_lora(plain, tmp_path):
    """It is 0 in the very first update and positive after it; without --kl_beta it is not computed."""
    assert [line["kl"] for line in lines_of(plain, "update")] == [None, None]
    folder = train(tmp_path / "run", "--kl_beta 1000")
    first, second = lines_of(folder, "update")
    assert first["kl"] == [0.0] * 2
    assert all(value > 0 for value in second["kl"])
    far, near = (lines_of(run, "eval")[-1]["kl_to_base"] for run in (plain, folder))
    assert 0 < near < far


@pytest.mark.parametrize("beta", [0.0, 100.0])
def test_a_dead_group_still_has_the_gradient_of_its_kl(beta, plain, tmp_path, monkeypatch):
    """All rewards are equal, and the LoRA to start from is no longer the base model."""
    monkeypatch.setitem(rewards.REWARDS, "cards", lambda: lambda images, *_: [0.5] * len(images))
    folder = train(tmp_path / "run", f"--kl_beta {beta} --init_lora {plain / 'checkpoint-000002'}")
    (rollout,), updates = lines_of(folder, "rollout"), lines_of(folder, "update")
    assert rollout["dead_groups"] == 2
    assert [line["live"] for line in updates] == [0, 0] and updates[0]["ratio_mean"] is None
    if beta:
        steps = guard.schedule(sigmas_of_tiny_sd3(3), 0.7, "flow")[:-1]
        for line in updates:
            penalty = beta * sum(step.dt * kl for step, kl in zip(steps, line["kl"], strict=True)) / 2
            assert line["loss"] == pytest.approx(penalty, rel=1e-5) and penalty > 0
            assert line["grad_norm"] > 1e-3
    else:
        assert [(line["loss"], line["grad_norm"], line["kl"]) for line in updates] == [(0, 0, None)] * 2


def sigmas_of_tiny_sd3(steps):
    scheduler = guard.diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


def test_blocked_counts_only_what_ppo_blocks():
    """Beyond the range by the advantage's own sign; on the other side the gradient passes."""
    rho = torch.tensor([[3e-6, -3e-6, 3e-6, -3e-6], [9.0, 9.0, -9.0, -9.0]]).double().unsqueeze(-1)
    A = torch.tensor([[1.0, 1.0, -1.0, -1.0], [0.0] * 4]).double()
    # Group 0: above and good, below and good, above and bad, below and bad. Group 1 is dead.
    line = guard.statistics(guard.Args(clip=2e-6), rho, A)
    assert (line["clip_high"].item(), line["clip_low"].item(), line["blocked"].item()) == (0.5, 0.5, 0.5)
    assert line["live"] == 4 and line["ratio_mean"].item() == 0
    assert line["ratio_std"].item() == pytest.approx(3e-6)
    line = guard.statistics(guard.Args(clip=2e-6), rho, -A.abs())  # all of them bad: blocked below alone
    assert line["blocked"] == line["clip_low"] == 0.5
    for value, sign in ((3e-6, 1), (3e-6, -1), (-3e-6, 1), (-3e-6, -1)):
        one = torch.full((1,), value, dtype=torch.float64, requires_grad=True)
        guard.surrogate(one, torch.tensor([float(sign)]), 2e-6, 1.0).sum().backward()
        alone = guard.statistics(guard.Args(clip=2e-6), one.detach().view(1, 1, 1), torch.full((1, 1), sign))
        assert alone["blocked"].item() == (one.grad.item() == 0)


# ------------------------------------------------------------------------------------------------------------
# Samplers, memory, precision


def test_only_the_steps_of_the_window_are_trained(tmp_path):
    for sde in ("flow", "cps"):
        folder = train(tmp_path / sde, f"--steps 4 --sde_window 2 --sde {sde}")
        first, second = lines_of(folder, "update")
        assert first["ratio_mean"] == [0.0, 0.0] and first["ratio_std"] == [0.0, 0.0]
        assert len(second["ratio_mean"]) == 2 and all(value > 0 for value in second["ratio_std"])
        sigmas = [1.0, 0.8577, 0.6022, 0.0089]
        start = guard.noisy_steps(guard.Args(steps=4, sde_window=2), 0).start
        (rollout,) = lines_of(folder, "rollout")
        assert rollout["sigma"] == pytest.approx(sigmas[start : start + 2], abs=1e-4)


@pytest.mark.parametrize("model", ["tiny-sd3", "tiny-flux"])
def test_what_only_saves_memory_changes_no_number(model, plain, tmp_path):
    """Checkpointing recomputes the same activations, and parking encoders and rollout moves them alone."""
    one = plain if model == "tiny-sd3" else train(tmp_path / "one", model=model)
    other = train(tmp_path / "other", "--grad_checkpoint --offload", model)
    assert lines_of(one) == lines_of(other)
    mine, theirs = state_of(one, 2), state_of(other, 2)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class Moves(TorchFunctionMode):
    """Where kept tensors, (3, B, C, H, W), are moved to."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and args[0].dim() == 5:
            self.kept.append(str(args[1]))
        return function(*args, **(kwargs or {}))


GPU, HOST = "cpu:0", "cpu"  # one device by two names, which tell what was asked for


@pytest.mark.parametrize("flags, resting", [("", GPU), ("--offload", HOST)])
def test_offload_parks_encoders_vae_and_rollout_on_the_cpu(flags, resting, tmp_path, monkeypatch):
    """Each comes to the GPU when it is used and goes back after that; without --offload nothing leaves it."""
    monkeypatch.setattr(guard, "DEVICE", torch.device(GPU))
    moves, move = [], torch.nn.Module.to

    def noted(module, *given, **options):
        moves.append((module, str(given[0])))
        return move(module, *given, **options)

    def places(of):
        """Where this module was moved to since the last time."""
        found = [place for module, place in moves if module is of]
        moves[:] = [(module, place) for module, place in moves if module is not of]
        return found

    args = arguments(tmp_path / "run", flags)
    monkeypatch.setattr(torch.nn.Module, "to", noted)
    backbone = guard.load_backbone(args)
    assert str(backbone.resting) == resting
    assert places(backbone.transformer) == [GPU]  # and stays there
    assert places(backbone.encoders) == [GPU, resting]  # for the empty prompt
    policy = guard.Policy(backbone, args)
    prompts = rewards.read_set(args.prompts)[0][:2]
    scorers = background.Scorers(["cards"], guard.DEVICE, backbone.patch)
    steps = guard.schedule(backbone.sigmas(3), args.eta, args.sde)
    with Moves() as rollout:
        slices, scores, _ = guard.rollout(backbone, args, steps, prompts, 2, 0, ["cards"], scorers)
    assert places(backbone.encoders) == [GPU, resting]
    assert places(backbone.pipe.vae) == [GPU, resting] * 2  # two slices
    assert rollout.kept == [resting] * 4  # of two trained steps each
    advantage = guard.advantages(scores.view(2, 2))
    with Moves() as update:
        guard.update(backbone, policy, args, steps, slices, advantage, range(2))
    assert update.kept == [GPU] * 4
    assert places(backbone.encoders) == places(backbone.pipe.vae) == places(backbone.transformer) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains(dtype, plain, tmp_path):
    """The same pass rounds the same way on a CPU: the first ratio is 1 even here. Gradients do not vanish."""
    folder = train(tmp_path / "run", f"--dtype {dtype}")
    first, second = lines_of(folder, "update")
    assert first["ratio_mean"] == [0.0] * 2
    exact = lines_of(plain, "update")[0]["grad_norm"]
    assert 0.5 < first["grad_norm"] / exact < 2
    assert math.isfinite(second["grad_norm"]) and second["grad_norm"] > 0
    assert all(weight.dtype == torch.float32 for weight in weights_of(folder).values())


# ------------------------------------------------------------------------------------------------------------
# Starting from a LoRA, evaluating, going on


def test_training_starts_from_the_lora_given(plain, tmp_path):
    """Its rank and alpha hold, not the flags' or the preset's; to go on, the LoRA need no longer be there."""
    small = train(tmp_path / "small", "--lora_rank 4 --lora_alpha 12")
    folder = train(tmp_path / "run", f"--init_lora {small / 'checkpoint-000002'}")
    assert lines_of(folder, "eval")[0]["kl_to_base"] == lines_of(small, "eval")[-1]["kl_to_base"] > 0
    assert lines_of(folder, "update")[0]["ratio_mean"] == [0.0] * 2
    saved = json.loads((folder / "config.json").read_text())["args"]
    assert (saved["lora_rank"], saved["lora_alpha"]) == (4, 12)
    assert weights_of(folder).keys() == weights_of(small).keys()
    assert {min(weight.shape) for weight in weights_of(folder).values()} == {4}
    gone = shutil.copytree(folder, tmp_path / "gone")
    guard.train(guard.parse_args(["--resume", str(folder), "--epochs", "2"]))
    shutil.rmtree(small)
    guard.train(guard.parse_args(["--resume", str(gone), "--epochs", "2"]))
    assert lines_of(gone, "update") == lines_of(folder, "update") and len(lines_of(gone, "update")) == 4
    mine, theirs = state_of(folder, 4), state_of(gone, 4)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_evaluation_says_what_pictures_look_like(plain):
    for line in lines_of(plain, "eval"):
        assert list(line["looks"]) == list(rewards.LOOKS)
        assert all(math.isfinite(value) for value in line["looks"].values())
        assert 0 < line["looks"]["brightness"] < 1 and line["gold"] == {}
    assert [line["kl_to_base"] > 0 for line in lines_of(plain, "eval")] == [False, True]


def test_gold_is_drawn_from_its_own_prompts(tmp_path, monkeypatch):
    """Scored are the trained reward on the one set and gold on the other; looks are those of the first."""
    seen = {"cards": [], "cards-frame": []}
    for name in seen:
        reward = rewards.REWARDS[name]()

        def noted(images, prompts, metadata, name=name, reward=reward):
            seen[name] += prompts
            return reward(images, prompts, metadata)

        monkeypatch.setitem(rewards.REWARDS, name, lambda noted=noted: noted)
    held_out = CARDS.read_text().splitlines()
    (tmp_path / "gold.txt").write_text("\n".join(held_out[7:9]))
    args = arguments(tmp_path / "run", f"--gold cards-frame --gold_prompts {tmp_path / 'gold.txt'}")
    backbone = guard.load_backbone(args)
    scorers = background.Scorers(["cards", "cards-frame"], guard.DEVICE, backbone.patch)
    (tmp_path / "run" / "samples").mkdir(parents=True)
    guard.evaluate(backbone, guard.Policy(backbone, args), args, scorers, 0)
    assert seen == {"cards": held_out[:2], "cards-frame": held_out[7:9]}
    (line,) = lines_of(tmp_path / "run")
    assert line["gold"].keys() == {"cards-frame"} and 0 < line["gold"]["cards-frame"] <= 1


def test_a_resumed_run_remembers_its_new_length(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "run")
    guard.train(guard.parse_args(["--resume", str(folder), "--epochs", "2", "--save_every", "2"]))
    again = guard.parse_args(["--resume", str(folder)])
    assert (again.epochs, again.save_every) == (2, 2)
    assert not list(folder.glob("*.partial"))
