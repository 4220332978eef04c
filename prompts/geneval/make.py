"""Make the GenEval prompt set: `python prompts/geneval/make.py` (seconds).

Writes `train_metadata.jsonl` and `test_metadata.jsonl` next to this file, in GenEval's metadata format:

- training: 1938 lines in Flow-GRPO's ratio, position : counting : color_attr : colors : two_object :
  single_object = 7 : 5 : 3 : 1 : 1 : 0. There are only 240 counting prompts; each of the 190 that are not
  held out comes 3 times.
- test: 300 lines, the six tags in turn, so that every first part is balanced too.

No scene of the test is trained on; "a cat and a dog" is the scene of "a dog and a cat", and what is left of a
thing has that thing on its right. GenEval's own 553 prompts are not held out: remove them from the training
set before reporting a score on them. Where GenEval writes "three sandwichs" or "a scissors", this is English.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scorers.geneval import CLASSES  # noqa: E402
from scorers.geneval import COLOURS as COLORS  # noqa: E402

POSITIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}  # and opposite
NUMBERS = {2: "two", 3: "three", 4: "four"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

UNITS = {"skis": "pair", "scissors": "pair", "broccoli": "head"}  # "a pair of red skis"
PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}

TRAIN = {"position": 798, "counting": 570, "color_attr": 342, "colors": 114, "two_object": 114}
REPEATS = {"counting": 3}
TEST = dict.fromkeys(TAGS, 50)


def article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name):
    if name in UNITS:
        return f"{UNITS[name]}s of {name}"
    return PLURALS.get(name) or name + ("es" if name.endswith(("s", "ch", "sh")) else "s")


def one(name, color=None):
    """The noun phrase of one object: "an orange cup"."""
    words = f"{color} {name}" if color else name
    return article(f"{UNITS[name]} of {words}" if name in UNITS else words)


def draw(tag, rng):
    """A random line of that tag. A person is never given a colour, as in GenEval."""
    with_person = tag not in ("colors", "color_attr")
    first, second = rng.sample(CLASSES if with_person else CLASSES[1:], 2)
    colors = rng.sample(COLORS, 2)
    a, b = ({"class": name, "count": 1} for name in (first, second))
    line = dict(tag=tag, include=[a])
    if tag == "single_object":
        what = one(first)
    elif tag == "two_object":
        line["include"] = [a, b]
        what = f"{one(first)} and {one(second)}"
    elif tag == "counting":
        a["count"] = rng.choice(list(NUMBERS))
        line["exclude"] = [dict(a, count=a["count"] + 1)]
        what = f"{NUMBERS[a['count']]} {plural(first)}"
    elif tag == "colors":
        a["color"] = colors[0]
        what = one(first, colors[0])
    elif tag == "position":
        b["position"] = [rng.choice(list(POSITIONS)), 0]  # of the clause with that index
        line["include"] = [a, b]
        what = f"{one(second)} {b['position'][0]} {one(first)}"
    elif tag == "color_attr":
        a["color"], b["color"] = colors
        line["include"] = [a, b]
        what = f"{one(first, colors[0])} and {one(second, colors[1])}"
    return dict(line, prompt=f"a photo of {what}")


def scene(line):
    """What is to be seen: equal for two lines that differ only in how they say it."""
    clauses = [(c["class"], c["count"], c.get("color", "")) for c in line["include"]]
    if line["tag"] == "position":
        relation = line["include"][1]["position"][0]
        if relation in ("right of", "below"):
            return (POSITIONS[relation], *reversed(clauses))
        return (relation, *clauses)
    return (line["tag"], *sorted(clauses))


def sets():
    """(training lines, test lines), the same ones at every call."""
    rng = random.Random(0)
    seen = set()

    def fresh(tag, count):
        lines = []
        while len(lines) < count:
            line = draw(tag, rng)
            if scene(line) not in seen:
                seen.add(scene(line))
                lines.append(line)
        return lines

    test = [line for turn in zip(*(fresh(*item) for item in TEST.items()), strict=True) for line in turn]
    train = []
    for tag, count in TRAIN.items():
        repeats = REPEATS.get(tag, 1)
        train += fresh(tag, count // repeats) * repeats
    rng.shuffle(train)
    return train, test


def text(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    for name, lines in zip(("train", "test"), sets(), strict=True):
        file = Path(__file__).resolve().parent / f"{name}_metadata.jsonl"
        file.write_bytes(text(lines).encode())
