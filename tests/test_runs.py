"""Small real runs of guard.py: alone in a folder, killed, in two processes, and with what goes wrong."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import HERE, errors, lines_of, run, start, state_of
from safetensors.torch import load_file, save_file

import guard
import rewards

SMALL = (
    f"--model {HERE}/tiny/sd3 --reward test_runs:brightness --gold none --groups 2 --group_size 4 "
    "--micro_batch 4 --eval_prompts 4 --steps 4 --eval_steps 2 --epochs 1 --lr 2e-3 --clip 2.3e-5"
)
# 9 updates, so that the moving average moves once, and evaluations everywhere
WHOLE = f"{SMALL} --epochs 3 --groups 3 --updates_per_epoch 3 --eval_every 1 --ema_decay 0.9"


def brightness():
    """A reward that is never the same for two pictures, so that no group is dead."""
    return lambda images, prompts, metadata: [np.asarray(image).mean() / 255 for image in images]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(f"{WHOLE} --run_dir {folder}", folder.parent / "output")[0] == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(arguments, output, words, prepare=None):
    """Exit code 2 and one line, with these words in it. Before it a library may have its own."""
    code, lines = run(arguments, output, prepare)
    assert code == 2 and lines[-1].startswith("guard.py: error: ") and words in lines[-1]
    assert not any("Traceback" in line for line in lines)


def assert_same(mine, theirs):
    """Nested states, to the bit."""
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same(mine[key], theirs[key])
    elif isinstance(mine, list):
        assert_same(dict(enumerate(mine)), dict(enumerate(theirs)))
    else:
        assert mine == theirs


def assert_same_run(one, other, updates=9):
    assert_same(state_of(one, updates), state_of(other, updates))
    for kind in ("update", "rollout", "eval"):
        assert lines_of(one, kind) == lines_of(other, kind)


# ------------------------------------------------------------------------------------------------------------
# A run


def test_the_two_files_alone_train_save_and_resume(tmp_path):
    """In a folder beside nothing else, in a plain process."""
    for name in ("guard.py", "rewards.py"):
        shutil.copy(HERE / name, tmp_path)
    prompts = (HERE / "prompts/cards/test.txt").read_text().splitlines()[:4]
    (tmp_path / "cards.txt").write_text("\n".join(prompts))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    first = SMALL.replace("test_runs:brightness", "ocr") + " --prompts cards.txt --run_dir run"
    for arguments in (first, "--resume run --epochs 2"):
        command = [sys.executable, "guard.py", *arguments.split()]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    assert [line["update"] for line in lines_of(tmp_path / "run", "update")] == [1, 2, 3, 4]
    assert len(list((tmp_path / "run").glob("checkpoint-00000[24]/state.pt"))) == 2


def test_what_a_run_leaves(whole):
    kinds = [line["kind"] for line in lines_of(whole, "eval", "update", "rollout")]
    assert kinds == ["eval", *["update", "update", "update", "rollout", "eval"] * 3]
    assert [path.name for path in sorted(whole.glob("samples/*"))] == [f"{n:06d}.png" for n in (0, 3, 6, 9)]
    state, before = state_of(whole, 9), state_of(whole, 6)
    assert torch.equal(before["average"], state_of(whole, 3)["average"])  # it moves at the 8th update
    assert not torch.equal(state["average"], before["average"])
    assert not torch.equal(state["average"], state["params"])


def test_evaluation_draws_the_test_prompts_and_can_be_had_alone(tmp_path):
    (folder := tmp_path / "prompts").mkdir()
    (folder / "train.txt").write_text('a red card with dots that says "CAT"\n')
    (folder / "test.txt").write_text('a blue card with dots that says "DOG"\nred, "OWL"\n')
    arguments = f"{SMALL} --epochs 0 --prompts {folder} --run_dir {tmp_path / 'run'}"
    assert run(arguments, tmp_path / "output")[0] == 0
    assert [line["update"] for line in lines_of(tmp_path / "run", "eval", "update", "rollout")] == [0]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    args = guard.parse_args(arguments.split())
    backbone, seen = guard.load_backbone(args), []

    class Scorer:
        def submit(self, images, pairs, count):
            seen.extend(pairs)

        def collect(self, slices, total):
            return torch.zeros(1, total)

    guard.evaluate(backbone, guard.Policy(backbone, args), args, Scorer(), 0)
    assert [prompt.split('"')[1] for prompt, _ in seen] == ["DOG", "OWL"]


def test_the_saved_lora_is_a_file_like_any_other(whole):
    os.umask(umask := os.umask(0))
    mode = (whole / "checkpoint-000009/pytorch_lora_weights.safetensors").stat().st_mode
    assert mode & 0o777 == 0o666 & ~umask


def test_two_and_four_processes_train_what_one_does(tmp_path):
    """Before the first update all is equal to the bit, then but for the order of sums."""
    for ranks in (1, 2, 4):
        arguments = f"{SMALL} --epochs 2 --micro_batch 2 --kl_beta 0.01 --run_dir {tmp_path / str(ranks)}"
        processes = start(arguments, tmp_path / "output", ranks=ranks)
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * ranks
    one = lines_of(tmp_path / "1", "update", "rollout", "eval")
    for folder in (tmp_path / "2", tmp_path / "4"):
        several = lines_of(folder, "update", "rollout", "eval")
        assert several[0] == one[0] and several[3] == one[3]  # evaluation and rollout before any update
        for mine, theirs in zip(one, several, strict=True):
            assert mine.keys() == theirs.keys()
            for name in {"loss", "grad_norm", "kl", "rho_std", "reward", "reward_mean"} & mine.keys():
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-6), name
        difference = state_of(folder, 4)["params"] - state_of(tmp_path / "1", 4)["params"]
        assert difference.abs().max() < 0.05 * 2e-3  # of the learning rate, about one update's step


@pytest.mark.parametrize("task", ["geneval", "pickscore"])
def test_the_other_tasks_too_are_the_same_on_two_processes(task, tmp_path):
    """With the judges and settings of guard.json. test_guard.py has OCR."""
    small = "--groups 2 --updates_per_epoch 2 --group_size 8 --micro_batch 8 --eval_prompts 8 --epochs 1"
    for ranks in (1, 2):
        arguments = f"--model {HERE}/tiny/sd3 --task {task} {small} --run_dir {tmp_path / str(ranks)}"
        for process in start(arguments, tmp_path / "output", ranks=ranks):
            process.join(300)
    one, two = (lines_of(tmp_path / ranks, "update", "rollout", "eval") for ranks in ("1", "2"))
    assert one[0] == two[0] and len(one[0]["gold"]) >= 5  # the evaluation before training
    assert [line["reward_mean"] for line in one if line["kind"] == "rollout"] == [
        line["reward_mean"] for line in two if line["kind"] == "rollout"]
    for mine, theirs in zip(one, two, strict=True):
        if mine["kind"] == "update":
            assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3) and mine["live"] == 8


# ------------------------------------------------------------------------------------------------------------
# Killed and resumed


def killed_in(call, owner, name):
    """From now on the process kills itself at the end of that call of `owner.name`."""
    original, calls = getattr(owner, name), []

    def deadly(*args, **options):
        result = original(*args, **options)
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def killed_while_saving():
    """In the second epoch, with half of state.pt on the disk."""

    def save(state, path):
        original(state, path)
        if state["position"]["epochs"] == 2:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    original, torch.save = torch.save, save


def killed_while_sampling():
    killed_in(1 + 3 + 2, guard, "sample")  # of a resumed run: an evaluation, an epoch, 2 slices of the third


def killed_before_any_checkpoint():
    killed_in(2, guard.Policy, "apply_gradients")


def killed_while_tidying_up():
    """After the third epoch's checkpoint has its name, before older ones are deleted."""
    killed_in(2, guard.Path, "replace")  # the first is config.json's


