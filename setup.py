"""Builds vlmo._C with CMake."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds the CMake project; the extension itself lists no sources."""

    def build_extension(self, ext: Extension) -> None:
        import cmake
        import ninja
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        cmake_program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        # --fresh: a kept cache would name the isolated environment of an earlier build.
        configure = [
            *(cmake_program, "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVLMO_MODULE_DIR={output.parent}",
            f"-DVLMO_TEST_TARGETS={os.environ.get('VLMO_TEST_TARGETS', '')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake_program, "--build", str(build)], check=True)


setup(
    # vlmo/kernels is a symbolic link to the folder kernels/.
    packages=find_packages(str(ROOT), include=["vlmo", "vlmo.*"]),
    package_data={"vlmo": ["py.typed"], "vlmo.data.digits": ["vocab.txt"]},
    ext_modules=[Extension("vlmo._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
