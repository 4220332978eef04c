"""Prompt sets: what is read, what is refused and by which line, and the sets that come with the project."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import rewards
from prompts.geneval import make
from rewards import BadInput

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
LINE = {"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}


def test_text_files_and_jsonl_are_read(tmp_path):
    """With blank lines, Windows' ends of lines and a byte order mark."""

    def read(name, text):
        (tmp_path / name).write_bytes(f"\ufeff{text}".encode())
        return rewards.read_prompts(tmp_path / name)

    assert read("a.TXT", 'says "Öl"\r\n\n  \r\n  {"a": 1}  \n') == [('says "Öl"', {}), ('{"a": 1}', {})]
    assert read("a.jsonl", f"{json.dumps(LINE)}\r\n\r\n") == [("two cats", LINE)]


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b'says "A"', ": expected .txt, .* or .jsonl"),
    ("a.txt", b"\n  \n", ": holds no prompt"),
    ("a.txt", b'fine "A"\r\n\r\nno text here\n', ", line 3: expected exactly one text in double quotes"),
    ("a.txt", b'an "A" and a "B"', ", line 1: expected exactly one text in double quotes"),
    ("a.txt", 'blank " \u200b "'.encode(), ", line 1: expected exactly one text in double quotes"),
    ("a.txt", '"Ạ ´½!é⅓❤\ufe0f"\n"Дом"'.encode(), ", line 2: .*the OCR engine can read; got 'д'"),
    ("a.txt", b'"A"\ncaf\xe9 "A"\n', ", line 2: 'utf-8' codec can't decode byte 0xe9"),
    ("a.jsonl", b'{"prompt": "says \\"A\\""}\ntext', ", line 2: Expecting value"),
    ("a.jsonl", b"[1]", ", line 1: expected a JSON object"),
    ("a.jsonl", b'{"prompt": 3}', ", line 1: expected a JSON object"),
    ("a.jsonl", b'{"prompt": " "}', ", line 1: expected a JSON object"),
    ("a.jsonl", b'{"prompt": "\\ud800 \\"A\\""}', ", line 1: .*surrogates not allowed"),
    ("a.jsonl", b"[" * 10**5, ", line 1: .*recursion"),
])  # fmt: skip
def test_a_set_that_cannot_be_used_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"^{tmp_path / name}{message}") as error:
        rewards.read_prompts(tmp_path / name, ["ocr"])
    assert "\n" not in str(error.value)


def test_a_reward_of_ones_own_checks_its_prompts(tmp_path, monkeypatch):
    def check(prompt, metadata):
        if "cat" not in prompt:
            raise ValueError("expected a cat")

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(load=SimpleNamespace(check=check)))
    (tmp_path / "a.txt").write_text('a cat, "A"\na dog, "B"\n')
    with pytest.raises(BadInput, match="a.txt, line 2: expected a cat"):
        rewards.read_prompts(tmp_path / "a.txt", ["ocr", "mine:load"])


def test_sets_are_looked_for_here_and_then_beside_rewards(tmp_path, monkeypatch):
    for place in ("here", "program"):
        (tmp_path / place / "set").mkdir(parents=True)
    monkeypatch.setattr(rewards, "HERE", tmp_path / "program")
    monkeypatch.chdir(tmp_path / "here")
    Path("set/train_metadata.jsonl").write_text("half a set is none")
    with pytest.raises(BadInput, match="--prompts set: "):
        rewards.prompt_files("set")
    for place, ending in (("program", ".txt"), ("here", "_metadata.jsonl")):
        train, test = (tmp_path / place / "set" / f"{part}{ending}" for part in ("train", "test"))
        train.write_text("x")
        test.write_text("x")
        assert tuple(file.absolute() for file in rewards.prompt_files("set")) == (train, test)
    assert rewards.prompt_files(test) == (test, test)


# What a training prompt must not share with a held-out one, and how many of each there are at least.
SETS = [
    ("ocr", 1000, 100, lambda prompt, metadata: rewards.comparable(rewards.quoted_text(prompt))),
    ("geneval", 1938, 300, lambda prompt, metadata: make.scene(metadata)),  # however it is said
    ("pickscore", 300, 60, lambda prompt, metadata: prompt.lower()),
]


@pytest.mark.parametrize("name, training, held_out, content", SETS)
def test_the_projects_sets_can_be_scored_and_keep_their_test_prompts_apart(name, training, held_out, content):
    train, test = (rewards.read_prompts(file, [name]) for file in rewards.prompt_files(PROMPTS / name))
    assert len(train) >= training and len(test) >= held_out
    assert not {content(*line) for line in train} & {content(*line) for line in test}


def test_the_geneval_set_is_what_its_script_makes():
    for file, lines in zip(rewards.prompt_files(PROMPTS / "geneval"), make.sets(), strict=True):
        assert file.read_bytes() == make.text(lines).encode()
    cat, dog = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
    said = [(cat, dog, "left of"), (dog, cat, "right of"), (cat, dog, "right of")]
    pairs = [[first, second | dict(position=[relation, 0])] for first, second, relation in said]
    scenes = [make.scene(dict(tag="position", include=pair)) for pair in pairs]
    assert scenes[0] == scenes[1] != scenes[2]
