"""Bad input: one line that names the value, what was expected and what to do; exit code 2; nothing loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import guard
from rewards import BadInput

HERE = Path(__file__).resolve().parent.parent


def parse(arguments, tmp_path):
    return guard.parse_args(["--model", "tiny-sd3", "--run_dir", str(tmp_path / "run"), *arguments.split()])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--task paint", "--task: invalid choice: 'paint' .choose from .?ocr"),
        ("--model sd99", "--model sd99: expected tiny-sd3, tiny-flux, sd3.5-medium, flux.1-dev, or"),
        ("--method ppo", "--method: invalid choice: 'ppo'.*guard-v"),
        ("--sde ddim", "--sde: invalid choice: 'ddim'.*flow.*dance.*cps"),
        ("--reward beauty", "--reward: invalid choice: 'beauty'.*ocr.*cards"),
        ("--gold beauty", "--gold: invalid choice: 'beauty'"),
        ("--group_size 1", "--group_size 1: expected 2 or more"),
        ("--groups 9", "--groups 9: expected a multiple of updates_per_epoch x processes = 2"),
        ("--groups 0", "--groups 0: expected 1 or more"),
        ("--updates_per_epoch 0", "--updates_per_epoch 0: expected 1 or more"),
        ("--micro_batch 5", "--micro_batch 5: expected a divisor of 16"),
        ("--micro_batch 0", "--micro_batch 0: expected 1 or more"),
        ("--resolution 30x64", "--resolution 30x64: expected multiples of 8 pixels, at most 64"),
        ("--resolution 128", "--resolution 128: expected multiples of 8 pixels, at most 64"),
        ("--resolution wide", "--resolution wide: expected N or HxW"),
        ("--resolution 8x8x8", "--resolution 8x8x8: expected N or HxW"),
        ("--steps 1", "--steps 1: expected 2 or more"),
        ("--steps ten", "argument --steps: invalid int value: 'ten'"),
        ("--lr 0", "--lr 0.0: expected more than 0"),
        ("--lr nan", "--lr nan: expected more than 0"),
        ("--clip=-1e-4", "--clip -0.0001: expected more than 0"),
        ("--eta 0", "--eta 0.0: expected more than 0"),
        ("--eta 1.5 --sde cps", "--eta 1.5: expected at most 1 with cps"),
        ("--sde_window 10", "--sde_window 10: expected 1 to 9"),
        ("--ema_decay 1", "--ema_decay 1.0: expected less than 1"),
        ("--guidance 0.5", "--guidance 0.5: expected 1 or more"),
        ("--kl_beta -1", "--kl_beta -1.0: expected 0 or more"),
        ("--seed -1", "--seed -1: expected 0 or more"),
        ("--init_lora nowhere", "--init_lora nowhere: expected a folder or a safetensors file"),
        ("--prompts nowhere", "--prompts nowhere: expected a file, or a folder with train.txt"),
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
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(BadInput, match=f"{expected}.*'StableDiffusionPipeline'"):
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


def test_resume_may_change_the_cadence_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    args = parse("--lr 5e-4", tmp_path)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"args": vars(args)}))
    again = guard.parse_args(["--resume", str(folder), "--epochs", "7", "--keep", "1", "--lr", "5e-4"])
    assert vars(again) == vars(args) | {"epochs": 7, "keep": 1, "resume": str(folder)}
    for change in ("--lr 1e-4", "--method flow-grpo", "--seed 2", "--kl_beta 0.1"):
        with pytest.raises(BadInput, match="--resume may change only epochs, eval_every"):
            guard.parse_args(["--resume", str(folder), *change.split()])


# Settings of the paper, for Guard and for the baseline where they differ.
OF_BOTH = dict(
    resolution="512", group_size=24, groups=48, updates_per_epoch=2, lora_rank=32, lora_alpha=64, kl_beta=0.0,
    ema_decay=0.9, eval_every=30, save_every=30, sde="flow", gold=[], sde_window=None, init_lora=None,
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
        assert plan.startswith(
            f"an epoch: 48 prompts x 24 = 1152 images of {expected['steps']} steps; 2 updates of 576"
        )
    assert not list(tmp_path.iterdir())


def test_presets_follow_the_sampler_the_method_and_the_model(tmp_path):
    dance = ["--model", "flux.1-dev", "--sde", "dance", "--run_dir", str(tmp_path / "run")]
    assert guard.parse_args(dance).eta == 0.3
    by_v = parse("--method guard-v", tmp_path)
    assert by_v.clip == pytest.approx(parse("", tmp_path).clip * by_v.steps)
    assert parse("--gold none", tmp_path).gold == [] and parse("", tmp_path).prompts.endswith("prompts/cards")
    embedded = guard.parse_args(["--model", str(HERE / "tiny/sd3"), "--run_dir", str(tmp_path / "run")])
    assert embedded.resolution == "32x64"


@pytest.mark.parametrize("arguments", ["--group_size 1", "--prompts nowhere", "--no_such_flag 3"])
def test_the_command_exits_with_2_and_one_line(arguments):
    command = [sys.executable, "guard.py", "--model", "tiny-sd3", *arguments.split()]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("guard.py: error: ") and done.stderr.count("\n") == 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    command = [sys.executable, HERE / "guard.py", "--model", "sd3.5-medium", "--dry_run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    settings, plan = done.stdout.split("\n}\n")
    assert json.loads(settings + "}")["clip"] == 2e-6
    assert "48 prompts x 24 = 1152 images" in plan and not list(tmp_path.iterdir())
