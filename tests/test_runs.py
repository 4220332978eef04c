"""Small real runs of guard.py: alone in a folder, on several processes, killed, and with what goes wrong."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from helpers import HERE, files_of, lines_of, load_brightness, run
from PIL import Image

import guard

OF_ALL = ("--model tiny/sd3 --gold none --group_size 4 --steps 4 --eval_prompts 4 --lr 2e-3 "
          "--clip 1.796875e-7")
# 9 updates, so that the moving average moves once; evaluations everywhere; a group is two batches.
WHOLE = (f"{OF_ALL} --reward helpers:load_brightness --groups 3 --updates_per_epoch 3 --micro_batch 2 "
         "--epochs 3 --eval_every 1 --eval_steps 2 --ema_decay 0.9 --lora_rank 4 --lora_alpha 8")
SMALL = f"{WHOLE} --epochs 1 --ema_decay 0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder, WHOLE).codes == [0]
    return folder


def state_of(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def assert_refused(folder, arguments, words):
    """Exit code 2 and one line, with these words in it. Before it a library may have its own."""
    done = run(folder, arguments)
    assert done.codes == [2] and done.errors[-1].startswith("guard.py: error: ") and words in done.errors[-1]
    assert not any("Traceback" in line for line in done.errors)


# ------------------------------------------------------------------------------------------------------------
# A run


def test_the_two_files_alone_train_and_resume(tmp_path):
    """In a plain process, in a folder with only prompts beside them. It says that these have changed."""
    for name in ("guard.py", "rewards.py"):
        shutil.copy(HERE / name, tmp_path)
    prompts = tmp_path / "cards.txt"
    prompts.write_text('a red card with dots that says "CAT"\na blue card with dots that says "DOG"\n')
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    model = f"--model {HERE}/tiny/sd3 --reward ocr --prompts cards.txt"
    for arguments in (f"{SMALL} {model} --run_dir run", "--resume run --epochs 2"):
        command = [sys.executable, "guard.py", *arguments.split()]
        options = dict(cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=300)
        said = subprocess.run(command, **options).stdout
        assert ("have changed" in said) == ("--resume" in arguments)
        prompts.write_text(prompts.read_text() + 'a teal card with dots that says "OWL"\n')
    assert [line["update"] for line in lines_of(tmp_path / "run", "update")] == [1, 2, 3, 4, 5, 6]


def test_the_first_updates_are_the_committed_ones(tmp_path):
    """Seed 0 on tiny/sd3: a change of behaviour cannot slip in. Measured with torch 2.13.0 on a CPU."""
    small = f"{OF_ALL} --groups 4 --micro_batch 4 --epochs 1 --eval_steps 4"
    run(tmp_path / "run", small)
    first, second = lines_of(tmp_path / "run", "update")
    assert lines_of(tmp_path / "run", "rollout")[0]["reward_mean"] == pytest.approx(0.1145833, abs=1e-6)
    assert (first["grad_norm"], second["grad_norm"]) == pytest.approx((0.0166994, 0.0098801), rel=1e-3)
    assert (first["first"], first["excess_std"]) == (True, [0.0] * 3)
    assert second["excess_std"] == pytest.approx([1.02730e-4, 3.34126e-4, 7.61206e-4], rel=1e-2)
    assert (second["live"], second["clip_high"]) == (8, [0.5, 0.625, 0.75])
    assert second["blocked"] == [0.5, 0.25, 0.5]
    run(tmp_path / "slower", small.replace("--lr 2e-3 --clip 1.796875e-7", "--lr 6.7e-4"))
    _, second = lines_of(tmp_path / "slower", "update")
    assert second["clip"] == pytest.approx(2e-6 * 65536 / 512)
    assert second["excess_std"] == pytest.approx([3.42963e-5, 1.11915e-4, 2.56945e-4], rel=1e-2)
    assert second["blocked"] == [0, 0, 0.25]


def test_what_a_run_leaves(whole):
    kinds = [line["kind"] for line in lines_of(whole, "eval", "update", "rollout")]
    assert kinds == [*["eval", "update", "update", "update", "rollout"] * 3, "eval"]
    for number, line in enumerate(lines_of(whole, "update"), start=1):
        assert (line["update"], line["first"]) == (number, number % 3 == 1)
        assert (line["excess_std"] == [0.0] * 3) == line["first"]
    files, loras = files_of(whole), [f"lora-00000{update}" for update in (0, 3, 6, 9)]
    of_lora = ("pytorch_lora_weights.safetensors", "samples.png", "samples.jsonl")
    assert {str(path) for path in files} == {
        "config.json", "metrics.jsonl", "state.pt", *(f"{lora}/{name}" for lora in loras for name in of_lora)}
    zero, three, six, nine = ((whole / lora / of_lora[0]).read_bytes() for lora in loras)
    assert zero == three == six != nine  # the average moves at the 8th update
    assert len({(whole / name).stat().st_mode for name in files}) == 1  # others can read the LoRA too
    state = state_of(whole)
    assert not torch.equal(state["average"], state["params"])


def test_the_saved_lora_draws_in_plain_diffusers_what_the_evaluation_drew(whole):
    """By the ODE sampler with --eval_steps; the average at full strength, though its file says no alpha.

    To a level of 256 and not to the bit, since the pipeline encodes its prompts in one batch.
    """
    test = (HERE / "prompts/cards/test.txt").read_text().splitlines()
    prompts = [test[i * len(test) // 4] for i in range(4)]
    keys = [(0, guard.EVALUATION, i, 0, 0) for i in range(4)]
    noise = np.stack([guard.rng(*key).standard_normal((4, 8, 16), np.float32) for key in keys])
    pipe = StableDiffusion3Pipeline.from_pretrained(HERE / "tiny/sd3")
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for update, line in ((0, lines_of(whole, "eval")[0]), (9, lines_of(whole, "eval")[-1])):
        folder = whole / f"lora-00000{update}"
        pipe.load_lora_weights(folder)
        size = dict(height=32, width=64, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=18)
        images = pipe(prompts, latents=torch.from_numpy(noise), **size).images
        pipe.unload_lora_weights()
        reward = np.mean(load_brightness()(images, None, None))
        assert line["prompts"] == 4 and line["reward"] == pytest.approx(reward, abs=1e-4)
        theirs = np.hstack([np.array(image.resize((256, 128)), int) for image in images[:2]])
        assert np.abs(np.array(Image.open(folder / "samples.png"), int) - theirs).max() <= 2
        drawn.append(theirs)
    assert np.abs(drawn[0] - drawn[1]).max() >= 10


def test_the_readmes_snippets_run_as_they_stand(whole, tmp_path, monkeypatch):
    fix, use, reward = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    v_new, v_old, eps = torch.randn(3, 2, 8, dtype=torch.float64)
    names = dict(v_new=v_new, v_old=v_old, eps=eps, b=-0.1, s=0.3, dt=0.1, mean=guard.mean)
    exec(fix, names)
    for name, method in (("log_r_flow", "flow-grpo"), ("log_r_guard", "guard")):
        torch.testing.assert_close(names[name], guard.log_ratio(v_new, v_old, eps, -0.1, 0.3, method))
    exec(reward, names)
    assert names["load_brightness"]()([Image.new("RGB", (8, 8), "white")], ["a"], [{}]) == [1]
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/lora-000012").symlink_to(whole / "lora-000009")
    (tmp_path / "tiny").symlink_to(HERE / "tiny")
    monkeypatch.chdir(tmp_path)
    exec(use, {})
    assert Image.open("cat.png").size == (64, 32)


def test_a_run_can_start_from_the_lora_of_another(whole, tmp_path):
    """--init_lora takes the last one of a run's folder."""
    run(tmp_path / "run", f"{WHOLE} --epochs 0 --init_lora {whole}")
    assert files_of(tmp_path / "run" / "lora-000000") == files_of(whole / "lora-000009")


def test_gold_scores_are_those_of_the_models_own_settings(tmp_path):
    run(tmp_path / "run", "--model tiny/sd3 --task geneval --epochs 0 --eval_prompts 4")
    (line,) = lines_of(tmp_path / "run", "eval")
    assert line["gold"].keys() == {"geneval_strict", "gold", "colour", "frame", "pattern", "content"}
    assert 0.8 < line["gold"]["colour"] <= 1 and 0 <= line["reward"] < 0.9


def test_two_and_four_processes_train_what_one_does(whole, tmp_path):
    """Before the first update all is equal to the bit, then but for the order of sums."""
    for ranks in (2, 4):
        assert run(tmp_path / str(ranks), WHOLE, ranks=ranks).codes == [0] * ranks
    one = lines_of(whole, "update", "rollout", "eval")
    for folder in (tmp_path / "2", tmp_path / "4"):
        several = lines_of(folder, "update", "rollout", "eval")
        assert several[0] == one[0] and several[4] == one[4]  # the first evaluation and rollout
        for mine, theirs in zip(one, several, strict=True):
            assert mine.keys() == theirs.keys()
            for name in {"loss", "grad_norm", "excess_std", "reward", "reward_mean"} & mine.keys():
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-6), name
        difference = state_of(folder)["params"] - state_of(whole)["params"]
        assert difference.abs().max() < 0.05 * 2e-3  # of the learning rate, about one update's step


def test_flux_with_every_switch_on_has_first_ratios_of_1_too(tmp_path):
    more = "--sde dance --sde_window 2 --kl_beta 0.1 --grad_checkpoint True --offload True"
    run(tmp_path / "run", f"{SMALL} --model tiny/flux {more}")
    first, second, _ = lines_of(tmp_path / "run", "update")
    assert first["excess_std"] == first["kl"] == [0.0] * 2
    assert min(second["excess_std"]) > 0 and min(second["kl"]) > 0


def attention_by_mode():
    """Attention that rounds in another way without gradients, as a GPU's may."""

    def other_attention(*args, **options):
        return attention(*args, **options) * (1 if torch.is_grad_enabled() else 1.001)

    attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = other_attention


def attention_by_mode_in_samples_without_gradients():
    class Torch:
        __getattr__ = functools.partial(getattr, torch)
        set_grad_enabled = staticmethod(lambda mode: torch.no_grad())

    attention_by_mode()
    guard.torch = Torch()


def test_the_first_ratio_is_1_though_attention_depends_on_the_gradient_mode(tmp_path):
    """So samples are drawn with gradients on. Without, a line says that the first ratios are off 1."""
    for name in ("attention_by_mode", "attention_by_mode_in_samples_without_gradients"):
        done = run(tmp_path / name, SMALL, f"test_runs:{name}")
        first = lines_of(tmp_path / name, "update")[0]
        is_1 = name == "attention_by_mode"
        assert (first["excess_std"] == [0.0] * 3) == is_1
        assert (max(first["excess_std"]) > 0.1 * first["clip"]) != is_1
        assert ("the first ratios are off 1" in done.out) != is_1


# ------------------------------------------------------------------------------------------------------------
# Killed and resumed


def killed_while_saving():
    """In the second epoch, with half of its state on the disk."""

    def half_save(state, path):
        save(state, path)
        if state["epoch"] == 2:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    save, torch.save = torch.save, half_save


def killed_after(count):
    """When so many batches have been sampled."""

    def deadly(*args, **options):
        batches.append(sample(*args, **options))
        if len(batches) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches[-1]

    batches, sample, guard.sample = [], guard.sample, deadly


# An evaluation has 2 batches, an epoch 6. One goes on with epoch 1, the other with epoch 2.
killed_while_sampling = functools.partial(killed_after, 2 + 6 + 2 + 3)
killed_in_an_evaluation = functools.partial(killed_after, 2 + 6 + 1)


def test_killed_three_times_is_as_never_killed(whole, tmp_path):
    folder, arguments = tmp_path / "run", WHOLE
    for prepare in ("killed_while_saving", "killed_while_sampling", "killed_in_an_evaluation"):
        assert run(folder, arguments, f"test_runs:{prepare}").codes == [-signal.SIGKILL]
        arguments = ""
    assert run(folder).codes == [0]
    for name in ("params", "average"):
        assert torch.equal(state_of(whole)[name], state_of(folder)[name])
    assert lines_of(whole, "update", "rollout", "eval") == lines_of(folder, "update", "rollout", "eval")
    assert files_of(folder).keys() == files_of(whole).keys()
    for lora in whole.glob("lora-*"):
        assert files_of(folder / lora.name) == files_of(lora)


def test_a_resumed_run_keeps_its_settings(whole):
    before = files_of(whole)
    other = "--task geneval --method flow-grpo --height 64 --epochs 4"
    assert_refused(whole, other, "keeps its own height, method, task;")
    assert files_of(whole) == before


# ------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_failed_start_is_one_line_and_leaves_no_folder(tmp_path):
    (tmp_path / "lora").write_text("not safetensors")
    assert_refused(tmp_path / "run", f"{SMALL} --init_lora {tmp_path / 'lora'}", "--init_lora")
    assert not (tmp_path / "run").exists()


def load_raising():
    def reward(images, prompts, metadata):
        threading.Thread(target=time.sleep, args=(1000,), daemon=False).start()  # a request unanswered
        return [1 / 0 for image in images]

    return reward if guard.RANK == guard.WORLD - 1 else load_brightness()


def load_too_slow():
    guard.REWARD_TIMEOUT = 0.2
    return lambda images, prompts, metadata: time.sleep(1000)


@pytest.mark.parametrize("reward, error, ranks", [
    ("load_raising", "ZeroDivisionError", 1), ("load_raising", "ZeroDivisionError", 2),
    ("load_too_slow", "TimeoutError", 1)])
def test_a_reward_that_fails_ends_the_run_with_its_traceback(reward, error, ranks, tmp_path):
    """At once, whatever its threads still wait for, on all ranks; what was printed before is not lost."""
    done = run(tmp_path / "run", f"{SMALL} --reward test_runs:{reward}", ranks=ranks)
    assert done.codes == [1] * ranks and error in done.errors[-1]
    assert "guard on tiny/sd3" in done.out


def never_finite():
    guard.reweighting = lambda *args: float("inf")


def test_in_float16_gradients_that_are_never_finite_end_the_run(tmp_path):
    small = f"{SMALL} --groups 26 --updates_per_epoch 26 --group_size 2 --steps 2 --height 16 --width 16"
    done = run(tmp_path / "run", f"{small} --dtype float16", "test_runs:never_finite")
    assert done.codes == [1] and "--dtype bfloat16" in done.errors[-1]
    lines = lines_of(tmp_path / "run", "update")
    assert [line["scale"] for line in lines] == [2.0**power for power in range(23, -1, -1)]
    assert {line["grad_norm"] for line in lines} == {None}
