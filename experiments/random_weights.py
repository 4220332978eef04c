"""A diffusers folder with the true sizes of a full-size model and random weights, to measure guard.py with.

    python experiments/random_weights.py sd3.5-medium FOLDER
    few="--epochs 1 --ema_decay 0 --groups 2 --group_size 8 --eval_prompts 8"
    python guard.py --model FOLDER --reward experiments.random_weights:load_brightness $few

Its pictures are noise, but memory and seconds are those of the real model. The reward is one that noise can
earn: groups without any difference in reward would not be trained on. SD3.5-M takes 16 GB of disk and
FLUX.1-dev 34 GB, and about as much memory, of the GPU if there is one. The tokenizers spell letter by letter.
`--layers N` keeps only N layers of each kind in the transformer: with dual attention and without in SD3.5-M,
double and single in FLUX.1-dev. `--encoder_layers N` keeps N layers of every text encoder.
"""

import argparse

import diffusers
import numpy as np
import torch
import transformers

ALL = 10**6  # more layers than any model has
# The published configurations, as far as they differ from the defaults of the classes.
SD3 = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
    dual_attention_layers=tuple(range(13)), attention_head_dim=64, num_attention_heads=24,
    joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, qk_norm="rms_norm")
FLUX = dict(
    patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
    num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
    axes_dims_rope=(16, 56, 56))
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
    use_quant_conv=False, use_post_quant_conv=False)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
              projection_dim=768)
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
              projection_dim=1280, hidden_act="gelu")
T5_XXL = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
    feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
               max_image_seq_len=4096)


def load_brightness():
    """The mean brightness of a picture."""
    return lambda images, prompts, metadata: [np.asarray(image).mean() / 255 for image in images]


def clip_tokenizer():
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
    vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer({token: i for i, token in enumerate(vocab)}, [], model_max_length=77)


def t5_tokenizer():
    letters = [("▁", -3.0), *((chr(code), -4.0) for code in range(33, 127))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def cut(config, most):
    """The configuration with at most so many layers of each kind."""
    kinds = config.keys() & {"num_layers", "num_single_layers", "num_hidden_layers"}
    return config | {kind: min(config[kind], most) for kind in kinds}


def build(model, layers=ALL, encoder_layers=ALL):
    """The pipeline, in torch's default dtype and on its default device."""
    t5 = transformers.T5EncoderModel(transformers.T5Config(**cut(T5_XXL, encoder_layers)))
    clip_configs = [transformers.CLIPTextConfig(**cut(config, encoder_layers)) for config in (CLIP_L, CLIP_G)]
    if model == "flux.1-dev":
        return diffusers.FluxPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC),
            diffusers.AutoencoderKL(**VAE, scaling_factor=0.3611, shift_factor=0.1159),
            transformers.CLIPTextModel(clip_configs[0]), clip_tokenizer(), t5, t5_tokenizer(),
            diffusers.FluxTransformer2DModel(**cut(FLUX, layers)))
    clips = [transformers.CLIPTextModelWithProjection(config) for config in clip_configs]
    all_dual = len(SD3["dual_attention_layers"])
    dual, plain = min(layers, all_dual), min(layers, SD3["num_layers"] - all_dual)
    sd3 = SD3 | dict(num_layers=dual + plain, dual_attention_layers=tuple(range(dual)))
    return diffusers.StableDiffusion3Pipeline(
        diffusers.SD3Transformer2DModel(**sd3), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.AutoencoderKL(**VAE, scaling_factor=1.5305, shift_factor=0.0609),
        clips[0], clip_tokenizer(), clips[1], clip_tokenizer(), t5, t5_tokenizer())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=("sd3.5-medium", "flux.1-dev"))
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, default=ALL, help="at most so many of each kind")
    parser.add_argument("--encoder_layers", type=int, default=ALL, help="at most so many of each")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    args = parser.parse_args()
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipe = build(args.model, args.layers, args.encoder_layers)
    pipe.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
