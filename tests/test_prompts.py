"""Prompt sets: what is read, what is refused, and the sets that come with the project."""

import json
from pathlib import Path

import pytest

import guard
import rewards
from prompts.geneval import make as geneval
from rewards import BadInput
from tiny import cards

HERE = Path(__file__).resolve().parent.parent


def test_text_and_metadata_sets_are_read(tmp_path):
    text = tmp_path / "train.txt"
    text.write_bytes('\ufeffa sign that says "Öl"\r\n\n  a cup that reads "TEA"  \n'.encode())
    expected = [('a sign that says "Öl"', {}), ('a cup that reads "TEA"', {})]
    assert rewards.read_prompts(text, ["ocr"]) == expected
    line = {"prompt": "a photo of two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}
    metadata = tmp_path / "train_metadata.jsonl"
    metadata.write_text(json.dumps(line) + "\n")
    assert rewards.read_prompts(metadata, ["geneval"]) == [("a photo of two cats", line)]


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
        (b'caf\xe9 "A"\n', "expected prompts as UTF-8 text .*position 3"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused_with_its_line(tmp_path, content, message):
    file = tmp_path / "train.txt"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        rewards.read_prompts(file, ["ocr"])


def test_what_a_reward_needs_of_the_prompts_is_asked_before_anything_is_loaded(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text('a sign that says "OPEN"\n')
    given = ["--model", "tiny-sd3", "--prompts", str(file), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(BadInput, match="mine.txt, line 1: not a card's prompt: .*OPEN.*--gold none"):
        guard.parse_args([*given, "--gold_prompts", str(file)])
    with pytest.raises(BadInput, match='mine.txt, line 1: expected a "tag", a non-empty list "include"'):
        guard.parse_args([*given, "--task", "geneval", "--gold", "none"])
    with pytest.raises(BadInput, match='cards.*line 1: expected a "tag"'):
        guard.parse_args([*given, "--gold", "geneval-strict"])
    assert "cards" in guard.parse_args(given).gold  # its prompts are others
    assert guard.parse_args([*given, "--gold", "none"]).gold == []
    file.write_text("no text to read\n")
    with pytest.raises(BadInput, match="line 1: expected exactly one text in double quotes"):
        guard.parse_args([*given, "--gold", "none"])
    assert guard.parse_args([*given, "--gold", "none", "--reward", "pickscore"]).task == "ocr"


def test_each_check_is_made_once_and_an_unknown_reward_has_none(tmp_path, monkeypatch):
    file, asked = tmp_path / "mine.txt", []
    file.write_text("one\ntwo\n")
    check = lambda prompt, metadata: asked.append(prompt)  # noqa: E731
    monkeypatch.setattr(rewards, "CHECKS", {"a": check, "a-strict": check, "b": pytest.fail})
    assert len(rewards.read_prompts(file, ["a", "a-strict", "a", "unknown"])) == 2
    assert asked == ["one", "two"]


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"tag": "x"}', '{"prompt": 3}', '{"prompt": " "}', "[" * 10**5]
)
def test_metadata_without_a_prompt_is_refused(tmp_path, line):
    file = tmp_path / "train_metadata.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(BadInput, match="line 2: expected a JSON object"):
        rewards.read_prompts(file)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        rewards.read_prompts(tmp_path / "no.txt")


@pytest.mark.parametrize("name, least", [("ocr", (1000, 100)), ("cards", (2000, 800))])
def test_the_projects_own_sets(name, least):
    train, test = rewards.read_set(HERE / "prompts" / name, [name])
    assert len(train) >= least[0] and len(test) >= least[1]
    assert len({p for p, _ in train}) == len(train) and not {p for p, _ in train} & {p for p, _ in test}


def test_ocr_test_texts_are_not_trained_on():
    train, test = rewards.read_set(HERE / "prompts/ocr", ["ocr"])
    texts = [{rewards.quoted_text(prompt).lower() for prompt, _ in prompts} for prompts in (train, test)]
    assert not texts[0] & texts[1]


def test_the_tiny_models_sets_are_what_the_world_splits_into():
    splits = {
        "cards": cards.word_splits(),
        "cards-geneval": cards.shape_splits(),
        "cards-pickscore": cards.mixed_splits(),
    }
    names = {"cards-geneval": ["cards", "tiny-geneval"]}
    for name, split in splits.items():
        sets = rewards.read_set(HERE / "prompts" / name, names.get(name, ["cards"]))
        assert [[prompt for prompt, _ in prompts] for prompts in sets] == [list(prompts) for prompts in split]
    unseen = [cards.parse(prompt).word in cards.UNSEEN_WORDS for prompt in splits["cards"][1]]
    assert [sum(unseen[:n]) for n in (64, 256, 512)] == [16, 64, 128]


def test_pickscore_prompts_differ_and_none_is_a_stub():
    train, test = rewards.read_set(HERE / "prompts/pickscore", ["pickscore"])
    prompts = [prompt for prompt, _ in train + test]
    assert len(train) >= 300 and len(test) >= 60
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    assert all(3 <= len(prompt.split()) <= 60 for prompt in prompts)
    assert all(prompt.isascii() for prompt in prompts)


def geneval_set():
    return [[about for _, about in part] for part in rewards.read_set(HERE / "prompts/geneval", ["geneval"])]


def test_geneval_set_is_what_its_script_makes():
    for file, lines in zip(rewards.prompt_files(HERE / "prompts" / "geneval"), geneval.sets(), strict=True):
        assert file.read_bytes() == geneval.text(lines).encode()


def test_geneval_tags_are_in_their_ratio():
    train, test = ([line["tag"] for line in lines] for lines in geneval_set())
    ratio = dict(position=7, counting=5, color_attr=3, colors=1, two_object=1, single_object=0)
    assert {tag: train.count(tag) for tag in geneval.TAGS} == {tag: 114 * n for tag, n in ratio.items()}
    assert all(sorted(test[i : i + 6]) == sorted(geneval.TAGS) for i in range(0, 300, 6)) and len(test) == 300


def test_geneval_test_scenes_are_not_trained_on():
    train, test = ([geneval.scene(line) for line in lines] for lines in geneval_set())
    assert not set(train) & set(test) and len(set(test)) == len(test)
    counting = [scene for scene in train if scene[0] == "counting"]
    assert {counting.count(scene) for scene in counting} == {3}
    assert len(set(train)) == len(train) - len(counting) * 2 // 3


def test_scene_does_not_depend_on_how_it_is_said():
    a, b = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
    said = [
        dict(tag="position", include=[a, dict(b, position=["left of", 0])]),
        dict(tag="position", include=[b, dict(a, position=["right of", 0])]),
        dict(tag="position", include=[a, dict(b, position=["right of", 0])]),
    ]
    scenes = [geneval.scene(line) for line in said]
    assert scenes[0] == scenes[1] != scenes[2]
    assert geneval.scene(dict(tag="two_object", include=[a, b])) == geneval.scene(
        dict(tag="two_object", include=[b, a])
    )


def test_geneval_lines_are_in_its_format():
    """Every key, class, colour and position, and a prompt that says what the clauses ask for."""
    assert len(set(geneval.CLASSES)) == 80 and geneval.CLASSES[0] == "person"
    for line in sum(geneval_set(), []):
        tag, include, prompt = line["tag"], line["include"], line["prompt"]
        counting = tag == "counting"
        assert list(line) == ["tag", "include"] + ["exclude"] * counting + ["prompt"]
        assert len(include) == (2 if tag in ("two_object", "position", "color_attr") else 1)
        assert len({clause["class"] for clause in include}) == len(include)
        for i, clause in enumerate(include):
            more = {"colors": ["color"], "color_attr": ["color"], "position": ["position"] * (i == 1)}
            assert list(clause) == ["class", "count"] + more.get(tag, [])
            assert clause["class"] in geneval.CLASSES
            assert clause["count"] in ((2, 3, 4) if counting else (1,))
            if "color" in clause:
                assert clause["color"] in geneval.COLORS and clause["class"] != "person"
                assert f"{clause['color']} {clause['class']}" in prompt
            if "position" in clause:
                assert clause["position"][0] in geneval.POSITIONS and clause["position"][1] == 0
                a, b = (geneval.one(c["class"]) for c in include)
                assert prompt == f"a photo of {b} {clause['position'][0]} {a}"
        if counting:
            clause = include[0]
            assert line["exclude"] == [dict(clause, count=clause["count"] + 1)]
            number = {2: "two", 3: "three", 4: "four"}[clause["count"]]
            assert prompt == f"a photo of {number} {geneval.plural(clause['class'])}"


@pytest.mark.parametrize(
    "name, singular, plural",
    [
        ("person", "a person", "people"),
        ("airplane", "an airplane", "airplanes"),
        ("bus", "a bus", "buses"),
        ("bench", "a bench", "benches"),
        ("sheep", "a sheep", "sheep"),
        ("skis", "a pair of skis", "pairs of skis"),
        ("wine glass", "a wine glass", "wine glasses"),
        ("knife", "a knife", "knives"),
        ("sandwich", "a sandwich", "sandwiches"),
        ("broccoli", "a head of broccoli", "heads of broccoli"),
        ("computer mouse", "a computer mouse", "computer mice"),
        ("scissors", "a pair of scissors", "pairs of scissors"),
        ("toothbrush", "a toothbrush", "toothbrushes"),
    ],
)
def test_singulars_and_plurals(name, singular, plural):
    assert (geneval.one(name), geneval.plural(name)) == (singular, plural)
    assert geneval.one("scissors", "orange") == "a pair of orange scissors"
    assert geneval.one("car", "orange") == "an orange car"
