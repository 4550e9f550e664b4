"""Swap a variant into a Hugging Face model, check it, measure it, and take it out again."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnvariants import patch, unpatch
from attnvariants.diagnostics import diagnose

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
tokens = torch.randint(0, 128, (2, 48))
with torch.no_grad():
    before = model(tokens).logits

# SSMax as it goes into a model trained with softmax: mean temperature 1 over its training length
handle = patch(model, "ssmax", preset="retrofit", layers=[0, 1])
patch(model, "softpick", layers=[2])
print(handle.report)
print(handle.verify())
for figure, value in diagnose(model, tokens).summary().items():
    print(f"  {figure}: {value:.4g}")
print("new parameters:", [name for name, _ in model.named_parameters() if "attn_variant" in name])

unpatch(model)
with torch.no_grad():
    print("restored exactly:", torch.equal(model(tokens).logits, before))
