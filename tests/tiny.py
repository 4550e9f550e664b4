"""The tiny models of the patcher's tests: their sizes, and weights that show a change."""

import torch

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def strong(model):
    """Weights large enough that a variant changes the outputs."""
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.dim() > 1:
            value.data.normal_(0, 0.3, generator=generator)
    return model.eval()
