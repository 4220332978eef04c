"""Prompt sets: what is read, what is refused, and the sets that come with the project."""

import json
from pathlib import Path

import pytest

import rewards
from rewards import BadInput
from tiny import cards

HERE = Path(__file__).resolve().parent.parent


def test_text_and_metadata_sets_are_read(tmp_path):
    text = tmp_path / "train.txt"
    text.write_bytes('\ufeffa sign that says "Öl"\r\n\n  a cup that reads "TEA"  \n'.encode())
    assert rewards.read_prompts(text, True) == [('a sign that says "Öl"', {}), ('a cup that reads "TEA"', {})]
    line = {"prompt": "a photo of two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}
    metadata = tmp_path / "train_metadata.jsonl"
    metadata.write_text(json.dumps(line) + "\n")
    assert rewards.read_prompts(metadata, False) == [("a photo of two cats", line)]


def test_folders_of_both_layouts_are_found(tmp_path):
    for names in (("train.txt", "test.txt"), ("train_metadata.jsonl", "test_metadata.jsonl")):
        folder = tmp_path / names[0].split(".")[1]
        folder.mkdir()
        for name in names:
            (folder / name).write_text("x")
        assert rewards.prompt_files(folder) == tuple(folder / name for name in names)
    assert rewards.prompt_files(folder / names[0]) == (folder / names[0],) * 2
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="expected a file, or a folder with train.txt and test.txt"):
            rewards.prompt_files(place)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no prompt"),
        (b"\n  \n", "holds no prompt"),
        (b'fine "A"\nno text here\n', "line 2: expected exactly one text in double quotes"),
        (b'two "A" and "B"\n', "line 1: expected exactly one"),
        (b'open "A\n', "line 1: expected exactly one"),
        (b'blank "  "\n', "line 1: expected exactly one"),
        (b'caf\xe9 "A"\n', "byte 3 is not UTF-8"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused_with_its_line(tmp_path, content, message):
    file = tmp_path / "train.txt"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        rewards.read_prompts(file, True)


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"tag": "x"}', '{"prompt": 3}', '{"prompt": " "}', "[" * 10**5]
)
def test_metadata_without_a_prompt_is_refused(tmp_path, line):
    file = tmp_path / "train_metadata.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(BadInput, match="line 2: expected a JSON object"):
        rewards.read_prompts(file, False)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        rewards.read_prompts(tmp_path / "no.txt", True)


@pytest.mark.parametrize("name, least", [("ocr", (1000, 100)), ("cards", (2000, 900))])
def test_the_projects_own_sets(name, least):
    train, test = (rewards.read_prompts(file, True) for file in rewards.prompt_files(HERE / "prompts" / name))
    assert len(train) >= least[0] and len(test) >= least[1]
    assert len({p for p, _ in train}) == len(train) and not {p for p, _ in train} & {p for p, _ in test}


def test_ocr_test_texts_are_not_trained_on():
    train, test = (
        rewards.read_prompts(file, True) for file in rewards.prompt_files(HERE / "prompts" / "ocr")
    )
    texts = [{rewards.quoted_text(prompt).lower() for prompt, _ in prompts} for prompts in (train, test)]
    assert not texts[0] & texts[1]


def test_held_out_words_are_in_no_training_prompt():
    train, test = (
        rewards.read_prompts(file, True) for file in rewards.prompt_files(HERE / "prompts" / "cards")
    )
    assert ([p for p, _ in train], [p for p, _ in test]) == cards.splits()
    trained = {cards.parse(prompt)[0] for prompt, _ in train}
    assert trained == set(cards.SEEN_WORDS) and not trained & set(cards.UNSEEN_WORDS)
    unseen = [cards.parse(prompt)[0] in cards.UNSEEN_WORDS for prompt, _ in test]
    assert [sum(unseen[:n]) for n in (64, 256, 512)] == [16, 64, 128]
