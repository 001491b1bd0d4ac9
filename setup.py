"""Finds the packages: the folders at the root are imported as `onevocab.<folder>`, and all folders of modules below
them come along. Everything else about the project stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup

FOLDERS = ("common", "kernels", "model", "tokenizers", "data", "training", "generation", "tasks", "demo", "evaluation",
           "pipeline")

root = Path(__file__).resolve().parent
packages = {path.parent.relative_to(root) for folder in FOLDERS for path in (root / folder).rglob("*.py")}
setup(packages=["onevocab." + ".".join(path.parts) for path in sorted(packages)],
      package_data={"": ["*.c", "*.h"]},  # kernels in C are compiled where they run
      package_dir={f"onevocab.{folder}": folder for folder in FOLDERS if (root / folder).is_dir()})
