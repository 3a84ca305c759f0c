"""How far each storage of a matrix is from the matrix, and its products from the products.

    python benchmarks/quant_error.py [--model DIR]

Matrices of known kinds at one width of the 48B model, and the big ones of a checkpoint (the small
trained model): int8 and fp8 in groups of 64 columns, int4 in groups of 32, bf16 beside them. The
storage is that of kl.reference, whose bits the CPU and CUDA have. Errors are relative RMS against
the float32 matrix, in float64; x of x w^T is Gaussian. Appends to results/quant_error.jsonl.
"""

import statistics
from pathlib import Path

import numpy as np
from common import Results, arguments
from safetensors import safe_open

import kimi_linear as kl
from kimi_linear import reference

FORMATS = ("bf16", "int8", "fp8", "int4")
ROWS, COLUMNS, TOKENS = 1024, 2304, 64


def outlier_channels(r):
    """One input channel in a hundred is twenty times as large, as after some training."""
    w = r.standard_normal((ROWS, COLUMNS))
    w[:, r.permutation(COLUMNS)[: COLUMNS // 100]] *= 20
    return w


KINDS = {
    "Gaussian": lambda r: r.standard_normal((ROWS, COLUMNS)),
    "Laplace": lambda r: r.laplace(size=(ROWS, COLUMNS)),
    "Student t, 5": lambda r: r.standard_t(5, (ROWS, COLUMNS)),
    "Student t, 3": lambda r: r.standard_t(3, (ROWS, COLUMNS)),
    "outlier channels": outlier_channels,
}


def relative(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def errors(w, r):
    """{format: (of the matrix, of products)}."""
    w = np.asarray(w, np.float32)
    x = r.standard_normal((TOKENS, w.shape[-1]))
    exact, found = w.astype(np.float64), {}
    for name in FORMATS:
        stored = reference.quantize(w, name).dequantize().astype(np.float64)
        found[name] = relative(stored, exact), relative(x @ stored.T, x @ exact.T)
    return found


def checkpoint_matrices(folder):
    """The matrices that `dtype` stores: at least 64 rows and columns, but for the embedding."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and min(shape) >= 64 and "embed" not in name:
                    yield file.get_tensor(name).float().numpy()


def main():
    parser = arguments(__doc__.splitlines()[0])
    small = Path(kl.__file__).parent / "small_model"
    parser.add_argument("--model", metavar="DIR", type=Path, default=small)
    options = parser.parse_args()
    results, r = Results(options), np.random.default_rng(0)
    cases = {name: [errors(make(r), r)] for name, make in KINDS.items()}
    own = [errors(w, r) for w in checkpoint_matrices(options.model)]
    cases[f"{options.model.name}: median of {len(own)} matrices"] = own
    for name, found in cases.items():
        for format in FORMATS:
            weights, products = zip(*(f[format] for f in found), strict=True)
            results.add(
                "quant_error", {"matrix": name, "format": format},
                weights=statistics.median(weights), products=statistics.median(products),
            )  # fmt: skip


if __name__ == "__main__":
    main()
