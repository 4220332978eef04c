"""Bad input: one line that names the value, what was expected and what to do; exit code 2; nothing loaded."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import lines_without_bars

import guard
from rewards import BadInput
from settings import command_line

HERE = Path(__file__).resolve().parent.parent


def parse(arguments, tmp_path):
    return guard.parse_args(["--model", "tiny-sd3", "--run_dir", str(tmp_path / "run"), *arguments.split()])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--task paint", "--task: invalid choice: 'paint' .choose from .?ocr"),
        ("--model sd99", "--model sd99: expected sd3.5-medium, flux.1-dev, tiny-sd3, tiny-flux, or"),
        ("--method ppo", "--method: invalid choice: 'ppo'.*flow-grpo.*guard"),
        ("--sde ddim", "--sde: invalid choice: 'ddim'.*flow.*dance.*cps"),
        ("--reward beauty", "--reward: invalid choice: 'beauty'.*ocr.*cards"),
        ("--gold beauty", "--gold: invalid choice: 'beauty'"),
        ("--group_size 1", "--group_size 1: expected 2 or more"),
        ("--groups 9", "--groups 9: expected a multiple of updates_per_epoch x processes = 2"),
        ("--groups 0", "--groups 0: expected 1 or more"),
        ("--updates_per_epoch 0", "--updates_per_epoch 0: expected 1 or more"),
        ("--micro_batch 5", "--micro_batch 5: expected a divisor of 16"),
        ("--micro_batch 0", "--micro_batch 0: expected 1 or more"),
        ("--resolution 30x64", "--resolution 30x64: expected multiples of 16 pixels"),
        ("--resolution 40x64", "--resolution 40x64: expected multiples of 16 pixels"),
        ("--resolution 0", "--resolution 0: expected multiples of 16 pixels"),
        ("--resolution wide", "--resolution wide: expected N or HxW"),
        ("--resolution 8x8x8", "--resolution 8x8x8: expected N or HxW"),
        ("--steps 1", "--steps 1: expected 2 or more"),
        ("--steps ten", "argument --steps: invalid int value: 'ten'"),
        ("--epochs 0", "--epochs 0: expected 1 or more"),
        ("--eval_every 0", "--eval_every 0: expected 1 or more"),
        ("--keep 0", "--keep 0: expected 1 or more"),
        ("--lr 0", "--lr 0.0: expected more than 0"),
        ("--lr nan", "--lr nan: expected more than 0"),
        ("--lr inf", "--lr inf: expected more than 0"),
        ("--clip=-1e-4", "--clip -0.0001: expected more than 0"),
        ("--eta 0", "--eta 0.0: expected more than 0"),
        ("--eta 1.5 --sde cps", "--eta 1.5: expected at most 1 with cps"),
        ("--sde_window 10", "--sde_window 10: expected 1 to 9"),
        ("--sde_window 0", "--sde_window 0: expected 1 or more"),
        ("--ema_decay 1", "--ema_decay 1.0: expected less than 1"),
        ("--guidance 0.5", "--guidance 0.5: expected 1 or more"),
        ("--guidance nan", "--guidance nan: expected 1 or more"),
        ("--kl_beta -1", "--kl_beta -1.0: expected 0 or more"),
        ("--seed -1", "--seed -1: expected 0 or more"),
        ("--init_lora nowhere", "--init_lora nowhere: expected a folder or a safetensors file"),
        ("--prompts nowhere", "--prompts nowhere: expected a file, or a folder with train.txt"),
        ("--gold_prompts nowhere", "--gold_prompts nowhere: expected a file, or a folder with train.txt"),
        ("--resume nowhere", "--resume nowhere: expected a run folder"),
        ("--learning_rate 1", "unrecognized arguments: --learning_rate 1"),
    ],
)
def test_one_line_says_what_was_wrong(arguments, message, tmp_path):
    with pytest.raises(BadInput, match=message) as error:
        parse(arguments, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_models_that_are_no_supported_pipeline(tmp_path):
    expected = "or the place of a StableDiffusion3Pipeline or FluxPipeline"
    with pytest.raises(BadInput, match=expected):
        parse(f"--model {tmp_path}", tmp_path)
    for content in ('{"_class_name": "StableDiffusionPipeline"}', '{"_class_name": "NewerPipeline"}', "{}"):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(BadInput, match=expected):
            parse(f"--model {tmp_path}", tmp_path)
    (tmp_path / "model_index.json").write_text("not json")
    with pytest.raises(BadInput, match=expected):
        parse(f"--model {tmp_path}", tmp_path)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=f"holds a run; go on with --resume {folder}"):
        parse("", tmp_path)
    assert (folder / "config.json").read_text() == "{}"


# ------------------------------------------------------------------------------------------------------------
# --resume


@pytest.fixture
def started(tmp_path):
    """started(arguments): the settings of a run, and its folder with nothing but config.json."""

    def started(arguments):
        args, folder = parse(arguments, tmp_path), tmp_path / "run"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"args": vars(args)}))
        return args, folder

    return started


def test_resume_may_change_the_cadence_and_nothing_else(started):
    args, folder = started("--lr 5e-4")
    changes = "--epochs 7 --keep 1 --eval_every 3 --eval_prompts 9 --save_every 2 --lr 5e-4"
    again = guard.parse_args(["--resume", str(folder), *changes.split()])
    changed = dict(epochs=7, keep=1, eval_every=3, eval_prompts=9, save_every=2)
    assert vars(again) == vars(args) | changed | {"resume": str(folder)}
    for change in ("--lr 1e-4", "--method flow-grpo", "--seed 2", "--kl_beta 0.1", "--model tiny-flux"):
        with pytest.raises(BadInput, match="--resume may change only epochs, eval_every"):
            guard.parse_args(["--resume", str(folder), *change.split()])


def test_a_run_of_an_older_or_newer_guard_goes_on(started):
    """A setting that it did not have is at its default, one that is no more is left aside."""
    args, folder = started("--kl_beta 0.5 --ema_decay 0.5 --group_size 8 --micro_batch 4")
    saved = vars(args).copy()
    del saved["kl_beta"], saved["sde_window"]
    (folder / "config.json").write_text(json.dumps({"args": saved | {"compile": True}}))
    again = guard.parse_args(["--resume", str(folder)])
    assert vars(again) == vars(args) | dict(kl_beta=0.0, sde_window=None, resume=str(folder))


def test_to_go_on_the_lora_to_start_from_need_not_be_there(started, tmp_path):
    (tmp_path / "lora").mkdir()
    args, folder = started(f"--init_lora {tmp_path / 'lora'}")
    (tmp_path / "lora").rmdir()
    assert guard.parse_args(["--resume", str(folder)]).init_lora == args.init_lora


def test_a_moved_run_goes_on_where_it_is(started, tmp_path):
    _, folder = started("")
    folder.rename(tmp_path / "moved")
    assert guard.parse_args(["--resume", str(tmp_path / "moved")]).run_dir == str(tmp_path / "moved")


# ------------------------------------------------------------------------------------------------------------
# Presets

# Settings of the paper, for Guard and for the baseline where they differ.
OF_BOTH = dict(
    resolution="512", group_size=24, groups=48, updates_per_epoch=2, lora_rank=32, lora_alpha=64, kl_beta=0.0,
    ema_decay=0.9, eval_every=30, save_every=1, sde="flow", gold=[], sde_window=None, init_lora=None,
)  # fmt: skip
OF_BACKBONE = {
    "sd3.5-medium": dict(
        steps=10, eval_steps=40, eta=0.7, guidance=4.5, dtype="float16", grad_checkpoint=False
    ),
    "flux.1-dev": dict(steps=6, eval_steps=28, eta=0.9, guidance=3.5, dtype="bfloat16", grad_checkpoint=True),
}
LR = {"sd3.5-medium": (1e-4, 3e-4), "flux.1-dev": (2e-4, 3e-4)}
CLIP = {"ocr": (2e-6, 1e-4), "geneval": (2e-6, 1e-4), "pickscore": (4e-6, 1e-4)}
EPOCHS = {"ocr": 240, "geneval": 930, "pickscore": 510}  # of two updates: Table 1 for SD3.5-M


@pytest.mark.parametrize("task", CLIP)
@pytest.mark.parametrize("model", LR)
def test_a_dry_run_prints_the_settings_of_the_paper(task, model, tmp_path, monkeypatch, capsys):
    for i, method in enumerate(("guard", "flow-grpo")):
        given = f"--task {task} --model {model} --method {method} --run_dir {tmp_path} --dry_run"
        monkeypatch.setattr(sys, "argv", ["guard.py", *given.split()])
        guard.main()
        settings, plan = capsys.readouterr().out.split("\n}\n")
        settings = json.loads(settings + "}")
        expected = OF_BOTH | OF_BACKBONE[model] | dict(lr=LR[model][i], clip=CLIP[task][i])
        expected |= dict(task=task, reward=task, model=model, method=method, epochs=EPOCHS[task])
        assert {name: settings[name] for name in expected} == expected
        assert settings["prompts"].endswith(f"prompts/{task}")
        assert settings["gold_prompts"].endswith("prompts/pickscore")
        steps = expected["steps"]
        first = f"an epoch: 48 prompts x 24 = 1152 images of {steps} steps; 2 updates of 576"
        assert plan.splitlines() == [first, "each of 1 processes: 1152 images, 8 at a time"]
    assert not list(tmp_path.iterdir())


def test_presets_follow_the_sampler_and_the_model(tmp_path):
    dance = ["--model", "flux.1-dev", "--sde", "dance", "--run_dir", str(tmp_path / "run")]
    assert guard.parse_args(dance).eta == 0.3
    tiny = parse("", tmp_path)
    assert tiny.prompts.endswith("prompts/cards") and tiny.gold_prompts.endswith("prompts/cards")
    assert tiny.gold[0] == "cards" and parse("--gold none", tmp_path).gold == []
    assert parse("--gold none cards", tmp_path).gold == ["cards"]
    assert parse("--method flow-grpo", tmp_path).clip > 10 * tiny.clip
    embedded = guard.parse_args(["--model", str(HERE / "tiny/sd3"), "--run_dir", str(tmp_path / "run")])
    assert embedded.resolution == "32x64"


def test_another_model_takes_the_presets_of_its_pipelines_class(tmp_path):
    cards = ["--prompts", command_line.TINY_BY_TASK["ocr"]["prompts"], "--run_dir", str(tmp_path / "run")]
    for name, preset in (("sd3", "sd3.5-medium"), ("flux", "flux.1-dev")):
        (tmp_path / name).mkdir()
        shutil.copy(HERE / "tiny" / name / "model_index.json", tmp_path / name)
        args = guard.parse_args(["--model", str(tmp_path / name), *cards])
        assert {setting: getattr(args, setting) for setting in OF_BACKBONE[preset]} == OF_BACKBONE[preset]


@pytest.mark.parametrize("gpu, torchrun", [(False, False), (True, False), (False, True), (True, True)])
def test_without_a_model_only_torchrun_on_gpus_trains_sd35(gpu, torchrun, tmp_path, monkeypatch, capsys):
    """A laptop's GPU is not asked for gated weights. The first line says what was chosen, and why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: torchrun)
    model, why = "tiny-sd3", "it was not started by torchrun on GPUs"
    if gpu and torchrun:
        model, why = "sd3.5-medium", "torchrun started this on GPUs"
    given = ["--task", "ocr", "--run_dir", str(tmp_path / "run")]
    assert guard.parse_args(given).model == model
    assert capsys.readouterr().out == f"--model {model}, since {why}\n"
    monkeypatch.setenv("RANK", "1")
    assert guard.parse_args(given).model == model  # of all ranks one says it
    assert guard.parse_args([*given, "--model", "tiny-flux"]).model == "tiny-flux"
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("arguments", ["--group_size 1", "--prompts nowhere", "--no_such_flag 3"])
def test_the_command_exits_with_2_and_one_line(arguments, command):
    code, lines = command(f"--model tiny-sd3 {arguments}")
    assert code == 2 and len(lines) == 1 and lines[0].startswith("guard.py: error: ")


