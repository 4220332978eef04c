"""Make the embedded models from nothing, on a CPU: `python tiny/make.py` (under an hour on 2 cores).

Writes `tiny/sd3/` and `tiny/flux/`, a whole Stable Diffusion 3 and a whole FLUX pipeline, which diffusers
loads as any other, and the card prompts in `prompts/cards/`. `python tiny/make.py flux` makes that one alone.
The stages are seeded, and each is picked up where it was left when the script starts again (working folder
`tiny/.make/`):

1. vae: an AutoencoderKL on rendered cards; 4 x 8 x 16 latents, scaled to mean 0 and spread 1.
2. sd3, flux: the text encoders and the transformer together, by flow matching: predict v = x1 - x0 at
   x_t = (1-t) x0 + t x1. Half of the words are random letters, so that the model learns to spell.
3. check: the pipeline is read back and its pictures are scored.
"""

import json
import math
import random
import shutil
import sys
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
from safetensors.torch import load_file, save_file
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

import rewards  # noqa: E402
from tiny import cards  # noqa: E402

WORK = HERE / ".make"
TEXT_LENGTH = 16  # tokens, for CLIP and for T5
PROMPT_WORDS = ("card", "that", "says", *cards.COLOURS)


def pixels_of(pictures):
    """List of (H, W, 3) in [0, 1] -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).float().permute(0, 3, 1, 2) * 2 - 1


def save_progress(name, step, model, optimizer):
    """Weights and Adam's state as safetensors, written beside the old ones and then renamed."""
    tensors = {f"model/{key}": value for key, value in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{index}/{key}": value for key, value in state.items()}
    WORK.mkdir(exist_ok=True)
    partial = WORK / f"{name}.partial"
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, partial, metadata={"step": str(step)}
    )
    partial.rename(WORK / f"{name}.safetensors")


def load_progress(name, model, optimizer):
    """The number of steps done, 0 if there is nothing to go on from."""
    path = WORK / f"{name}.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        step = int(json.loads(file.read(length))["__metadata__"]["step"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{key}"])
    state = {}
    for key, value in tensors.items():
        if key.startswith("adam/"):
            _, index, field = key.split("/")
            state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def train(name, model, steps, lr, loss_of):
    """AdamW, short warm-up, cosine decay. `loss_of(step)` draws its batch from the step's number alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    start = load_progress(name, model, optimizer)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name)
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


class Examples:
    """Batches of (pictures, prompts): half of them training pairs, half random letters in random colours."""

    def __init__(self):
        self.pairs = [cards.parse(prompt) for prompt in cards.splits()[0]]

    def draw(self, rng):
        if rng.random() < 0.5:
            word, colour = rng.choice(self.pairs)
        else:
            colour = rng.choice(sorted(cards.COLOURS))
            word = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.choice((3, 4))))
            if word in cards.WORDS:
                return self.draw(rng)
        return cards.draw_at_random(word, colour, rng), cards.prompt_of(word, colour)

    def batch(self, step, size):
        rng = random.Random(step)
        pictures, prompts = zip(*[self.draw(rng) for _ in range(size)], strict=True)
        return pixels_of(pictures), list(prompts)


def mislabel(prompts):
    """Some prompts ask for another card's word. Models of the web have seen such captions too, and it leaves
    something to learn from a reward."""
    words, colours = zip(*(cards.parse(prompt) for prompt in prompts), strict=True)
    wrong = (torch.rand(len(prompts)) < 0.15).tolist()
    return [cards.prompt_of(words[i - wrong[i]], colour) for i, colour in enumerate(colours)]


def make_vae():
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
    examples = Examples()

    def loss_of(step):
        pixels, _ = examples.batch(step, 32)
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        return error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().mean() / 512

    train("vae", vae, 1000, 2e-3, loss_of)
    with torch.no_grad():
        latents = vae.encode(examples.batch(-1, 512)[0]).latent_dist.mean
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


def train_flow(name, steps, vae, modules, velocity):
    """Flow matching with logit-normal times: transformer and text encoders together."""
    learned = torch.nn.ModuleList(modules).train()
    examples = Examples()

    def loss_of(step):
        pixels, prompts = examples.batch(step, 32)
        prompts = mislabel(prompts)
        prompts = [prompt if torch.rand(()) > 0.1 else "" for prompt in prompts]  # so that guidance works too
        with torch.no_grad():
            x0 = vae.encode(pixels).latent_dist.sample()
        x0 = (x0 - vae.config.shift_factor) * vae.config.scaling_factor
        x1 = torch.randn_like(x0)
        t = torch.sigmoid(torch.randn(len(x0)))
        t = 2 * t / (1 + t)  # (B,), lean towards noise, where the word is decided
        x = torch.lerp(x0, x1, t.view(-1, 1, 1, 1))
        return F.mse_loss(velocity(x, t, prompts), x1 - x0)

    train(name, learned, steps, 1.5e-3, loss_of)
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

    def velocity(x, t, prompts):
        tokens, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
        )
        return transformer(x, tokens, pooled, t * 1000, return_dict=False)[0]

    train_flow("sd3", 2600, vae, [transformer, *encoders], velocity)
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

    def velocity(x, t, prompts):
        tokens, pooled, text_ids = pipe.encode_prompt(prompts, None, max_sequence_length=TEXT_LENGTH)
        batch, channels, height, width = x.shape
        image_ids = pipe._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype)
        v = transformer(
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

    train_flow("flux", 2600, vae, [transformer, *encoders], velocity)
    return pipe


def save_pipeline(pipe, folder):
    """The transformer in half precision, which halves the folder; all else in fp32."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.transformer.half()
    pipe.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def check(folder, count=128):
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = cards.splits()[1][:count]
    images = pipe(
        prompts,
        height=cards.HEIGHT,
        width=cards.WIDTH,
        num_inference_steps=20,
        guidance_scale=1.0,
        max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(0),
    ).images
    ocr = rewards.load("ocr")(images, prompts, [{}] * count)
    gold = [cards.fidelity(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    parts = {part: f"{sum(score[part] for score in gold) / count:.4f}" for part in cards.PARTS}
    print(f"{folder}: OCR {sum(ocr) / count:.3f}, fidelity {parts}, {count} held-out prompts, 20 ODE steps")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    sheet = Image.new("RGB", (8 * cards.WIDTH, 8 * cards.HEIGHT))
    for i, image in enumerate(images[:64]):
        sheet.paste(image, (i % 8 * cards.WIDTH, i // 8 * cards.HEIGHT))
    sheet.save(WORK / f"{folder.name}.png")


def write_prompts(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in zip(("train", "test"), cards.splits(), strict=True):
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def main():
    diffusers_logging.set_verbosity_error()
    write_prompts(HERE.parent / "prompts" / "cards")
    makers = {"sd3": make_sd3, "flux": make_flux}
    vae = make_vae()
    for name in sys.argv[1:] or makers:
        save_pipeline(makers[name](vae), HERE / name)
        check(HERE / name)


if __name__ == "__main__":
    main()
