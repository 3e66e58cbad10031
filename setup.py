"""The one step of the build that needs code; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRegistry(build_py):
    """Copies the registry of released checkpoints from the root of the project into `metro`."""

    def run(self):
        super().run()
        if self.editable_mode:  # the checkout is used, with its registry
            return
        target = Path(self.build_lib) / "metro" / "checkpoints"
        self.mkpath(str(target))
        for source in sorted(Path(__file__).resolve().parent.glob("checkpoints/*.*")):
            self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithRegistry})
