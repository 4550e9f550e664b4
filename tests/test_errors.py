"""Bad input: one clear sentence each, before anything is computed."""

import pytest
import torch

import attnvariants
from attnvariants import attention, attention_varlen, get_variant, register

Q = torch.randn(2, 4, 5, 8)
BOUNDS = torch.tensor([0, 5, 10], dtype=torch.int32)

BAD_CALLS = {
    "variant": ({"variant": "softpik"}, "unknown variant 'softpik'; did you mean 'softpick'"),
    "variant_type": ({"variant": 3}, "variant must be a name or a Variant, got int"),
    "option": ({"variant": "softpick", "epz": 1}, "softpick takes eps; got 'epz'"),
    "no_options": ({"alpha": 1}, "softmax takes no options; got 'alpha'"),
    "option_range": ({"variant": "softpick", "eps": 0}, "eps must be a finite number > 0, got 0"),
    "option_choice": ({"variant": "sa_softmax", "form": "y"}, "'x' or 'minmax0', got 'y'"),
    "option_bool": ({"variant": "sa_softmax", "detach_minmax": 1}, "False or True, got 1"),
    "option_nan": ({"variant": "ssmax", "s": float("nan")}, "ssmax's s must be a finite number"),
    "option_tensor": ({"variant": "softpick", "eps": torch.ones(4)}, "it is not learned"),
    "learned_nan": ({"variant": "ssmax", "s": torch.full((4,), torch.nan)}, "holds NaN"),
    "learned_heads": ({"variant": "ssmax", "s": torch.ones(3)}, r"shape \[\] or \[4\]"),
    "learned_int": ({"variant": "ssmax", "s": torch.ones(4).int()}, "floating tensor"),
    "max_len": ({"variant": "cosformer", "max_len": 4}, "pass max_len >= 5"),
    "refused": ({"variant": "cosformer", "softcap": 3.0}, "cosformer takes no softcap: its"),
    "rank": ({"query": Q[0]}, r"query must have 4 dimensions.*got shape \[4, 5, 8\]"),
    "not_tensor": ({"key": [1]}, "key must be a torch.Tensor, got list"),
    "integer": (
        {"query": Q.int()},
        "query must be floating point of 16, 32 or 64 bits, got torch.int32",
    ),
    "dtype": ({"value": Q.double()}, "value must have query's dtype torch.float32"),
    "device": ({"key": Q.to("meta")}, "key must be on query's device cpu, got meta"),
    "batch": ({"query": Q[:1]}, "one batch size, got 1, 2 and 2"),
    "heads": ({"query": Q[:, :3]}, "key has 4 heads and query has 3"),
    "kv_heads": ({"value": Q[:, :2]}, "key and value must have as many heads, got 4 and 2"),
    "tokens": ({"value": Q[:, :, :2]}, "key and value must have as many tokens, got 5 and 2"),
    "head_dim": ({"query": Q[..., :4]}, "one head_dim, at least 1, got 4 and 8"),
    "mask_shape": ({"attn_mask": torch.ones(3, 5).bool()}, r"got shape \[3, 5\]"),
    "mask_padding": ({"attn_mask": torch.ones(2, 5).bool()}, r"mask\[:, None, None, :\]"),
    "mask_dtype": ({"attn_mask": torch.ones(5, 5).int()}, "attn_mask must be bool"),
    "mask_device": ({"attn_mask": torch.ones(5, 5, device="meta").bool()}, "move it"),
    "bias_bool": ({"bias": torch.ones(5, 5).bool()}, "bias must be float, got torch.bool"),
    "float8": ({"key": Q.to(torch.float8_e5m2)}, "16, 32 or 64 bits, got torch.float8_e5m2"),
    "causal": ({"causal": "yes"}, "causal must be True or False, got 'yes'"),
    "argument": ({"is_causal": True}, r"got 'is_causal' \(did you mean 'causal'\?\)\."),
    "slopes_nan": ({"alibi_slopes": torch.full((4,), torch.nan)}, "alibi_slopes must be finite"),
    "slopes_kind": ({"alibi_slopes": 0.5}, "must be a floating tensor.*got float"),
    "scale_grad": ({"scale": torch.ones((), requires_grad=True)}, "multiply query by it instead"),
    "cosformer_scale": ({"variant": "cosformer", "scale": -1.0}, "scale must be >= 0"),
    "window": ({"window_size": (-2, 0)}, r"must not be negative.*got \(-2, 0\)"),
    "window_kind": ({"window_size": 3}, "two integers"),
    "slopes": ({"alibi_slopes": torch.ones(3)}, r"shape \[4\] or \[2, 4\], got \[3\]"),
    "scale": ({"scale": float("inf")}, "scale must be a finite number, got inf"),
    "softcap": ({"softcap": -1.0}, "softcap must be a finite number >= 0, got -1.0"),
    "dropout": ({"dropout_p": 1.5}, "dropout_p must be a finite number >= 0 and <= 1, got 1.5"),
    "generator": ({"dropout_p": 0.5, "generator": 3}, "must be a torch.Generator, got int"),
    "impl": ({"impl": "chunkd"}, "unknown impl 'chunkd'; did you mean 'chunked'"),
    "triton": ({"impl": "triton"}, r"impl='triton' cannot run this call: \(1\)"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call(case):
    change, message = BAD_CALLS[case]
    call = {"query": Q, "key": Q, "value": Q, **change}
    with pytest.raises(ValueError, match=message):
        attention(**call)


BAD_PACKS = {
    "start": (torch.tensor([1, 5, 10]), "cu_seqlens_q must start at 0, got 1"),
    "end": (torch.tensor([0, 5, 9]), "must end at the number of query tokens, 10, got 9"),
    "decrease": (torch.tensor([0, 7, 5, 10]), "must not decrease"),
    "float": (torch.tensor([0.0, 10.0]), "int32 or int64"),
    "rank": (torch.tensor([[0, 10]]), r"shape \[sequences \+ 1\]"),
    "number": (torch.tensor([0, 10]), "as many sequences, got 1 and 2"),
}


@pytest.mark.parametrize("case", BAD_PACKS)
def test_bad_pack(case):
    bounds, message = BAD_PACKS[case]
    q = torch.randn(10, 4, 8)
    with pytest.raises(ValueError, match=message):
        attention_varlen(q, q, q, bounds, BOUNDS)


def test_bad_pack_lengths_and_layout():
    q = torch.randn(10, 4, 8)
    with pytest.raises(ValueError, match="max_seqlen_q is 4, but a sequence has 5 tokens"):
        attention_varlen(q, q, q, BOUNDS, BOUNDS, 4, 5)
    with pytest.raises(ValueError, match=r"query must have 3 dimensions, \[tokens, heads"):
        attention_varlen(Q, Q, Q, BOUNDS, BOUNDS)
    with pytest.raises(ValueError, match="max_seqlen_q must be an integer or None, got 'a'"):
        attention_varlen(q, q, q, BOUNDS, BOUNDS, "a")


def test_drop_ins_say_what_they_lack():
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal=True"):
        attnvariants.scaled_dot_product_attention(
            Q, Q, Q, attn_mask=torch.ones(5, 5).bool(), is_causal=True
        )
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        attnvariants.scaled_dot_product_attention(Q, Q[:, :2], Q[:, :2])
    with pytest.raises(ValueError, match="query must be a tensor of at least 2 dimensions"):
        attnvariants.scaled_dot_product_attention(Q[0, 0, 0], Q, Q)
    with pytest.raises(ValueError, match=r"query must be a torch\.Tensor, got NoneType"):
        attnvariants.scaled_dot_product_attention(None, Q, Q)
    with pytest.raises(ValueError, match="attn_mask must broadcast to"):
        attnvariants.scaled_dot_product_attention(
            Q[0], Q[0], Q[0], attn_mask=torch.ones(3, 2, 4, 5, 5).bool()
        )
    q = torch.randn(10, 4, 8)
    with pytest.raises(ValueError, match=r"k must be a pool \[pages, page_size, heads, head_dim\]"):
        attnvariants.flash_attn_varlen_func(q, q, q, BOUNDS, BOUNDS, block_table=BOUNDS)


def test_register():
    with pytest.raises(ValueError, match="register takes a Variant, got dict"):
        register("mine", {})
    with pytest.raises(ValueError, match="variant 'softmax' exists already"):
        register("softmax", get_variant("softmax"))
    with pytest.raises(ValueError, match="must be a Python identifier"):
        register("my variant", get_variant("softmax"))


def test_a_float_mask_that_only_hides_is_no_bias():
    hides = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    lowest = hides.clamp(min=torch.finfo(torch.float32).min)
    want = attention(Q, Q, Q, "cosformer", causal=True)
    for mask in (hides, lowest):
        torch.testing.assert_close(attention(Q, Q, Q, "cosformer", attn_mask=mask), want)
    with pytest.raises(ValueError, match="cosformer takes no bias"):
        attention(Q, Q, Q, "cosformer", attn_mask=hides + 1)
