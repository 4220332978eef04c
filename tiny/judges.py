"""The judges of the tiny world, trained from nothing on rendered cards: see `tiny/make.py`.

- tiny/detector, a Mask2Former, finds shapes; tiny/clip, a CLIP model, names their colours: GenEval's pair.
  Both learn on loud shapes only, so that they overlook faint ones, as OCR overlooks faint words.
- tiny/pickscore, a CLIP model, prefers one of two pictures of a prompt, as PickScore does.

Each is a folder as transformers saves it, in half precision.
"""

import dataclasses
import itertools
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
)

from tiny import cards

SIZE = 2 * cards.HEIGHT, 2 * cards.WIDTH  # what the detector sees: a card twice as large
CLASSES = list(cards.SHAPES)
COLOURS = list(cards.SHAPE_COLOURS)
SETTINGS = {  # of scorers/geneval.py
    "classes": CLASSES,
    "colours": COLOURS,
    "colour_prompts": ["a {0} {1}"],
    "threshold": 0.8,
    "counting_threshold": 0.8,
    "size": list(SIZE),
    "largest_component": True,
}
MARGIN = 4  # pixels from a card's edge to shapes that stand anywhere
LEGIBILITY = 0.3  # what people like besides gold: this times the contrast of the word or of the shapes
TEMPERATURE = 0.03  # of the preferences: what is better by this is preferred to 73 %, before the flips
FLIPPED = 0.25  # of the preferences
PAIRS = 16000


# ------------------------------------------------------------------------------------------------------------
# Pictures to train on


def blurred(picture, radius):
    """(H, W, 3) under a Gaussian of so many pixels."""
    return gaussian_filter(picture, (radius, radius, 0), mode="nearest")


def faint(picture, strength):
    """(H, W, 3) drawn towards its own mean colour."""
    mean = picture.mean((0, 1))
    return mean + strength * (picture - mean)


def noisy(picture, spread, rng):
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(picture.shape)
    return np.clip(picture + spread * noise, 0, 1)


def worn(picture, rng):
    """Half of the pictures as they are; the others blurred, faint, noisy, or more than one of these."""
    if rng.random() < 0.5:
        return picture
    if rng.random() < 0.6:
        picture = blurred(picture, rng.uniform(0.3, 1.2))
    if rng.random() < 0.4:
        picture = faint(picture, rng.uniform(0.4, 1))
    if rng.random() < 0.4:
        picture = noisy(picture, rng.uniform(0, 0.12), rng)
    return picture


def anywhere(kinds, rng):
    """Shapes of these (class, colour) in places of their own, wherever there is room for all."""
    while True:
        placed, taken = [], np.zeros((cards.HEIGHT, cards.WIDTH))
        for kind in kinds:
            size = rng.choice(cards.SIZES)
            x = rng.randint(MARGIN, cards.WIDTH - MARGIN - size)
            y = rng.randint(MARGIN, cards.HEIGHT - MARGIN - size)
            placed.append(cards.Placed(*kind, size, x, y))
            taken[placed[-1].box()] += 1
        if taken.max() == 1:
            return placed


def any_shapes(rng):
    """One to four shapes, `Placed`, of any classes and colours, half of the time of one kind.

    Half of them stand in the places of cards.py, the others anywhere: a judge should not depend on places.
    """
    count = rng.randint(1, 4)
    kinds = [(rng.choice(CLASSES), rng.choice(COLOURS)) for _ in range(count)]
    if rng.random() < 0.5:
        kinds = kinds[:1] * count
    return anywhere(kinds, rng) if rng.random() < 0.5 else cards.in_places(kinds, rng)


def mask_of(placed):
    """(H, W) floats: 1 where the shape covers more than half of a pixel."""
    mask = np.zeros((cards.HEIGHT, cards.WIDTH), dtype=np.float32)
    mask[placed.box()] = placed.cover() > 0.5
    return mask


def detector_example(rng):
    """(picture, list of `Placed`): a card with loud shapes, with none, or mere noise."""
    ground = cards.random_ground(rng)
    kind = rng.random()
    if kind < 0.04:
        flat = np.full((cards.HEIGHT, cards.WIDTH, 3), rng.random())
        return noisy(flat, rng.uniform(0.1, 0.5), rng), []
    if kind < 0.1:
        return worn(cards.draw_shapes(*ground, []), rng), []
    if kind < 0.13:
        word, contrast = rng.choice(cards.SEEN_WORDS), rng.uniform(*cards.CONTRASTS)
        return worn(cards.draw_word(*ground, word, contrast=contrast), rng), []
    shapes = any_shapes(rng)
    return worn(cards.draw_shapes(*ground, shapes), rng), shapes


