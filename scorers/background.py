"""Rewards on a thread beside the sampling, and the report and the sample sheet of an evaluation."""

import json
import math
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import rewards

TIMEOUT = timedelta(minutes=10)  # that a slice's rewards may take; then the run stops


class Scorers:
    """The rewards of a run by name, and what pictures look like (`rewards.LOOKS`), on one thread.

    device: whose GPU the thread uses; CUDA's current device is each thread's own. period: of `rewards.looks`.
    """

    def __init__(self, names, device, period):
        self.rewards = {name: rewards.load(name) for name in names}
        self.period = period
        self.thread = ThreadPoolExecutor(1, initializer=use_device, initargs=[device])

    def submit(self, names, images, prompts):
        """A future for `result_of`. names: of rewards or looks; prompts: (prompt, metadata) of each image."""
        return self.thread.submit(self.score, names, images, prompts)

    def score(self, names, images, prompts):
        """(names, images) scores."""
        texts, metadata = [prompt for prompt, _ in prompts], [about for _, about in prompts]
        looks = []
        if set(names) & set(rewards.LOOKS):
            looks = [rewards.looks(image, self.period) for image in images]
        scores = []
        for name in names:
            if name in rewards.LOOKS:
                scores.append([of_image[name] for of_image in looks])
            else:
                scores.append(self.rewards[name](images, texts, metadata))
        return torch.tensor(scores, dtype=torch.float64)


def use_device(device):
    if device.type == "cuda":
        torch.cuda.set_device(device)


def result_of(future):
    """Wait for the scores. Raises RewardError if the reward did, or if it takes longer than TIMEOUT."""
    try:
        return future.result(TIMEOUT.total_seconds())
    except TimeoutError:
        raise rewards.RewardError(f"no reward within {TIMEOUT}, hours:minutes:seconds") from None


def report_evaluation(metrics):
    """Print the last evaluation, and which of rewards.LOOKS have left their first value by over a third.

    metrics: the path of metrics.jsonl.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    first, last = evaluations[0], evaluations[-1]
    scores = {"reward": last["proxy"]} | last["gold"]
    tqdm.write(f"update {last['update']}: " + ", ".join(f"{name} {scores[name]:.4f}" for name in scores))
    for name, before in first.get("looks", {}).items():
        now = last["looks"][name]
        if abs(now - before) > abs(before) / 3:
            tqdm.write(f"look at samples/: {name} was {before:.3g} at update 0, is {now:.3g} now")


def sheet(images, prompts, scores, width=256):
    """One picture of many, under each its prompt and score."""
    cells = []
    for image, prompt, score in zip(images, prompts, scores, strict=True):
        image = image.resize((width, width * image.height // image.width), Image.Resampling.LANCZOS)
        cells.append(ImageOps.expand(image, (0, 0, 0, 48), "white"))
        text = "\n".join(textwrap.wrap(f"{prompt}  {score:.2f}", 42)[:3])
        ImageDraw.Draw(cells[-1]).text((4, image.height + 2), text, "black", ImageFont.load_default(12))
    columns = math.gcd(len(cells), 4)
    rows = [np.hstack(cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return Image.fromarray(np.vstack(rows))