def test_a_process_exits_with_2_too(start, tmp_path):
    (process,) = start("--model tiny-sd3 --group_size 1", tmp_path / "output")
    process.join(120)
    assert process.exitcode == 2
    output = lines_without_bars((tmp_path / "output-0.txt").read_text())
    assert output == ["guard.py: error: --group_size 1: expected 2 or more"]


@pytest.mark.parametrize("rank, local_rank, lines", [(0, 0, 1), (1, 1, 0), (8, 0, 1), (9, 1, 0)])
def test_bad_input_is_said_once_on_every_machine(rank, local_rank, lines, monkeypatch, command):
    """Ranks 8 and 9 are on the second machine of two."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(guard, "RANK", rank)
    code, said = command("--model tiny-sd3 --group_size 1")
    assert code == 2 and said == ["guard.py: error: --group_size 1: expected 2 or more"] * lines


def test_a_dry_run_writes_nothing_and_works_from_any_folder(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert command("--model sd3.5-medium --dry_run") == (0, [])
    assert command("--task geneval --model tiny-sd3 --reward cards --dry_run") == (0, [])
    assert not list(tmp_path.iterdir())


def test_without_git_or_a_repository_the_commit_is_null(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "HERE", tmp_path)
    assert command_line.git_commit() is None
    monkeypatch.setattr(command_line, "HERE", HERE)
    monkeypatch.setenv("PATH", "")
    command_line.write_config(parse("", tmp_path), torch.device("cpu"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["commit"] is None and config["processes"] == 1 and "numpy" in config["versions"]
    assert os.listdir(tmp_path / "run" / "samples") == []
