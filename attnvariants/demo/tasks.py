"""Synthetic data of the demonstration: Bigram-Backcopy and key retrieval, made without downloads.

Both are drawn from a `torch.Generator` alone, so a seed gives the same data on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backcopy:
    """Sequences of the Bigram-Backcopy task (Guo et al., 2024, arXiv:2410.13835).

    Attributes:
        tokens: `[sequences, length + 1]` int64; column 0 is the start token `vocab`.
        copied: `[sequences, length + 1]` bool, True where a token follows a trigger and is
            therefore the token before that trigger.
        nats: `[sequences, length + 1]` float64, -log of the probability with which each token was
            drawn, 0 where there was no choice: what no model can do better than, on average.
        bigrams: `[vocab, vocab]` float64, row i the distribution of the token after i.
        triggers: `[vocab]` bool.
    """

    tokens: Tensor
    copied: Tensor
    nats: Tensor
    bigrams: Tensor
    triggers: Tensor


def bigram_backcopy(
    sequences: int, length: int, *, vocab: int = 32, triggers: int = 3, seed: int = 0
) -> Backcopy:
    """Draw sequences: a start token, then bigrams, but a trigger is followed by a copy.

    The token after a trigger repeats the token before it; every other token is drawn from the
    bigram row of its predecessor. Rows are `softmax(2 z)` with z normal (about 2 nats each); the
    triggers are the most frequent tokens of the bigram chain, and never come directly after the
    start token. Only after a trigger is attention of use: everywhere else the last token tells all.

    Args:
        sequences: how many.
        length: tokens of a sequence that a model reads; one more is drawn, to be predicted.
        vocab: tokens besides the start token.
        triggers: how many of them are triggers.
        seed: of the bigrams and of the sequences.

    Raises:
        ValueError: a number is too small, or there are as many triggers as tokens.
    """
    if sequences < 1 or length < 2:
        raise ValueError(
            f"bigram_backcopy needs at least 1 sequence of length 2, got {sequences} of {length}."
        )
    if not 0 < triggers < vocab:
        raise ValueError(
            f"triggers must lie between 1 and vocab - 1 = {vocab - 1}, got {triggers}."
        )
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)
    bigrams = (2 * normal).softmax(1)
    frequency = torch.full((vocab,), 1 / vocab, dtype=torch.float64)
    for _ in range(100):
        frequency = frequency @ bigrams
    is_trigger = torch.zeros(vocab, dtype=torch.bool)
    is_trigger[frequency.topk(triggers).indices] = True

    upto = bigrams.cumsum(1)
    tokens = torch.full((sequences, length + 1), vocab)
    copied = torch.zeros(sequences, length + 1, dtype=torch.bool)
    first = frequency.masked_fill(is_trigger, 0.0)
    tokens[:, 1] = torch.multinomial(first, sequences, replacement=True, generator=generator)
    nats = torch.zeros(sequences, length + 1, dtype=torch.float64)
    nats[:, 1] = -(first / first.sum()).log()[tokens[:, 1]]
    for place in range(2, length + 1):
        last = tokens[:, place - 1]
        draw = torch.rand(sequences, 1, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(upto[last], draw).squeeze(1).clamp(max=vocab - 1)
        copied[:, place] = is_trigger[last]
        tokens[:, place] = torch.where(copied[:, place], tokens[:, place - 2], drawn)
        nats[:, place] = -bigrams[last, drawn].log().masked_fill(copied[:, place], 0.0)
    return Backcopy(tokens, copied, nats, bigrams, is_trigger)


@dataclass(frozen=True)
class Retrieval:
    """A batch of contexts of (key, value) pairs, with queries after them.

    Attributes:
        keys: `[batch, pairs + queries]` int64; the pairs' keys, all different, then the queries',
            each one of them.
        values: `[batch, pairs + queries]` int64; the pairs' values, then the marker `n_values`.
        answers: `[batch, queries]` int64, the value that belongs to each query's key.
        places: `[batch, queries]` int64, where that pair is (the needle).
    """

    keys: Tensor
    values: Tensor
    answers: Tensor
    places: Tensor


def retrieval_batch(
    batch: int,
    pairs: int,
    *,
    queries: int = 8,
    n_keys: int = 2048,
    n_values: int = 16,
    generator: torch.Generator,
) -> Retrieval:
    """Draw a batch of the key retrieval task: given the pairs, what is the value of this key?

    Raises:
        ValueError: more pairs than different keys, or more queries than pairs.
    """
    if not queries <= pairs <= n_keys:
        raise ValueError(
            f"pairs must lie between queries = {queries} and n_keys = {n_keys}, got {pairs}."
        )
    keys = torch.rand(batch, n_keys, generator=generator).topk(pairs).indices
    values = torch.randint(n_values, (batch, pairs), generator=generator)
    places = torch.rand(batch, pairs, generator=generator).topk(queries).indices
    marker = torch.full((batch, queries), n_values)
    return Retrieval(
        torch.cat([keys, keys.gather(1, places)], 1),
        torch.cat([values, marker], 1),
        values.gather(1, places),
        places,
    )
