"""Other checkouts than the one under test: a package `onevocab` that stands before the installed one."""

import shutil
import subprocess
from pathlib import Path

import pytest


def link_package(root: Path, where: Path, leave_out: tuple[str, ...] = ()) -> Path:
    """Makes where/onevocab, a package with a link to every folder of modules of the checkout `root`; returns it.

    With `where` first on the path (PYTHONPATH) it hides an installed onevocab, whose finder comes last.
    """
    package = where / "onevocab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for folder in sorted(root.iterdir()):
        inside = folder.is_dir() and not folder.name.startswith(".") and any(folder.rglob("*.py"))
        if inside and folder.name not in ("benchmarks", "docs", "tests", *leave_out):
            (package / folder.name).symlink_to(folder.resolve())
    return package


def copy_checkout(root: Path, where: Path) -> Path:
    """A copy of the checkout `root` as a new folder `where`: what git tracks, or would; returns it."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, sorted(set(done.stdout.split("\0")))):
        if (root / name).is_file():  # else deleted, and not yet committed
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, where / name)
    return where
