"""Other checkouts than the one under test: a package `onevocab` that stands before the installed one."""

from pathlib import Path


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
