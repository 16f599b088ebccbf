"""A wheel carries recipes and configs inside ``components``, where ``ebft`` finds them; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies both folders into a wheel; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("recipes", "configs"):
                shutil.copytree(
                    folder,
                    Path(self.build_lib, "components", f"_{folder}"),
                    dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__"),
                )


setup(cmdclass={"build_py": BuildWithRecipes})
