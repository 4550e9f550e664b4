"""Train tiny Hugging Face GPT-2 models, patched with a variant, and measure what attention does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnvariants.demo.measure import measure_sinks
from attnvariants.demo.models import RetrievalModel, RetrievalRecipe, SinkRecipe, sink_model
from attnvariants.demo.tasks import Retrieval, bigram_backcopy, retrieval_batch

Progress = Callable[[int], None]


def train_sinks(
    variant: str, seed: int, recipe: SinkRecipe, progress: Progress | None = None
) -> dict[str, Any]:
    """Train one model on Bigram-Backcopy; its metrics, their course, and one attention map.

    Args:
        variant: name of the variant the model is patched with before training.
        seed: of the data, the initial weights and the order of batches.
        recipe: numbers of the run.
        progress: called with the number of steps done.

    Returns:
        `metrics` (see `measure.METRICS`), `history` (lists `step`, `sink_rate`, `copy_accuracy`),
        `map` (`[length, length]` weights of the first held-out sequence, as lists), `learned`
        (the variant's learned parameters) and `core_seconds`.
    """
    from attnvariants import patch

    started = time.process_time()
    trained = recipe.steps * recipe.batch
    data = bigram_backcopy(
        trained + recipe.held_out,
        recipe.length,
        vocab=recipe.vocab,
        triggers=recipe.triggers,
        seed=seed,
    )
    held_out = data.tokens[trained:], data.copied[trained:], data.nats[trained:]
    few = [part[:256] for part in held_out]
    with _random_state(seed):
        model = sink_model(recipe)
        handle = patch(model, variant)
        history: dict[str, list[float]] = {"step": [], "sink_rate": [], "copy_accuracy": []}
        check_at = {round(i * recipe.steps / recipe.checks) for i in range(recipe.checks)}
        optimizer = _Optimizer(model, recipe)
        for step in range(recipe.steps):
            if step in check_at:
                _note(history, step, measure_sinks(model, *few)[0])
            batch = data.tokens[step * recipe.batch : (step + 1) * recipe.batch]
            logits = model(batch[:, :-1]).logits
            optimizer.update(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
            if progress:
                progress(step + 1)
        metrics, first_map = measure_sinks(model, *held_out)
        _note(history, recipe.steps, metrics)
    return {
        "metrics": metrics,
        "history": history,
        "map": first_map.tolist(),
        "learned": _learned(handle),
        "core_seconds": time.process_time() - started,
    }


def train_retrieval(
    variant: str,
    seed: int,
    recipe: RetrievalRecipe,
    progress: Progress | None = None,
    swaps: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Train one model on key retrieval and test it beyond its training length.

    Args:
        variant: name of the variant the model is patched with before training.
        seed: of the data and the initial weights.
        recipe: numbers of the run.
        progress: called with the number of steps done.
        swaps: variants to patch into the trained model in turn, with their preset "retrofit" and
            without any training, each tested in the same way.

    Returns:
        `tests`, one mapping per variant tested (`variant`, `trained`: whether with that variant,
        `accuracy` and `needle_weight` per factor, `learned` parameters), and `core_seconds`.
    """
    from attnvariants import patch

    started = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    tests = []
    with _random_state(seed):
        model = RetrievalModel(recipe)
        handle = patch(model.body, variant)
        optimizer = _Optimizer(model, recipe)
        for step in range(recipe.steps):
            low, high = recipe.queries, recipe.train_pairs
            pairs = int(torch.randint(low, high + 1, (), generator=generator))
            batch = _batch(recipe, recipe.batch, pairs, generator)
            logits, _ = model(batch.keys, batch.values)
            optimizer.update(F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()))
            if progress:
                progress(step + 1)
        tests.append(_test(model, variant, True, seed, recipe, _learned(handle)))
        for swap in swaps:
            handle.unpatch()
            handle = patch(
                model.body,
                swap,
                preset="retrofit",
                train_length=recipe.train_pairs,
                trainable=False,
            )
            tests.append(_test(model, swap, False, seed, recipe, _learned(handle)))
    return {"tests": tests, "core_seconds": time.process_time() - started}


@torch.no_grad()
def _test(
    model: RetrievalModel,
    variant: str,
    trained: bool,
    seed: int,
    recipe: RetrievalRecipe,
    learned: dict[str, list[float]],
) -> dict[str, Any]:
    """Accuracy and mean weight on the needle at every length; the same contexts for every model."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    accuracy, needle = [], []
    for factor in recipe.factors:
        right = weight = 0.0
        # Weights are tokens x tokens per context: a few contexts at a time keep them small.
        for start in range(0, recipe.contexts, 16):
            size = min(16, recipe.contexts - start)
            batch = _batch(recipe, size, recipe.train_pairs * factor, generator)
            logits, weights = model(batch.keys, batch.values, weights=True)
            right += (logits.argmax(-1) == batch.answers).double().sum().item()
            rows = weights[:, 0, -recipe.queries :]
            weight += rows.gather(-1, batch.places[..., None]).double().sum().item()
        asked = recipe.contexts * recipe.queries
        accuracy.append(right / asked)
        needle.append(weight / asked)
    return {
        "variant": variant,
        "trained": trained,
        "accuracy": accuracy,
        "needle_weight": needle,
        "learned": learned,
    }


class _Optimizer:
    """AdamW with gradient clipping, a short warmup and a cosine decay to 2 percent."""

    def __init__(self, model: nn.Module, recipe: SinkRecipe | RetrievalRecipe):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.recipe = recipe
        self.done = 0
        self.adam = torch.optim.AdamW(
            self.parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )

    def update(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.done / self.recipe.steps))
        warm = min(1.0, (self.done + 1) / self.recipe.warmup)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.learning_rate * warm * (0.02 + 0.98 * cosine)
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.done += 1


def _batch(recipe: RetrievalRecipe, size: int, pairs: int, generator: torch.Generator) -> Retrieval:
    return retrieval_batch(
        size,
        pairs,
        queries=recipe.queries,
        n_keys=recipe.n_keys,
        n_values=recipe.n_values,
        generator=generator,
    )


def _note(history: dict[str, list[float]], step: int, metrics: dict[str, float]) -> None:
    history["step"].append(step)
    for name, values in history.items():
        if name != "step":
            values.append(metrics[name])


def _learned(handle: Any) -> dict[str, list[float]]:
    """The variant's learned parameters, `[heads]` each, by their own names."""
    return {name.rsplit(".", 1)[-1]: p.tolist() for name, p in handle.parameters.items()}


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Seed torch inside, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
