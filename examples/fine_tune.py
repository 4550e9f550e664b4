"""Fine-tune a model with a variant: patch, train, save, load, and the same numbers again."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

from attnvariants import from_pretrained, patch, save_pretrained
from attnvariants.hf import param_groups

logging.set_verbosity_error()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
model = LlamaForCausalLM(config)

# SSMax as it goes into a model trained with softmax: its temperature starts at a mean of 1
handle = patch(model, "ssmax", preset="retrofit")
print(handle.report)

# sequences that repeat after 16 tokens, so that attention has something to find
half = torch.randint(0, 64, (64, 16))
tokens = torch.cat([half, half], 1)

# weight decay would pull the temperatures to 0: these groups leave the learned values out of it
optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=5e-3)
for step in range(40):
    loss = model(tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 13 == 0:
        print(f"step {step:2d}: loss {loss.item():.3f}")
for name, value in handle.parameters.items():
    print(f"{name}: {[round(v, 3) for v in value.tolist()]}")

model.eval()
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(model, folder)
    again = from_pretrained(AutoModelForCausalLM, folder)
    with torch.no_grad():
        same = torch.equal(again(tokens).logits, model(tokens).logits)
    print("loaded with its variants, same logits:", same)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        print("a plain from_pretrained says:", str(error).split(" is not")[0])
