"""Installs megatron_med and builds the index extension; without a compiler the NumPy path serves."""

from __future__ import annotations

import sys

from setuptools import setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import Pybind11Extension

    EXTENSIONS = [Pybind11Extension("_megatron_med_index", ["csrc/index/index.cpp"], cxx_std=17)]
except ImportError:
    EXTENSIONS = []


class BuildOrSayWhy(build_ext):
    """Building may fail: the package works without the extension and says so once when it is used."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # a missing compiler shows in many types
            self.extensions = []
            print(f"warning: csrc/index was not built, the NumPy path serves: {error}", file=sys.stderr)


setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildOrSayWhy})
