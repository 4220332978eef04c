"""Faults lose no more than the work since the last checkpoint; a run goes on as if nothing had happened."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import guard
import rewards
from rewards import BadInput, RewardError

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent.parent
SMALL = (
    "--model tiny-sd3 --groups 2 --group_size 4 --micro_batch 4 --steps 3 --eval_steps 2 --eval_prompts 4 "
    "--gold none --epochs 3 --save_every 1 --eval_every 2"
)


def arguments(folder, more=""):
    return guard.parse_args([*SMALL.split(), "--run_dir", str(folder), *more.split()])


def resumed(folder):
    return guard.parse_args(["--resume", str(folder)])


def lines_of(folder):
    """metrics.jsonl without the seconds, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(one, other):
    assert lines_of(one) == lines_of(other)
    last = guard.checkpoints(arguments_of(one))[-1].name
    states = [load_file(folder / last / "state.safetensors") for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def arguments_of(folder):
    return guard.Args(run_dir=str(folder))


@pytest.fixture(autouse=True)
def signals():
    """No stop is pending, and Ctrl-C is heard, though shells have their background jobs ignore it."""
    guard.STOPPING.clear()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    guard.STOPPING.clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three epochs, never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    guard.train(arguments(folder))
    return folder


def checkpoint_names(folder):
    return [path.name for path in guard.checkpoints(arguments_of(folder))]


# ------------------------------------------------------------------------------------------------------------
# Told to stop


@pytest.mark.parametrize("where, epochs_done", [("sample", 1), ("update", 2), ("evaluate", 2)])
def test_a_run_told_to_stop_saves_and_goes_on_as_if_never_stopped(
    where, epochs_done, whole, tmp_path, monkeypatch
):
    """SIGTERM in the second epoch: while sampling that epoch is given up, later it is finished."""
    folder, calls, original = tmp_path / "run", [], getattr(guard, where)

    def stopping(*args, **kwargs):
        calls.append(where)
        # sample: called twice for the first evaluation, then twice an epoch; update: twice an epoch
        if len(calls) == {"sample": 5, "update": 3, "evaluate": 2}[where]:
            guard.STOPPING.append(True)
        return original(*args, **kwargs)

    monkeypatch.setattr(guard, where, stopping)
    guard.train(arguments(folder))
    monkeypatch.undo()
    assert len(calls) == {"sample": 5, "update": 4, "evaluate": 2}[where]  # nothing came after it
    assert checkpoint_names(folder)[-1] == f"checkpoint-{2 * epochs_done:06d}"
    guard.STOPPING.clear()
    guard.train(resumed(folder))
    assert_same_run(whole, folder)


def test_told_to_stop_before_the_first_update_it_saves_the_beginning(whole, tmp_path):
    folder = tmp_path / "run"
    guard.STOPPING.append(True)
    guard.train(arguments(folder))
    assert checkpoint_names(folder) == ["checkpoint-000000"]
    guard.STOPPING.clear()
    guard.train(resumed(folder))
    assert_same_run(whole, folder)


SECRETS = {"HF_TOKEN": "hf_neverwritten", "GRPO_GUARD_UNIFIEDREWARD_KEY": "sk-neverwritten"}


def start(folder, processes=1, more=""):
    command = [sys.executable, "guard.py"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "guard.py"]
    environment = os.environ | SECRETS | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *SMALL.split(), *more.split(), "--run_dir", str(folder)],
        cwd=HERE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_sigterm_and_sigkill_of_a_real_process(whole, tmp_path):
    """The first signal asks; it exits with 0 and says how to go on. The second cannot be caught."""
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(lambda: '"rollout"' in read(folder / "metrics.jsonl"), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f"go on with: python guard.py --resume {folder}" in out
    killed = tmp_path / "killed"
    process = start(killed)
    wait_for(lambda: (killed / "checkpoint-000002").exists(), process)
    process.kill()
    process.communicate()
    for run in (folder, killed):
        guard.train(resumed(run))
        assert_same_run(whole, run)


def two_processes_with_a_checkpoint(tmp_path):
    """The folder of a run of two ranks, and the launcher's process."""
    folder = tmp_path / "run"
    process = start(folder, processes=2, more="--updates_per_epoch 1 --epochs 9")
    wait_for(lambda: (folder / "checkpoint-000002").exists(), process)
    return folder, process


def test_one_rank_dying_ends_the_others_and_is_named(tmp_path):
    folder, process = two_processes_with_a_checkpoint(tmp_path)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child, 1)]
    assert len(ranks) == 1
    ranks[0].kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in err and "SIGKILL" in err
    assert load_file(folder / "checkpoint-000002" / "state.safetensors")


def is_rank(process, rank):
    return "guard.py" in process.cmdline() and process.environ().get("RANK") == str(rank)


