"""The model of a benchmark: the one inside the package, or a shape with random weights."""

import argparse
from typing import Any

from common import arguments
from kimi_linear.testing import random_model
from random_checkpoint import SHAPES, shape

import kimi_linear as kl


def model_arguments(
    description: str, devices: list[str] | None = None
) -> argparse.ArgumentParser:
    """The options that open_model() reads, beside those every benchmark has. devices: no others."""
    parser = arguments(description)
    parser.add_argument("--device", default="cpu", choices=devices)
    parser.add_argument("--shape", choices=SHAPES, help="random weights; else the small model")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--batch-invariant", action="store_true")
    return parser


def open_model(options: argparse.Namespace, **sizes: Any) -> kl.Model:
    sizes |= {
        "device": options.device,
        "dtype": options.dtype,
        "batch_invariant": options.batch_invariant,
    }
    if options.shape is None:
        return kl.load(**sizes, progress=False)
    return random_model(shape(options.shape), seed=0, **sizes)
