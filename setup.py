"""Packaging that pyproject.toml cannot say: the repository's `conf/` ships inside the package as `saferlhf/conf`.

An editable install copies nothing: there the code reads `conf/` where it lies.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONF = Path(__file__).parent / "conf"


class BuildWithConf(build_py):
    """`build_py` that also copies every YAML file of `conf/`, sub-folders included."""

    def _conf_files(self) -> dict[Path, Path]:
        target = Path(self.build_lib) / "saferlhf" / "conf"
        return {file: target / file.relative_to(CONF) for file in sorted(CONF.rglob("*.yaml"))}

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        # a build folder left from an earlier build must not smuggle deleted files into the wheel
        shutil.rmtree(Path(self.build_lib) / "saferlhf" / "conf", ignore_errors=True)
        for source, target in self._conf_files().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else outputs + [str(target) for target in self._conf_files().values()]


setup(cmdclass={"build_py": BuildWithConf})
