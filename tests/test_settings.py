"""What the command line becomes: presets, the clip rule, bad input in one line."""

import json
import sys
from dataclasses import asdict

import pytest
from diffusers import AutoencoderKL
from helpers import HERE

import guard
from experiments.random_weights import VAE
from rewards import BadInput

TINY = f"--model {HERE}/tiny/sd3 --gold none"
OCR = "prompts/ocr"


def parse(text):
    return guard.parse_args(text.split())


def make_index(folder, like="sd3", **changes):
    """A model's folder with model_index.json and the config.json of a full-size VAE, and no more."""
    index = json.loads((HERE / "tiny" / like / "model_index.json").read_text())
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    vae = VAE | dict(_class_name=AutoencoderKL.__name__)
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return folder


@pytest.fixture
def full_size(tmp_path, monkeypatch):
    """The models of the paper are these two folders."""
    sd3, flux = make_index(tmp_path / "sd3"), make_index(tmp_path / "flux", "flux")
    monkeypatch.setattr(guard, "MODELS", {"sd3.5-medium": str(sd3), "flux.1-dev": str(flux)})


# ------------------------------------------------------------------------------------------------------------
# Presets

OF_ALL = dict(
    height=512, width=512, group_size=24, groups=48, updates_per_epoch=2, lora_rank=32, lora_alpha=64,
    kl_beta=0.0, ema_decay=0.9, eval_every=30, save_every=1, sde="flow", same_noise=False, sde_window=None,
    gold=[])
OF_MODEL = {
    "sd3.5-medium": dict(steps=10, eval_steps=40, eta=0.7, guidance=4.5, dtype="float16"),
    "flux.1-dev": dict(steps=6, eval_steps=28, eta=0.9, guidance=3.5, dtype="bfloat16", grad_checkpoint=True),
}
LR = {"sd3.5-medium": (1e-4, 3e-4), "flux.1-dev": (2e-4, 3e-4)}  # of Guard and of the baseline
CLIP = {"ocr": (2e-6, 1e-4), "geneval": (2e-6, 1e-4), "pickscore": (4e-6, 1e-4)}
EPOCHS = {"sd3.5-medium": dict(ocr=240, geneval=930, pickscore=510)}
EPOCHS["flux.1-dev"] = dict(ocr=270, geneval=630, pickscore=510)


@pytest.mark.parametrize("task", CLIP)
@pytest.mark.parametrize("model", LR)
def test_the_settings_of_the_paper(task, model, full_size):
    of_guard, of_baseline = ("guard", "rationorm"), ("flow-grpo", "temp-reweight", "mean-revised")
    for column, methods in enumerate((of_guard, of_baseline)):
        expected = OF_ALL | OF_MODEL[model] | dict(lr=LR[model][column], epochs=EPOCHS[model][task])
        for method in methods:
            args = parse(f"--task {task} --model {model} --method {method} --reward ocr --prompts {OCR}")
            assert {name: getattr(args, name) for name in expected} == expected
            assert args.clip == pytest.approx(CLIP[task][column])  # D is 65,536


def test_a_task_has_its_own_prompts_and_reward(full_size):
    for task in ("ocr", "geneval", "pickscore"):
        args = parse(f"--task {task}")
        assert (args.model, args.reward, args.prompts) == ("sd3.5-medium", task, f"prompts/{task}")


def test_the_clip_range_goes_as_1_over_d(full_size):
    """For every method. D is 65,536 for SD3.5 at 512 x 512 and 512 for tiny/sd3. A flag is as given."""
    for method, clip in (("guard", 2e-6), ("flow-grpo", 1e-4)):
        assert parse(f"--method {method} --height 256").clip == pytest.approx(2 * clip)
        assert parse(f"{TINY} --method {method}").clip == pytest.approx(clip * 65536 / 512)
        assert parse(f"{TINY} --method {method} --clip 0.5").clip == 0.5


