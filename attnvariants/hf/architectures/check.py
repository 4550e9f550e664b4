"""One model, every test: what `attnvariants patch-check` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.engines import check_impl
from attnvariants.hf import masks
from attnvariants.hf.architectures.check_model import model_of
from attnvariants.hf.architectures.drive import cases_of, runnable, state_of_model
from attnvariants.hf.build import requests_of
from attnvariants.hf.find import attention_modules
from attnvariants.hf.judge import NOT_SO
from attnvariants.hf.names import implementation_of, set_implementation
from attnvariants.hf.outputs import Case, difference, meaning_of, outputs_of, sentence
from attnvariants.hf.patcher import Patch, patch
from attnvariants.hf.penalties import AUTO, check_penalties
from attnvariants.hf.plan import check_backend
from attnvariants.hf.state import state_of
from attnvariants.hf.verify import TITLES, verify_model

STEPS = 6


@dataclass(frozen=True)
class Check:
    """One test of a model.

    Attributes:
        name: of the test.
        passed: None if it does not apply.
        figure: a relative difference; None if there is none.
        note: what was compared, or why the test failed or does not apply.
    """

    name: str
    passed: bool | None
    figure: float | None
    note: str


@dataclass(frozen=True)
class CheckResult:
    """The tests of one model with one variant.

    Attributes:
        model: class of the model, and what was done to make it.
        variant: that was put in.
        checks: the tests, in order.
    """

    model: str
    variant: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no test failed."""
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        words = {True: "passed", False: "FAILED", None: "not applicable"}
        lines = [f"{self.model} with {self.variant}: {words[self.passed]}"]
        for check in self.checks:
            figure = "" if check.figure is None else f" {check.figure:.3g}"
            lines.append(f"  {check.name}: {words[check.passed]}{figure} ({check.note})")
        return "\n".join(lines)


def check(
    model: nn.Module | str | Path | Any, variant: str = "softmax", **settings: Any
) -> CheckResult:
    """Test identity, causality, padding, caches and restoring of a patch on one model.

    Args:
        model: a model, which is left as it is; a folder with a model or only a config.json; a
            config.json; or a config. Of a config a random model is made, tiny if it is large.
        variant: to put in. Identity is always that of softmax.
        **settings: further arguments of `patch`.

    Raises:
        ValueError: there is nothing to test: the folder, config, variant or an option is bad.
    """
    name, tested = model_of(model)
    modes = [(module, module.training) for module in tested.modules()]
    tested.eval()
    try:
        return CheckResult(name, variant, tuple(_checks(tested, variant, settings)))
    finally:
        for module, training in modes:
            module.training = training


def _checks(model: nn.Module, variant: str, settings: dict[str, Any]) -> Iterator[Check]:
    named = {key: settings.get(key) for key in ("layers", "preset", "train_length")}
    others = {"impl", "trainable", "masks", "penalties", "backend"} | set(named)
    options = {key: value for key, value in settings.items() if key not in others}
    requests_of(variant, named["layers"], options, named["preset"], named["train_length"])
    check_impl(settings.get("impl", "auto"))
    masks.check_mode(settings.get("masks"))
    check_penalties(settings.get("penalties", AUTO))
    check_backend(
        settings.get("backend", "dispatch"), settings.get("impl", "auto"), settings.get("masks")
    )
    before = state_of_model(model)
    sample, why = runnable(model)
    cases = [] if sample is None else list(cases_of(model, sample))
    own = [outputs_of(model, case) for case in cases[:1]]
    generated = _generate(model, sample.inputs) if sample is not None else {}
    try:
        handle = patch(model, variant, **settings)
    except ValueError as error:
        yield Check("patch", False, None, sentence(error))
        yield _restored(model, before, cases, own)
        return
    count = len(attention_modules(model))
    yield Check("patch", True, None, f"{len(handle.names)} of {count} attention modules")
    try:
        if sample is None:
            yield Check("run", False, None, f"no inputs could be made: {why}")
        else:
            yield from _figures(handle)
            yield _generation(model, sample.inputs, generated)
    finally:
        handle.unpatch()
    if sample is not None:
        yield from _identity(model, cases, settings)
    yield _restored(model, before, cases, own)


def _figures(handle: Patch) -> Iterator[Check]:
    """The patch's self-test, figure by figure."""
    state = state_of(handle.model)
    assert state is not None
    try:
        result = verify_model(
            handle.model, [*state.configs, *state.eager], None, None, 0, strict=False
        )
    except ValueError as error:
        yield Check("self-test", False, None, sentence(error))
        return
    note = f"{result.reached} of {result.modules} patched modules ran, all with their variant"
    yield Check("reached", True, None, note)
    for field, title in TITLES.items():
        if field != "identity":
            figure = getattr(result, field)
            passed = False if field in result.failed else (None if figure is None else True)
            yield Check(title, passed, figure, result.notes[field])


