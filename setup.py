"""Build the two shared objects: _core (C, always) and _cuda (nvcc, where there is one).

KIMI_LINEAR_CUDA=0 skips _cuda, 1 makes its absence an error, auto (default) builds it if nvcc
and the cuBLAS headers are found. Neither git, nor the network, nor a GPU is touched.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = {  # csrc/flags.mk, shared with csrc/Makefile
    name: shlex.split(words)
    for name, words in re.findall(r"^(\w+) = (.*)$", (ROOT / "csrc/flags.mk").read_text(), re.M)
}


def files(folder, *suffixes):
    found = (p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)
    return sorted(str(p.relative_to(ROOT)) for p in found)


def core_sources():
    variants = [name.removeprefix("FLAGS_") for name in FLAGS if name.startswith("FLAGS_")]
    return [s for s in files("csrc", ".c") if X86 or Path(s).stem not in variants]


# ---- CUDA ------------------------------------------------------------------------------------


def site_folders():
    paths = sysconfig.get_paths()
    return [
        Path(p)
        for p in dict.fromkeys(
            [*sys.path, paths["purelib"], paths["platlib"], site.getusersitepackages()]
        )
        if p
    ]


def toolkit_folders():
    """Where a toolkit may be: the environment's, the path's, the usual place, NVIDIA's wheels."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    beside = [Path(on_path).resolve().parent.parent] if on_path else []
    wheels = [p / "nvidia" / "cu13" for p in site_folders()]
    return [*(Path(p) for p in named if p), *beside, Path("/usr/local/cuda"), *wheels]


def find_nvcc():
    """The command of nvcc as a list ("ccache nvcc" is two words), or None."""
    if os.environ.get("NVCC"):
        return shlex.split(os.environ["NVCC"])
    in_order = [p / "bin" / "nvcc" for p in toolkit_folders()]
    return next(([str(p)] for p in in_order if os.access(p, os.X_OK)), None)


def find_cublas_headers():
    folders = [i for p in toolkit_folders() for i in (p / "include", *p.glob("targets/*/include"))]
    folders += [p / "nvidia" / "cublas" / "include" for p in site_folders()]
    return next((p for p in folders if (p / "cublasLt.h").is_file()), None)


def plan_cuda():
    """(nvcc, include folder, why not): nvcc is None where _cuda is not to be built."""
    wanted = os.environ.get("KIMI_LINEAR_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"KIMI_LINEAR_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None, None, "KIMI_LINEAR_CUDA=0 at build time"
    nvcc, headers = find_nvcc(), find_cublas_headers()
    lacking = [
        *(["nvcc (set CUDA_HOME or NVCC)"] if nvcc is None else []),
        *(["the cuBLAS headers (pip install 'nvidia-cublas==13.*')"] if headers is None else []),
    ]
    if not lacking:
        return nvcc, headers, ""
    reason = f"not found at build time: {' and '.join(lacking)}"
    if wanted == "1":
        raise SystemExit(f"KIMI_LINEAR_CUDA=1, but {reason}")
    return None, None, reason


NVCC, CUBLAS_HEADERS, NO_CUDA = plan_cuda()


# ---- compiling -------------------------------------------------------------------------------


def dependencies(depfile):
    """The files that a make-style dependency file names."""
    text = depfile.read_text().replace("\\\n", " ").partition(":")[2]
    return [Path(p.replace("\\ ", " ")) for p in re.findall(r"(?:\\ |\S)+", text)]


def is_fresh(obj, depfile, stamp, digest):
    if not (obj.exists() and depfile.exists() and stamp.exists()):
        return False
    if stamp.read_text() != digest:
        return False
    built = obj.stat().st_mtime
    return all(p.exists() and p.stat().st_mtime <= built for p in dependencies(depfile))


def compile_object(command, source, folder):
    """Compile one file, unless its object is newer than all it was made from and was made by
    the same command."""
    obj = Path(folder) / (source.replace("/", "_") + ".o")
    depfile, stamp = obj.with_suffix(".d"), obj.with_suffix(".stamp")
    command = [*command, "-c", source, "-o", str(obj), "-MMD", "-MF", str(depfile)]
    digest = hashlib.sha256("\0".join(command).encode()).hexdigest()
    if not is_fresh(obj, depfile, stamp, digest):
        print(shlex.join(command), flush=True)
        stamp.unlink(missing_ok=True)
        subprocess.run(command, check=True, cwd=ROOT)
        stamp.write_text(digest)
    return str(obj)


def compile_all(jobs, folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    workers = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: compile_object(*job, folder), jobs))