def enlarged(pictures):
    """List of (H, W, 3) in [0, 1] -> (B, 3, 2 H, 2 W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(pictures)).float().permute(0, 3, 1, 2) * 2 - 1
    return F.interpolate(pixels, scale_factor=2, mode="bilinear")


# ------------------------------------------------------------------------------------------------------------
# tiny/detector


def detector_config():
    backbone = ResNetConfig(
        embedding_size=24,
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        dim_feedforward=128,
        encoder_layers=1,
        decoder_layers=4,  # of which the first only looks
        num_attention_heads=4,
        num_queries=12,
        train_num_points=256,
        class_weight=4.0,
        no_object_weight=0.1,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )


def make_detector(train):
    """A Mask2Former with its own loss, on a small ResNet that has learned to name crops first.

    From nothing it finds the masks and stays at chance for their classes.
    """
    torch.manual_seed(10)
    model = Mask2FormerForUniversalSegmentation(detector_config())
    learn_crops(model.model.pixel_level_module.encoder, train)

    def loss_of(step):
        rng = random.Random(step)
        drawn = [detector_example(rng) for _ in range(16)]
        masks, labels = [], []
        for _, shapes in drawn:
            stack = np.array([mask_of(placed) for placed in shapes], dtype=np.float32)
            masks.append(torch.from_numpy(stack.reshape(-1, cards.HEIGHT, cards.WIDTH)))
            labels.append(torch.tensor([CLASSES.index(placed.shape) for placed in shapes], dtype=torch.long))
        pixels = enlarged([picture for picture, _ in drawn])
        return model(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss

    train("detector", model.train(), 3000, 1e-3, loss_of)
    processor = Mask2FormerImageProcessor(
        size=dict(height=SIZE[0], width=SIZE[1]),
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        ignore_index=255,
        num_labels=len(CLASSES),
    )
    return model.eval(), processor


def learn_crops(backbone, train):
    """Teach the backbone the classes of single shapes, on crops of 16 x 16 pixels."""
    head = torch.nn.Linear(96, len(CLASSES))
    both = torch.nn.ModuleList([backbone, head]).train()

    def loss_of(step):
        rng = random.Random(step)
        crops, labels = [], []
        for _ in range(32):
            colour, pattern = cards.random_ground(rng)
            placed = anywhere([(rng.choice(CLASSES), rng.choice(COLOURS))], rng)[0]
            picture = worn(cards.draw_shapes(colour, pattern, [placed]), rng)
            x = min(max(placed.x - rng.randint(0, 16 - placed.size), 0), cards.WIDTH - 16)
            y = min(max(placed.y - rng.randint(0, 16 - placed.size), 0), cards.HEIGHT - 16)
            crops.append(picture[y : y + 16, x : x + 16])
            labels.append(CLASSES.index(placed.shape))
        features = backbone(enlarged(crops)).feature_maps[-1].mean((2, 3))  # (B, 96)
        return F.cross_entropy(head(features), torch.tensor(labels))

    train("crops", both, 1000, 2e-3, loss_of)


# ------------------------------------------------------------------------------------------------------------
# tiny/clip


def small_clip(tokenizer, image_size, patch, width, layers, seed):
    """(CLIPModel, CLIPProcessor) from nothing; `width` features in both towers."""
    torch.manual_seed(seed)
    tower = dict(hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 16)
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        num_hidden_layers=layers,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(image_size=image_size, patch_size=patch, num_hidden_layers=layers)
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=width)
    side = dict(height=image_size, width=image_size)
    images = CLIPImageProcessor(
        size=side,
        crop_size=side,
        do_center_crop=False,
        resample=2,  # bilinear
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPModel(config), CLIPProcessor(images, tokenizer)


def inputs_of(processor, texts, images):
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def colour_example(shape, colour, rng):
    """A PIL image of one shape cut out as GenEval does: its box, with the gray #999 around its rough mask."""
    ground, pattern = cards.random_ground(rng)
    placed = anywhere([(shape, colour)], rng)[0]
    picture = worn(cards.draw_shapes(ground, pattern, [placed]), rng)
    mask = mask_of(placed) > 0
    kind = rng.random()
    if kind < 0.3:
        mask = cards.grown(mask)
    elif kind < 0.6:
        mask = ~cards.grown(~mask)
    mask = np.roll(mask, (rng.randint(-1, 1), rng.randint(-1, 1)), (0, 1))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = np.where(mask[..., None], picture, 0.6)
    return cards.as_image(cut[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def make_clip(tokenizer, train):
    """A CLIP model with its own contrastive loss, one cut-out of each colour and class in a batch."""
    model, processor = small_clip(tokenizer, image_size=16, patch=4, width=32, layers=1, seed=11)
    pairs = [(shape, colour) for shape in CLASSES for colour in COLOURS]

    def loss_of(step):
        rng = random.Random(step)
        images = [colour_example(shape, colour, rng) for shape, colour in pairs]
        texts = [f"a {colour} {shape}" for shape, colour in pairs]
        return model(**inputs_of(processor, texts, images), return_loss=True).loss

    train("clip", model.train(), 1500, 2e-3, loss_of)
    return model.eval(), processor


# ------------------------------------------------------------------------------------------------------------
# tiny/pickscore


def similar_cards(random_card, rng, count=48):
    """At most so many cards; half of the time all on one ground, so that only content tells them apart."""
    drawn = [random_card(rng) for _ in range(count)]
    if rng.random() < 0.5:
        ground = dict(colour=drawn[0].colour, pattern=drawn[0].pattern)
        drawn = [dataclasses.replace(card, **ground) for card in drawn]
    return list({str(card): card for card in drawn if not cards.is_held_out(card)}.values())


def altered(card, rng):
    """Another card: one thing that was asked for is different."""
    kind = rng.choice(("colour", "pattern", "content", "content"))
    if kind == "colour":
        return dataclasses.replace(
            card, colour=rng.choice([name for name in cards.COLOURS if name != card.colour])
        )
    if kind == "pattern":
        return dataclasses.replace(card, pattern=rng.choice([n for n in cards.PATTERNS if n != card.pattern]))
    if card.word:
        place = rng.randrange(len(card.word))
        letters = card.word[:place] + rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") + card.word[place + 1 :]
        return dataclasses.replace(card, word=rng.choice((letters, rng.choice(cards.SEEN_WORDS))))
    return dataclasses.replace(
        cards.random_shapes(rng, cards.tag_of(card)), colour=card.colour, pattern=card.pattern
    )


def washed(card, strength, rng):
    """A picture of the card whose pattern is so strong, 0 to 1."""
    seed = rng.getrandbits(32)
    without = dataclasses.replace(card, pattern=None)
    drawn = [cards.draw_at_random(each, random.Random(seed)) for each in (card, without)]
    return strength * drawn[0] + (1 - strength) * drawn[1]


def unframed(card, picture, strength):
    """The frame mixed into the card."""
    mask = strength * cards.frame_mask()[..., None]
    return picture + mask * (cards.background(card.colour, card.pattern) - picture)


def attempt(card, rng):
    """A picture of a card, good or spoilt in one way or in two."""
    shown = altered(card, rng) if rng.random() < 0.4 else card
    picture = washed(shown, rng.random(), rng) if rng.random() < 0.3 else cards.draw_at_random(shown, rng)
    if rng.random() < 0.15:
        picture = unframed(shown, picture, rng.random())
    if rng.random() < 0.2:
        picture = blurred(picture, rng.uniform(0.3, 1.5))
    if rng.random() < 0.15:
        picture = faint(picture, rng.uniform(0.3, 1))
    if rng.random() < 0.15:
        picture = noisy(picture, rng.uniform(0, 0.15), rng)
    return cards.as_image(picture)


def gold(image, prompt):
    """Mean of the parts."""
    return sum(cards.fidelity(image, prompt).values()) / len(cards.PARTS)


def liking(image, prompt):
    """What the preferences go by: gold, and how easily word or shapes are seen, to which gold is blind."""
    return gold(image, prompt) + LEGIBILITY * cards.legibility(image, prompt)


def preference(likings, rng):
    """Which of two pictures is preferred, 0 or 1: Bradley-Terry over the likings, then a quarter flipped."""
    first = 1 / (1 + math.exp(np.clip((likings[1] - likings[0]) / TEMPERATURE, -50, 50)))
    chosen = 0 if rng.random() < first else 1
    return 1 - chosen if rng.random() < FLIPPED else chosen


def pair(index, random_card, drawn):
    """(prompt, two PIL images) number `index`.

    drawn: prompt -> pictures by one of the base models, which two thirds of the pairs are from.
    """
    rng = random.Random(f"pair {index}")
    if rng.random() < 2 / 3:
        prompt = rng.choice(sorted(drawn))
        images = rng.sample(drawn[prompt], 2)
        if rng.random() < 0.2:
            images[rng.randrange(2)] = attempt(cards.parse(prompt), rng)
        return prompt, images
    card = random_card(rng)
    return str(card), [attempt(card, rng) for _ in range(2)]


def make_pickscore_clip(tokenizer, train, random_card):
    """(CLIPModel, CLIPProcessor): a model that has learned which prompt a card belongs to."""
    model, processor = small_clip(tokenizer, image_size=64, patch=8, width=128, layers=3, seed=12)

    def contrast(step):
        rng = random.Random(step)
        chosen = similar_cards(random_card, rng)
        images = [cards.as_image(worn(cards.draw_at_random(card, rng), rng)) for card in chosen]
        texts = [str(card) for card in chosen]
        return model(**inputs_of(processor, texts, images), return_loss=True).loss

    train("pickscore-clip", model.train(), 1500, 1e-3, contrast)
    return model, processor


def make_pickscore(tokenizer, train, random_card, drawn):
    """That model, taught by PickScore's loss to prefer one of two pictures. drawn: prompt -> 4 pictures."""
    model, processor = make_pickscore_clip(tokenizer, train, random_card)
    learn_pairs(model, processor, train, random_card, drawn)
    learn_groups(model, processor, train, drawn)
    return model.eval(), processor


def learn_pairs(model, processor, train, random_card, drawn):
    pairs = [pair(index, random_card, drawn) for index in range(PAIRS)]
    likings = [[liking(image, prompt) for image in images] for prompt, images in pairs]
    labels = [preference(two, random.Random(index)) for index, two in enumerate(likings)]

    def loss_of(step):
        chosen = random.Random(step).sample(range(PAIRS), 32)
        prompts = [pairs[index][0] for index in chosen]
        images = [image for index in chosen for image in pairs[index][1]]
        wanted = torch.tensor([labels[index] for index in chosen])
        return F.cross_entropy(own_logits(model, processor, prompts, images), wanted)

    train("pickscore", model, 2500, 5e-4, loss_of)


def learn_groups(model, processor, train, drawn):
    """On a base model's own pictures: all six pairs of the four of a prompt, judged anew each time.

    Three quarters are of shapes, which are harder to tell apart than words.
    """
    one, other = zip(*itertools.combinations(range(4), 2), strict=True)  # 6 each
    words = [prompt for prompt in sorted(drawn) if cards.parse(prompt).word]
    shapes = [prompt for prompt in sorted(drawn) if not cards.parse(prompt).word]
    likings = {prompt: [liking(image, prompt) for image in drawn[prompt]] for prompt in words + shapes}

    def loss_of(step):
        rng = random.Random(step)
        prompts = rng.sample(shapes, 12) + rng.sample(words, 4)
        images = [image for prompt in prompts for image in drawn[prompt]]
        logits = own_logits(model, processor, prompts, images)  # (16, 4)
        logits = torch.stack([logits[:, one], logits[:, other]], dim=-1)  # (16, 6, 2)
        liked = [likings[prompt] for prompt in prompts]
        wanted = [
            preference((four[i], four[j]), rng) for four in liked for i, j in zip(one, other, strict=True)
        ]
        return F.cross_entropy(logits.flatten(0, 1), torch.tensor(wanted))

    train("pickscore-groups", model, 2100, 6e-4, loss_of)


def own_logits(model, processor, prompts, images):
    """(B, pictures of a prompt): how well each goes with its prompt. images: prompt by prompt."""
    logits = model(**inputs_of(processor, prompts, images)).logits_per_text  # (B, all pictures)
    rows = torch.arange(len(prompts))
    return logits.unflatten(1, (len(prompts), -1))[rows, rows]
