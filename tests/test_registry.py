"""The registry, out-of-tree variants, and what an import costs."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import attnvariants
from attnvariants import Option, Variant, attention, get_variant, list_variants, register, registry


def test_every_variant_describes_itself():
    for name in list_variants():
        variant = get_variant(name)
        assert variant.name == name
        assert variant.summary.endswith(".")
        assert "=" in variant.formula
        assert variant.arxiv
        assert variant.row_sum in ("one", "at most one", "any")
        assert all(option.doc for option in variant.options.values())
        assert variant.resolve({}) == {n: o.default for n, o in variant.options.items()}


def test_presets_of_ssmax():
    presets = get_variant("ssmax").presets
    assert presets["pretrain"](1024) == {"s": 1.0}
    # 1 / mean ln n over 1..1024, as recomputed in the paper's discussion
    assert presets["retrofit"](1024)["s"] == pytest.approx(0.168471, abs=1e-6)
    mean = torch.arange(1, 301, dtype=torch.float64).log().mean()
    assert presets["retrofit"](300)["s"] == pytest.approx(1 / float(mean))
    assert presets["retrofit"](1)["s"] == 1.0


def test_out_of_tree_variant_gets_everything(monkeypatch):
    """Softmax off by one, from its formula alone: both engines, gradients, a learned number.

    w_j = e^{s_j} / (e^c + sum_k e^{s_k})
    """
    monkeypatch.setattr(registry, "_registered", {})

    def ratio(scores, rows, *, c):
        peak = scores.amax(-1, keepdim=True).detach().clamp(min=0)
        e = (scores - peak).exp()
        return e, e.sum(-1, keepdim=True) + (c - peak).exp()

    mine = Variant(
        doc=test_out_of_tree_variant_gets_everything.__doc__,
        ratio=ratio,
        options={"c": Option(0.0, "sink logit", learned=True)},
        row_sum="at most one",
    )
    assert register("off_by_one", mine).name == "off_by_one"
    assert "off_by_one" in list_variants()
    q, k, v = (torch.randn(2, 4, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    c = torch.randn(4, dtype=torch.float64, requires_grad=True)
    scores = torch.cat([c.view(1, 4, 1, 1).expand(2, 4, 6, 1), q @ k.transpose(-1, -2) / 2], -1)
    want = scores.softmax(-1)[..., 1:] @ v
    grad_out = torch.randn_like(want)
    wanted = torch.autograd.grad(want, (q, k, v, c), grad_out)
    for impl in ("reference", "chunked"):
        got = attention(q, k, v, "off_by_one", c=c, impl=impl)
        torch.testing.assert_close(got, want)
        for one, other in zip(
            torch.autograd.grad(got, (q, k, v, c), grad_out), wanted, strict=True
        ):
            torch.testing.assert_close(one, other)
    assert attention(q, k, v, mine).shape == want.shape


def in_fresh_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import attnvariants; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} "
        "- set(sys.stdlib_module_names)))"
    )
    assert in_fresh_process(code).split() == ["attnvariants"]


def test_variants_copy_and_pickle_by_name():
    softpick = get_variant("softpick")
    assert copy.deepcopy(softpick) is softpick
    assert pickle.loads(pickle.dumps(softpick)) is softpick
    with pytest.raises(TypeError, match="only registered variants"):
        pickle.dumps(Variant(doc="", ratio=softpick.ratio))


def test_version_is_one():
    assert attnvariants.__version__ == attnvariants._version.__version__