class BuildExt(build_ext):
    def get_ext_filename(self, fullname):
        if fullname.endswith("_cuda"):  # not a Python module: no ABI tag
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).absolute()
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).absolute() / ext.name
        build = self.build_cuda if ext.name.endswith("_cuda") else self.build_core
        build(ext, str(out), folder)

    def build_core(self, ext, out, folder):
        cc = [*self.compiler.compiler_so, *FLAGS["CORE_FLAGS"], "-O3", "-g0", "-Icsrc"]
        about = [f"-DKL_BUILD_FLAGS={json.dumps(shlex.join(cc))}",
                 f"-DKL_BUILD_NO_CUDA={json.dumps(NO_CUDA)}"]  # fmt: skip
        python = [*(f"-isystem{p}" for p in [sysconfig.get_path("include"), numpy.get_include()])]

        def flags(source):
            if source.startswith("csrc/python/"):
                return [*python, "-DPy_LIMITED_API=0x030b0000", *about]
            return FLAGS.get(f"FLAGS_{Path(source).stem}", [])

        objects = compile_all([([*cc, *flags(s)], s) for s in ext.sources], folder)
        self.spawn([*self.compiler.linker_so, *objects, "-o", out, *FLAGS["CORE_LIBS"]])
        if NO_CUDA and os.environ.get("KIMI_LINEAR_CUDA") != "0":
            print(f"\n*** kimi_linear: CPU-ONLY BUILD. CUDA parts were {NO_CUDA} ***\n",
                  file=sys.stderr, flush=True)  # fmt: skip

    def build_cuda(self, ext, out, folder):
        nvcc = [*NVCC, *FLAGS["CUDA_FLAGS"], f"-I{CUBLAS_HEADERS}"]
        cc = [*self.compiler.compiler_so, *FLAGS["CORE_FLAGS"], "-O3", "-g0", "-Icsrc"]
        jobs = [(cc if s.endswith(".c") else nvcc, s) for s in ext.sources]
        objects = compile_all(jobs, folder)
        # NVIDIA's wheels keep libcudart_static.a in lib, where nvcc does not look.
        libs = [f"-L{p}" for p in (Path(NVCC[-1]).resolve().parent.parent / "lib",) if p.is_dir()]
        self.spawn([*NVCC, "-shared", "-cudart", "static", *objects, "-o", out, *libs,
                    "-Xlinker", "--exclude-libs,ALL"])  # fmt: skip


# What the objects are made from besides their sources; a source distribution carries it all.
OTHER_FILES = [
    "csrc/flags.mk",
    "csrc/Makefile",
    *files("csrc", ".h", ".md"),
    *files("cuda", ".cu", ".cuh", ".h", ".md"),
    *files("csrc", ".c"),
    *files("tests", ".py", ".c", ".h", ".md"),
    *files("benchmarks", ".py", ".c", ".md"),
    *files("examples", ".py", ".md"),
]
EXTENSIONS = [
    Extension("kimi_linear._core", core_sources(), depends=OTHER_FILES, py_limited_api=True)
]
if NVCC is not None:
    EXTENSIONS.append(Extension("kimi_linear._cuda", [*files("cuda", ".cu"), "csrc/base/error.c"]))

setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
