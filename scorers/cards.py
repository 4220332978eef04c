"""The exact gold score of the tiny models' cards: tiny/cards.py drew what they learned from.

Rewards `cards` and `cards-<part>`; they need no weights and no packages beyond those of rewards.py.
"""

from tiny import cards


def check(prompt, metadata):
    """Raise ValueError unless the prompt is that of a card."""
    cards.parse(prompt)


def load(part=None):
    """The mean over the parts of `fidelity` in tiny/cards.py, or one of them: 1 perfect, 0 nothing of it."""

    def reward(images, prompts, metadata):
        scores = [cards.fidelity(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [score[part] if part else sum(score.values()) / len(score) for score in scores]

    return reward
