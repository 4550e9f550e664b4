"""The classes with attention of their own whose masks and softmax `softmax_hook` knows.

Each was compared with its eager attention: what it hides, what its scores hold besides products
of queries and keys, and that it computes one softmax over the keys.
"""

from __future__ import annotations

import math
from inspect import isfunction
from typing import NamedTuple

from torch import nn

_MODELS = "transformers.models."


class Known(NamedTuple):
    """What is known of a class.

    Attributes:
        bias: whether its scores hold a position bias, or the attribute that says so.
        alibi: the argument of its forward, `[batch * heads or heads, 1, keys or more]`, that holds
            the bias if that is ALiBi; it differs from minus slope times distance by a number for
            each row, which a softmax does not see.
        shifted: likewise, but it cannot be told what the rows differ by.
        hidden: what it adds to hidden scores if that is not the lowest number of a dtype.
        divided_by: the attribute that it divides masked scores by.
        streams: how many attentions a call may compute, one softmax each.
        unless: the attribute that makes its softmax another function.
        sdpa: whether it takes torch's SDPA in place of a softmax if its config says so.
    """

    bias: bool | str = False
    alibi: str = ""
    shifted: bool = False
    hidden: float = -math.inf
    divided_by: str = ""
    streams: int = 1
    unless: str = ""
    sdpa: bool = False


PLAIN = Known()
BIASED = Known(bias=True)
KNOWN: dict[str, Known] = {
    "bark.BarkSelfAttention": PLAIN,
    "big_bird.BigBirdSelfAttention": PLAIN,
    "blip.BlipAttention": PLAIN,
    "blip.BlipTextSelfAttention": PLAIN,
    "bloom.BloomAttention": Known(bias=True, alibi="alibi"),
    "canine.CanineSelfAttention": PLAIN,
    "clvp.ClvpSelfAttention": PLAIN,
    "codegen.CodeGenAttention": Known(divided_by="scale_attn"),
    "convbert.ConvBertSelfAttention": PLAIN,
    "cpmant.CpmAntAttention": BIASED,
    "data2vec.Data2VecVisionSelfAttention": BIASED,
    "deberta.DisentangledSelfAttention": Known(bias="relative_attention"),
    "deberta_v2.DisentangledSelfAttention": Known(bias="relative_attention"),
    "falcon.FalconAttention": Known(bias="alibi", shifted=True, sdpa=True),
    "fastspeech2_conformer.FastSpeech2ConformerAttention": BIASED,
    "flaubert.MultiHeadAttention": PLAIN,
    "flava.FlavaSelfAttention": PLAIN,
    "fsmt.Attention": PLAIN,
    "funnel.FunnelRelMultiheadAttention": Known(bias=True, hidden=-1e6),
    "git.GitSelfAttention": PLAIN,
    "glpn.GLPNEfficientSelfAttention": PLAIN,
    "gpt_neo.GPTNeoSelfAttention": PLAIN,
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": PLAIN,
    "gptj.GPTJAttention": PLAIN,
    "groupvit.GroupViTAttention": PLAIN,
    "ibert.IBertSelfAttention": Known(unless="quant_mode"),
    "imagegpt.ImageGPTAttention": PLAIN,
    "led.LEDDecoderAttention": PLAIN,
    "luke.LukeSelfAttention": PLAIN,
    "lxmert.LxmertAttention": PLAIN,
    "megatron_bert.MegatronBertSelfAttention": PLAIN,
    "mgp_str.MgpstrAttention": PLAIN,
    "mobilevit.MobileViTSelfAttention": PLAIN,
    "mpnet.MPNetSelfAttention": BIASED,
    "mpt.MptAttention": Known(bias=True, alibi="position_bias"),
    "mvp.MvpAttention": PLAIN,
    "openai.Attention": Known(hidden=-1e4),
    "pvt.PvtEfficientSelfAttention": PLAIN,
    "pvt_v2.PvtV2SelfAttention": PLAIN,
    "rembert.RemBertSelfAttention": PLAIN,
    "roformer.RoFormerSelfAttention": PLAIN,
    "sam.SamVisionAttention": BIASED,
    "sam_hq.SamHQVisionAttention": BIASED,
    "squeezebert.SqueezeBertSelfAttention": PLAIN,
    "tapas.TapasSelfAttention": PLAIN,
    "timesformer.TimesformerSelfAttention": PLAIN,
    "trocr.TrOCRAttention": PLAIN,
    "visual_bert.VisualBertSelfAttention": PLAIN,
    "vitdet.VitDetAttention": Known(bias="use_relative_position_embeddings"),
    "vits.VitsAttention": BIASED,
    "xglm.XGLMAttention": PLAIN,
    "xlm.MultiHeadAttention": PLAIN,
    "xlnet.XLNetRelativeAttention": Known(bias=True, hidden=-1e30, streams=2),
}


def known_of(cls: type[nn.Module]) -> Known | None:
    """What is known of the class whose forward and helpers run, untouched, in this one."""
    owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
    own = {name: value for name, value in vars(owner).items() if isfunction(value)}
    if any(value.__module__ != owner.__module__ for value in own.values()):
        return None
    derived = cls.__mro__[: cls.__mro__.index(owner)]
    if any(own.keys() & vars(base).keys() for base in derived):
        return None
    return KNOWN.get(_name(owner))


def known_parent(cls: type[nn.Module]) -> str:
    """The known class that this one derives from, or an empty string."""
    return next((base.__name__ for base in cls.__mro__[1:] if _name(base) in KNOWN), "")


def _name(cls: type) -> str:
    """`folder.Class` in transformers, `module:Class` elsewhere."""
    if not cls.__module__.startswith(_MODELS):
        return f"{cls.__module__}:{cls.__name__}"
    folder, _, _ = cls.__module__.removeprefix(_MODELS).partition(".")
    return f"{folder}.{cls.__name__}"
