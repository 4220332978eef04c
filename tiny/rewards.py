"""The rewards of the embedded world: `--reward tiny.rewards:geneval`, `--gold tiny.rewards:gold`, and so on.

Each is a loader without arguments. It returns `reward(images, prompts, metadata) -> list of float`. Where not
every prompt can be scored, its attribute `check(prompt, metadata)` raises ValueError, in one line.

- gold, and its parts colour, frame, pattern, content: exact, from the renderer in cards.py; never trained on
- geneval, geneval_strict: GenEval's rules with the judges in `detector/` and `clip/`
- pickscore: the preference model in `pickscore/`
"""

from pathlib import Path

from tiny import cards

HERE = Path(__file__).resolve().parent
JUDGES = dict(detector=str(HERE / "detector"), clip=str(HERE / "clip"))


def mean_of(*parts):
    def reward(images, prompts, metadata):
        scores = [cards.fidelity(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [sum(score[part] for part in parts) / len(parts) for score in scores]

    return reward


def gold():
    """The mean of the four parts: 1 is a perfect card."""
    return mean_of(*cards.PARTS)


def colour():
    return mean_of("colour")


def frame():
    return mean_of("frame")


def pattern():
    return mean_of("pattern")


def content():
    return mean_of("content")


def geneval():
    """Flow-GRPO's partial score."""
    from scorers import geneval as full_size

    return full_size.load(**JUDGES)


def geneval_strict():
    """GenEval's own verdict, 0 or 1."""
    from scorers import geneval as full_size

    return full_size.load(strict=True, **JUDGES)


def pickscore():
    from rewards import load_clip_score

    return load_clip_score(str(HERE / "pickscore"), str(HERE / "pickscore"), 26)


def check_card(prompt, metadata):
    cards.parse(prompt)


def check_geneval(prompt, metadata):
    from scorers import geneval as full_size

    full_size.check(prompt, metadata, JUDGES["detector"])


for loader in (gold, colour, frame, pattern, content):
    loader.check = check_card
for loader in (geneval, geneval_strict):
    loader.check = check_geneval
