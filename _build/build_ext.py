"""setuptools' build_ext, with ninja instead of distutils' compilers."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from _build import native
from _build.toolchain import ROOT


class BuildExt(build_ext):
    """Builds `rpg_fast._C`. `RPG_FAST_REQUIRE_EXT=1` makes a build that failed, or built nothing, fatal."""

    def run(self) -> None:
        outcome = native.build(self.parallel if isinstance(self.parallel, int) else None)
        native.install(outcome, self._package_dir())
        line = f"rpg_fast: {outcome.line}"
        if outcome.failed and os.environ.get("RPG_FAST_REQUIRE_EXT") == "1":
            raise CompileError(f"{line} (RPG_FAST_REQUIRE_EXT=1)")
        print(line, file=sys.stderr, flush=True)
        if outcome.failed:  # pip hides what a build prints, but newer ones show its warnings
            warnings.warn(line, stacklevel=1)

    def _package_dir(self) -> Path:
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "rpg_fast"

    def get_outputs(self) -> list[str]:
        files = (self._package_dir() / name for name in (native.LIBRARY_NAME, native.RECORD_NAME))
        return [str(path) for path in files if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}