def test_dance_shares_noise_unless_told_not_to(full_size):
    assert not parse(f"{TINY}").same_noise and not parse(f"{TINY} --sde cps").same_noise
    assert parse(f"{TINY} --same_noise").same_noise
    for model in (TINY, "--model flux.1-dev"):
        args = parse(f"{model} --sde dance")
        assert args.same_noise and args.eta == 0.3
        assert not parse(f"{model} --sde dance --same_noise False").same_noise


def test_a_models_own_settings_win_and_flags_win_over_them(tmp_path):
    """Its gold scores are for its own prompts, and go with them."""
    model = make_index(tmp_path / "mine")
    table = {"all": {"gold": ["pickscore", "hpsv2"], "lr": 7e-4, "clip": 1e-6}, "ocr": {"epochs": 7},
             "baseline": {"lr": 8e-4}, "dance": {"eta": 0.1}}
    (model / "guard.json").write_text(json.dumps(table))
    args = parse(f"--model {model}")
    assert (args.gold, args.lr, args.epochs, args.eta) == (["pickscore", "hpsv2"], 7e-4, 7, 0.7)
    assert args.clip == pytest.approx(1e-6)
    args = parse(f"--model {model} --method flow-grpo --sde dance --epochs 3")
    assert (args.lr, args.epochs, args.eta) == (8e-4, 3, 0.1)
    assert parse(f"--model {model} --prompts prompts/ocr").gold == []
    assert parse(f"--model {model} --prompts prompts/ocr --gold hpsv2").gold == ["hpsv2"]
    assert parse(f"--model {model} --gold none").gold == []


# ------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("arguments, message", [
    ("--method ppo", "--method: invalid choice: 'ppo'.*flow-grpo.*guard"),
    ("--steps ten", "--steps: invalid int value: 'ten'"),
    ("--learning_rate 1", "unrecognized arguments: --learning_rate 1"),
    ("--group_size 1", "--group_size 1: expected 2 or more"),
    ("--epochs -1", "--epochs -1: expected 0 or more"),
    ("--lr nan", "--lr nan: expected 0 or more"),
    ("--clip inf", "--clip inf: expected 0 or more"),
    ("--eta 0", "--eta 0.0: expected 0.001 or more"),
    ("--eta 1.5 --sde cps", "--eta 1.5: expected at most 1"),
    ("--micro_batch 5", "--micro_batch 5: expected a divisor of 16"),
    ("--groups 9", "--groups 9: expected a multiple of 2"),
    ("--width 40", "--width 40: expected a multiple of 16"),
    ("--sde_window 10", "--sde_window 10: expected at most 9"),
    ("--init_lora nowhere", "--init_lora: there is no nowhere"),
    ("--prompts nowhere", "--prompts nowhere: expected a file, or a folder with train.txt"),
    ("--reward beauty", "reward beauty: expected module:function or one of ocr"),
    ("--resume nowhere", "--resume nowhere: expected a run's folder"),
    ("--model nowhere", "--model nowhere: "),
])
def test_bad_input_is_one_line_that_says_what_was_expected(arguments, message):
    with pytest.raises(BadInput, match=message) as error:
        parse(f"{TINY} {arguments}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(_class_name="StableDiffusionPipeline"), "StableDiffusionPipeline; expected .*FluxPipeline"),
    (dict(scheduler=["diffusers", "DDIMScheduler"]), "DDIMScheduler; expected FlowMatchEuler"),
])
def test_other_pipelines_and_schedulers_are_refused(change, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        parse(f"--model {make_index(tmp_path / 'model', **change)} --prompts prompts/ocr")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    model = make_index(tmp_path / "model")
    (model / "model_index.json").write_text("not json")
    with pytest.raises(BadInput, match="--model"):
        parse(f"--model {model} --prompts prompts/ocr")


# ------------------------------------------------------------------------------------------------------------
# The command


def test_a_dry_run_prints_the_settings_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["guard.py", "--dry_run", *TINY.split(), "--epochs", "3"])
    guard.main()
    first, settings = capsys.readouterr().out.split("\n", 1)
    assert "clip 0.000256 at D = 512" in first
    settings = json.loads(settings)
    assert settings == asdict(parse(f"{TINY} --epochs 3 --dry_run")) | dict(run_dir=settings["run_dir"])
    assert not list(tmp_path.iterdir())