def read(path):
    return path.read_text() if path.exists() else ""


# ------------------------------------------------------------------------------------------------------------
# Ctrl-C, and what the command prints


@pytest.fixture
def command(monkeypatch, capfd):
    """command(arguments): guard.py in this process. Returns its exit code and what it said on stderr."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(os, "_exit", sys.exit)

    def command(arguments):
        monkeypatch.setattr(sys, "argv", ["guard.py", *arguments.split()])
        capfd.readouterr()
        try:
            guard.main()
            code = 0
        except SystemExit as done:
            code = done.code
        return code, lines_without_bars(capfd.readouterr().err)

    yield command
    signal.signal(signal.SIGTERM, handler)


def lines_without_bars(err):
    """The lines of stderr but for progress bars, which go up a line and write over themselves."""
    lines = [line.split("\r")[-1].replace("\x1b[A", "").strip() for line in err.split("\n")]
    return [line for line in lines if line and "%|" not in line]


INTERRUPTED = "guard.py: error: KeyboardInterrupt: ; checkpoints are whole, go on with --resume"


@pytest.mark.parametrize("where, call", [("sample", 5), ("update", 3), ("evaluate", 2), ("save_file", 3)])
def test_ctrl_c_anywhere_in_the_second_epoch_costs_that_epoch(
    where, call, whole, tmp_path, monkeypatch, command
):
    """save_file: called for the held-out prompts' embeddings, then once a checkpoint."""
    folder, calls, original = tmp_path / "run", [], getattr(guard, where)

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(where)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(guard, where, interrupted)
    assert command(f"{SMALL} --run_dir {folder}") == (1, [INTERRUPTED])
    monkeypatch.setattr(guard, where, original)
    assert len(calls) == call and checkpoint_names(folder) == ["checkpoint-000002"]
    assert (folder / "checkpoint-000004.partial").exists() == (where == "save_file")
    guard.train(resumed(folder))
    assert_same_run(whole, folder)