def test_killed_three_times_is_as_never_killed(whole, tmp_path):
    folder = tmp_path / "run"
    arguments = f"{WHOLE} --run_dir {folder}"
    for prepare in ("killed_while_saving", "killed_while_sampling", "killed_while_tidying_up", None):
        code, _ = run(arguments, tmp_path / "output", prepare and f"test_runs:{prepare}")
        assert code == (-signal.SIGKILL if prepare else 0)
        arguments = f"--resume {folder}"
    assert_same_run(whole, folder)
    assert not list(folder.glob("*.partial"))


def test_killed_before_its_first_checkpoint_it_starts_again(whole, tmp_path):
    """From the LoRA that it was to start from."""
    lora, folder = whole / "checkpoint-000009", tmp_path / "run"
    for name, prepare in (("whole", None), ("run", "test_runs:killed_before_any_checkpoint")):
        run(f"{SMALL} --init_lora {lora} --run_dir {tmp_path / name}", tmp_path / "output", prepare)
    assert not list(folder.glob("checkpoint-*"))
    assert run(f"--resume {folder}", tmp_path / "output")[0] == 0
    assert_same_run(tmp_path / "whole", folder, 2)


def test_only_checkpoints_that_the_run_wrote_are_read_or_deleted(copy, tmp_path):
    others = ("checkpoint-000003-good", "checkpoint-best", "checkpoint-9999999", "checkpoint-000001")
    for name in others:
        shutil.copytree(copy / "checkpoint-000003", copy / name)
    assert run(f"--resume {copy} --epochs 4 --keep 1", tmp_path / "output")[0] == 0
    assert [line["update"] for line in lines_of(copy, "update")] == list(range(1, 13))
    assert len(lines_of(copy, "start")) == 2
    assert {path.name for path in copy.glob("checkpoint-*")} == {*others, "checkpoint-000012"}


