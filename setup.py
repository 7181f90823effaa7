"""All metadata is in pyproject.toml; here only the kernels are built, by fastgpt/native/build.py."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from fastgpt.errors import UserError  # noqa: E402
from fastgpt.native import build, loading  # noqa: E402


class BuildKernels(build_ext):
    """Stands in for the compiler of extension modules, so that installs of every kind build the kernels."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        self.folder = loading.FOLDER if in_place else Path(self.build_lib).absolute() / "fastgpt" / "native"
        try:
            result = build.build_as_wished(
                ROOT / "csrc", self.folder, ROOT / "build" / "native", in_place=in_place, verbose=self.verbose > 1
            )
        except UserError as error:
            raise SystemExit(f"fastgpt: error: {error}") from None
        print(f"fastgpt: {build.describe(result)}")
        if result["status"] == "built":
            self.build_module()

    def build_module(self) -> None:
        """`fastgpt._C`, a view of the kernels that they do without: no reason for an install to fail."""
        folder = self.folder.parent
        try:
            result = build.build("python", ROOT / "csrc", folder, ROOT / "build" / "native", verbose=self.verbose > 1)
            print(f"fastgpt: {build.describe(result)}")
        except UserError as error:
            print(f"fastgpt: {loading.MODULE} is not built: {error}")

    def get_outputs(self) -> list[str]:
        made = [self.folder / name for name in (loading.FILES["cuda"], loading.result_file("cuda"))]
        made += [self.folder.parent / name for name in (loading.MODULE, loading.result_file("python"))]
        return [str(path) for path in made if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """The kernels need no particular Python, only this kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fastgpt.native.kernels", [])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