def test_ctrl_c_in_a_real_process_and_no_secret_in_what_it_leaves(whole, tmp_path):
    """Two of its environment's variables are secret: nothing that it prints or writes has them."""
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(lambda: (folder / "checkpoint-000002").exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert lines_without_bars(err) == [INTERRUPTED]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.json", "metrics.jsonl", "state.safetensors"}
    for content in (out.encode(), err.encode(), *(path.read_bytes() for path in files)):
        assert b"neverwritten" not in content
    guard.train(resumed(folder))
    assert_same_run(whole, folder)


def test_ctrl_c_in_a_terminal_with_two_processes(tmp_path):
    """The terminal sends SIGINT to torchrun and all that it started."""
    folder, process = two_processes_with_a_checkpoint(tmp_path)
    for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
        each.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert INTERRUPTED in err
    assert load_file(folder / "checkpoint-000002" / "state.safetensors")


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and the disk


def test_a_kill_at_any_moment_leaves_a_run_that_goes_on(whole, tmp_path):
    """What a kill can leave: a half-written folder, lines of metrics.jsonl after the last checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-000006")
    partial = folder / "checkpoint-000006.partial"
    partial.mkdir()
    (partial / "state.json").write_text('{"epo')
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "upd')
    guard.train(resumed(folder))
    assert_same_run(whole, folder)
    assert not partial.exists()


def test_only_the_newest_checkpoints_stay(tmp_path):
    folder = tmp_path / "run"
    guard.train(arguments(folder, "--keep 1"))
    assert checkpoint_names(folder) == ["checkpoint-000006"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(name, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "checkpoint-000006" / name
    path.write_bytes(path.read_bytes()[:20])
    before = read(folder / "metrics.jsonl")
    with pytest.raises(BadInput, match="checkpoint-000006: cannot be read; remove it to go on"):
        guard.train(resumed(folder))
    assert read(folder / "metrics.jsonl") == before
    shutil.rmtree(folder / "checkpoint-000006")
    guard.train(resumed(folder))
    assert_same_run(whole, folder)


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(whole, tmp_path, monkeypatch):
    folder, save = tmp_path / "run", guard.save_file

    def full(tensors, path):
        if "checkpoint-000004" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(guard, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        guard.train(arguments(folder))
    monkeypatch.undo()
    assert checkpoint_names(folder) == ["checkpoint-000002"]
    guard.train(resumed(folder))
    assert_same_run(whole, folder)


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
    code, lines = command(f"{SMALL} --run_dir {folder}")
    error = f"OSError: [Errno 30] Read-only file system: '{folder / 'metrics.jsonl'}'"
    assert (code, lines) == (1, [f"guard.py: error: {error}; checkpoints are whole, go on with --resume"])
    monkeypatch.delattr(guard, "open")
    guard.train(resumed(folder))
    assert_same_run(whole, folder)


@pytest.mark.parametrize("size", [0, 20, 100_000])
def test_a_truncated_lora_is_named(size, whole, tmp_path, command):
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes((whole / "checkpoint-000006" / "pytorch_lora_weights.safetensors").read_bytes()[:size])
    code, lines = command(f"{SMALL} --run_dir {tmp_path / 'run'} --init_lora {lora}")
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"guard.py: error: --init_lora {lora}: ")
    assert not (tmp_path / "run").exists()


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
    model = tmp_path / "model"
    shutil.copytree(HERE / "tiny" / "sd3", model)
    os.truncate(model / file, (model / file).stat().st_size // 2)
    code, lines = command(f"{SMALL} --run_dir {tmp_path / 'run'} --model {model} --resolution 32x64")
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"guard.py: error: --model {model}: expected ")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------
# Rewards and gradients


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda images: 1 / 0, "division by zero"),
        (lambda images: [float("nan")] * len(images), "returned nan"),
        (lambda images: [1.0], "returned 1 scores for 4 images"),
    ],
)
def test_a_reward_that_fails_stops_the_run(answer, message, whole, tmp_path, monkeypatch):
    folder, good, calls = tmp_path / "run", rewards.REWARDS["ocr"], []

    def load():
        reward = good()

        def failing(images, prompts, metadata):
            calls.append(1)  # once for the evaluation, twice an epoch
            return answer(images) if len(calls) == 5 else reward(images, prompts, metadata)

        return failing

    monkeypatch.setitem(rewards.REWARDS, "ocr", load)
    with pytest.raises((RewardError, ZeroDivisionError), match=message):
        guard.train(arguments(folder))
    monkeypatch.undo()
    assert checkpoint_names(folder) == ["checkpoint-000002"]
    guard.train(resumed(folder))
    assert_same_run(whole, folder)


def test_a_reward_that_hangs_stops_the_run(tmp_path):
    """In a process of its own, since the thread that hangs cannot be ended."""
    code = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
import guard, rewards
first = []
def load():
    def reward(images, prompts, metadata):
        if first:
            time.sleep(1000)
        first.append(1)
        return [0.5] * len(images)
    return reward
rewards.REWARDS["ocr"] = load
guard.REWARD_TIMEOUT = 0.5
sys.argv = ["guard.py", *{SMALL.split()!r}, "--run_dir", {str(tmp_path / "run")!r}]
guard.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "guard.py: error: TimeoutError" in done.stderr and "Traceback" not in done.stderr


def test_updates_without_a_finite_gradient_are_skipped_and_counted(tmp_path, monkeypatch):
    folder, calls, loss = tmp_path / "run", [], guard.slice_loss

    def broken(*args):
        calls.append(1)
        bad = len(calls) in infinite
        return tuple(part * (float("inf") if bad else 1.0) for part in loss(*args))

    infinite = {1}
    monkeypatch.setattr(guard, "slice_loss", broken)
    guard.train(arguments(folder, "--epochs 1"))
    updates = [line for line in lines_of(folder) if line["kind"] == "update"]
    assert [line["skipped"] for line in updates] == [True, False]
    assert updates[0]["grad_norm"] is None and updates[1]["grad_norm"] > 0
    weights = load_file(folder / "checkpoint-000002" / "state.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["step.0"] == 1  # of two updates

    calls.clear()
    infinite = set(range(1000))
    monkeypatch.setattr(guard, "advantages", lambda scores: torch.tensor([[-1.0, 1, -1, 1]] * 2).double())
    with pytest.raises(FloatingPointError, match="3 updates in a row"):
        guard.train(arguments(tmp_path / "hopeless"))
    assert checkpoint_names(tmp_path / "hopeless") == ["checkpoint-000002"]


# ------------------------------------------------------------------------------------------------------------
# Nothing dangerous


def test_a_model_that_offers_only_a_pickle_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(HERE / "tiny" / "sd3", folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    args = guard.parse_args(
        [*SMALL.split(), "--model", str(folder), "--resolution", "32x64", "--run_dir", str(tmp_path / "run")]
    )
    with pytest.raises(BadInput, match=f"--model {folder}: expected"):
        guard.train(args)
    assert not (tmp_path / "run").exists()


def test_nothing_unsafe_is_in_the_code():
    unsafe = r"trust_remote_code|pickle\.|torch\.load\(|(?<![\w.])(eval|exec)\(|allow_pickle|shell=True"
    for path in (*HERE.glob("*.py"), *HERE.glob("tiny/*.py"), *HERE.glob("experiments/*.py")):
        assert not re.search(unsafe, path.read_text()), path.name
