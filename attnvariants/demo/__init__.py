"""The demonstration: train tiny models and see sinks and lengths, on a CPU, in minutes."""

from attnvariants.demo.experiment import run_demo

__all__ = ["run_demo"]
