"""Faults lose no more than the work since the last checkpoint; a run goes on as if nothing had happened."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers import assert_same_run, checkpoint_names, lines_of, lines_without_bars, state_of

import guard
import rewards
from scorers import background
from settings import command_line

HERE = Path(__file__).resolve().parent.parent
CARDS = HERE / "prompts" / "cards" / "test.txt"  # few, so that they are soon read
# In each of its two epochs two slices, and before and after each an evaluation of one slice.
SMALL = (
    f"--prompts {CARDS} --gold_prompts {CARDS} "
    "--model tiny-sd3 --reward cards --gold cards-frame --groups 2 --group_size 2 --micro_batch 2 --steps 3 "
    "--eval_steps 2 --eval_prompts 2 --epochs 2 --eval_every 1"
)
GO_ON = "; checkpoints are whole, go on with --resume"


def arguments(folder, more=""):
    return guard.parse_args([*SMALL.split(), "--run_dir", str(folder), *more.split()])


def resume(folder):
    guard.train(guard.parse_args(["--resume", str(folder)]))


@pytest.fixture(scope="module")
def synced():
    """Inodes of the files that `whole` has flushed to the disk."""
    return set()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, synced):
    """A run never interrupted, on a system without os.sync, and where renaming does not replace (Windows)."""
    folder, fsync = tmp_path_factory.mktemp("runs") / "whole", os.fsync

    def noted(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "sync", raising=False)
        patch.delattr(Path, "rename")
        patch.setattr(os, "fsync", noted)
        guard.train(arguments(folder))
    return folder


def copy_of(whole, folder, updates=4):
    """A copy of the run as it was saved after so many updates: 2 or 4."""
    shutil.copytree(whole, folder)
    if updates == 2:
        shutil.rmtree(folder / "checkpoint-000004")
    return folder


def test_a_run_evaluates_before_and_after_every_epoch_and_saves_each(whole):
    kinds = [line["kind"] for line in lines_of(whole)]
    assert kinds == ["eval", *["update", "update", "rollout", "eval"] * 2]
    assert checkpoint_names(whole) == ["checkpoint-000002", "checkpoint-000004"]


def test_what_a_checkpoint_holds(whole, synced):
    """Every tensor by its parameter's name; metrics.jsonl as it was; all of it flushed to the disk."""
    for folder in whole.glob("checkpoint-*"):
        files = {path.name: path for path in folder.iterdir()}
        expected = {"pytorch_lora_weights.safetensors", "state.safetensors", "state.json", "metrics.jsonl"}
        assert files.keys() == expected
        assert {path.stat().st_ino for path in files.values()} <= synced
    state = state_of(whole, 4)
    names = {kind: set() for kind in ("live", "average", "step", "exp_avg", "exp_avg_sq")}
    for name in state:
        kind, parameter = name.split(".", 1)
        names[kind].add(parameter)
    assert len(set(map(frozenset, names.values()))) == 1 and len(names["live"]) > 50
    assert all("lora_" in name for name in names["live"])
    assert {state[f"step.{name}"].item() for name in names["step"]} == {4}
    kept = (whole / "checkpoint-000004" / "metrics.jsonl").read_text()
    assert (whole / "metrics.jsonl").read_text().startswith(kept)
    assert [json.loads(line)["kind"] for line in kept.splitlines()][-2:] == ["update", "rollout"]


# ------------------------------------------------------------------------------------------------------------
# Killed

SECRETS = {"HF_TOKEN": "hf_neverwritten", "GRPO_GUARD_UNIFIEDREWARD_KEY": "sk-neverwritten"}


def signal_to_itself(number):
    """A reward that sends its own process a signal in the second epoch; secrets in the environment."""
    os.environ |= SECRETS
    calls, reward = [], rewards.REWARDS["cards"]()

    def signalling(*given):
        calls.append(1)  # an evaluation, the first epoch's two slices, an evaluation
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return reward(*given)

    rewards.REWARDS["cards"] = lambda: signalling


def sigterm():
    signal_to_itself(signal.SIGTERM)


def sigkill():
    signal_to_itself(signal.SIGKILL)


def sigint():
    signal_to_itself(signal.SIGINT)


