"""Checkpoints of any size with random weights, written as fast as the storage takes them.

Every tensor is cut from one block of normal values, from a place that its name chooses, so that
98 GB cost the time of writing 98 GB:

    python benchmarks/random_checkpoint.py FOLDER --shape 48b

Layers add a fraction of what they read: else the rounding
of bfloat16 would grow from layer to layer until no two implementations could be compared.
"""

import argparse
import json
import math
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from kimi_linear._tensors import FLOAT32
from kimi_linear.config import KimiLinearConfig
from kimi_linear.testing import config_json, tiny_config, to_bf16

BLOCK = 4_194_301  # values; prime, so that no two rows of a matrix start at the same one
GAINS = {"lm_head": 3.0, "experts": 0.5}  # of matrices; the others 0.4
WORKERS = 16
SHAPES = ("48b", "wide5", "small")


@cache
def normals() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(BLOCK, np.float32)


@cache
def block(mean: float, std: float, dtype: str) -> memoryview:
    x = mean + std * normals()
    return memoryview(x if dtype == "F32" else to_bf16(x)).cast("B")


def moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor: decays from long memory to almost none, norms
    near 1, logits a few units apart."""
    fixed = {"A_log": (1.7, 0.5), "dt_bias": (-4.0, 1.5), "norm.weight": (1.0, 0.1),
             "e_score_correction_bias": (0.0, 0.1), "conv1d.weight": (0.0, 0.5),
             "embed_tokens.weight": (0.0, 1.0)}  # fmt: skip
    for end, found in fixed.items():
        if name.endswith(end):
            return found
    gain = next((g for part, g in GAINS.items() if part in name), 0.4)
    return 0.0, gain * shape[-1] ** -0.5


class Tensor:
    """Where a tensor lies in its file."""

    def __init__(self, name: str, shape: tuple[int, ...], start: int) -> None:
        self.name, self.shape = name, shape
        self.dtype = "F32" if name.endswith(FLOAT32) else "BF16"
        self.itemsize = {"F32": 4, "BF16": 2}[self.dtype]
        self.start, self.end = start, start + math.prod(shape) * self.itemsize

    def entry(self) -> dict:
        offsets = [self.start, self.end]
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": offsets}

    def write(self, fd: int, header: int) -> None:
        values = block(*moments(self.name, self.shape), self.dtype)
        at, source = self.start, zlib.crc32(self.name.encode()) % BLOCK * self.itemsize
        while at < self.end:
            n = min(self.end - at, len(values) - source)
            n = os.pwrite(fd, values[source : source + n], header + at)
            at, source = at + n, (source + n) % len(values)


def shards(config: KimiLinearConfig, shard_bytes: int) -> list[list[Tensor]]:
    files: list[list[Tensor]] = [[]]
    for name, shape in config.tensor_shapes().items():
        if files[-1] and files[-1][-1].end >= shard_bytes:
            files.append([])
        files[-1].append(Tensor(name, shape, files[-1][-1].end if files[-1] else 0))
    return files


def shape(name: str) -> KimiLinearConfig:
    """The published model, five layers at its width (four KDA, one MLA; one dense, four with
    experts), or a tiny one."""
    full = KimiLinearConfig.kimi_linear_48b()
    if name == "48b":
        return full
    if name == "small":
        return tiny_config(model_max_length=1 << 20)
    data = full.to_dict()
    data["num_hidden_layers"] = 5
    data["linear_attn_config"] |= dict(kda_layers=(1, 2, 3, 5), full_attn_layers=(4,))
    return KimiLinearConfig.from_dict(data)


def write(path: Path, config: KimiLinearConfig, *, shard_bytes: int = 5 * 10**9,
          workers: int = WORKERS) -> int:  # fmt: skip
    """Write the checkpoint into a directory; returns the bytes of its tensors."""
    path.mkdir(parents=True, exist_ok=True)
    files, weight_map, total = shards(config, shard_bytes), {}, 0
    kinds = {(*moments(t.name, t.shape), t.dtype) for tensors in files for t in tensors}
    with ThreadPoolExecutor(workers) as pool:
        normals()
        list(pool.map(lambda kind: block(*kind), kinds))
        for i, tensors in enumerate(files):
            file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
            weight_map |= {t.name: file for t in tensors}
            total += tensors[-1].end
            write_file(path / file, tensors, pool)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config_json(config, "native"), indent=1))
    return total


def write_file(file: Path, tensors: list[Tensor], pool: ThreadPoolExecutor) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}} | {t.name: t.entry() for t in tensors})
    text += " " * (-len(text) % 8)
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(fd, len(text).to_bytes(8, "little") + text.encode())
        list(pool.map(lambda t: t.write(fd, 8 + len(text)), tensors))
    finally:
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="48b", choices=SHAPES)
    parser.add_argument("--workers", type=int, default=WORKERS)
    options = parser.parse_args()
    start = time.perf_counter()
    nbytes = write(options.folder, shape(options.shape), workers=options.workers)
    seconds = time.perf_counter() - start
    print(f"# {nbytes / 1e9:.2f} GB written in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