def _identity(model: nn.Module, cases: list[Case], settings: dict[str, Any]) -> Iterator[Check]:
    """Softmax by a patch against the model's own operator and against eager attention."""
    tolerance = 5e-2 if _half(model) else 1e-4
    chosen = {
        key: settings[key]
        for key in ("layers", "impl", "masks", "penalties", "backend")
        if key in settings
    }
    cases, untaken = _taken(model, cases)
    expected = {"its own operator": [outputs_of(model, case) for case in cases]}
    parts = [
        meaning_of(model, case, own)
        for case, own in zip(cases, expected["its own operator"], strict=True)
    ]
    try:
        with _eager(model):
            expected["eager attention"] = [outputs_of(model, case) for case in cases]
    except Exception as error:
        why = f"with eager attention the unpatched model raises {sentence(error)}"
        yield Check("identity to eager attention", None, None, why)
    try:
        with patch(model, "softmax", **chosen):
            got = [outputs_of(model, case) for case in cases]
    except Exception as error:
        for name in expected:
            yield Check(f"identity to {name}", False, None, f"patched it raises {sentence(error)}")
        return
    changes = {
        name: max(
            (
                difference(one, other, part)
                for one, other, part in zip(outputs, got, parts, strict=True)
            ),
            default=math.inf,
        )
        for name, outputs in expected.items()
    }
    names = ", ".join([*(case.name for case in cases), *untaken])
    eager_passed = changes.get("eager attention", math.inf) <= tolerance
    for name, change in changes.items():
        note = f"softmax against {name}, {names}"
        passed: bool | None = change <= tolerance
        if not passed and eager_passed:
            passed, note = None, f"{name} and eager attention of this model differ, {names}"
        yield Check(f"identity to {name}", passed, change, note)


def _taken(model: nn.Module, cases: list[Case]) -> tuple[list[Case], list[str]]:
    """The cases that the unpatched model runs, and of padding that it does not take, why."""
    taken, untaken = [], []
    for case in cases:
        try:
            outputs_of(model, case)
        except Exception as error:
            if case.name == "plain":
                raise
            untaken.append(f"not {case.name}, where the unpatched model raises {sentence(error)}")
        else:
            taken.append(case)
    return taken, untaken


def _generate(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor | str]:
    """Logits of a few greedy steps without a cache and with each kind; why where it cannot."""
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        return {"no": f"{type(model).__name__} does not generate: its can_generate is False"}
    found: dict[str, Tensor | str] = {}
    kinds: dict[str, dict[str, Any]] = {
        "no": {"use_cache": False},
        "dynamic": {"use_cache": True},
        "static": {"use_cache": True, "cache_implementation": "static"},
    }
    prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    if "input_ids" in prompt:
        prompt.setdefault("attention_mask", torch.ones_like(prompt["input_ids"]))
    extra: dict[str, Any] = {}
    if getattr(model.config, "is_encoder_decoder", False):
        settings: Any = model.generation_config
        named = (settings.decoder_start_token_id, settings.bos_token_id)
        extra = {"decoder_start_token_id": next((n for n in named if n is not None), 0)}
    for kind, arguments in kinds.items():
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                result = model.generate(  # type: ignore[operator]
                    **prompt,
                    **arguments,
                    **extra,
                    do_sample=False,
                    max_new_tokens=STEPS,
                    min_new_tokens=STEPS,
                    disable_compile=True,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            found[kind] = torch.stack(result.logits)
        except Exception as error:
            found[kind] = f"it raises {sentence(error)}"
    return found


def _generation(
    model: nn.Module, inputs: dict[str, Tensor], before: dict[str, Tensor | str]
) -> Check:
    """Caches against no cache, where the unpatched model's agree."""
    plain = before.get("no")
    if not isinstance(plain, Tensor):
        return Check("generate", None, None, plain or "no inputs could be made")
    tolerance = 5e-2 if _half(model) else 1e-4
    steady = {
        kind
        for kind in ("dynamic", "static")
        if isinstance(value := before[kind], Tensor) and difference([plain], [value]) <= tolerance
    }
    why_not = [
        f"{kind} cache: the unpatched model "
        + (
            value.removeprefix("it ")
            if isinstance(value, str)
            else f"differs by {difference([plain], [value]):.3g}"
        )
        for kind, value in before.items()
        if kind not in ("no", *steady)
    ]
    lacking = "; ".join(why_not)
    if not steady:
        return Check("generate", None, None, lacking)
    after = _generate(model, inputs)
    broken = [value for kind in ("no", *steady) if isinstance(value := after[kind], str)]
    if broken:
        return Check("generate", False, None, broken[0])
    worst = max(difference([after["no"]], [after[kind]]) for kind in steady)  # type: ignore[list-item]
    note = f"{' and '.join(sorted(steady))} cache against none, {STEPS} greedy tokens"
    note += f"{NOT_SO}{lacking}" if lacking else ""
    return Check("generate", worst <= tolerance, worst, note)


def _restored(
    model: nn.Module, before: tuple[Any, ...], cases: list[Case], own: list[list[Tensor]]
) -> Check:
    after = state_of_model(model)
    if after != before:
        kinds = ("state dict keys", "config", "attention implementation")
        names = [n for n, a, b in zip(kinds, before, after, strict=True) if a != b]
        return Check("restore", False, None, f"changed: {', '.join(names)}")
    if not own:
        return Check("restore", True, None, "keys, config and operators are as before")
    change = difference(own[0], outputs_of(model, cases[0]))
    note = "outputs, keys, config and operators after removing the patch"
    return Check("restore", change == 0, change, note)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Eager attention everywhere, for as long as it takes."""
    configs = {
        id(config): config
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None
        and implementation_of(config) is not None
    }
    before = {key: implementation_of(config) for key, config in configs.items()}
    try:
        for config in configs.values():
            set_implementation(config, "eager")
        yield
    finally:
        for key, config in configs.items():
            set_implementation(config, before[key])


def _half(model: nn.Module) -> bool:
    return next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
