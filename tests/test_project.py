"""The shape of the project: floors, imports, packaging, and what must not be in a file."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Imports go down only. Folders on one floor do not import each other.
FLOORS = {
    "common": 0,
    "kernels": 1,
    "model": 2,
    "tokenizers": 2,
    "data": 3,
    "training": 4,
    "generation": 5,
    "tasks": 6,
    "evaluation": 7,
    "demo": 8,
    "pipeline": 9,
    "serving": 10,
    "train": 11,
    "sample": 11,
    "benchmarks": 11,
}
SCRIPTS = {"train", "sample", "benchmarks", "serving"}  # not in the wheel (serving: not there yet)
FORBIDDEN = {
    "training": {"tokenizers", "data", "model"},  # it knows nn.Module and batches, no modality
    "generation": {"training"},  # a trained model is used without what made it
}


def modules() -> list[tuple[str, Path]]:
    """(floor's name, file) of every module of the project, root scripts included."""
    found = [(path.stem, path) for path in (ROOT / "train.py", ROOT / "sample.py") if path.exists()]
    for folder in FLOORS:
        found += [(folder, path) for path in sorted((ROOT / folder).rglob("*.py"))]
    return found


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of all imports, those inside functions and `import_module("...")` included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [
                (node.lineno, "." * node.level + ".".join(filter(None, [node.module, alias.name])))
                for alias in node.names
            ]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def problems_of(floor: str, source: str) -> list[str]:
    """What is wrong with the imports of one module that stands on the given floor."""
    problems = []
    for line, name in imports_of(ast.parse(source)):
        parts = name.split(".")
        if name.startswith("."):
            problems.append(f"{line}: relative import {name}; write onevocab.{floor}...")
            continue
        if parts[0] == "onevocab" and len(parts) > 1:
            target = parts[1]
        elif parts[0] in ("train", "sample", "benchmarks"):
            target = parts[0]
        elif parts[0] in FLOORS and parts[0] not in ("tokenizers", "kernels"):  # those two are Hugging Face's
            problems.append(f"{line}: {name} is imported by its folder's name; write onevocab.{name}")
            continue
        else:
            continue
        if target not in FLOORS:
            problems.append(f"{line}: {name} is on no floor; add its folder to FLOORS")
        elif target == floor:
            continue
        elif FLOORS[target] >= FLOORS[floor] or target in FORBIDDEN.get(floor, ()):
            problems.append(f"{line}: {floor} may not import {name}")
    return problems


def test_imports_go_down_only():
    problems = [
        f"{path.relative_to(ROOT)}:{problem}"
        for floor, path in modules()
        for problem in problems_of(floor, path.read_text())
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "floor, source",
    [
        ("kernels", "from onevocab.model.config import ModelConfig"),
        ("model", "import onevocab.tokenizers.vocabulary"),
        ("tokenizers", "def f():\n    from onevocab import model"),
        ("training", "from onevocab.data import loader"),
        ("training", "import importlib\nimportlib.import_module('onevocab.tokenizers.vocabulary')"),
        ("data", "from . import shards"),
        ("data", "import training.loop"),
        ("generation", "from onevocab.training.checkpoint import find"),
        ("evaluation", "import train"),
        ("evaluation", "from onevocab.demo import world"),
    ],
)
def test_the_floors_test_sees(floor, source):
    assert problems_of(floor, source)


def test_the_floors_test_lets_pass():
    assert not problems_of(
        "data", "import tokenizers\nfrom onevocab.tokenizers import vocab\nimport onevocab.data.shards.format"
    )


def test_hugging_face_keeps_its_names():
    """A script at the root has the root first on sys.path; `tokenizers` must still be Hugging Face's."""
    for folder in ("tokenizers", "kernels", "common"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py shadows a package; remove it"
    pytest.importorskip("tokenizers")
    code = "import sys; sys.path.insert(0, '.'); import tokenizers as t; print(t.__file__); t.Tokenizer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).is_relative_to(ROOT / "tokenizers")


IMPORT_ALL = """
import importlib, importlib.metadata as metadata, importlib.util, re, sys, traceback
from packaging.requirements import Requirement

# Everything that the base dependencies bring; all other installed packages are refused.
def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

closure, todo = set(), ["onevocab"]
while todo:
    name = normal(todo.pop())
    if name in closure:
        continue
    closure.add(name)
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    for requirement in map(Requirement, requires):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            todo.append(requirement.name)
refused = {top for top, names in metadata.packages_distributions().items()
           if not any(normal(name) in closure for name in names)} - {"packaging", "pip", "setuptools"}

for name in refused:
    sys.modules[name] = None  # imports raise and find_spec finds nothing, as where it is not installed
failed = 0
for name in sys.argv[1:]:
    try:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location("script_" + name[:-3], name)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        else:
            importlib.import_module(name)
    except BaseException:
        failed += 1
        print(f"--- {name}"); traceback.print_exc(limit=-3, file=sys.stdout)
print("refused", *sorted(refused))
sys.exit(failed > 0)
"""


def test_every_module_imports_with_the_base_dependencies_alone():
    """Extras are imported where they are used, so that what does not need them works without them."""
    pytest.importorskip("packaging")
    names = []
    for floor, path in modules():
        if path.parent == ROOT:
            names.append(path.name)
        elif floor not in SCRIPTS and not path.stem.endswith("_triton"):  # those are what needs triton
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append("onevocab." + ".".join(part for part in parts if part != "__init__"))
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "pytest" in done.stdout.splitlines()[-1].split(), "the list of refused packages is empty"


@pytest.mark.parametrize("use", ["import sample; sample.parse(['runs/demo'])", "import onevocab.data.shards.index",
                                 "import onevocab.generation.chat"])
def test_what_reads_shards_or_flags_starts_without_torch(use):
    done = subprocess.run([sys.executable, "-c", f"import sys; {use}; sys.exit('torch' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0


def test_extras():
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"demo", "speech", "judge", "playground", "dev"} <= set(extras)
    base = " ".join(PROJECT["project"]["dependencies"])
    for name in ("espeak", "pocketsphinx", "transformers", "emoji"):
        assert name not in base, f"{name} belongs to an extra"


def test_wheel_carries_every_module(tmp_path):
    """Builds the wheel from a copy, so that nothing is left in the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for folder in FLOORS.keys() - SCRIPTS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--quiet",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    [wheel] = tmp_path.glob("onevocab-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {"onevocab/" + path.relative_to(ROOT).as_posix() for floor, path in modules() if floor not in SCRIPTS}
    assert wanted, "no modules found"
    assert {name for name in names if name.endswith(".py")} == wanted
    in_c = {f"onevocab/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("kernels/**/*.[ch]")}
    assert {name for name in names if name.endswith((".c", ".h"))} == in_c
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}


def project_files() -> list[Path]:
    """Files that are tracked, or would be: not those that git ignores."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in sorted(set(done.stdout.split("\0"))) if name and (path := ROOT / name).is_file()]


def test_no_machine_paths_and_no_package_index():
    # Spelled in pieces, so that this file does not find itself.
    forbidden = re.compile(
        "|".join(
            [
                "/wo" + "rk/",
                "/tmp/" + "team",
                "/ro" + r"ot/\w",
                r"/home/" + r"\w",
                "py" + r"pi\.org",
                "files.python" + "hosted",
                "download.py" + "torch",
                "--find-" + "links",
            ]
        )
    )
    found = []
    for path in project_files():
        if path.suffix in (".png", ".wav", ".flac", ".jpg"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := forbidden.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_files_stay_short_and_small():
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in project_files()
        if path.suffix == ".py"
        if (lines := len(path.read_text().splitlines())) > 400
    ]
    assert not long, "split these: " + "; ".join(long)
    large = [
        f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes"
        for path in project_files()
        if path.stat().st_size > 1_500_000
    ]
    assert not large, "too large for the repository: " + "; ".join(large)


def test_no_folder_is_most_of_the_project_and_the_scripts_are_thin():
    lines: dict[str, int] = {}
    for floor, path in modules():
        folder = "data/convert" if path.is_relative_to(ROOT / "data" / "convert") else floor
        lines[folder] = lines.get(folder, 0) + len(path.read_text().splitlines())
    assert max(lines.pop("train"), lines.pop("sample")) <= 120
    lines.pop("benchmarks")
    largest = max(lines, key=lines.get)
    assert lines[largest] <= 0.2 * sum(lines.values()), f"{largest} holds a fifth of the source; split it"


def test_few_places_name_a_modality():
    """What must know pictures from sound is listed here with its reason; everything else asks the registry."""
    allowed = {
        "generation/anytoany.py": 2,  # Reply.images and Reply.audio
        "tokenizers/modalities.py": 2,  # the registry
    }
    own = ("tokenizers/image", "tokenizers/audio", "demo/", "data/convert/", "benchmarks/")
    named = {}
    for _, path in modules():
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(own) and (count := len(re.findall("[\"'](?:image|audio)[\"']", path.read_text()))):
            named[name] = count
    assert named == allowed


def test_make_plans_every_target():
    if not shutil.which("make"):
        pytest.skip("no make")
    for target in ("demo", "test", "smoke", "bench", "bench-gpu", "demo-gpu-prepare", "demo-gpu", "demo-gpu-evaluate",
                   "lint"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, f"make {target}: {done.stderr}"
    for config in re.findall(r"configs/[\w-]+\.toml", (ROOT / "Makefile").read_text()):
        assert (ROOT / config).exists(), f"Makefile names {config}"


def test_make_names_an_old_python(tmp_path):
    """One line that says what to do, and no half-made environment."""
    if not shutil.which("make"):
        pytest.skip("no make")
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    venv = tmp_path / "venv"
    done = subprocess.run(["make", "demo", f"PYTHON={old}", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.11" in done.stderr and not venv.exists(), done.stderr


def test_ci_runs_the_tests_without_changing_them():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK), ".ci/run must be executable"
    assert "make test" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
