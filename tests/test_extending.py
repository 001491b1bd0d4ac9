"""docs/extending.md is true: each section's files, written into a copy of the project, do what it says.

In a section, a fenced block with a title is a file: `python title="kernels/x/y.py"` a new one with that content, `diff
title="path"` changes to one that is there. A diff is hunks that begin with a line `@@`: what of it is there (lines with
a blank or `-`) must occur exactly once. `bash` blocks are commands, run in order at the root of the copy.
"""

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from scratch import copy_checkout, link_package

PAGE = ROOT / "docs" / "extending.md"
LIMIT = 600  # seconds for the commands of a block
CACHES = {"__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}


class Bar(NamedTuple):
    """What a section may need at most. Patterns of new files, each for one of them; one that ends in / is for a new
    folder and all that is in it. lines: of files that are there, changed or added."""

    new: tuple[str, ...]
    lines: int


BARS = {
    "A modality": Bar(("tokenizers/*.py",), 1),
    "A quantizer": Bar(("tokenizers/quantizers/*.py",), 1),
    "A kernel": Bar(("kernels/*/", "benchmarks/*.py", "tests/kernels/interpreter/test_*_triton.py"), 0),
    "A task": Bar(("demo/tasks/*.py",), 1),
    "A converter": Bar(("data/convert/*.py",), 1),
}


class Block(NamedTuple):
    language: str
    title: str | None
    text: str


def sections(page: str) -> dict[str, list[Block]]:
    """title -> its fenced blocks."""
    found: dict[str, list[Block]] = {}
    fence, begin, text, blocks = "", None, [], []
    for line in page.splitlines(keepends=True):
        if fence:  # within a block
            if line.rstrip("\n") == fence:
                blocks.append(Block(begin[2], begin[3], "".join(text)))
                fence = ""
            else:
                text.append(line)
        elif line.startswith("## "):
            blocks = found.setdefault(line[3:].strip(), [])
        elif begin := re.match(r'(`{3,})(\w+)(?: title="([^"]+)")?$', line):
            fence, text = begin[1], []
    assert not fence, f"a block {begin[0]} does not end"
    return found


def hunks(diff: str) -> list[list[str]]:
    """The lines of each hunk."""
    parts = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)
    assert not parts[0].strip() and len(parts) > 1, "a diff begins with a line @@"
    return [part.splitlines() for part in parts[1:]]


def apply(diff: str, text: str) -> tuple[str, int]:
    """The changed text, and how many of its lines are changed or added."""
    changed = 0
    for lines in hunks(diff):
        assert all(line[:1] in ("", " ", "+", "-") for line in lines), f"not lines of a diff: {lines}"
        old, new = ("".join(line[1:] + "\n" for line in lines if line[:1] != sign) for sign in "+-")
        assert f"\n{text}".count(f"\n{old}") == 1, f"occurs not exactly once:\n{old}"
        text = f"\n{text}".replace(f"\n{old}", f"\n{new}")[1:]
        changed += max(sum(line.startswith(sign) for line in lines) for sign in "+-")
    return text, changed


def unit(name: str, there: set[str]) -> str:
    """The highest folder above a new file that is new itself, with a / behind it; the file where all are there."""
    folders = {parent.as_posix() for path in there for parent in Path(path).parents}
    for parent in [*reversed(Path(name).parents)][1:]:
        if parent.as_posix() not in folders:
            return f"{parent.as_posix()}/"
    return name


def files(folder: Path) -> dict[str, bytes]:
    """name -> content of all files, those that tools leave behind left out."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not CACHES & set(path.parts)}


def write(blocks: list[Block], bar: Bar, scratch: Path) -> set[str]:
    """Writes a section's files and fails above the bar; returns its new files and folders (as `unit`)."""
    before, lines, new = set(files(scratch)), 0, set()
    for language, title, text in blocks:
        if title is None:
            assert language == "bash", f"a block of {language} without a title"
            continue
        assert ".." not in Path(title).parts and not Path(title).is_absolute()
        path = scratch / title
        if language == "diff":
            changed, count = apply(text, path.read_text(encoding="utf-8"))
            lines += count
            path.write_text(changed, encoding="utf-8")
            continue
        assert not path.exists(), f"{title} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        new.add(unit(title, before))
    assert lines <= bar.lines, f"{lines} lines of files that are there change, more than {bar.lines}"
    left = list(bar.new)
    for each in sorted(new):
        match = next((pattern for pattern in left if pattern.endswith("/") == each.endswith("/")
                      and fnmatch(each, pattern)), None)
        assert match, f"{each} is new beside {', '.join(sorted(new - {each})) or 'nothing'}; allowed are {bar.new}"
        left.remove(match)
    return new


