"""Put a variant into a loaded model, and take it out again without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.engines import check_impl
from attnvariants.hf.build import requests_of
from attnvariants.hf.find import attention_modules
from attnvariants.hf.holder import CHILD, DISPATCH
from attnvariants.hf.idle import is_idle
from attnvariants.hf.masks import check_mode, register
from attnvariants.hf.parallel import refuse_wrapped
from attnvariants.hf.penalties import AUTO, check_penalties
from attnvariants.hf.plan import check_backend, new_in, plan_patch
from attnvariants.hf.record import warn_of_plain_reload
from attnvariants.hf.report import Report, report_of
from attnvariants.hf.select import Layers
from attnvariants.hf.state import attach, remove, state_of, switch
from attnvariants.hf.verify import Verification, verify_model
from attnvariants.hf.wrappers import plain_name, refuse_peft
from attnvariants.registry import Variant


class Patch:
    """Handle of a `patch` call: report, self-test and removal; also a context manager.

    Attributes:
        model: the patched model.
        names: qualified names of the modules this call patched.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        self.model = model
        self.names = names

    @property
    def active(self) -> bool:
        """Whether the patch is still in the model, and all its modules compute it."""
        return self._present and not self._idle

    @property
    def _present(self) -> bool:
        state = state_of(self.model)
        return state is not None and any(handle is self for handle in state.handles)

    @property
    def _idle(self) -> list[nn.Module]:
        modules = {plain_name(name): module for name, module in self.model.named_modules()}
        return [modules[name] for name in self.names if name in modules and is_idle(modules[name])]

    @property
    def report(self) -> Report:
        """Every attention module of the model as it is now."""
        return report_of(self.model)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The learned parameters that this call added, by qualified name."""
        # A stage of a pipeline has only some of the layers.
        modules = {plain_name(name): module for name, module in self.model.named_modules()}
        return {
            f"{name}.{CHILD}.{key}": value
            for name in self.names
            if hasattr(modules.get(name), CHILD)
            for key, value in getattr(modules[name], CHILD).named_parameters()
        }

    def verify(
        self,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        tolerance: float | None = None,
        seed: int = 0,
    ) -> Verification:
        """Run the model and prove that the patch keeps causality, padding, caches and documents.

        A future token must change nothing before it (difference exactly 0 where the unpatched
        model's is), rows padded on the left and on the right must equal the unpadded ones, hidden
        tokens must change nothing, a growing and a static cache (of an encoder-decoder too) and
        packed documents must give what runs without them do, with softmax in place of the variant
        the model must compute what it did before, and every patched module that runs must compute
        its variant. A figure that is too large is computed again in float64 before it is called an
        error, from a copy of the model, so that rounding is told from a leak.

        A test that does not apply names the property of the model or of the inputs that makes it
        so, or what the unpatched model itself fails; `notes` has it. A model that has a cache which
        this package does not know fails. Modes, gradients and the global random state are left
        alone.

        Args:
            inputs: keyword arguments of the model's forward, used whole; by default small random
                ones. Tokens that stand for images, and what belongs to them, are neither changed
                nor cut.
            tolerance: largest relative difference of what must be equal; by default 1e-4, and 5e-2
                for models in half precision.
            seed: of the random inputs.

        Raises:
            ValueError: a test failed, the patch is no longer active, no inputs could be made for
                this model, or it gives NaN or infinity before it is patched.
        """
        self._require_present()
        state = state_of(self.model)
        configs = [*state.configs, *state.eager] if state is not None else []
        return verify_model(self.model, configs, inputs, tolerance, seed)

    def unpatch(self) -> None:
        """Take this call's variants out; the last one restores the model completely.

        Raises:
            ValueError: the patch is not in the model any more.
        """
        self._require_present()
        remove(self.model, [self])

    def _require_present(self) -> None:
        if not self._present:
            raise ValueError(
                f"this patch of {type(self.model).__name__} is not active: it was unpatched; "
                "call patch again."
            )

    def __enter__(self) -> Patch:
        self._require_present()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._present:
            self.unpatch()

    def __repr__(self) -> str:
        state = "active" if self.active else "not used" if self._present else "not active"
        return f"Patch({type(self.model).__name__}, {len(self.names)} modules, {state})"


def patch(
    model: nn.Module,
    variant: str | Variant | Mapping[Any, Any],
    *,
    layers: Layers = None,
    impl: str = "auto",
    preset: str | None = None,
    train_length: int | None = None,
    trainable: bool = True,
    verify: bool = False,
    masks: str | None = None,
    penalties: str | float = AUTO,
    backend: str = DISPATCH,
    **options: Any,
) -> Patch:
    """Replace the attention operator of a Hugging Face model by a variant, in place.

    Learned options become parameters `[heads]` of the attention modules, named
    `....attn_variant.<option>`, in the dtype and on the device of the module's own parameters.
    Everything is checked before anything is changed. Patch before wrapping with PEFT, FSDP or
    DDP. `model.config.attn_variants` records what was done and is saved with the model, whoever
    saves it. Copies, and models that are built from this config, are patched as it records.

    Args:
        model: a model whose attention goes through transformers' attention interface, or one that
            `backend="softmax-hook"` knows.
        variant: a name, a registered `Variant`, or a mapping of layers (an index, a tuple of
            them, or a regular expression) to a variant or a pair (variant, options).
        layers: None for all text attention; an index or several, negative ones from the end; a
            regular expression searched in module names; or a predicate `(name, module) -> bool`.
        impl: engine of `attention`.
        preset: name of one of the variant's presets of initial values, e.g. "retrofit".
        train_length: length the preset is computed for; default the model's longest.
        trainable: whether the learned parameters require a gradient.
        verify: run `Patch.verify`, and unpatch again if it fails.
        masks: "lazy", masks of tokens x tokens are built only where one is read; or "bool", they
            always are, which is slower and needs no knowledge of what a mask function means.
            Default "lazy", and with transformers before 5.5 the nearest to it that they allow.
        penalties: which entries of an additive mask hide a key and which are a bias. "auto": the
            lowest of the dtype, anything at or below -1e8, and lower numbers that a mask is made of
            (-1e4, -100, sums of them), also with a position bias added: they are the same in all
            heads and far below the rest, which neither a learned bias nor ALiBi at any length is
            (`attnvariants.hf.penalties`). "added": half the dtype's minimum or lower hides, as in
            `attention`, and all else is added to the scores. A negative number: that or lower
            hides. With softmax, rows whose every key is penalised keep the penalties as a bias.
        backend: "dispatch", through transformers' attention interface; or "softmax-hook", for
            models that compute attention themselves: while a module runs, the one softmax in it
            is the variant, in plain torch. For variants that need scores alone, and classes whose
            masks are known (docs/models.md); not for torch.compile.
        **options: the variant's own; for a learned one its initial value, a number or `[heads]`.

    Returns:
        The handle. Patching the same layers with the same arguments again returns the first one.

    Raises:
        ValueError: the variant, an option or a layer is unknown, a layer has another variant
            already, or the model cannot be patched; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch takes a torch model, got {type(model).__name__}.")
    refuse_wrapped(model)
    register()
    check_mode(masks)
    check_penalties(penalties)
    targets = attention_modules(model)
    requests = requests_of(variant, layers, options, preset, train_length)
    check_impl(impl)
    check_backend(backend, impl, masks)
    # parameters made in inference mode could never learn
    with torch.inference_mode(False):
        plan = plan_patch(model, targets, requests, impl, trainable, backend)
    for _, holder in plan.values():
        holder.masks, holder.penalties = masks, penalties
    state = state_of(model)
    fresh = new_in(plan, model, state)
    refuse_peft(model, "patch", [holder for _, holder in fresh.values()])
    if state is None:
        warn_of_plain_reload(model)
    if fresh or state is None:
        handle = Patch(model, tuple(fresh))
        attach(model, handle, fresh, targets, masks)
    else:
        handle = state.handle_of(next(iter(plan)))
        switch(state, [target for target, _ in plan.values()], targets, masks)
    if verify:
        try:
            handle.verify()
        except BaseException:
            if fresh:
                handle.unpatch()
            raise
    return handle


def patches_of(model: nn.Module) -> tuple[Patch, ...]:
    """The handles of a model's patches, such as those `from_pretrained` restored, oldest first."""
    state = state_of(model)
    return () if state is None else tuple(state.handles)


def unpatch(model: nn.Module) -> None:
    """Undo every `patch` of the model: operators, parameters and config are as before.

    Raises:
        ValueError: the model is not patched, or was patched through another module.
    """
    state = state_of(model)
    if state is None:
        inside = isinstance(model, nn.Module) and any(
            hasattr(module, CHILD) for module in model.modules()
        )
        hint = (
            "it was patched as a part of another model; unpatch that one."
            if inside
            else "there is nothing to undo."
        )
        raise ValueError(f"{type(model).__name__} is not patched: {hint}")
    remove(model, list(state.handles))
