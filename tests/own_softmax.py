"""A small decoder whose attention computes its softmax itself, as ever fewer of transformers' do.

Tests of the softmax hook and of refusals take it, so that they do not hang on which families call
transformers' attention interface in the version that is installed.
"""

import dataclasses
import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from attnvariants.hf.names import CACHES
from attnvariants.hf.softmax_known import KNOWN, PLAIN
from attnvariants.hf.source import dispatches

FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE_FIELD = next(name for name in CACHES if name in FIELDS)
KNOWN[f"{__name__}:OwnAttention"] = PLAIN


def calls_the_interface(cls):
    """Whether the attention of a model's file has moved to transformers' interface."""
    file = vars(inspect.getmodule(cls)).values()
    found = [thing for thing in file if inspect.isclass(thing) and "Attention" in thing.__name__]
    return any(dispatches(thing) for thing in found if issubclass(thing, nn.Module))


class OwnConfig(PretrainedConfig):
    model_type = "own_softmax"

    def __init__(self, vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, **kwargs):
        self.vocab_size, self.n_positions = vocab_size, n_positions
        self.n_embd, self.n_layer, self.n_head = n_embd, n_layer, n_head
        self.hidden_size, self.num_hidden_layers = n_embd, n_layer
        self.num_attention_heads = n_head
        # transformers 4 ties them by default
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class OwnAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.num_heads = config, layer_idx, config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(0.0)

    def forward(self, x, attention_mask, memory=None):
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        if memory is not None:
            key, value = memory.update(key, value, self.layer_idx)
        out, weights = self._attn(query, key, value, attention_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights

    def _attn(self, query, key, value, attention_mask):
        scores = query @ key.mT * query.shape[-1] ** -0.5 + attention_mask
        weights = self.attn_dropout(F.softmax(scores, dim=-1).to(value.dtype))
        return weights @ value, weights


class OwnBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.LayerNorm(config.n_embd)
        self.attn = OwnAttention(config, layer_idx)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 64), nn.GELU(), nn.Linear(64, config.n_embd)
        )

    def forward(self, x, attention_mask, memory=None):
        out, weights = self.attn(self.norm(x), attention_mask, memory)
        x = x + out
        return x + self.mlp(x), weights


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = False


class OwnModel(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(OwnBlock(config, index) for index in range(config.n_layer))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, attention_mask=None, position_ids=None, memory=None):
        past = 0 if memory is None else memory.get_seq_length()
        rows = past + torch.arange(input_ids.shape[1], device=input_ids.device)
        position_ids = rows[None] if position_ids is None else position_ids
        x = self.wte(input_ids) + self.wpe(position_ids)
        keep = rows[:, None] >= torch.arange(past + len(rows), device=x.device)
        keep = keep.expand(x.shape[0], 1, -1, -1)
        if attention_mask is not None:
            keep = keep & attention_mask[:, None, None].bool()
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        mask, weights = torch.where(keep, zero, torch.finfo(x.dtype).min), []
        for block in self.h:
            x, found = block(x, mask, memory)
            weights.append(found)
        return x, tuple(weights)


class OwnForCausalLM(OwnPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = OwnModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        output_attentions=None,
        return_dict=None,
        **kwargs,
    ):
        memory = past_key_values if cache is None else cache
        if use_cache and memory is None:
            memory = DynamicCache()
        x, weights = self.transformer(input_ids, attention_mask, position_ids, memory)
        logits, loss = self.lm_head(x), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            attentions=weights if output_attentions else None,
            **{CACHE_FIELD: memory},
        )
