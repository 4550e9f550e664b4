"""Run as a module: model types on stdin, their outcomes as JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict


def main() -> None:
    """Answer until stdin ends; whatever models print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    from attnvariants.hf.architectures.compare import Outcome, drive
    from attnvariants.hf.outputs import sentence

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        name = line.strip()
        try:
            outcome = drive(name)
        except Exception as error:
            outcome = Outcome(name, verdict="different", note=sentence(error))
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
