"""Tiny, randomly initialised models from `transformers`, one or more of each kind of architecture.

Each entry builds a model and a batch of `BATCH` examples. Nothing is downloaded, and no model is
changed in any way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

BATCH = 3
_LENGTH, _WORDS = 5, 29
_COMMON = dict(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_hidden_layers=2,
    pad_token_id=0,
    vocab_size=_WORDS,
)
_DECODER = dict(_COMMON, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
_SEQ2SEQ = dict(
    bos_token_id=1,
    d_model=16,
    decoder_attention_heads=2,
    decoder_ffn_dim=24,
    decoder_layers=1,
    decoder_start_token_id=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    encoder_layers=1,
    eos_token_id=2,
    pad_token_id=0,
    vocab_size=_WORDS,
)

Inputs = dict[str, torch.Tensor]


def _words(length: int = _LENGTH) -> torch.Tensor:
    return torch.randint(3, _WORDS, (BATCH, length))


def _text() -> Inputs:
    return {"input_ids": _words()}


def _masked_text() -> Inputs:
    # Without a mask these models look for padding, which is a question about values.
    return {"input_ids": _words(), "attention_mask": torch.ones(BATCH, _LENGTH, dtype=torch.long)}


def _text_pair() -> Inputs:
    return {"input_ids": _words(), "decoder_input_ids": _words(4)}


def _pixels(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size)}


def _sound() -> Inputs:
    return {"input_values": torch.randn(BATCH, 120)}


def _spectrum() -> Inputs:
    return {"input_features": torch.randn(BATCH, 6, 16), "decoder_input_ids": _words(4)}


# name: class without "Model", what its config says, inputs
_ZOO: dict[str, tuple[str, dict[str, Any], Callable[[], Inputs]]] = {
    # Encoders
    "bert": ("Bert", _COMMON, _text),
    "deberta": (
        "DebertaV2",
        dict(_COMMON, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        _masked_text,
    ),
    "distilbert": (
        "DistilBert",
        dict(dim=16, hidden_dim=24, n_heads=2, n_layers=2, vocab_size=_WORDS),
        _text,
    ),
    # Decoders
    "falcon": (
        "Falcon",
        dict(
            bos_token_id=1,
            eos_token_id=2,
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=_WORDS,
        ),
        _text,
    ),
    "gemma": ("Gemma", dict(_DECODER, head_dim=8), _text),
    "gpt2": (
        "GPT2",
        dict(bos_token_id=1, eos_token_id=2, n_embd=16, n_head=2, n_layer=2, vocab_size=_WORDS),
        _text,
    ),
    "llama": ("Llama", _DECODER, _text),
    # Encoder and decoder
    "bart": ("Bart", _SEQ2SEQ, _text_pair),
    "t5": (
        "T5",
        dict(d_ff=24, d_kv=8, d_model=16, num_heads=2, num_layers=2, vocab_size=_WORDS),
        _text_pair,
    ),
    # Mixtures of experts
    "mixtral": ("Mixtral", dict(_DECODER, num_local_experts=3), _text),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(
            _DECODER,
            moe_intermediate_size=8,
            num_experts=3,
            num_experts_per_tok=2,
            shared_expert_intermediate_size=8,
        ),
        _text,
    ),
    # State spaces and linear recurrences
    "mamba": (
        "Mamba",
        dict(
            hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2, vocab_size=_WORDS
        ),
        _text,
    ),
    "mamba2": (
        "Mamba2",
        dict(
            chunk_size=4,
            head_dim=8,
            hidden_size=16,
            n_groups=1,
            num_heads=4,
            num_hidden_layers=2,
            state_size=4,
            vocab_size=_WORDS,
        ),
        _text,
    ),
    "rwkv": (
        "Rwkv",
        dict(
            attention_hidden_size=16,
            bos_token_id=1,
            context_length=16,
            eos_token_id=2,
            hidden_size=16,
            num_hidden_layers=2,
            use_cache=False,  # it writes to a state in place, which torch.autograd refuses
            vocab_size=_WORDS,
        ),
        _text,
    ),
    # Vision
    "clip_vision": ("CLIPVision", dict(_COMMON, image_size=8, patch_size=4), _pixels(8)),
    "convnext": (
        "ConvNext",
        dict(depths=[1, 1], hidden_sizes=[4, 8], num_stages=2, patch_size=2),
        _pixels(16),
    ),
    "resnet": (
        "ResNet",
        dict(depths=[1, 1], embedding_size=4, hidden_sizes=[4, 8], layer_type="basic"),
        _pixels(16),
    ),
    "swin": (
        "Swin",
        dict(
            depths=[1, 1], embed_dim=8, image_size=16, num_heads=[2, 2], patch_size=2, window_size=4
        ),
        _pixels(16),
    ),
    "vit": ("ViT", dict(_COMMON, image_size=8, patch_size=4), _pixels(8)),
    # Speech
    "wav2vec2": (
        "Wav2Vec2",
        dict(
            _COMMON,
            conv_dim=(8, 8),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embedding_groups=2,
            num_conv_pos_embeddings=4,
        ),
        _sound,
    ),
    "whisper": (
        "Whisper",
        dict(_SEQ2SEQ, max_source_positions=8, max_target_positions=8, num_mel_bins=6),
        _spectrum,
    ),
}
# Their grouped matrix products exist in float32 and below only.
_SINGLE = frozenset(["mixtral", "qwen2_moe"])

NAMES = sorted(_ZOO)


def build(name: str) -> tuple[torch.nn.Module, Inputs]:
    """A model in eval mode, and a batch for it; in float64 where the model can."""
    kind, settings, inputs = _ZOO[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    batch = inputs()
    if name not in _SINGLE:
        model = model.double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    return model, batch
