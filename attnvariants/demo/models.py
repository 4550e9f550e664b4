"""The recipes of the two experiments and the Hugging Face models they train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class SinkRecipe:
    """Training of the sink experiment: GPT-2, one layer, one head, on Bigram-Backcopy."""

    steps: int = 500
    batch: int = 32
    length: int = 32
    width: int = 48
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    warmup: int = 20
    vocab: int = 32
    triggers: int = 3
    held_out: int = 1024
    checks: int = 20


@dataclass(frozen=True)
class RetrievalRecipe:
    """Training of the length experiment: GPT-2 without positions, one layer, one head."""

    steps: int = 300
    batch: int = 64
    train_pairs: int = 32
    queries: int = 8
    width: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 0.3
    warmup: int = 20
    n_keys: int = 2048
    n_values: int = 16
    factors: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: int = 64


def sink_model(recipe: SinkRecipe) -> nn.Module:
    """A GPT-2 language model: one layer, one head, ReLU, untied head, embeddings of size 1."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(
        _config(recipe.vocab + 1, recipe.length, recipe.width, activation_function="relu")
    )
    nn.init.normal_(model.transformer.wte.weight)
    nn.init.normal_(model.transformer.wpe.weight)
    return model


class RetrievalModel(nn.Module):
    """A GPT-2 body that reads pairs as key embedding + value embedding, and a linear head.

    The position embeddings are 0 and stay so: which pair is meant is decided by keys alone.
    """

    def __init__(self, recipe: RetrievalRecipe):
        super().__init__()
        from transformers import GPT2Model

        longest = recipe.train_pairs * max(recipe.factors) + recipe.queries
        self.body = GPT2Model(_config(1, longest, recipe.width, n_inner=recipe.width))
        self.body.wpe.weight.data.zero_().requires_grad_(False)
        self.body.wpe.requires_grad_(False)
        self.keys = nn.Embedding(recipe.n_keys, recipe.width)
        self.values = nn.Embedding(recipe.n_values + 1, recipe.width)
        self.head = nn.Linear(recipe.width, recipe.n_values)
        self.queries = recipe.queries

    def forward(
        self, keys: Tensor, values: Tensor, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[batch, queries, n_values]` of the answers; if asked for, attention weights."""
        embedded = self.keys(keys) + self.values(values)
        out = self.body(inputs_embeds=embedded, output_attentions=weights)
        logits = self.head(out.last_hidden_state[:, -self.queries :])
        return logits, out.attentions[0] if weights else None


def _config(vocab_size: int, n_positions: int, width: int, **more: Any) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=width,
        n_layer=1,
        n_head=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.07,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )
