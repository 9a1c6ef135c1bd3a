"""A language model of transformers with random weights: a few thousand numbers, no biases.

A bias of keys has a gradient of rounding errors alone, whose sign Adam follows: no two runs would agree.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32


def language_model(dtype: torch.dtype) -> Any:
    """The same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).to(dtype)


def sentences(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]
