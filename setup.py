"""Installs megatron_med and builds its C++; without a compiler plain Python serves.

Two extensions: the index of the token data (pybind11), and the kernels, which are operations of torch on its stable
ABI, so that one build serves this torch and later ones.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("csrc/kernels")
TORCH_TARGET_VERSION = "0x020a000000000000"
"""2.10: the oldest torch whose stable ABI has all that the kernels call."""
PER_CAPABILITY = [KERNELS / "cpu/decode_attention_group.cpp", *sorted(KERNELS.glob("cpu/*_rows.cpp"))]
"""Compiled once per instruction set."""
CAPABILITIES = {
    "baseline": ["-DMEGATRON_MED_VECTOR_BYTES=16"],
    "avx2": ["-DMEGATRON_MED_VECTOR_BYTES=32", "-mavx2", "-mfma"],
    "avx512": [
        *("-DMEGATRON_MED_VECTOR_BYTES=64", "-mprefer-vector-width=512"),
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ],
}


def index_extension() -> Extension:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension

    ParallelCompile("MAX_JOBS").install()  # the files of an extension at once, as many as there are cores
    return Pybind11Extension("_megatron_med_index", ["csrc/index/index.cpp"], cxx_std=17, extra_compile_args=["-g0"])


def kernels_extension() -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    once = sorted(set(KERNELS.glob("**/*.cpp")) - set(PER_CAPABILITY))
    flags = ["-std=c++20", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    flags += ["-DMEGATRON_MED_X86"] if platform.machine() in ("x86_64", "AMD64") else []
    return Extension(
        "_megatron_med_kernels",
        [str(path) for path in once],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu", "c10"],
        extra_compile_args=flags,
        depends=[str(path) for path in (*KERNELS.glob("**/*.h"), *PER_CAPABILITY)],
        language="c++",
    )


class BuildOrSayWhy(build_ext):
    """Builds at once what it can. It may fail: the package works without an extension and says so when it is used."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == "_megatron_med_kernels":
                self._build_per_capability(ext)
            super().build_extension(ext)
        except Exception as error:  # a missing compiler shows in many types
            self.extensions = [other for other in self.extensions if other is not ext]
            print(f"warning: {ext.name} was not built, plain Python serves: {error}", file=sys.stderr)

    def _build_per_capability(self, ext: Extension) -> None:
        x86 = "-DMEGATRON_MED_X86" in ext.extra_compile_args
        for name, flags in CAPABILITIES.items() if x86 else [("baseline", CAPABILITIES["baseline"])]:
            ext.extra_objects += self.compiler.compile(
                [str(path) for path in PER_CAPABILITY],
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *flags, f"-DMEGATRON_MED_CAPABILITY={name}"],
            )


def extensions() -> list[Extension]:
    """Those whose libraries are there: with isolation pip shows the build no torch."""
    found = []
    for make in (index_extension, kernels_extension):
        try:
            found.append(make())
        except ImportError as error:
            print(f"warning: {make.__name__} is left out, plain Python serves: {error}", file=sys.stderr)
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOrSayWhy})
