"""The world of the tiny models: cards, how they are drawn, and an exact score of how well one was drawn.

A card is 32 x 64 pixels: a vertical gradient of one colour under a pattern, a thin white frame, and on it

- a word in white capitals, more or less faint: `a red card with stripes that says "CAT"`
- or one to four shapes: `a blue card with dots that shows two yellow circles`

Since this file draws the cards, it also knows what a generated card should have looked like, and `fidelity`
measures that part by part: a gold score which no reward ever sees.

The font is the one embedded in Pillow, Aileron Regular by Sora Sagano, released into the public domain (CC0
1.0).
"""

import dataclasses
import functools
import itertools
import math
import random
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HEIGHT, WIDTH = 32, 64
COLOURS = {  # of the card, RGB at its top; at the bottom 0.6 times this
    "red": (200, 45, 45),
    "orange": (205, 110, 25),
    "green": (45, 140, 65),
    "teal": (20, 130, 140),
    "blue": (50, 85, 205),
    "purple": (125, 60, 170),
    "pink": (205, 80, 150),
    "gray": (115, 115, 120),
}
PATTERNS = ("stripes", "dots", "checks", "waves")
PATTERN_STRENGTH = 0.4  # of the way to white
SHAPE_COLOURS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "yellow": (255, 225, 0),
    "red": (235, 20, 20),
    "green": (0, 185, 45),
    "blue": (20, 60, 250),
}
SHAPES = {  # and their plurals
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "heart": "hearts",
}
COUNTS = {"a": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's
CELL = 14  # pixels from one letter to the next
JITTER = 1  # pixels, either way, of a word
CONTRASTS = 0.3, 1.0  # the faintest and the loudest word or shape
SIZES = (8, 9, 10, 11)  # pixels, of a shape
PLACES = [(x, y) for y in (8, 24) for x in (8, 24, 40, 56)]  # pixels, the centres of the shapes' places
PARTS = ("colour", "frame", "pattern", "content")
LEAST_GAIN = 0.5  # squared error that a shape must explain to be one; the faintest explains 0.65
MEAN_AREA = 50  # pixels, of a shape

# Words of 3 or 4 letters that the OCR engine reads on every card.
SEEN_WORDS = """
ACE ACT ADD AGE AGO AID AIM ANT ANY APE ARC ARM ART ASH ASK BAD BAG BAT BAY BED BEE BET BOW BOX BOY BUD BUG
BUS BUY CAB CAN CAP CAR CAT COD COW CRY CUP CUT DAD DAY DEN DEW DOG DOT DRY DUE EAR EAT EGG ELK END EYE FAN
FAR FEW FLY FOG FOR FOX FUN FUR GAP GAS GEM GET GUM GUN GYM HAM HAT HEN HER HOP HOT HUG HUT ICE INK JAM JAR
JAW JET JOB JOY KEY LAP LAW LEG LET LOG LOT LOW MAD MAN MAP MAT MAX MEN MOP MUD MUG NAP NET NEW NOW NUT OAK
OAR ODD OLD ONE OUR OUT OWL OWN PAD PAN PAW PAY PEA PEN PET POD POT PUB PUP RAG RAM RAN RAT RAW RAY ROD ROW
RUB RUG RUN SAD SAW SAY SEA SET SHE SKY SPA SUM SUN TAN TAP TAR TAX TEA TEN TOE TOP TOY TRY TUB TUG TWO USE
VAN VET WAR WAX WAY WEB WET WHO WHY YAK YES YET YOU ZAP ZOO ARMY ATOM AUNT AWAY BABY BACK BAKE BAND BANK
BARK BATH BEAD BEAR BEAT BELT BEND BEST BIRD BLOW BOAT BODY BOLD BOMB BONE BOOK BOOT BORN BOSS BOWL BURN
CAFE CAGE CAKE CALM CAMP CARE CART CASE CASH CAVE CHAT CHEF CLAY COAT CODE COIN COLD COOK COPY CORN COST
CREW CROW CUBE CURE DARK DATE DAWN DEEP DEER DESK DOCK DOOR DOVE DOWN DRUM DUCK DUST EAST EASY ECHO EDGE
FACE FACT FARM FAST FERN FISH FOAM FOOD FOOT FORK FROG FUND GAME GATE GEAR GOAT GOLD GOOD GREW GREY HAND
HARD HAWK HEAD HEAT HERO HOME HOOK HOPE HORN HOUR HUGE HUNT JADE JAZZ JUMP JUNE KEEP KING KNOT LAKE LAMB
LAND LAVA LEAF LOCK LOUD LOVE LUCK MANY MARS MATH MEAT MENU MOON MOTH NAVY NECK NEST NEXT NOON NOTE OPEN
OVEN PACK PAGE PARK PATH PEAK POEM POND PORT RACE RAFT RAMP READ RENT REST RICE ROAD ROCK ROOF ROOM ROSE
RUBY SAFE SALT SAND SAVE SEED SHOP SHOE SNOW SOAP SOFT SONG SOUP SPOT STAR STEM STEP SURF SWAN TACO TEAM
TENT TOAD TOUR TREE TUBE TUNA TURN VASE VERY WARM WAVE WEST WOLF WOOD WORK YARD YEAR YOGA ZERO ZONE
""".split()
# These are never trained on, neither by tiny/make.py nor by guard.py.
UNSEEN_WORDS = """
AXE BUN CUE DAM EVE FED GOT HAY JOG KEG LAB MOB NOD ORB PEG RIM SUB TAG URN VOW BARN BUSH CHIN CRAB DISH
EARN FOLK GULF HOST JURY KELP MOSS NEON PLUM RUSH SHED TAXI UNDO VOTE WORD
""".split()
WORDS = SEEN_WORDS + UNSEEN_WORDS


# ------------------------------------------------------------------------------------------------------------
# Prompts


@dataclasses.dataclass(frozen=True)
class Clause:
    """So many shapes of a kind; colour None is any colour."""

    shape: str
    count: int = 1
    colour: str | None = None

    def __str__(self):
        number = next(word for word, count in COUNTS.items() if count == self.count)
        name = self.shape if self.count == 1 else SHAPES[self.shape]
        return " ".join(filter(None, (number, self.colour, name)))


@dataclasses.dataclass(frozen=True)
class Card:
    """What a prompt asks for: a word, or one or two clauses, the first in `relation` to the second."""

    colour: str
    pattern: str
    word: str | None = None
    clauses: tuple = ()
    relation: str | None = None

    def __str__(self):
        article = "an" if self.colour[0] in "aeiou" else "a"
        start = f"{article} {self.colour} card with {self.pattern} that"
        if self.word:
            return f'{start} says "{self.word}"'
        return f"{start} shows " + f" {self.relation or 'and'} ".join(map(str, self.clauses))


def parse_clause(text):
    number, *colour, name = text.split()
    singular = {plural: shape for shape, plural in SHAPES.items()}
    if number != "a":
        name = singular[name]
    if len(colour) > 1 or name not in SHAPES or not set(colour) <= SHAPE_COLOURS.keys():
        raise ValueError
    return Clause(name, COUNTS[number], *colour)


@functools.lru_cache(maxsize=65536)
def parse(prompt):
    """The `Card` of a prompt. Raises ValueError if it is not one of a card."""
    wanted = 'a COLOUR card with PATTERN that says "WORD", or ... that shows two red circles'
    error = ValueError(f"not a card's prompt: {prompt!r}; expected: {wanted}")
    match = re.fullmatch(r'an? (\w+) card with (\w+) that (?:says "([A-Z]{1,4})"|shows (.+))', prompt.strip())
    if not match or match[1] not in COLOURS or match[2] not in PATTERNS:
        raise error
    if match[3]:
        return Card(match[1], match[2], match[3])
    try:
        first, *more = re.split(rf" (and|{'|'.join(RELATIONS)}) ", match[4])
        clauses = tuple(parse_clause(text) for text in (first, *more[1::2]))
    except (ValueError, KeyError):
        raise error from None
    if len(clauses) > 2 or sum(clause.count for clause in clauses) > 4:
        raise error
    relation = more[0] if more and more[0] != "and" else None
    return Card(match[1], match[2], clauses=clauses, relation=relation)


def metadata_of(card):
    """The line of GenEval's metadata for a card with shapes."""
    include = [{"class": clause.shape, "count": clause.count} for clause in card.clauses]
    for clause, entry in zip(card.clauses, include, strict=True):
        if clause.colour:
            entry["color"] = clause.colour
    about = {"tag": tag_of(card), "include": include}
    if card.relation:
        include.reverse()  # GenEval names the target first
        include[1]["position"] = [card.relation, 0]
    if about["tag"] == "counting":
        about["exclude"] = [{"class": card.clauses[0].shape, "count": card.clauses[0].count + 1}]
    return about | {"prompt": str(card)}


def tag_of(card):
    coloured = any(clause.colour for clause in card.clauses)
    if card.relation:
        return "position"
    if len(card.clauses) == 2:
        return "color_attr" if coloured else "two_object"
    if card.clauses[0].count > 1:
        return "counting"
    return "colors" if coloured else "single_object"


# ------------------------------------------------------------------------------------------------------------
# Splits: which cards are trained on, and which are held out


def held_out_colours(shape, count):
    """For every class and count one colour is held out, each colour equally often."""
    names = list(SHAPE_COLOURS)
    return {names[(list(SHAPES).index(shape) + count) % len(names)]}


@functools.cache
def held_out_relations():
    """A fifth of (class, relation, class)."""
    triples = list(itertools.product(SHAPES, RELATIONS, SHAPES))
    triples = [(one, relation, other) for one, relation, other in triples if one != other]
    return frozenset(random.Random(0).sample(triples, len(triples) // 5))


@functools.cache
def held_out_grounds(content):
    """Four of the 32 pairs of card colour and pattern for a word, twelve for shapes whose colour is open."""
    pairs = list(itertools.product(COLOURS, PATTERNS))
    return frozenset(random.Random(content).sample(pairs, 4 if content.isupper() else 12))


def is_held_out(card):
    """Whether a card is for evaluation only.

    A word that is never trained on; a word on one of its four held-out grounds; a held-out class, colour and
    count; a held-out relation of two classes; for shapes whose colour is open, a held-out ground.
    """
    if card.word:
        return card.word in UNSEEN_WORDS or (card.colour, card.pattern) in held_out_grounds(card.word)
    if card.relation:
        one, other = (clause.shape for clause in card.clauses)
        if (one, card.relation, other) in held_out_relations():
            return True
    colours = [held_out_colours(clause.shape, clause.count) for clause in card.clauses]
    if any(clause.colour in held for clause, held in zip(card.clauses, colours, strict=True)):
        return True
    if card.relation or any(clause.colour for clause in card.clauses):
        return False
    return (card.colour, card.pattern) in held_out_grounds(" and ".join(map(str, card.clauses)))


def random_ground(rng):
    return rng.choice(list(COLOURS)), rng.choice(PATTERNS)


def random_shapes(rng, tag):
    """A card with shapes of GenEval's `tag`. Half of the countings and of the positions name colours."""
    one, other = rng.sample(list(SHAPES), 2)
    red, blue = rng.choices(list(SHAPE_COLOURS), k=2)
    if tag in ("single_object", "two_object") or (tag in ("counting", "position") and rng.random() < 0.5):
        red = blue = None
    count = rng.randint(2, 4) if tag == "counting" else 1
    clauses = [Clause(one, count, red)]
    if tag in ("two_object", "color_attr", "position"):
        clauses.append(Clause(other, 1, blue))
    relation = rng.choice(RELATIONS) if tag == "position" else None
    return Card(*random_ground(rng), clauses=tuple(clauses), relation=relation)


def distinct(draw, count):
    """`count` different things by calling `draw`, in the order in which they came."""
    found = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def word_splits():
    """Prompts with words for training and for evaluation.

    Every seen word is trained on six grounds and evaluated on two. Of the prompts for evaluation every fourth
    is of a word that was never seen, so that any leading part of the list has the same mixture.
    """
    rng = random.Random(0)
    train, held_out = [], []
    for word in SEEN_WORDS:
        grounds = sorted(itertools.product(COLOURS, PATTERNS))
        rng.shuffle(grounds)
        apart = [ground for ground in grounds if ground in held_out_grounds(word)]
        known = [ground for ground in grounds if ground not in apart]
        train += [str(Card(*ground, word)) for ground in known[:6]]
        held_out += [str(Card(*ground, word)) for ground in apart[:2]]
    unseen = [str(Card(*random_ground(rng), word)) for word in UNSEEN_WORDS * 6]
    unseen = list(dict.fromkeys(unseen))
    for prompts in (train, held_out, unseen):
        rng.shuffle(prompts)
    test = []
    while len(held_out) >= 3 and unseen:
        test += [held_out.pop(), held_out.pop(), held_out.pop(), unseen.pop()]
    return train, test


def shape_splits():
    """Prompts with shapes for training and for evaluation.

    Training on four tags alike, since Flow-GRPO's ratio is for larger models: the tiny ones draw nearly every
    single object, and hardly ever two in a given position. Evaluation on all six of GenEval's tags, in turn.
    """
    rng = random.Random(1)
    trained = ("two_object", "counting", "colors", "color_attr")

    def draw(tag, held_out):
        while True:
            card = random_shapes(rng, tag)
            if is_held_out(card) == held_out:
                return str(card)

    train = distinct(lambda: draw(rng.choice(trained), False), 2000)
    by_tag = [distinct(functools.partial(draw, tag, True), 50) for tag in TAGS]
    return train, [prompt for row in zip(*by_tag, strict=True) for prompt in row]


def mixed_splits():
    """Words and shapes in turn: prompts for a preference model."""
    words, shapes = word_splits(), shape_splits()
    rng = random.Random(2)
    train = rng.sample(words[0], 1000) + rng.sample(shapes[0], 1000)
    rng.shuffle(train)
    return train, [prompt for pair in zip(words[1][:256], shapes[1][:256], strict=True) for prompt in pair]


# ------------------------------------------------------------------------------------------------------------
# Drawing


@functools.cache
def gradient():
    """(H, 1, 1)"""
    return np.linspace(1.0, 0.6, HEIGHT, dtype=np.float32)[:, None, None]


@functools.cache
def plain(colour):
    """(H, W, 3) floats in [0, 1]: the gradient alone."""
    column = np.array(COLOURS[colour], dtype=np.float32) / 255 * gradient()  # (H, 1, 3)
    return np.broadcast_to(column, (HEIGHT, WIDTH, 3))


@functools.cache
def pattern_mask(name):
    """(H, W) floats in [0, 1]: how much of each pixel the pattern covers; None is no pattern."""
    scale = 8
    y, x = (np.mgrid[: HEIGHT * scale, : WIDTH * scale] + 0.5) / scale
    if name == "stripes":
        fine = (x + y) % 8 < 4
    elif name == "dots":
        shift = 4 * (y // 4 % 2)
        fine = ((x + shift) % 8 - 4) ** 2 + (y % 4 - 2) ** 2 < 1.7**2
    elif name == "checks":
        fine = (x // 4 + y // 4) % 2 == 1
    elif name == "waves":
        fine = (y + 2 * np.sin(2 * math.pi * x / 16)) % 6 < 2.6
    else:
        fine = np.zeros_like(x)
    return fine.reshape(HEIGHT, scale, WIDTH, scale).mean((1, 3)).astype(np.float32)


@functools.cache
def background(colour, pattern):
    """(H, W, 3) floats in [0, 1]: gradient and pattern."""
    share = PATTERN_STRENGTH * pattern_mask(pattern)[..., None]
    return plain(colour) + share * (1 - plain(colour))


@functools.cache
def frame_mask():
    """(H, W) bools: one pixel wide, two pixels from the edge."""
    image = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(image).rectangle((2, 2, WIDTH - 3, HEIGHT - 3), outline=1)
    return np.array(image)


@functools.cache
def inside_mask():
    """(H, W) bools: all that the frame surrounds."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[3:-3, 3:-3] = True
    return mask


@functools.cache
def font():
    return ImageFont.load_default(17)


def glyphs(word, dx, dy):
    """(H, W) floats in [0, 1]: how much of each pixel the word covers. Every letter has a cell of its own."""
    image = Image.new("L", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(image)
    for i, letter in enumerate(word):
        centre = (WIDTH / 2 + dx + (i - (len(word) - 1) / 2) * CELL, HEIGHT / 2 + dy)
        pen.text(centre, letter, font=font(), fill=255, anchor="mm", stroke_width=0.4)
    return np.asarray(image, dtype=np.float32) / 255


def corners_of(shape):
    """The corners of a shape in the unit square, y downwards."""
    if shape == "square":
        return [(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "cross":
        arm = [(0.33, 0), (0.67, 0), (0.67, 0.33)]  # and then three times the same, turned
        return [corner for turn in range(4) for corner in turned(arm, turn)]
    if shape == "star":
        radii = [0.54, 0.22] * 5
        angles = [math.pi * i / 5 for i in range(10)]
        return [(0.5 + r * math.sin(a), 0.54 - r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]
    angles = [math.pi * i / 24 for i in range(48)]
    if shape == "circle":
        return [(0.5 + 0.5 * math.sin(a), 0.5 + 0.5 * math.cos(a)) for a in angles]
    return [(0.5 + 0.5 * math.sin(a) ** 3, heart_height(a)) for a in angles]


def turned(corners, quarters):
    """Corners turned by so many quarters about the middle of the unit square."""
    for _ in range(quarters):
        corners = [(1 - y, x) for x, y in corners]
    return corners


def heart_height(a):
    """The well-known curve, scaled to [0, 1] downwards."""
    up = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return (12 - up) / 29


def outline_colour(colour, ground):
    """White or black where a shape would drown in its card, else None."""
    distance = np.abs(np.subtract(SHAPE_COLOURS[colour], COLOURS[ground])).max()
    if distance > 110:
        return None
    return "black" if colour in ("white", "yellow") else "white"


@functools.cache
def template(shape, colour, outline, size):
    """(size, size) cover in [0, 1] and (size, size, 3) colours of one shape."""
    scale = 8
    side = size * scale
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).polygon([(x * side, y * side) for x, y in corners_of(shape)], fill=255)
    cover = np.asarray(image, dtype=np.float32).reshape(size, scale, size, scale).mean((1, 3)) / 255
    fill = np.array(SHAPE_COLOURS[colour], dtype=np.float32) / 255
    if outline is None:
        return cover, np.broadcast_to(fill, (size, size, 3))
    padded = Image.new("L", (side + 2 * scale, side + 2 * scale))
    padded.paste(image, (scale, scale))
    inner = np.asarray(padded.filter(ImageFilter.MinFilter(9)), dtype=np.float32)[scale:-scale, scale:-scale]
    inner = inner.reshape(size, scale, size, scale).mean((1, 3))[..., None] / 255
    share = np.minimum(1, inner / np.maximum(cover[..., None], 1e-6))
    edge = np.array(SHAPE_COLOURS[outline], dtype=np.float32) / 255
    return cover, share * fill + (1 - share) * edge


@dataclasses.dataclass(frozen=True)
class Placed:
    """A shape of so many pixels, its upper left corner at (x, y)."""

    shape: str
    colour: str
    size: int
    x: int
    y: int
    contrast: float = 1.0

    def box(self):
        return slice(self.y, self.y + self.size), slice(self.x, self.x + self.size)

    def cover(self):
        return template(self.shape, self.colour, None, self.size)[0]

    def centre(self):
        return self.x + self.size / 2, self.y + self.size / 2


def paint(picture, placed, ground):
    """The picture with one more shape on a card of colour `ground`."""
    outline = outline_colour(placed.colour, ground)
    cover, colours = template(placed.shape, placed.colour, outline, placed.size)
    painted = picture.copy()
    box = placed.box()
    painted[box] += placed.contrast * cover[..., None] * (colours - painted[box])
    return painted


def draw_word(colour, pattern, word, dx=0, dy=0, contrast=1.0):
    """One card with a word as (H, W, 3) floats in [0, 1]."""
    card = np.where(frame_mask()[..., None], 1, background(colour, pattern))
    cover = contrast * glyphs(word, dx, dy)[..., None]
    return card + cover * (1 - card)


def draw_shapes(colour, pattern, shapes):
    """One card with shapes, each `Placed`, as (H, W, 3) floats in [0, 1]."""
    card = np.where(frame_mask()[..., None], 1, background(colour, pattern))
    for placed in shapes:
        card = paint(card, placed, colour)
    return card


def stands(one, relation, other):
    """Whether the centre `one` stands to the centre `other` in the relation, clearly."""
    x, y = one[0] - other[0], one[1] - other[1]
    along, across = {
        "left of": (-x, y),
        "right of": (x, y),
        "above": (-y, x),
        "below": (y, x),
    }[relation]
    return along > 1.5 * abs(across)


def put(kind, size, x, y):
    """A shape of a (class, colour) with its centre at (x, y), or as near to it as the frame allows."""
    left = min(max(x - size // 2, 3), WIDTH - 3 - size)
    top = min(max(y - size // 2, 3), HEIGHT - 3 - size)
    return Placed(*kind, size, left, top)


def in_places(kinds, rng):
    """Shapes of these (class, colour), each of a random size in one of the 2 x 4 places."""
    places = rng.sample(PLACES, len(kinds))
    return [put(kind, rng.choice(SIZES), *place) for kind, place in zip(kinds, places, strict=True)]


def place(card, rng):
    """The card's shapes in some of the 2 x 4 places; an open colour is any that is not held out."""
    kinds = []
    for clause in card.clauses:
        known = sorted(SHAPE_COLOURS.keys() - held_out_colours(clause.shape, clause.count))
        kinds += [(clause.shape, clause.colour or rng.choice(known))] * clause.count
    while True:
        placed = in_places(kinds, rng)
        if card.relation is None or stands(placed[0].centre(), card.relation, placed[1].centre()):
            return placed


def draw_at_random(card, rng, loud_shapes=False):
    """One picture of a card by a `random.Random`: where word or shapes stand, and how faint each is."""
    if not card.word:
        placed = place(card, rng)
        if not loud_shapes:
            placed = [dataclasses.replace(one, contrast=rng.uniform(*CONTRASTS)) for one in placed]
        return draw_shapes(card.colour, card.pattern, placed)
    dx, dy = rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)
    return draw_word(card.colour, card.pattern, card.word, dx, dy, rng.uniform(*CONTRASTS))


def as_image(picture):
    """(H, W, 3) floats in [0, 1] as a PIL image."""
    return Image.fromarray(np.uint8(np.round(np.clip(picture, 0, 1) * 255)))


# ------------------------------------------------------------------------------------------------------------
# The gold score


def score_against(error, reference):
    """1 for no error, 0 for an error as large as the reference's, or larger."""
    return float(max(0.0, 1 - error / max(reference, 1e-6)))


def own_background(image):
    """The colour and the pattern, or None, that a picture has, whatever was asked for: the nearest rendering.

    Large errors count no more than 0.25, so that what stands on the card does not matter.
    """
    inside = inside_mask()
    grounds = list(itertools.product(COLOURS, (*PATTERNS, None)))
    off = [np.abs(image - background(*ground)).mean(-1)[inside] for ground in grounds]
    return grounds[int(np.argmin([np.minimum(pixels, 0.25).mean() for pixels in off]))]


def grown(mask):
    """(H, W) bools and every pixel next to them."""
    return np.array(Image.fromarray(np.uint8(mask)).filter(ImageFilter.MaxFilter(3)), dtype=bool)


def whiteness(image, base):
    """(H, W): how far each pixel is on its way from its base colour to white."""
    white = 1 - base
    return ((image - base) * white).sum(-1) / (white**2).sum(-1)


@functools.lru_cache(maxsize=1024)
def layouts(word):
    """(N, H, W): the word at every place that the renderer may have chosen."""
    places = itertools.product(range(-JITTER, JITTER + 1), repeat=2)
    return np.stack([glyphs(word, dx, dy) for dx, dy in places])


def nearest_contrast(along, size):
    """(contrast, gain): the contrast that fits best, and how much squared error it explains.

    With d, what a shape or word would change at full contrast, |missing - contrast d|² is |missing|² - gain.
    along: missing . d; size: |d|²
    """
    contrast = np.clip(along / np.maximum(size, 1e-6), *CONTRASTS)
    return contrast, contrast * (2 * along - contrast * size)


def judge_word(image, word, empty):
    """(score, contrast, (H, W) bools of what belongs to the word).

    The score is against the nearest rendering, over place and contrast; 0 is a card without a word.
    """
    inside = inside_mask()
    covers = layouts(word)[:, inside]  # (N, P)
    missing = (image - empty)[inside]  # (P, 3)
    white = (1 - empty)[inside]  # (P, 3)
    along = covers @ (missing * white).sum(-1)  # (N,)
    size = covers**2 @ (white**2).sum(-1)  # (N,)
    contrasts, gains = nearest_contrast(along, size)
    best = int(gains.argmax())
    cover = layouts(word)[best]  # (H, W)
    near = grown(cover > 0) & inside
    target = empty + contrasts[best] * cover[..., None] * (1 - empty)
    score = score_against(np.abs(image - target)[near].mean(), np.abs(empty - target)[near].mean())
    return score, float(contrasts[best]), near


KINDS = list(itertools.product(SHAPES, SHAPE_COLOURS))


def windows_of(terms, size):
    """(H, W, C) -> (places, C * size * size): all squares of so many pixels inside the frame, row by row."""
    windows = np.lib.stride_tricks.sliding_window_view(terms[3:-3, 3:-3], (size, size), axis=(0, 1))
    return windows.reshape(-1, terms.shape[-1] * size**2)


@functools.cache
def templates(ground, size):
    """What `explained` needs of all kinds of shapes of a size on a card with that colour and pattern.

    (4 * size * size, K) weights whose product with a place is along; (places, K) sizes: see nearest_contrast.
    """
    drawn = [template(shape, colour, outline_colour(colour, ground[0]), size) for shape, colour in KINDS]
    cover = np.stack([cover for cover, _ in drawn])[..., None]  # (K, size, size, 1)
    colours = np.stack([colours for _, colours in drawn])  # (K, size, size, 3)

    def flat(weights):
        return weights.transpose(3, 1, 2, 0).reshape(-1, len(KINDS))

    empty = background(*ground)
    terms = np.concatenate([empty, (empty**2).sum(-1, keepdims=True)], axis=-1)  # (H, W, 4)
    weights = np.concatenate([-2 * cover**2 * colours, cover**2], axis=-1)  # (K, size, size, 4)
    squares = windows_of(terms, size) @ flat(weights) + (cover**2 * colours**2).sum((1, 2, 3))
    return flat(np.concatenate([cover * colours, -cover], axis=-1)), squares


def explained(image, ground, size):
    """Of the shape of a size that explains most at each place: (gains, contrasts, kinds), (Y, X) each."""
    empty = background(*ground)
    missing = image - empty
    # missing . cover (colours - empty), expanded: one product for all places.
    terms = np.concatenate([missing, (missing * empty).sum(-1, keepdims=True)], axis=-1)  # (H, W, 4)
    weights, squares = templates(ground, size)
    contrasts, gains = nearest_contrast(windows_of(terms, size) @ weights, squares)  # (places, K)
    kinds = gains.argmax(1)[:, None]
    of_best = [np.take_along_axis(values, kinds, 1) for values in (gains, contrasts)]
    return [values.reshape(HEIGHT - 5 - size, WIDTH - 5 - size) for values in (*of_best, kinds)]


def find_shapes(image, ground):
    """The shapes on a picture, the nearest rendering at each place, as (Placed, fit in [0, 1]) each."""
    empty, found = background(*ground), []
    by_size = {size: explained(image, ground, size) for size in SIZES}
    while len(found) < 8:
        size = max(SIZES, key=lambda size: by_size[size][0].max())
        gains, contrasts, kinds = by_size[size]
        y, x = np.unravel_index(gains.argmax(), gains.shape)
        if gains[y, x] < LEAST_GAIN:
            break
        placed = Placed(*KINDS[kinds[y, x]], size, 3 + int(x), 3 + int(y), float(contrasts[y, x]))
        target = paint(empty, placed, ground[0])
        off, absent = np.abs(image - target), np.abs(empty - target)
        fit = score_against(off[placed.box()].mean(), absent[placed.box()].mean())
        if fit > 0:
            found.append((placed, fit))
        for other, (others, *_) in by_size.items():  # no other shape there, but for a pixel at the edge
            others[max(0, y - other + 2) : y + size - 1, max(0, x - other + 2) : x + size - 1] = 0
    return found


def judge_shapes(image, card, ground):
    """(score, mean contrast of the shapes, (H, W) bools of what belongs to them).

    Each shape asked for is a part of the score, and so is the relation if there is one. A shape counts by how
    well it fits its rendering. What else stands there counts against it, by its area in shapes of mean size.
    """
    found = find_shapes(image, ground)
    parts, centres, kept = [], [], np.zeros((HEIGHT, WIDTH), dtype=bool)
    for clause in card.clauses:
        same = [pair for pair in found if pair[0].shape == clause.shape]
        fits = [pair for pair in same if clause.colour in (None, pair[0].colour)]
        fits = sorted(fits, key=lambda pair: -pair[1])[: clause.count]
        parts += [fit for _, fit in fits] + [0.0] * (clause.count - len(fits))
        centres.append(fits[0][0].centre() if fits else None)
        for placed, _ in fits:
            kept[placed.box()] = True
    if card.relation:
        parts.append(float(None not in centres and stands(centres[0], card.relation, centres[1])))
    strength = np.clip(whiteness(image, plain(ground[0])), 0, PATTERN_STRENGTH)[..., None]
    nearest = plain(ground[0]) + strength * (1 - plain(ground[0]))  # whatever became of the pattern
    foreground = (np.abs(image - nearest).max(-1) > 0.2) & inside_mask()
    for placed, _ in found:  # the faint ones too
        foreground[placed.box()] |= placed.cover() > 0.5
    stray = (foreground & ~grown(kept)).sum() / MEAN_AREA
    contrast = float(np.mean([placed.contrast for placed, _ in found])) if found else 0.0
    return float(max(0.0, (sum(parts) - stray) / len(parts))), contrast, grown(kept | foreground)


def base_of(image, around):
    """(H, W, 3): the gradient below the pattern, fitted to a picture in four bands.

    A pattern covers half of a card, so a quarter of the way up the pixels by brightness is its base.
    """
    base = np.empty_like(image)
    for rows in np.split(np.arange(HEIGHT), 4):
        pixels = (image / gradient())[rows][around[rows]]
        pixels = pixels if len(pixels) else (image / gradient())[rows].reshape(-1, 3)
        base[rows] = np.quantile(pixels, 0.25, axis=0) * gradient()[rows]
    return base


@functools.lru_cache(maxsize=8192)
def measured(pixels, prompt):
    """(the parts of the score, the contrast of what is shown)"""
    card = parse(prompt)
    image = np.frombuffer(pixels, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3).astype(np.float32) / 255
    frame = frame_mask()
    ground = own_background(image)
    if card.word:
        content, contrast, near = judge_word(image, card.word, background(*ground))
    else:
        content, contrast, near = judge_shapes(image, card, ground)
    around = ~near & ~frame
    base, asked = base_of(image, around), plain(card.colour)
    others = [np.abs(plain(name) - asked).mean() for name in COLOURS if name != card.colour]
    wanted = PATTERN_STRENGTH * pattern_mask(card.pattern)
    off = np.abs(whiteness(image, base) - wanted)[around]
    parts = {
        "colour": score_against(np.abs(base - asked).mean(), np.mean(others)),
        "frame": score_against(np.abs(image - 1)[frame].mean(), np.abs(base - 1)[frame].mean()),
        "pattern": score_against(off.mean(), wanted[around].mean()),
        "content": content,
    }
    return parts, contrast


def pixels_of(image):
    if image.size != (WIDTH, HEIGHT):
        raise ValueError(
            f"a card is {WIDTH} x {HEIGHT} pixels, this picture is {image.width} x {image.height}"
        )
    return image.convert("RGB").tobytes()


def fidelity(image, prompt):
    """How faithfully a picture draws the card that its prompt asks for, part by part, each in [0, 1].

    1 is a perfect card; 0 is as far off as a card that lacks the part altogether:

    - colour: the gradient under the pattern; 0 = as far off as the average other colour
    - frame: the frame's pixels; 0 = no frame
    - pattern: how far each pixel outside word, shapes and frame is on its way to white; 0 = no pattern
    - content: the word or the shapes against the nearest rendering; 0 = none. How faint they are does not
      matter, as long as the renderer would draw them so faint

    image: PIL image of 64 x 32 pixels. Raises ValueError for another size or for a prompt that is not a
    card's.
    """
    return dict(measured(pixels_of(image), prompt)[0])


def legibility(image, prompt):
    """The contrast of the word asked for, or the mean contrast of the shapes that a picture shows."""
    return measured(pixels_of(image), prompt)[1]