def environment(scratch: Path, links: Path) -> dict[str, str]:
    """With onevocab as the copy has it, and this Python first."""
    link_package(scratch, links)
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "ONEVOCAB_KERNELS")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"PYTHONPATH": str(links), "PATH": path, "OMP_NUM_THREADS": "1"}


def run(script: str, scratch: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=scratch, env=variables, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT)
    assert done.returncode == 0, f"{script}\nexit {done.returncode}; its output ends:\n{done.stdout[-6000:]}"
    return done.stdout


SECTIONS = sections(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_needs_no_more_than_its_bar(title, tmp_path):
    assert title in BARS, f"tests/test_extending.py has no bar for the section {title!r}"
    scratch = copy_checkout(ROOT, tmp_path / "checkout")
    assert write(SECTIONS[title], BARS[title], scratch)
    assert any(block.language == "bash" for block in SECTIONS[title]), "nothing is run"
    run("python -m ruff check .", scratch, environment(scratch, tmp_path / "links"))


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_works(title, tmp_path):
    scratch = copy_checkout(ROOT, tmp_path / "checkout")
    new = write(SECTIONS[title], BARS[title], scratch)
    variables = environment(scratch, tmp_path / "links")
    where = run('python -c "import onevocab.kernels.backend as b; print(b.__file__)"', scratch, variables).strip()
    assert Path(where).resolve() == scratch.resolve() / "kernels" / "backend.py", "not the copy would be tried"
    written = files(scratch)
    for block in SECTIONS[title]:
        if block.language == "bash" and block.title is None:
            run(block.text, scratch, variables)
    after = files(scratch)
    assert {name: after.get(name) for name in written} == written, "the commands changed files"
    left = {name for name in set(after) - set(written) if not any(name.startswith(each) for each in new)}
    assert not left, f"the commands left files outside of what is new: {sorted(left)}"


def test_every_bar_has_a_section():
    assert set(SECTIONS) == set(BARS)


def test_what_is_above_the_bar_is_noticed(tmp_path):
    for folder in ("data", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "there.py").touch()
    (tmp_path / "data" / "old.py").write_text("one\ntwo\nthree\ntwo\n")
    bar = Bar(("data/*.py", "kernels/*/"), 1)
    page = """# Title

## First
```python title="data/new.py"
## no section
```
```diff title="data/old.py"
@@
 one
-two
+2
```
```python title="data/old.py"
```

## Second
```bash
true
```
"""
    found = sections(page)
    assert list(found) == ["First", "Second"] and found["Second"] == [Block("bash", None, "true\n")]
    new, diff, again = found["First"]
    assert write([new, diff], bar, tmp_path) == {"data/new.py"}
    assert (tmp_path / "data" / "old.py").read_text() == "one\n2\nthree\ntwo\n"
    for block, message in ((again, "is there already"), (new._replace(title="data/third.py"), None),
                           (new._replace(title="train/x.py"), "train/ is new"),
                           (Block("python", "kernels/a/b.py", ""), None),
                           (Block("diff", "data/old.py", "@@\n+x\n+y\n three\n"), "2 lines of files"),
                           (Block("diff", "data/old.py", "@@\n-four\n"), "not exactly once"),
                           (Block("python", None, ""), "without a title")):  # fmt: skip
        if message:
            with pytest.raises(AssertionError, match=message):
                write([block], bar, tmp_path)
        else:
            write([block], bar, tmp_path)
    with pytest.raises(AssertionError, match="allowed are"):
        write([Block("python", f"data/{name}.py", "") for name in "ab"], bar, tmp_path)
