"""What attention does in a model: sinks, row mass, entropy, sparsity, outliers, dead heads.

    from attnvariants.diagnostics import attention_metrics, diagnose
    attention_metrics(query, key, variant="softpick", causal=True).sink_rate      # [heads]
    print(diagnose(model, input_ids).summary())

Weights are read block by block, so memory is O(tokens). `DEFINITIONS` says in one sentence what
each figure is and where it comes from.
"""

from attnvariants.diagnostics.activations import (
    ActivationMetrics,
    ActivationSums,
    activation_metrics,
)
from attnvariants.diagnostics.collect import diagnose
from attnvariants.diagnostics.definitions import DEFINITIONS
from attnvariants.diagnostics.metrics import AttentionMetrics, AttentionSums, attention_metrics
from attnvariants.diagnostics.report import LayerReport, Report

__all__ = [
    "DEFINITIONS",
    "ActivationMetrics",
    "ActivationSums",
    "AttentionMetrics",
    "AttentionSums",
    "LayerReport",
    "Report",
    "activation_metrics",
    "attention_metrics",
    "diagnose",
]
