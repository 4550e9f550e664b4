"""What other libraries put around or into a model: recognise it, take it off, or refuse."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from attnvariants.hf.names import unwrap

_INSIDE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def plain_name(name: str) -> str:
    """A module's or parameter's name without what FSDP1, checkpointing and compiling put in it."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT has put anything into the model."""
    if "peft" not in sys.modules:
        return False
    return any(type(module).__module__.split(".")[0] == "peft" for module in model.modules())


def is_fsdp(model: nn.Module) -> bool:
    """Whether any part of the model is sharded by FSDP1 or FSDP2."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed import fsdp

    kinds = (fsdp.FullyShardedDataParallel, getattr(fsdp, "FSDPModule", ()))
    return any(isinstance(module, kinds) for module in model.modules())


def refuse_peft(model: nn.Module, doing: str, holders: Iterable[Any]) -> None:
    """Raise ValueError if PEFT stands between the model and what is to be done with it.

    Args:
        model: the model.
        doing: "patch" or "unpatch".
        holders: what is to be put in, or taken out.
    """
    outside = type(model).__module__.split(".")[0] == "peft"
    if doing == "patch":
        touched = any(holder.learned for holder in holders)
    else:
        touched = any(type(holder).__module__.split(".")[0] == "peft" for holder in holders)
    if not outside and not (touched and is_peft(model)):
        return
    undo = "unload() or merge_and_unload() of the PEFT model takes them out"
    if doing == "patch":
        raise ValueError(
            f"patch came after PEFT: {type(model).__name__} carries adapters, which would not save "
            f"the variant's learned values; {undo}; then patch the base and wrap it again with "
            "modules_to_save=attnvariants.hf.peft_modules_to_save()."
        )
    raise ValueError(f"{type(model).__name__} carries PEFT adapters; before unpatch, {undo}.")


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP, FSDP, DataParallel or torch.compile.

    Raises:
        ValueError: there is none, or PEFT has put adapters into it.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise ValueError(f"save_pretrained takes a torch model, got {type(model).__name__}.")
    whole = unwrap(model)
    whole = unwrap(getattr(whole, "_orig_mod", whole))
    if is_peft(whole):
        raise ValueError(
            f"{type(whole).__name__} carries PEFT adapters, which save_pretrained would tear from "
            "their base; save them with attnvariants.hf.save_adapter, or call merge_and_unload() "
            "and save the result."
        )
    if not isinstance(whole, PreTrainedModel):
        raise ValueError(
            f"save_pretrained takes a transformers model, got {type(whole).__name__}; save the "
            "transformers model inside it."
        )
    return whole


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are spread over processes in a way transformers does not gather."""
    sharded = any(hasattr(value, "placements") for value in model.parameters())
    return not is_native(model) and (sharded or is_fsdp(model))


def is_native(model: nn.Module) -> bool:
    """Whether transformers itself spread the model over processes, and gathers it to save it."""
    native = getattr(getattr(model, "config", None), "distributed_config", None) is not None
    return native or (getattr(model, "_tp_size", None) or 1) > 1


def is_first_process() -> bool:
    """Whether this is the only process, or the first of several."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not together or torch.distributed.get_rank() == 0


def gathered(model: nn.Module) -> dict[str, Any]:
    """The whole weights, at least on the first process; every process calls it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # FSDP1 frees the tensors of a model on the CPU before it would offload them.
    elsewhere = any(value.device.type != "cpu" for value in model.parameters())
    options = StateDictOptions(full_state_dict=True, cpu_offload=elsewhere)
    return get_model_state_dict(model, options=options)
