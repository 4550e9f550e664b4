"""Hugging Face models: replace the attention operator of a loaded model, and put it back.

    from attnvariants.hf import patch

    with patch(model, "ssmax", preset="retrofit") as handle:
        print(handle.report)
        print(handle.verify())
        model.generate(...)

    save_pretrained(model, folder)
    model = from_pretrained(AutoModelForCausalLM, folder)

Works on models that call attention through transformers' attention interface (transformers
>= 4.56); all others are refused with the reason and left as they are.
"""

from typing import TYPE_CHECKING, Any

from attnvariants.hf.adapters import load_adapter, peft_modules_to_save, save_adapter
from attnvariants.hf.architectures.check import Check, CheckResult, check
from attnvariants.hf.architectures.sweep import SweepResult, sweep
from attnvariants.hf.checkpoint import save_pretrained
from attnvariants.hf.loading import auto_load, from_pretrained
from attnvariants.hf.parallel import tp_plan
from attnvariants.hf.patcher import Patch, patch, patches_of, unpatch
from attnvariants.hf.report import Report, Row
from attnvariants.hf.training import param_groups
from attnvariants.hf.verify import Verification

if TYPE_CHECKING:
    from attnvariants.hf.recurrent_cache import RecurrentCache

__all__ = [
    "Check",
    "CheckResult",
    "Patch",
    "RecurrentCache",
    "Report",
    "Row",
    "SweepResult",
    "Verification",
    "auto_load",
    "check",
    "from_pretrained",
    "load_adapter",
    "param_groups",
    "patch",
    "patches_of",
    "peft_modules_to_save",
    "save_adapter",
    "save_pretrained",
    "sweep",
    "tp_plan",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    # a class of transformers' is its base, which importing this package leaves alone
    if name == "RecurrentCache":
        from attnvariants.hf.recurrent_cache import RecurrentCache

        return RecurrentCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
