"""The compiled part of rpg_fast; all else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _build.build_ext import BuildExt
from _build.native import source_files

setup(
    # optional: an install outlives a failed compiler, and plain torch runs.
    ext_modules=[Extension("rpg_fast._C", source_files(with_cuda=True), optional=True)],
    cmdclass={"build_ext": BuildExt},
)
