"""All but one thing is in pyproject.toml: the wheel carries configs/ as rlalign/presets, which needs a build step."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path(__file__).parent / "configs"


class BuildWithPresets(build_py):
    """Copy the preset files. An editable install reads them from the source tree and needs no copy."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in sorted(CONFIGS.rglob("*.yaml")):
            target = Path(self.build_lib, "rlalign", "presets", source.relative_to(CONFIGS))
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithPresets})
