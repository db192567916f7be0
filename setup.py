"""The wheel holds conf/ and the demo teacher inside the package, where `nemo_minitron.run.registry.resources` looks."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RESOURCES = ("conf", "assets")


class BuildWithResources(build_py):
    """What setuptools does, and the folders that lie beside the package in a clone."""

    def run(self) -> None:
        """Copy them after the modules."""
        super().run()
        for name in RESOURCES:
            shutil.copytree(ROOT / name, Path(self.build_lib, "nemo_minitron", name), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithResources})
