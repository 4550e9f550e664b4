"""The names of transformers that change are asked for in one module, which knows all spellings."""

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from attnvariants.hf import names

PACKAGE = Path(names.__file__).parents[1]
CHANGING = re.compile(
    r"past_key_value|cache_params|_attn_implementation|ALL_(MASK_)?ATTENTION_FUNCTIONS"
    r"|AttentionInterface|AttentionMaskInterface|eager_attention_forward|masking_utils"
    r"|(sdpa|eager)_mask$|causal_mask_function|_overlay$|output_capturing|_active_collector"
    r"|ALL_PARALLEL_STYLES|_global_mapping|unwrap_model"
)
# As an argument of from_pretrained and a field of config.json it is transformers' public name.
PUBLIC = re.compile(r"(?<!_)attn_implementation|set_attn_implementation")
PRIVATE_MODULES = ("masking_utils", "modeling_utils", "integrations", "utils")


def asked_for(tree):
    """Identifiers, attributes, keyword arguments, imports and strings that are not docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node.lineno, PUBLIC.sub("", node.value)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, PUBLIC.sub("", node.arg)
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "transformers" and parts[1:2] and parts[1] in PRIVATE_MODULES:
                yield node.lineno, "masking_utils"
            for alias in node.names:
                yield node.lineno, alias.name


def test_nothing_else_asks_for_a_name_that_changes():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {what!r}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != Path(names.__file__)
        for line, what in asked_for(ast.parse(path.read_text()))
        if CHANGING.search(what)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "run(root, past_key_values=cache)",
        "'past_key_values' in accepts",
        "getattr(config, '_attn_implementation', None)",
        "config._attn_implementation_internal = 'eager'",
        "from transformers.masking_utils import sdpa_mask",
        "from transformers.utils import output_capturing",
        "re.search(r'self\\._attn_implementation', text)",
        "f'{x} ALL_ATTENTION_FUNCTIONS'",
    ],
)
def test_each_way_to_ask_is_seen(line):
    assert any(CHANGING.search(what) for _, what in asked_for(ast.parse(line)))


def of(forward):
    return inspect.signature(forward).parameters


def test_both_spellings_of_the_cache():
    def new(self, input_ids, cache=None, use_cache=None): ...
    def old(self, input_ids, past_key_values=None, use_cache=None): ...
    def renamed(self, input_ids, kv_memory=None, use_cache=None): ...
    def xlm(self, input_ids, cache: "dict[str, object] | None" = None): ...
    def mamba(self, input_ids, cache_params=None, use_cache=None): ...

    assert names.cache_argument(of(new)) == "cache"
    assert names.cache_argument(of(old)) == "past_key_values"
    for forward in (renamed, xlm, mamba):
        assert names.cache_argument(of(forward)) is None
    assert [names.memory_argument(of(f)) for f in (new, old, renamed)] == [None] * 3
    assert names.memory_argument(of(xlm)) == "cache"
    assert names.memory_argument(of(mamba)) == "cache_params"

    for forward, name in ((new, "cache"), (old, "past_key_values")):
        model = type("Model", (), {"forward": forward})()
        assert names.with_cache(model, 1) == {name: 1}
        assert names.cache_of(SimpleNamespace(**{name: 1})) == 1
    with pytest.raises(ValueError, match=r"Model\.forward takes no cache by a name that is known"):
        names.with_cache(type("Model", (), {"forward": renamed})(), 1)
    assert names.cache_of(SimpleNamespace(kv_memory=1)) is None


def test_this_transformers_has_every_helper_that_masks_are_made_with(monkeypatch):
    helpers = names.masking()
    assert all((helpers.sdpa, helpers.eager, helpers.causal, helpers.both))
    from transformers import masking_utils

    monkeypatch.setattr(names, "_masking", None)
    monkeypatch.delattr(masking_utils, "sdpa_mask")
    with pytest.raises(ImportError, match="has no sdpa_mask in its masking_utils"):
        names.masking()


def test_llama_takes_its_cache_by_a_known_name():
    import transformers

    assert names.cache_argument(of(transformers.LlamaForCausalLM.forward)) in names.CACHES