@pytest.mark.parametrize(
    "prepare, code", [(sigterm, -signal.SIGTERM), (sigkill, -signal.SIGKILL), (sigint, 1)]
)
def test_a_kill_costs_at_most_the_epoch_and_leaves_no_secret(prepare, code, whole, start, tmp_path):
    """Two of its environment's variables are secret: nothing that it prints or writes has them."""
    folder = tmp_path / "run"
    (process,) = start(f"{SMALL} --run_dir {folder}", tmp_path / "output", prepare=prepare)
    process.join(120)
    output = (tmp_path / "output-0.txt").read_text()
    assert process.exitcode == code
    assert [f"guard.py: error: KeyboardInterrupt: {GO_ON}" in output] == [prepare == sigint]
    assert "Traceback" not in output
    assert checkpoint_names(folder) == ["checkpoint-000002"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.json", "metrics.jsonl", "state.safetensors"}
    for content in (output.encode(), *(path.read_bytes() for path in files)):
        assert b"neverwritten" not in content
    resume(folder)
    assert_same_run(whole, folder, 4)


def read(path):
    return path.read_text() if path.exists() else ""


def wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def pid_of_rank(rank, folder):
    """The process with torchrun's RANK in its environment and the run's folder on its command line."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment and str(folder) in (process / "cmdline").read_text():
                return int(process.name)
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process in /proc")
def test_one_rank_dying_ends_the_others_and_is_named(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "guard.py"]
    command += [*SMALL.split(), "--updates_per_epoch", "1", "--epochs", "99", "--run_dir", str(folder)]
    process = subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(folder / "checkpoint-000001")
    os.kill(pid_of_rank(1, folder), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in err and "SIGKILL" in err
    assert state_of(folder, 1)


def test_ctrl_c_in_a_terminal_with_two_processes(start, tmp_path):
    """The terminal sends SIGINT to all of them."""
    folder = tmp_path / "run"
    more = f"--updates_per_epoch 1 --epochs 99 --run_dir {folder}"
    processes = start(f"{SMALL} {more}", tmp_path / "output", ranks=2)
    wait_for(folder / "checkpoint-000001")
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]
    outputs = [(tmp_path / f"output-{rank}.txt").read_text() for rank in (0, 1)]
    assert f"guard.py: error: KeyboardInterrupt: {GO_ON}" in "".join(outputs)
    assert state_of(folder, 1)


@pytest.mark.parametrize(
    "where, call, epochs_kept",
    [("sample", 3, 1), ("update", 1, 1), ("evaluate", 1, 1), ("evaluate", 2, 2), ("save_file", 1, 1)],
)
def test_ctrl_c_anywhere_costs_at_most_the_epoch(
    where, call, epochs_kept, whole, tmp_path, monkeypatch, command
):
    """In the second epoch, evaluations before and after it included; `sample` is called twice in each."""
    folder, calls, original = copy_of(whole, tmp_path / "run", updates=2), [], getattr(guard, where)

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(where)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(guard, where, interrupted)
    assert command(f"--resume {folder}") == (1, [f"guard.py: error: KeyboardInterrupt: {GO_ON}"])
    monkeypatch.setattr(guard, where, original)
    assert checkpoint_names(folder) == ["checkpoint-000002", "checkpoint-000004"][:epochs_kept]
    assert (folder / "checkpoint-000004.partial").exists() == (where == "save_file")
    resume(folder)
    assert_same_run(whole, folder, 4)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and the disk


def test_a_kill_at_any_moment_leaves_a_run_that_goes_on(whole, tmp_path):
    """What a kill can leave: a half-written folder, lines of metrics.jsonl after the last checkpoint."""
    folder = copy_of(whole, tmp_path / "run", updates=2)
    partial = folder / "checkpoint-000004.partial"
    partial.mkdir()
    (partial / "state.json").write_text('{"epo')
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "upd')
    resume(folder)
    assert_same_run(whole, folder, 4)
    assert not partial.exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, tmp_path):
    folder = copy_of(whole, tmp_path / "run", updates=2)
    shutil.rmtree(folder / "checkpoint-000002")
    resume(folder)
    assert_same_run(whole, folder, 4)


def test_only_the_newest_checkpoints_stay(tmp_path):
    folder = tmp_path / "run"
    guard.train(arguments(folder, "--keep 1 --eval_every 9"))
    assert checkpoint_names(folder) == ["checkpoint-000004"]


def test_a_longer_run_keeps_the_evaluation_that_ended_the_shorter(whole, tmp_path):
    """It was made because the run ended there; no cadence of the longer run makes it again."""
    folder = copy_of(whole, tmp_path / "run")
    guard.train(guard.parse_args(["--resume", str(folder), "--epochs", "3", "--eval_every", "3"]))
    before, after = lines_of(whole, "eval"), lines_of(folder, "eval")
    assert after[:-1] == before and [line["update"] for line in after] == [0, 2, 4, 6]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "metrics.jsonl"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(name, whole, tmp_path, command):
    folder = copy_of(whole, tmp_path / "run")
    path = folder / "checkpoint-000004" / name
    if name == "metrics.jsonl":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, lines = command(f"--resume {folder}")
    assert code == 2 and len(lines) == 1
    assert re.search("checkpoint-000004: cannot be read; remove it to go on before it", lines[0])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    shutil.rmtree(folder / "checkpoint-000004")
    resume(folder)
    assert_same_run(whole, folder, 4)


def test_config_keeps_the_first_start_and_appends_later_ones(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "git_commit", lambda: "1" * 40)
    folder = copy_of(whole, tmp_path / "run")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config["processes"] == 1 and config["device"] == "cpu" and "resumed" not in config
    assert config["versions"]["torch"] == version("torch")
    first = dict(commit="0" * 40, processes=7, device="another", versions={"torch": "0.1"})
    path.write_text(json.dumps(config | first))
    for starts in (1, 2):
        resume(folder)
        after = json.loads(path.read_text())
        assert {name: after[name] for name in first} == first
        later = dict(commit="1" * 40, processes=1, device="cpu", versions=config["versions"])
        assert after["resumed"] == [later] * starts
    assert not list(folder.glob("*.partial"))


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(whole, tmp_path, monkeypatch, command):
    folder, save = copy_of(whole, tmp_path / "run", updates=2), guard.save_file

    def full(tensors, path):
        if "checkpoint-000004" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(guard, "save_file", full)
    error = "guard.py: error: OSError: [Errno 28] No space left on device"
    assert command(f"--resume {folder}") == (1, [error + GO_ON])
    monkeypatch.setattr(guard, "save_file", save)
    assert checkpoint_names(folder) == ["checkpoint-000002"]
    resume(folder)
    assert_same_run(whole, folder, 4)


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path, command):
    """A file is where its parent should be: a folder without permissions would not stop root."""
    (tmp_path / "file").write_text("")
    code, lines = command(f"{SMALL} --run_dir {tmp_path / 'file' / 'run'}")
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith("guard.py: error: NotADirectoryError: ")
    assert str(tmp_path / "file" / "run") in lines[0]


def test_a_run_folder_that_turns_read_only_leaves_the_last_checkpoint(whole, tmp_path, monkeypatch, command):
    folder = tmp_path / "run"

    def read_only(path, mode):
        if (folder / "checkpoint-000002").exists():
            raise OSError(30, "Read-only file system", str(path))
        return open(path, mode)

    monkeypatch.setattr(guard, "open", read_only, raising=False)
    error = f"guard.py: error: OSError: [Errno 30] Read-only file system: '{folder / 'metrics.jsonl'}'"
    assert command(f"{SMALL} --run_dir {folder}") == (1, [error + GO_ON])
    monkeypatch.delattr(guard, "open")
    resume(folder)
    assert_same_run(whole, folder, 4)


@pytest.mark.parametrize("size", [0, 20, 100_000])
def test_a_truncated_lora_is_named(size, whole, tmp_path, command):
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes((whole / "checkpoint-000004" / "pytorch_lora_weights.safetensors").read_bytes()[:size])
    code, lines = command(f"{SMALL} --run_dir {tmp_path / 'run'} --init_lora {lora}")
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"guard.py: error: --init_lora {lora}: ")
    assert not (tmp_path / "run").exists()


def copy_of_tiny_sd3(folder):
    """A model that can be spoiled, and the flags for it: its presets are those of SD3.5-M."""
    model = folder / "model"
    shutil.copytree(HERE / "tiny" / "sd3", model)
    return model, f"{SMALL} --run_dir {folder / 'run'} --resolution 32x64 --model {model}"


@pytest.mark.parametrize(
    "file",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/config.json",
        "model_index.json",
    ],
)
def test_a_truncated_model_is_named(file, tmp_path, command):
    model, flags = copy_of_tiny_sd3(tmp_path)
    os.truncate(model / file, (model / file).stat().st_size // 2)
    code, lines = command(flags)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"guard.py: error: --model {model}: expected ")
    assert not (tmp_path / "run").exists()


def test_a_picture_too_large_for_the_model_is_one_line(tmp_path, command):
    code, lines = command(f"{SMALL} --resolution 128 --run_dir {tmp_path / 'run'}")
    message = "guard.py: error: --resolution 128: this model draws at most 64 pixels a side"
    assert (code, lines) == (2, [message])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "part, name", [("_class_name", "NewerPipeline"), ("transformer", ["diffusers", "NewerTransformer"])]
)
def test_a_class_that_diffusers_lacks_is_one_line(part, name, tmp_path, command):
    model, flags = copy_of_tiny_sd3(tmp_path)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {part: name}))
    code, lines = command(flags)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"guard.py: error: --model {model}: expected ") and "Newer" in lines[0]
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------
# Rewards


def fail_at(call, name, answer):
    """A loader of that reward which answers otherwise at one of its calls."""
    reward, calls = rewards.REWARDS[name](), []

    def failing(images, prompts, metadata):
        calls.append(1)
        return answer(images) if len(calls) == call else reward(images, prompts, metadata)

    return lambda: failing


def two_lines(images):
    raise RuntimeError("two\nlines")


FAILURES = [
    (lambda images: 1 / 0, "ZeroDivisionError: division by zero"),
    (two_lines, "RuntimeError: two lines"),
    (lambda images: [float("nan")] * len(images), "expected 2 finite numbers, got 2: [nan, nan]"),
    (lambda images: [1.0], "expected 2 finite numbers, got 1: [1.0]"),
    (lambda images: None, "TypeError: 'NoneType' object is not iterable"),
]


@pytest.mark.parametrize("answer, message", FAILURES)
def test_whatever_a_reward_raises_is_one_line(answer, message, tmp_path, monkeypatch, command):
    monkeypatch.setitem(rewards.REWARDS, "cards", fail_at(1, "cards", answer))
    code, lines = command(f"{SMALL} --run_dir {tmp_path / 'run'}")
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith("guard.py: error: RewardError: reward 'cards' failed: ")
    assert message in lines[0] and lines[0].endswith(GO_ON)


def test_a_reward_that_fails_costs_the_epoch(whole, tmp_path, monkeypatch, command):
    """In the second epoch, after the evaluation before it."""
    folder = copy_of(whole, tmp_path / "run", updates=2)
    with monkeypatch.context() as patch:
        patch.setitem(rewards.REWARDS, "cards", fail_at(2, "cards", two_lines))
        assert command(f"--resume {folder}")[0] == 1
    assert checkpoint_names(folder) == ["checkpoint-000002"]
    resume(folder)
    assert_same_run(whole, folder, 4)


def test_a_gold_score_that_fails_costs_no_epoch(whole, tmp_path, monkeypatch, command):
    """It is asked in evaluations only, the second of which comes after the first epoch was saved."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setitem(rewards.REWARDS, "cards-frame", fail_at(2, "cards-frame", two_lines))
        code, lines = command(f"{SMALL} --run_dir {folder}")
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith("guard.py: error: RewardError: reward 'cards-frame' failed: RuntimeError")
    assert checkpoint_names(folder) == ["checkpoint-000002"]
    assert [line["update"] for line in lines_of(folder, "eval")] == [0]
    resume(folder)
    assert [line["update"] for line in lines_of(folder, "eval")] == [0, 2, 4]
    assert_same_run(whole, folder, 4)


def hang(name):
    background.TIMEOUT = timedelta(seconds=0.5)
    rewards.REWARDS[name] = lambda: lambda *given: time.sleep(1000)


def reward_hangs():
    hang("cards")


def gold_hangs():
    hang("cards-frame")


@pytest.mark.parametrize("prepare", [reward_hangs, gold_hangs])
def test_a_reward_that_hangs_stops_the_run(prepare, start, tmp_path):
    """In a process of its own, since the thread that hangs cannot be ended."""
    (process,) = start(f"{SMALL} --run_dir {tmp_path / 'run'}", tmp_path / "output", prepare=prepare)
    process.join(60)
    assert process.exitcode == 1
    lines = lines_without_bars((tmp_path / "output-0.txt").read_text())
    why = "RewardError: no reward within 0:00:00.500000, hours:minutes:seconds"
    assert lines[-1] == f"guard.py: error: {why}{GO_ON}" and "Traceback" not in "".join(lines)


def test_other_processes_wait_longer_than_a_reward_may_take(tmp_path, monkeypatch, command):
    """Else they give up first, and the reward's own error is not read."""
    given = {}

    def init_process_group(backend, **options):
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(guard, "WORLD", 2)
    monkeypatch.setattr(guard.dist, "init_process_group", init_process_group)
    assert command(f"{SMALL} --run_dir {tmp_path / 'run'}")[0] == 1
    assert given["timeout"] >= background.TIMEOUT + timedelta(minutes=5)


# ------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return guard.load_backbone(arguments(tmp_path_factory.mktemp("none") / "run"))


@pytest.fixture
def policy(backbone):
    return guard.Policy(backbone, guard.Args())


def test_an_overflow_halves_the_loss_scale_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    folder, calls, loss = tmp_path / "run", [], guard.slice_loss

    def overflowing(*args):
        calls.append(1)  # two trained steps for each of two updates an epoch
        return tuple(part * (float("inf") if len(calls) == 1 else 1.0) for part in loss(*args))

    monkeypatch.setattr(guard, "slice_loss", overflowing)
    guard.train(arguments(folder, "--epochs 1"))
    said = "skipped an update: its gradient is not finite; the loss scale is 0.5 now"
    assert said in capfd.readouterr().out
    updates = lines_of(folder, "update")
    assert [line["skipped"] for line in updates] == [True, False]
    assert updates[0]["grad_norm"] is None and updates[1]["grad_norm"] > 0
    state = state_of(folder, 2)
    assert all(value.isfinite().all() for value in state.values())
    assert {state[name].item() for name in state if name.startswith("step.")} == {1}  # of two updates
    guard.train(guard.parse_args(["--resume", str(folder), "--epochs", "2"]))
    position = json.loads((folder / "checkpoint-000004" / "state.json").read_text())
    assert position == dict(epoch=2, loss_scale=0.5)


def test_the_loss_scale_changes_no_gradient(policy):
    torch.manual_seed(0)
    gradients = [torch.randn_like(p) for p in policy.params]
    norms, before, steps = [], [p.detach().clone() for p in policy.params], []
    for scale in (1.0, 2.0**-7):
        for p, start, gradient in zip(policy.params, before, gradients, strict=True):
            p.data.copy_(start)
            p.grad.copy_(gradient * scale)
        policy.optimizer.state.clear()
        policy.loss_scale = scale
        norms.append(policy.step(divisor=1e6))
        steps.append([p.detach() - start for p, start in zip(policy.params, before, strict=True)])
    assert norms[0] == norms[1] > 0 and policy.skipped == 0
    assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))


