"""What the losses cost beside the formulas they replace: ``python -m benchmarks.report``, or ``pytest benchmarks``."""
