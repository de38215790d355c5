"""Longer work: checkpoints, ablation, the ends of the demo, the steps around an engine."""
