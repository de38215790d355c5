"""Inference model -> ONNX -> engines -> bundle."""