def test_the_tenth_skipped_update_in_a_row_ends_the_run(policy):
    before = [p.detach().clone() for p in policy.params]
    for number in range(1, 10):
        policy.params[0].grad.fill_(float("nan"))
        assert not policy.step(1.0).isfinite()
        assert policy.skipped == number and policy.loss_scale == 0.5**number
    policy.params[0].grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="10 updates in a row"):
        policy.step(1.0)
    assert all(torch.equal(p, old) for p, old in zip(policy.params, before, strict=True))
    policy.skipped = 9
    for p in policy.params:
        p.grad.fill_(1.0)
    assert policy.step(1.0) > 0 and policy.skipped == 0  # a good one in between, and it counts from the start


def test_the_live_weights_are_back_after_an_exception(policy):
    policy.ema.shadow_params = [torch.full_like(p, 7.0) for p in policy.params]
    before = [p.detach().clone() for p in policy.params]
    with pytest.raises(KeyboardInterrupt), policy.averaged():
        assert all((p == 7).all() for p in policy.params)
        raise KeyboardInterrupt
    assert all(torch.equal(p, old) for p, old in zip(policy.params, before, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Nothing dangerous


def test_a_model_that_offers_only_a_pickle_is_refused(tmp_path, command):
    model, flags = copy_of_tiny_sd3(tmp_path)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(guard.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    code, lines = command(flags)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"guard.py: error: --model {model}: expected ")
    assert not (tmp_path / "run").exists()


def test_nothing_unsafe_is_in_the_code():
    unsafe = r"trust_remote_code|pickle\.|torch\.load\(|(?<![\w.])(eval|exec)\(|allow_pickle|shell=True"
    folders = ("settings", "scorers", "tiny", "experiments", "prompts")
    files = [*HERE.glob("*.py"), *(path for folder in folders for path in HERE.glob(f"{folder}/**/*.py"))]
    assert len(files) > 10
    for path in files:
        assert not re.search(unsafe, path.read_text()), path.name
