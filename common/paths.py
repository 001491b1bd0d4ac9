"""Paths that people write, in a configuration or on a command line: `~` is their home folder."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from onevocab.common.errors import UserError


def expand_home(path: str) -> str:
    """`~/runs/x` below the home folder; any other path, and an address, as it is. Shells do this, but not after `=`.
    Raises UserError where there is no such home folder."""
    expanded = os.path.expanduser(path)
    if expanded == path and path.startswith("~"):
        raise UserError(f"{path}: there is no such home folder (HOME is not set, or no user has this name); write the "
                        "whole path, or ./~ for a folder of that name")
    return expanded


def path_argument(text: str) -> Path:
    """For argparse's `type`."""
    return Path(expand_home(text))


HomePath = Annotated[str, AfterValidator(expand_home)]  # a path of a configuration
