"""Measurements: networks side by side, kernels against the plain operations, and the demo."""
