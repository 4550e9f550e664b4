"""Train patched models: which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnvariants.hf.holder import CHILD

# Those of transformers' Trainer, which gives them in no other way, and the learned values.
_NO_DECAY = ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)", CHILD)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: no weight decay on the variants' learned values.

    transformers' Trainer exempts biases and norms and decays everything else, learned values too,
    which pulls a temperature towards 0. Pass it these in place of its own:

        optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=3e-4)
        Trainer(model, args, optimizers=(optimizer, None), ...)

    Args:
        model: a patched model, PEFT-wrapped or not.
        weight_decay: of the parameters that decay.

    Returns:
        Two groups of the parameters that require a gradient: those that decay, and the others.

    Raises:
        ValueError: the weight decay is negative, or nothing requires a gradient.
    """
    from transformers.trainer_pt_utils import get_parameter_names

    if not isinstance(weight_decay, (int, float)) or not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be a number >= 0, got {weight_decay!r}.")
    decays = set(get_parameter_names(model, [nn.LayerNorm], list(_NO_DECAY)))
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if not trained:
        raise ValueError(f"no parameter of this {type(model).__name__} requires a gradient.")
    return [
        {
            "params": [value for name, value in trained if name in decays],
            "weight_decay": float(weight_decay),
        },
        {"params": [value for name, value in trained if name not in decays], "weight_decay": 0.0},
    ]
