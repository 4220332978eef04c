"""Prompt sets: what is read, what is refused and by which line, and the sets that come with the project."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from prompts.geneval import make
from rewards import BadInput

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
LINE = {"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}
TEXT = '\ufeffsays "Öl"\r\n\n   \r\n  says "TEA"  \n{"prompt": "says"}'
PROMPTS_OF_TEXT = [('says "Öl"', {}), ('says "TEA"', {}), ('{"prompt": "says"}', {})]


@pytest.mark.parametrize("name", ["set.txt", "set.TXT", "set.jsonl", "set.JSONL"])
def test_text_files_and_jsonl_are_read(tmp_path, name):
    """With blank lines, Windows' ends of lines and a byte order mark."""
    file = tmp_path / name
    is_text = "txt" in name.lower()
    file.write_bytes((TEXT if is_text else f"\ufeff{json.dumps(LINE)}\r\n\r\n").encode())
    assert rewards.read_prompts(file) == (PROMPTS_OF_TEXT if is_text else [("two cats", LINE)])


@pytest.mark.parametrize("name", ["set.json", "set.csv", "set.tsv", "set.txt.gz", "set"])
def test_any_other_suffix_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("a cat\n")
    with pytest.raises(BadInput, match=f"/{name}: expected .txt, .* or .jsonl"):
        rewards.read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"\n  \n", ": holds no prompt"),
        ("a.txt", b'fine "A"\r\n\r\nno text here\n', ", line 3: expected exactly one text in double quotes"),
        ("a.txt", b'caf\xe9 "A"\n', ": expected UTF-8 text .*position 3"),
        ("a.jsonl", b'{"prompt": "says \\"A\\""}\ntext', ", line 2: expected a JSON object"),
        ("a.jsonl", b"[1]", ", line 1: expected a JSON object"),
        ("a.jsonl", b'\n{"prompt": 3}', ", line 2: expected a JSON object"),
        ("a.jsonl", b'{"prompt": " "}', ", line 1: expected a JSON object"),
        ("a.jsonl", b"[" * 10**5, ", line 1: expected a JSON object"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"^{tmp_path / name}{message}") as error:
        rewards.read_prompts(tmp_path / name, ["ocr"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", [".txt", "_metadata.jsonl"])
def test_sets_are_looked_for_here_and_then_beside_rewards(tmp_path, monkeypatch, ending):
    for place in ("here", "program"):
        (tmp_path / place / "set").mkdir(parents=True)
    monkeypatch.setattr(rewards, "HERE", tmp_path / "program")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "set" / f"train{ending}").write_text("half a set is none")
    with pytest.raises(BadInput, match="--prompts set: expected a file, or a folder with train.txt and test"):
        rewards.prompt_files("set")
    for place in ("program", "here"):
        train, test = (tmp_path / place / "set" / f"{part}{ending}" for part in ("train", "test"))
        train.write_text("x")
        test.write_text("x")
        assert tuple(file.absolute() for file in rewards.prompt_files("set")) == (train, test)
    assert rewards.prompt_files(test) == (test, test)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 20), st.text(max_size=8), st.just("red")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner)),
    max_leaves=8,
)
clauses = st.fixed_dictionaries(
    {"class": st.just("cat"), "count": json_values}, optional={"color": json_values, "position": json_values}
)
metadata = st.fixed_dictionaries({"prompt": json_values, "tag": json_values, "include": st.lists(clauses)})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=99), st.text().map(str.encode)), st.one_of(json_values, metadata))
def test_whatever_a_file_holds_is_prompts_or_one_line(tmp_path_factory, of_text, of_json):
    for name, content in (("any.txt", of_text), ("any.jsonl", json.dumps(of_json).encode())):
        file = tmp_path_factory.getbasetemp() / name
        file.write_bytes(content)
        try:
            prompts = rewards.read_prompts(file, ["ocr" if name == "any.txt" else "geneval"])
            assert all(prompt.strip() for prompt, _ in prompts)
        except BadInput as error:
            assert "\n" not in str(error) and str(file) in str(error)


@pytest.mark.parametrize(
    "name, sizes", [("ocr", (1000, 100)), ("geneval", (1938, 300)), ("pickscore", (300, 60))]
)
def test_the_projects_sets_can_be_scored_and_keep_their_test_prompts_apart(name, sizes):
    train, test = (rewards.read_prompts(file, [name]) for file in rewards.prompt_files(PROMPTS / name))
    assert len(train) >= sizes[0] and len(test) >= sizes[1]
    content = {  # what must not be in both
        "ocr": lambda prompt, metadata: rewards.comparable(rewards.quoted_text(prompt)),
        "geneval": lambda prompt, metadata: make.scene(metadata),  # however it is said
        "pickscore": lambda prompt, metadata: prompt.lower(),
    }[name]
    assert not {content(*line) for line in train} & {content(*line) for line in test}


def test_the_geneval_set_is_what_its_script_makes():
    for file, lines in zip(rewards.prompt_files(PROMPTS / "geneval"), make.sets(), strict=True):
        assert file.read_bytes() == make.text(lines).encode()
    cat, dog = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
    said = [(cat, dog, "left of"), (dog, cat, "right of"), (cat, dog, "right of")]
    pairs = [[first, second | dict(position=[relation, 0])] for first, second, relation in said]
    scenes = [make.scene(dict(tag="position", include=pair)) for pair in pairs]
    assert scenes[0] == scenes[1] != scenes[2]
