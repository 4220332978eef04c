"""Make the embedded models and judges from nothing on two cores: `python tiny/make.py` (README.md: how long).

Writes, next to this file, `sd3/` and `flux/`, a whole Stable Diffusion 3 and a whole FLUX pipeline which
diffusers loads as any other, the judges `detector/`, `clip/` and `pickscore/`, and the prompts of the three
tasks in `prompts/`. `python tiny/make.py flux` makes that one alone. The stages are seeded, and each is
picked up where it was left when the script starts again (working folder `tiny/.make/`):

1. vae: an AutoencoderKL on rendered cards; 4 x 8 x 16 latents, scaled to mean 0 and spread 1. Beside it
   detector (crops first), clip and the first half of pickscore: see judges.py.
2. sd3 and flux side by side: the text encoders and the transformer together, by flow matching: predict
   v = x1 - x0 at x_t = (1-t) x0 + t x1. A fifth of the cards bear random letters, so that the model learns
   to spell. Shapes are loud at first, then as faint as they come.
3. pickscore, partly on pictures that both draw: see judges.py.

`python tiny/check.py` measures what came out.
"""

import contextlib
import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tiny import cards, judges  # noqa: E402

WORK = HERE / ".make"
DRAWERS = "sd3", "flux"
WAVES = [  # what is made side by side, one process of one thread each; a wave needs those before it
    [["vae"], ["detector", "clip", "pickscore-clip"]],
    [["sd3", "sd3-drawn"], ["flux", "flux-drawn"]],
    [["pickscore"]],
]
TEXT_LENGTH = 18  # tokens, for CLIP and for T5: the longest prompt fits
PROMPT_WORDS = (
    *("an", "card", "with", "that", "says", "shows", "and", "left", "right", "of", "above", "below"),
    *("two", "three", "four"),
    *cards.PATTERNS,
    *cards.SHAPES,
    *cards.SHAPES.values(),
    *dict.fromkeys((*cards.COLOURS, *cards.SHAPE_COLOURS)),
)


def pixels_of(pictures):
    """List of (H, W, 3) in [0, 1] -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).float().permute(0, 3, 1, 2) * 2 - 1


def save_progress(name, step, model, optimizer):
    """Weights and Adam's state, written beside the old ones and then renamed."""
    WORK.mkdir(exist_ok=True)
    partial = WORK / f"{name}.partial"
    torch.save(dict(step=step, model=model.state_dict(), adam=optimizer.state_dict()), partial)
    partial.rename(WORK / f"{name}.pt")


