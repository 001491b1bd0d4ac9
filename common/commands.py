"""Flags of a command: a mistake among them is one line, as every other mistake of a user."""

import argparse

from onevocab.common.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse prints its usage before what is wrong; this raises a UserError, which `@cli` prints."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")
