"""The files of a folder that is converted: each is given, or it is counted why not.

A link that leads out of the folder is followed only if the user says so: in a stranger's archive it could show any file
of this machine. A folder that several ways lead to is read once, so links in a circle end.
"""

import os
from collections.abc import Iterator

from onevocab.data.convert.samples import Dropped

OUTSIDE = "a link that leads out of the folder; --follow-links reads it, if you trust who made the link"


def walk(options) -> Iterator[tuple[str, list[str]]]:
    """(folder's place, names of its files), places relative to `options.source`, "" for itself; those that only links
    lead to come last. What is passed over stands in `options.passed_over` afterwards, place -> Dropped: hidden files
    and folders, links that lead out, nowhere or back, what cannot be read.
    """
    root, seen, todo = os.path.realpath(options.source), set(), [""]  # todo: links to folders
    passed: dict[str, Dropped] = options.passed_over

    def unreadable(error: OSError) -> None:
        passed[os.path.relpath(error.filename, root)] = Dropped("unreadable folder", error.strerror)

    for start in todo:
        for here, folders, names in os.walk(os.path.join(root, start), onerror=unreadable):
            place = os.path.relpath(here, root)
            place = "" if place == os.curdir else place
            about = os.stat(here)
            if (about.st_dev, about.st_ino) in seen:
                passed[place] = Dropped("linked again", "its folder is read under another name")
                folders.clear()
                continue
            seen.add((about.st_dev, about.st_ino))
            folders[:], links = _sorted_out(options, here, place, folders)
            todo += [os.path.join(place, name) for name in links]
            files, links = _sorted_out(options, here, place, names)
            yield place, sorted(files + links)


def _sorted_out(options, here: str, place: str, names: list[str]) -> tuple[list[str], list[str]]:
    """(real ones, links) of the names in a folder; the others are added to what is passed over."""
    real, links = [], []
    for name in sorted(names):
        path, why = os.path.join(here, name), None
        if name.startswith("."):
            why = Dropped("hidden")
        elif not os.path.islink(path):
            real.append(name)
        elif not os.path.exists(path):
            why = Dropped("unsafe path", "a link that leads nowhere")
        elif leads_out(path, options.source) and not options.follow_links:
            why = Dropped("unsafe path", OUTSIDE)
        else:
            links.append(name)
        if why:
            options.passed_over[os.path.join(place, name)] = why
    return real, links


def leads_out(path, folder) -> bool:
    """Whether a path, its links resolved, is not below the folder."""
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(path)]) != root