def load_progress(name, model, optimizer):
    """The number of steps done, 0 if there is nothing to go on from."""
    if not (WORK / f"{name}.pt").exists():
        return 0
    saved = torch.load(WORK / f"{name}.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    if saved["adam"]["state"]:  # none where only weights were given
        optimizer.load_state_dict(saved["adam"])
    return saved["step"]


def train(name, model, steps, lr, loss_of):
    """AdamW, short warm-up, cosine decay. `loss_of(step)` draws its batch from the step's number alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    start = load_progress(name, model, optimizer)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    for step in bar:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 100, cosine)
        torch.manual_seed(step)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_progress(name, step + 1, model, optimizer)


def random_word(rng):
    """Three or four random letters, so that the model learns to spell; never a word of the lists."""
    while True:
        word = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.choice((3, 4))))
        if word not in cards.WORDS:
            return word


def random_card(rng):
    """A card to train on: a fifth each random letters and words, and the others shapes of all tags alike."""
    while True:
        kind = rng.random()
        if kind < 0.2:
            card = cards.Card(*cards.random_ground(rng), random_word(rng))
        elif kind < 0.4:
            card = cards.Card(*cards.random_ground(rng), rng.choice(cards.SEEN_WORDS))
        else:
            card = cards.random_shapes(rng, rng.choice(cards.TAGS))
        if not cards.is_held_out(card):
            return card


def examples(step, size, loud_shapes=False):
    """Pictures, (B, 3, H, W) in [-1, 1], and prompts of the batch of that number."""
    rng = random.Random(step)
    drawn = [random_card(rng) for _ in range(size)]
    pictures = [cards.draw_at_random(card, rng, loud_shapes) for card in drawn]
    return pixels_of(pictures), [str(card) for card in drawn]


def weighted_examples(step, size, weight=10):
    """(pictures, weights of their pixels): a word or a shape weighs `weight`, what is behind it 1."""
    rng = random.Random(step)
    pictures, weights = [], []
    for _ in range(size):
        card = random_card(rng)
        pictures.append(cards.draw_at_random(card, rng))
        behind = cards.draw_shapes(card.colour, card.pattern, [])
        weights.append(np.where(np.abs(pictures[-1] - behind).max(-1) > 0.02, weight, 1))
    return pixels_of(pictures), torch.from_numpy(np.stack(weights)).float()[:, None]


def make_vae():
    """Frozen, and with latents of mean 0 and spread 1."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )

    def loss_of(step):
        pixels, weights = weighted_examples(step, 16)
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        return (weights * (error.abs() + error.square())).mean() + 1e-5 * posterior.kl().mean() / 512

    train("vae", vae, 5000, 2e-3, loss_of)
    with torch.no_grad():
        latents = vae.encode(examples(-1, 512)[0]).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae.eval().requires_grad_(False)


def clip_tokenizer():
    """Byte-level BPE as CLIP's without merges: a word is spelled letter by letter. PROMPT_WORDS are whole."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocab = [*letters, *(letter + "</w>" for letter in letters), *specials]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(vocab)}, [], model_max_length=TEXT_LENGTH)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in PROMPT_WORDS])
    return tokenizer


def t5_tokenizer():
    """Unigram as T5's, over single characters and the prompt's own words."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    characters = [(chr(code), -4.0) for code in range(33, 127)]
    words = [("▁", -3.0), ('▁"', -3.0), ("▁a", -1.0), *(("▁" + word, -1.0) for word in PROMPT_WORDS)]
    return T5Tokenizer(vocab=[*specials, *words, *characters], extra_ids=0, model_max_length=TEXT_LENGTH)


def make_clip(kind, tokenizer, seed):
    torch.manual_seed(seed)
    clip = kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # SD3 takes CLIP's hidden states without a final norm. With CLIP's own 0.02 they would be drowned by the
    # bias of the layer that reads them, and the transformer would not learn to spell.
    embeddings = getattr(clip, "text_model", clip).embeddings
    for embedding in (embeddings.token_embedding, embeddings.position_embedding):
        torch.nn.init.normal_(embedding.weight, std=1.0)
    return clip


def make_t5(tokenizer):
    torch.manual_seed(3)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def train_flow(name, vae, modules, velocity):
    """Flow matching with logit-normal times: transformer and text encoders together.

    In four rounds of the learning rate. The second brings two shapes with the right colours on a card, the
    others bring faint shapes.
    """
    learned = torch.nn.ModuleList(modules).train()

    def loss_of(step, done, loud_shapes):
        pixels, prompts = examples(done + step, 32, loud_shapes)
        prompts = [prompt if torch.rand(()) > 0.1 else "" for prompt in prompts]  # so that guidance works too
        with torch.no_grad():
            x0 = vae.encode(pixels).latent_dist.sample()
        x0 = (x0 - vae.config.shift_factor) * vae.config.scaling_factor
        x1 = torch.randn_like(x0)
        t = torch.sigmoid(torch.randn(len(x0)))
        t = 2 * t / (1 + t)  # (B,), lean towards noise, where the word is decided
        x = torch.lerp(x0, x1, t.view(-1, 1, 1, 1))
        return F.mse_loss(velocity(x, t, prompts), x1 - x0)

    rounds = [
        (name, 5000, 1.5e-3, True),
        (f"{name}-late", 3500, 1.2e-3, True),
        (f"{name}-faint", 1200, 5e-4, False),
        (f"{name}-last", 2500, 1e-3, False),
    ]
    done = 0
    for stage, steps, lr, loud_shapes in rounds:
        train(stage, learned, steps, lr, functools.partial(loss_of, done=done, loud_shapes=loud_shapes))
        done += steps
    learned.eval()


def make_sd3(vae):
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    encoders = [make_clip(CLIPTextModelWithProjection, clip, seed) for seed in (1, 2)] + [make_t5(t5)]
    torch.manual_seed(4)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(
        transformer, scheduler, vae, encoders[0], clip, encoders[1], clip_tokenizer(), encoders[2], t5
    )
    pipe.set_progress_bar_config(disable=True)
    compiled = torch.compile(transformer)  # a quarter faster

    def velocity(x, t, prompts):
        tokens, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
        )
        return compiled(x, tokens, pooled, t * 1000, return_dict=False)[0]

    train_flow("sd3", vae, [transformer, *encoders], velocity)
    return pipe


def make_flux(vae):
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    encoders = make_clip(CLIPTextModel, clip, 5), make_t5(t5)
    torch.manual_seed(6)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=32, max_image_seq_len=512
    )
    pipe = FluxPipeline(scheduler, vae, encoders[0], clip, encoders[1], t5, transformer)
    pipe.set_progress_bar_config(disable=True)
    compiled = torch.compile(transformer)

    def velocity(x, t, prompts):
        tokens, pooled, text_ids = pipe.encode_prompt(prompts, None, max_sequence_length=TEXT_LENGTH)
        batch, channels, height, width = x.shape
        image_ids = pipe._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype)
        v = compiled(
            pipe._pack_latents(x, batch, channels, height, width),
            tokens,
            pooled,
            t,
            image_ids,
            text_ids,
            guidance=1 + 4 * torch.rand(batch),  # of no effect: there is no teacher to distil it from
            return_dict=False,
        )[0]
        return pipe._unpack_latents(v, cards.HEIGHT, cards.WIDTH, pipe.vae_scale_factor)

    train_flow("flux", vae, [transformer, *encoders], velocity)
    return pipe


@contextlib.contextmanager
def replacing(folder):
    """A path to write to, which takes the folder's place when all is written. guard.json stays."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if (folder / "guard.json").exists():
        shutil.copy(folder / "guard.json", partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def save_pipeline(pipe, folder):
    """The transformer in half precision, which halves the folder; all else in fp32."""
    pipe.transformer.half()
    with replacing(folder) as partial:
        pipe.save_pretrained(partial)


def save_judge(model, processor, folder, **files):
    """In half precision. files: name without .json -> its content."""
    with replacing(folder) as partial:
        model.half().save_pretrained(partial)
        processor.save_pretrained(partial)
        for name, content in files.items():
            (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def pipeline(name):
    """What is in `sd3` or `flux`, in fp32 and quiet."""
    pipe = DiffusionPipeline.from_pretrained(HERE / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, seed, number=1):
    """`number` pictures of each prompt, in ten steps and without guidance."""
    return pipe(
        prompts,
        height=cards.HEIGHT,
        width=cards.WIDTH,
        num_inference_steps=10,
        guidance_scale=1.0,
        num_images_per_prompt=number,
        max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(seed),
    ).images


def draw_groups(name):
    """Four pictures by `sd3` or `flux` for each prompt of its half of the training prompts, into a file."""
    pipe, prompts = pipeline(name), cards.mixed_splits()[0][DRAWERS.index(name) :: len(DRAWERS)]
    drawn = []
    for start in tqdm(range(0, len(prompts), 50), desc=f"{name} draws"):
        drawn += draw(pipe, prompts[start : start + 50], seed=start, number=4)
    pixels = np.stack([np.asarray(image) for image in drawn]).reshape(len(prompts), 4, cards.HEIGHT, -1, 3)
    WORK.mkdir(exist_ok=True)
    np.savez(WORK / f"{name}-drawn.npz", prompts=prompts, pixels=pixels)


def drawn_groups():
    """What both drew, as prompt -> images."""
    groups = {}
    for name in DRAWERS:
        saved = np.load(WORK / f"{name}-drawn.npz")
        for prompt, pixels in zip(saved["prompts"].tolist(), saved["pixels"], strict=True):
            groups[prompt] = [Image.fromarray(one) for one in pixels]
    return groups


def write_prompts(folder):
    """The sets of the three tasks: words, shapes with GenEval's metadata, and both in turn."""
    sets = {
        "cards": ("{}.txt", cards.word_splits(), str),
        "cards-geneval": ("{}_metadata.jsonl", cards.shape_splits(), metadata_line),
        "cards-pickscore": ("{}.txt", cards.mixed_splits(), str),
    }
    for name, (file, splits, line_of) in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, prompts in zip(("train", "test"), splits, strict=True):
            lines = [line_of(prompt) + "\n" for prompt in prompts]
            (folder / name / file.format(split)).write_text("".join(lines), encoding="utf-8")


def metadata_line(prompt):
    return json.dumps(cards.metadata_of(cards.parse(prompt)))


def make(name):
    """One model, judge or stage, from where it was left; prints how long that took."""
    start = time.monotonic()
    if name == "vae":
        make_vae()
    elif name in DRAWERS:
        save_pipeline({"sd3": make_sd3, "flux": make_flux}[name](make_vae()), HERE / name)
    elif name.endswith("-drawn"):
        draw_groups(name.removesuffix("-drawn"))
    elif name == "detector":
        save_judge(*judges.make_detector(train), HERE / name, geneval=judges.SETTINGS)
    elif name == "clip":
        save_judge(*judges.make_clip(clip_tokenizer(), train), HERE / name)
    elif name == "pickscore-clip":
        judges.make_pickscore_clip(clip_tokenizer(), train, random_card)
    elif name == "pickscore":
        judge = judges.make_pickscore(clip_tokenizer(), train, random_card, drawn_groups())
        save_judge(*judge, HERE / name)
    else:
        sys.exit(f"nothing is called {name}")
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def main():
    diffusers_logging.set_verbosity_error()
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            make(name)
        return
    write_prompts(HERE.parent / "prompts")
    for wave in WAVES:
        commands = [[sys.executable, __file__, *names] for names in wave]
        workers = [
            subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for command in commands
        ]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            sys.exit(1)


if __name__ == "__main__":
    main()