def test_what_the_command_line_says_wins_on_resume(copy, tmp_path):
    """Also over a path that is no more."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"prompts": "gone.txt"}))
    prompts = shutil.copy(HERE / "prompts/cards/test.txt", tmp_path / "new.txt")
    flags = f"--prompts {prompts} --lr 5e-4 --epochs 4"
    assert run(f"--resume {copy} {flags}", tmp_path / "output")[0] == 0
    assert len(lines_of(copy, "update")) == 12
    assert state_of(copy, 12)["optimizer"]["param_groups"][0]["lr"] == 5e-4
    config = json.loads((copy / "config.json").read_text())
    assert (config["prompts"], config["epochs"], config["clip"]) == (str(prompts), 4, 2.3e-5)


def test_to_go_on_the_lora_to_start_from_need_not_be_there(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"init_lora": "gone"}))
    assert guard.parse_args(["--resume", str(copy)]).run_dir == str(copy)


def test_a_lora_of_another_rank_than_the_checkpoints_is_one_line(copy, tmp_path):
    before = files_of(copy)
    assert_refused(f"--resume {copy} --lora_rank 16", tmp_path / "output", "--lora_rank")
    assert files_of(copy) == before


def test_a_damaged_checkpoint_is_a_traceback_and_nothing_is_deleted(copy, tmp_path):
    os.truncate(copy / "checkpoint-000009/state.pt", 1000)
    before = files_of(copy)
    code, lines = run(f"--resume {copy}", tmp_path / "output")
    assert code == 1 and "Traceback" in lines[0]
    after = files_of(copy)
    assert [path.name for path in before if after[path] != before[path]] in ([], ["config.json"])


def test_processes_that_see_other_checkpoints_do_not_go_on(tmp_path, monkeypatch):
    """As without a shared disk: this one of two finds nothing, the other one an epoch."""
    args = guard.Args(run_dir=str(tmp_path))
    monkeypatch.setattr(guard, "WORLD", 2)
    monkeypatch.setattr(guard, "all_reduce", lambda epochs: epochs + 0)
    assert guard.load_checkpoint(None, args)["epochs"] == 0
    monkeypatch.setattr(guard, "all_reduce", lambda epochs: epochs + 1)
    with pytest.raises(rewards.BadInput, match="shared disk"):
        guard.load_checkpoint(None, args)


# ------------------------------------------------------------------------------------------------------------
# A folder belongs to one run


def test_a_new_run_takes_no_folder_that_holds_something(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-000002").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert_refused(f"{SMALL} --run_dir {folder}", tmp_path / "output", "is not empty")
    assert sorted(path.name for path in folder.rglob("*")) == ["checkpoint-000002", "notes.txt"]


def test_of_two_that_start_in_one_folder_one_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    arguments = f"{SMALL} --run_dir {tmp_path / 'run'}"
    processes = [start(arguments, tmp_path / name)[0] for name in ("one", "other")]
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode for process in processes) == [0, 2]
    assert len(lines_of(tmp_path / "run", "start")) == 1


def test_a_run_that_is_alive_is_not_resumed(copy, tmp_path):
    before = files_of(copy)
    held = os.open(copy, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert_refused(f"--resume {copy} --epochs 9", tmp_path / "output", "another process")
    os.close(held)
    assert files_of(copy) == before


def no_weights():
    guard.MODELS = {"sd3.5-medium": "nobody/nothing"}


def test_without_the_gated_weights_a_line_says_how_to_get_them_or_do_without(tmp_path):
    for words in ("licence", "hf auth login", "--model tiny/sd3"):
        assert_refused("--task ocr", tmp_path / "output", words, "test_runs:no_weights")


# ------------------------------------------------------------------------------------------------------------
# A LoRA to start from, and models that are not whole


def test_a_lora_with_dropout_starts_a_run_with_ratio_1(whole, tmp_path):
    """At its own strength: its first evaluation is the last one of the run that made it."""
    file, metadata = tmp_path / "lora.safetensors", {"transformer.r": 32, "transformer.lora_alpha": 64}
    metadata |= {"transformer.lora_dropout": 0.1}
    weights = load_file(whole / "checkpoint-000009/pytorch_lora_weights.safetensors")
    halved = {name: weight / 2 if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(halved, file, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    arguments = f"{SMALL} --init_lora {file} --run_dir {tmp_path / 'run'}"
    assert run(arguments, tmp_path / "output")[0] == 0
    assert lines_of(tmp_path / "run", "eval")[0]["reward"] == lines_of(whole, "eval")[-1]["reward"]
    assert lines_of(whole, "eval")[-1]["reward"] != lines_of(whole, "eval")[0]["reward"]
    assert lines_of(tmp_path / "run", "update")[0]["rho_std"] == [0.0] * 3


@pytest.mark.parametrize("kind", ["text encoder", "peft", "rank"])
def test_a_lora_that_does_not_fit_is_one_line(kind, whole, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    weights = load_file(whole / "checkpoint-000009/pytorch_lora_weights.safetensors")
    name = "pytorch_lora_weights.safetensors"
    if kind == "text encoder":
        layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        weights |= {f"{layer}.lora_A.weight": torch.ones(4, 8), f"{layer}.lora_B.weight": torch.ones(8, 4)}
    elif kind == "peft":
        name = "adapter_model.safetensors"
        weights = {key.replace("transformer.", "base_model.model."): value for key, value in weights.items()}
        (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    else:
        weights = {key: weight[:4] if "lora_A" in key else weight[:, :4] for key, weight in weights.items()}
    save_file({key: weight.contiguous() for key, weight in weights.items()}, lora / name)
    arguments = f"{SMALL} --init_lora {lora} --run_dir {tmp_path / 'run'}"
    assert_refused(arguments, tmp_path / "output", "--init_lora")


@pytest.mark.parametrize("part", ["tokenizer_2", "tokenizer_3", "text_encoder_3", "transformer", "vae"])
def test_a_model_that_is_not_whole_is_one_line(part, tmp_path):
    model = shutil.copytree(HERE / "tiny/sd3", tmp_path / "model", copy_function=os.symlink)
    if part == "tokenizer_2":
        shutil.rmtree(model / part)
    elif part == "tokenizer_3":
        (model / part / "tokenizer.json").unlink()
    else:
        (file,) = (model / part).glob("*.safetensors")
        weights = load_file(file)
        weights.pop([name for name in weights if "embed_tokens" not in name][3])
        file.unlink()
        save_file(weights, file, {"format": "pt"})
    arguments = f"{SMALL} --model {model} --run_dir {tmp_path / 'run'}"
    assert_refused(arguments, tmp_path / "output", part)


# ------------------------------------------------------------------------------------------------------------
# What goes wrong on the way


def raising():
    def reward(images, prompts, metadata):
        threading.Thread(target=time.sleep, args=(1000,), daemon=False).start()  # a request unanswered
        return [1 / 0 for image in images]

    return reward


def not_a_number():
    return lambda images, prompts, metadata: [float("nan") for image in images]


def too_slow():
    guard.REWARD_DEADLINE = 0.2
    return lambda images, prompts, metadata: time.sleep(1000)


REWARDS = dict(raising="ZeroDivisionError", not_a_number="RewardError", too_slow="TimeoutError")


@pytest.mark.parametrize("reward", REWARDS)
def test_a_reward_that_fails_ends_the_run_with_its_traceback(reward, tmp_path):
    """At once, whatever its threads are still waiting for; what was printed until then is not lost."""
    begin = time.monotonic()
    arguments = f"{SMALL} --reward test_runs:{reward} --run_dir {tmp_path / 'run'}"
    code, lines = run(arguments, tmp_path / "output")
    assert code == 1 and time.monotonic() - begin < 60
    assert REWARDS[reward] in lines[-1]
    assert [line for line in lines if "1 / 0" in line] or reward != "raising"
    assert "guard on" in (tmp_path / "output-0.out").read_text()


def raising_on_rank_1():
    return raising() if guard.RANK == 1 else brightness()


def test_a_rank_that_fails_alone_says_why_and_the_other_ends(tmp_path):
    arguments = f"{SMALL} --reward test_runs:raising_on_rank_1 --run_dir {tmp_path / 'run'}"
    processes = start(arguments, tmp_path / "output", ranks=2)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]
    assert errors(tmp_path / "output-1.err")[-1] == "ZeroDivisionError: division by zero"


def out_of_memory():
    def update(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    guard.update = update


def test_out_of_memory_ends_with_what_would_help(tmp_path):
    code, lines = run(f"{SMALL} --run_dir {tmp_path / 'run'}", tmp_path / "output", "test_runs:out_of_memory")
    assert code == 1 and "CUDA out of memory" in lines[-2]
    assert all(flag in lines[-1] for flag in ("--grad_checkpoint", "--offload", "--micro_batch"))


def test_a_latent_that_is_not_finite_is_no_picture():
    backbone = SimpleNamespace(shape=(1, 2, 2), velocity=lambda x, sigma, embeddings: x * float("inf"))
    schedule = guard.make_schedule([1.0, 0.5, 0.0], 0.7, "flow")
    with pytest.raises(FloatingPointError, match="bfloat16"):
        guard.sample(backbone, schedule, [None], [(0, 0, 0, 0)])
