"""The world of the tiny models: word cards, how they are drawn, and an exact score of how well one was drawn.

A card is 32 x 64 pixels: a word in white capitals, slightly displaced, over a vertical gradient of one colour
with a thin white frame. Its prompt is `a red card that says "CAT"`. Since this file draws the cards, it also
knows what a generated card should have looked like, and `fidelity` measures that: a gold score which the OCR
reward never sees.

The font is the one embedded in Pillow, Aileron Regular by Sora Sagano, released into the public domain (CC0
1.0).
"""

import functools
import random
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HEIGHT, WIDTH = 32, 64
COLOURS = {  # RGB at mid height; the gradient runs from 1.2 times this at the top to 0.5 times at the bottom
    "red": (200, 45, 45),
    "orange": (205, 110, 25),
    "green": (45, 140, 65),
    "teal": (20, 130, 140),
    "blue": (50, 85, 205),
    "purple": (125, 60, 170),
    "pink": (205, 80, 150),
    "gray": (115, 115, 120),
}
CELL = 14  # pixels from one letter to the next
JITTER_X, JITTER_Y = 1, 1  # pixels, either way
PARTS = ("colour", "frame", "gradient", "glyph")

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


def prompt_of(word, colour):
    return f'a {colour} card that says "{word}"'


def parse(prompt):
    """`(word, colour)` of a card's prompt. Raises ValueError if it is not one."""
    match = re.fullmatch(r'an? (\w+) card that says "([A-Z]+)"', prompt.strip())
    if not match or match[1] not in COLOURS:
        wanted = 'a COLOUR card that says "WORD"; for other prompts --gold none'
        raise ValueError(f"not a card's prompt: {prompt!r}; expected: {wanted}")
    return match[2], match[1]


def splits():
    """Prompts for training and for evaluation, with no (word, colour) pair in both.

    Every seen word is trained in six colours and held out in two. Of the held-out prompts every fourth is of
    a word that was never seen, so that any leading part of the list has the same mixture.
    """
    rng = random.Random(0)
    train, held_out, unseen = [], [], []
    for word in SEEN_WORDS:
        colours = rng.sample(sorted(COLOURS), len(COLOURS))
        train += [prompt_of(word, colour) for colour in colours[:6]]
        held_out += [prompt_of(word, colour) for colour in colours[6:]]
    for word in UNSEEN_WORDS:
        unseen += [prompt_of(word, colour) for colour in sorted(COLOURS)]
    for prompts in (train, held_out, unseen):
        rng.shuffle(prompts)
    test = []
    while len(held_out) >= 3 and unseen:
        test += [held_out.pop(), held_out.pop(), held_out.pop(), unseen.pop()]
    return train, test


@functools.cache
def background(colour):
    """(H, W, 3) floats in [0, 1]: the gradient alone."""
    brightness = np.linspace(1.2, 0.5, HEIGHT)[:, None, None]
    column = np.clip(np.array(COLOURS[colour]) / 255 * brightness, 0, 1)  # (H, 1, 3)
    return np.broadcast_to(column, (HEIGHT, WIDTH, 3))


@functools.cache
def frame_mask():
    """(H, W) bools: one pixel wide, two pixels from the edge."""
    image = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(image).rectangle((2, 2, WIDTH - 3, HEIGHT - 3), outline=1)
    return np.array(image)


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


def draw(word, colour, dx, dy):
    """One card as (H, W, 3) floats in [0, 1]."""
    card = np.where(frame_mask()[..., None], 1, background(colour))
    cover = glyphs(word, dx, dy)[..., None]
    return card + cover * (1 - card)


def draw_at_random(word, colour, rng):
    """One card, its word randomly displaced; `rng` is a `random.Random`."""
    dx, dy = rng.randint(-JITTER_X, JITTER_X), rng.randint(-JITTER_Y, JITTER_Y)
    return draw(word, colour, dx, dy)


@functools.lru_cache(maxsize=1024)
def layouts(word):
    """(N, H, W): the word at every place that the renderer may have chosen."""
    covers = [
        glyphs(word, dx, dy) for dx in range(-JITTER_X, JITTER_X + 1) for dy in range(-JITTER_Y, JITTER_Y + 1)
    ]
    return np.stack(covers)


def score_against(error, reference):
    """1 for no error, 0 for an error as large as the reference's, or larger."""
    return float(max(0.0, 1 - error / reference))


@functools.lru_cache(maxsize=8192)
def _fidelity(pixels, prompt):
    word, colour = parse(prompt)
    image = np.frombuffer(pixels, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3).astype(np.float32) / 255
    empty = background(colour)
    frame = frame_mask()
    inside = np.zeros_like(frame)
    inside[3:-3, 3:-3] = True

    # Find the layout that this picture is nearest to: |image - card|² summed over the inside of the frame,
    # with card = empty + cover (1 - empty), expanded so that every layout costs one product.
    covers = layouts(word)[:, inside]  # (N, P)
    missing = (image - empty)[inside]  # (P, 3)
    white = (1 - empty)[inside]  # (P, 3)
    distance = covers**2 @ (white**2).sum(-1) - 2 * covers @ (missing * white).sum(-1)  # (N,)
    cover = layouts(word)[distance.argmin()]  # (H, W)

    grown = Image.fromarray(np.uint8(cover > 0)).filter(ImageFilter.MaxFilter(3))
    near_word = np.array(grown, dtype=bool) & ~frame
    around = ~near_word & ~frame
    target = empty + cover[..., None] * (1 - empty)

    mean, mean_asked = image[around].mean(0), empty[around].mean(0)
    others = [background(name)[around].mean(0) for name in COLOURS if name != colour]
    flat = np.abs(empty[around] - mean_asked).mean()
    uneven = np.abs((image[around] - mean) - (empty[around] - mean_asked)).mean()
    return {
        "colour": score_against(
            np.abs(mean - mean_asked).mean(), np.abs(np.stack(others) - mean_asked).mean()
        ),
        "frame": score_against(np.abs(image - 1)[frame].mean(), np.abs(empty - 1)[frame].mean()),
        "gradient": score_against(uneven, flat),
        "glyph": score_against(
            np.abs(image - target)[near_word].mean(), np.abs(empty - target)[near_word].mean()
        ),
    }


def fidelity(image, prompt):
    """How faithfully a picture draws the card that its prompt asks for, part by part, each in [0, 1].

    1 is a perfect card; 0 is as far off as a card that lacks the part altogether:

    - colour: mean colour outside word and frame; 0 = as far off as the average other colour
    - frame: the frame's pixels; 0 = no frame
    - gradient: what is left outside word and frame once the mean colour is taken off; 0 = a flat card
    - glyph: the word's pixels and those next to them, against the nearest rendering; 0 = no word

    image: PIL image of 64 x 32 pixels. Raises ValueError for another size or for a prompt that is not a
    card's.
    """
    if image.size != (WIDTH, HEIGHT):
        raise ValueError(
            f"a card is {WIDTH} x {HEIGHT} pixels, this picture is {image.size[0]} x {image.size[1]}"
        )
    return dict(_fidelity(image.convert("RGB").tobytes(), prompt))
