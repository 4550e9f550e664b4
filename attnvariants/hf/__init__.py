"""Hugging Face models: replace the attention operator of a loaded model, and put it back.

    from attnvariants.hf import patch

    with patch(model, "ssmax", preset="retrofit") as handle:
        print(handle.report)
        print(handle.verify())
        model.generate(...)

Works on models that call attention through transformers' attention interface (transformers
>= 4.56); all others are refused with the reason and left as they are.
"""

from attnvariants.hf.patcher import Patch, patch, unpatch
from attnvariants.hf.report import Report, Row
from attnvariants.hf.verify import Verification

__all__ = ["Patch", "Report", "Row", "Verification", "patch", "unpatch"]
