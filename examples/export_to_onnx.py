"""Export a patched model to ONNX, and run the file on other lengths and paddings."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnvariants import patch

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
# the default engine: where a graph is recorded, it is the reference
patch(model, "softpick")


class Logits(torch.nn.Module):
    """The model with tensors in and tensors out."""

    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, tokens, mask):
        """Logits of `[batch, tokens]`."""
        return self.model(tokens, attention_mask=mask, use_cache=False).logits


def batch(rows, length, padding):
    """Tokens and their mask, the first row padded on the left."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :padding] = 0
    return torch.randint(0, 128, (rows, length)), mask


sizes = {0: torch.export.Dim("rows", min=2, max=64), 1: torch.export.Dim("length", min=2, max=256)}
path = str(Path(tempfile.mkdtemp()) / "model.onnx")
torch.onnx.export(
    Logits(), batch(3, 9, 0), path, dynamo=True, dynamic_shapes=(sizes, sizes), verbose=False
)
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
for rows, length, padding in ((3, 9, 0), (2, 13, 4)):
    tokens, mask = batch(rows, length, padding)
    (found,) = session.run(None, {"tokens": tokens.numpy(), "mask": mask.numpy()})
    with torch.no_grad():
        wanted = Logits()(tokens, mask)
    apart = (torch.as_tensor(found) - wanted)[mask.bool()].abs().max()
    assert apart < 1e-4, apart
    print(f"{rows} rows of {length} tokens: {apart:.1e} from the model's own logits")
