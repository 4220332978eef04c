"""What the command line becomes: the paper's settings, the rows of a model, bad input in one line."""

import json
from dataclasses import asdict

import pytest
from helpers import HERE

import guard
from rewards import BadInput

TINY = "--model tiny/sd3 --gold none"


def parse(text):
    return guard.parse_args(text.split())


def make_model(folder, like="sd3", rows=None, **changes):
    """A folder with the model_index.json of a pipeline, rows of its own if any, and no more."""
    index = json.loads((HERE / "tiny" / like / "model_index.json").read_text())
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    if rows:
        (folder / "guard.json").write_text(json.dumps(rows))
    return f"--model {folder}"


# ------------------------------------------------------------------------------------------------------------
# Settings

OF_ALL = dict(
    height=512, width=512, group_size=24, groups=48, updates_per_epoch=2, lora_rank=32, lora_alpha=64,
    kl_beta=0.0, ema_decay=0.9, eval_every=30, sde="flow", same_noise=False, sde_window=0, gold=[])
OF_MODEL = dict(
    sd3=dict(steps=10, eval_steps=40, eta=0.7, guidance=4.5, dtype="float16"),
    flux=dict(steps=6, eval_steps=28, eta=0.9, guidance=3.5, dtype="bfloat16", grad_checkpoint=True))
LR = dict(sd3=(1e-4, 3e-4), flux=(2e-4, 3e-4))  # of Guard and of the baseline
CLIP = dict(ocr=(2e-6, 1e-4), geneval=(2e-6, 1e-4), pickscore=(4e-6, 1e-4))
EPOCHS = dict(
    sd3=dict(ocr=240, geneval=930, pickscore=510),
    flux=dict(ocr=270, geneval=630, pickscore=510))


@pytest.mark.parametrize("model", OF_MODEL)
def test_the_settings_of_the_paper(model, tmp_path):
    of_guard, of_baseline = (
        ("guard", "rationorm", "guard-mask"), ("flow-grpo", "temp-reweight", "mean-revised"))
    given = make_model(tmp_path / "model", model)
    for task in CLIP:
        for column, methods in enumerate((of_guard, of_baseline)):
            of_task = dict(epochs=EPOCHS[model][task], reward=task, prompts=f"prompts/{task}")
            of_method = dict(lr=LR[model][column], clip=CLIP[task][column])
            for method in methods:
                args = asdict(parse(f"{given} --task {task} --method {method}"))
                assert args == args | OF_ALL | OF_MODEL[model] | of_task | of_method
        dance = parse(f"{given} --task {task} --sde dance")
        assert dance.same_noise and dance.eta == 0.3


def test_a_models_own_rows_win_and_flags_win_over_them(tmp_path):
    """Its gold scores are for its own prompts, and go with them."""
    rows = {"all": {"gold": ["pickscore", "hpsv2"], "lr": 7e-4, "clip": 1e-6}, "ocr": {"epochs": 7},
            "flow-grpo": {"lr": 8e-4}, "dance": {"eta": 0.1}}
    model = make_model(tmp_path / "mine", rows=rows)
    args = parse(model)
    assert (args.gold, args.lr, args.epochs, args.eta) == (["pickscore", "hpsv2"], 7e-4, 7, 0.7)
    args = parse(f"{model} --method flow-grpo --sde dance --epochs 8 --same_noise False")
    assert (args.lr, args.clip, args.epochs, args.eta, args.same_noise) == (8e-4, 1e-6, 8, 0.1, False)
    assert parse(f"{model} --prompts prompts/ocr").gold == []
    assert parse(f"{model} --prompts prompts/ocr --gold hpsv2").gold == ["hpsv2"]
    assert parse(f"{model} --gold none").gold == []


def test_a_resumed_run_has_its_own_settings_but_for_four(tmp_path):
    begun = parse(f"{TINY} --seed 3 --clip 0.5 --lora_rank 4 --run_dir {tmp_path / 'run'}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(begun)))
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = dict(resume=str(tmp_path / "moved"), run_dir=str(tmp_path / "moved"))
    assert asdict(parse(f"--resume {tmp_path / 'moved'}")) == asdict(begun) | moved
    more = "--epochs 30 --eval_every 2 --offload True --grad_checkpoint True"
    changed = dict(epochs=30, eval_every=2, offload=True, grad_checkpoint=True)
    assert asdict(parse(f"--resume {tmp_path / 'moved'} {more}")) == asdict(begun) | moved | changed
    for other in ("--task geneval", "--method flow-grpo", "--height 64", "--lora_rank 8"):
        with pytest.raises(BadInput, match=f"keeps its own {other.split()[0][2:]};"):
            parse(f"--resume {tmp_path / 'moved'} {other}")


def test_a_lora_to_start_from_is_a_file_its_folder_or_a_run(tmp_path):
    for lora in ("lora-000003", "lora-000012"):
        (tmp_path / lora).mkdir()
        (tmp_path / lora / "pytorch_lora_weights.safetensors").touch()
    newest = tmp_path / "lora-000012" / "pytorch_lora_weights.safetensors"
    for path in (tmp_path, newest.parent, newest):
        assert parse(f"{TINY} --init_lora {path}").init_lora == str(newest)


def test_evaluation_is_on_so_many_held_out_prompts_from_all_of_their_file(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("".join(f'{name} "{number}"\n' for number in range(9)))
    flags = f"{TINY} --reward helpers:load_brightness --prompts {tmp_path}"
    training, held_out, _ = guard.load_task(parse(f"{flags} --eval_prompts 3"))
    assert [prompt for prompt, _ in training] == [f'train "{number}"' for number in range(9)]
    assert [prompt for prompt, _ in held_out] == ['test "0"', 'test "3"', 'test "6"']
    assert len(guard.load_task(parse(flags))[1]) == 9


# ------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("arguments, message", [
    ("--method ppo", "--method: invalid choice: 'ppo'.*flow-grpo.*guard"),
    ("--group_size 1", "--group_size 1: expected 2 or more"),
    ("--eta 1.5 --sde cps", "--eta 1.5: expected at most 1"),
    ("--micro_batch 5", "--micro_batch 5: expected a divisor of 16"),
    ("--groups 9", "--groups 9: expected a multiple of 2"),
    ("--width 40", "--width: expected multiples of 16"),
    ("--sde_window 10", "--sde_window 10: expected 1 to 9"),
    ("--ema_decay 0.9 --epochs 3", "--ema_decay 0.9: first moves at update 8"),
    ("--init_lora nowhere", "--init_lora nowhere: there is no nowhere"),
    ("--run_dir tests", "--run_dir tests: is not empty"),
    ("--resume nowhere", "--resume nowhere: "),
    ("--model nobody/nothing", "--model nobody/nothing: torch sees no GPU.*--model tiny/sd3"),
])
def test_bad_input_is_one_line_that_says_what_was_expected(arguments, message, monkeypatch):
    monkeypatch.chdir(HERE)
    with pytest.raises(BadInput, match=message) as error:
        parse(f"{TINY} {arguments}")
    assert "\n" not in str(error.value)


def test_other_pipelines_are_refused(tmp_path):
    with pytest.raises(BadInput, match="is a StableDiffusionPipeline; expected .*FluxPipeline"):
        parse(make_model(tmp_path / "model", _class_name="StableDiffusionPipeline"))


def test_two_gold_scores_of_one_name_are_refused():
    one, other = "helpers:load_brightness", "experiments.random_weights:load_brightness"
    flags = f"{TINY} --reward {one} --gold {one}"
    assert [judge.name for judge in guard.load_task(parse(flags))[2]] == ["load_brightness"] * 2
    with pytest.raises(BadInput, match="--gold .*different names"):
        guard.load_task(parse(f"{flags} {other}"))
