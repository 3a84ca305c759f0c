"""Kimi Linear on CPU and CUDA: kernels, and the whole model."""

__version__ = "0.1.0"
