"""How a user's mistake is reported: one clear line, a non-zero exit code, no traceback."""

import functools
import io
import os
import re
import sys


class UserError(Exception):
    """Something that the user can put right. The message says what is wrong, where, and what to do."""


def invalid(error, where) -> UserError:
    """pydantic's ValidationError as one line that names the first wrong key."""
    first = error.errors()[0]
    return UserError(f"{where}: {'.'.join(str(part) for part in first['loc'])}: {wrong(first)}")


def wrong(entry) -> str:
    """One of the errors that pydantic lists, in words: what is allowed and what was found."""
    if entry["type"] in ("extra_forbidden", "missing"):
        return "unknown key" if entry["type"] == "extra_forbidden" else "this key is missing"
    said, found = entry["msg"].removeprefix("Value error, "), entry["input"]
    if not re.match(r"\w+ should ", said):
        return said
    said = re.sub(r"^\w+ should", "must", said).partition(", unable to parse")[0]
    return said + (f"; found {found!r}"[:100] if isinstance(found, str | int | float | bool) else "")


def cli(main):
    """Wraps a command's `main`: a UserError, or a file that the system refuses, becomes one line on stderr and exit
    code 2; Ctrl-C exits 130, a reader that went away (`| head`) 141, as in a shell. What the terminal's encoding cannot
    write, an emoji in a stranger's file name, is printed as an escape."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # not one that a caller put in its place
                stream.reconfigure(errors="backslashreplace")
        try:
            result = main(*args, **kwargs)
            if sys.stdout is not None:  # as where it was closed before the start
                sys.stdout.flush()  # here, where a reader that went away is no traceback
            return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
            sys.exit(128 + 13)  # SIGPIPE
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise  # no file's fault: a bug, or torch's
            where = f" {error.filename}" if error.filename else ""
            print(f"error:{where} {error.strerror}; check the path, its permissions and the disk", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped
