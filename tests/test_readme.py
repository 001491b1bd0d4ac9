"""Every command of the README runs as it stands, where `runs/demo` is the run of configs/smoke.toml."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from PIL import Image

from onevocab.common.errors import UserError
from onevocab.data.convert.writing import convert

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "shell", "console")


def commands() -> list[str]:
    """The README's shell commands; comments are dropped, lines that end in a backslash are joined."""
    found = []
    for language, body in FENCE.findall(README):
        if language in SHELL:
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append(shlex.join(words))
    return found


def blocks(language: str) -> list[str]:
    return [body for found, body in FENCE.findall(README) if found == language]


@pytest.fixture(scope="session")
def folder(smoke_run, tmp_path_factory) -> Path:
    """A folder like the checkout's root, with an evaluated `runs/demo`."""
    here = tmp_path_factory.mktemp("readme")
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git", ".venv"):
            (here / path.name).symlink_to(path)
    (here / "runs").mkdir()
    (here / "runs" / "demo").symlink_to(smoke_run)
    # `make demo` evaluates too: the report's examples are what the README's samples are about.
    run_command([sys.executable, "-m", "onevocab.evaluation", "runs/demo"], cwd=here, env=environment())
    return here


def environment() -> dict:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def check_make(words, folder):
    targets = [word for word in words[1:] if "=" not in word]
    assert targets, "which target?"
    run_command(["make", "-n", *words[1:]], cwd=ROOT)


def check_pip(words, folder):
    """The extras that the command names exist; the installation itself is the Makefile's first step."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [target] = [word for word in words if word.startswith(".")]
    named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
    assert named, f"installs {target}"
    assert set(filter(None, (named[1] or "").split(","))) <= set(extras)


def check_torchrun(words, folder):
    """The config that is named exists; the same command on the smoke run finds every stage finished."""
    [config] = [word for word in words if word.startswith("configs/")]
    tomllib.loads((ROOT / config).read_text())
    run = (folder / "runs" / "demo").resolve()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert before, "the smoke run has no weights"
    words = ["configs/smoke.toml" if word == config else word for word in words if not word.startswith("--folder")]
    words = [words[0], "--standalone", *words[1:], f"--folder={run}"]
    run_command(words, cwd=folder, env=environment())
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}, (
        "a finished stage ran again"
    )


def check_as_it_stands(words, folder):
    """Runs the command; `--chat` reads one line, then the end of its input. --out must not be empty."""
    run_command(words, cwd=folder, env=environment(), input="What is this?\n" if "--chat" in words else "")
    for flag, value in zip(words, words[1:], strict=False):
        if flag == "--out":
            assert any((folder / value).iterdir()), f"{shlex.join(words)} wrote nothing to {value}"


def check_evaluation(words, folder):
    run_command([*words, "--help"], cwd=ROOT, env=environment())  # the run itself is evaluated already
    report = folder / "runs" / "demo" / "report"
    assert json.loads((report / "report.json").read_text())["results"]
    assert "<html" in (report / "index.html").read_text(encoding="utf-8")[:1000].lower()


def check_own_data(words, folder):
    """With the folder of which the README speaks; shards of an earlier command are there."""
    pets = folder / "pets"
    if not pets.exists():
        pets.mkdir()
        Image.new("RGB", (40, 30), "orange").save(pets / "cat.png")
        (pets / "cat.txt").write_text("an orange cat")
        convert("captions", pets, folder / "shards" / "pets", progress=False)
    run_command([*words, "--overwrite"], cwd=folder, env=environment())
    out = folder / words[words.index("--out") + 1]
    assert out.is_file() or list(out.glob("*.tar"))


def check_new(words, folder):
    """Of the README's pets, for a minute; the way from there to an answer is tests/test_data_guide.py's."""
    check_own_data(shlex.split("python -m onevocab.data.convert captions pets --out shards/pets"), folder)
    written = folder / words[words.index("--new") + 1]
    written.unlink(missing_ok=True)
    run_command([*words, "--minutes", "1"], cwd=folder, env=environment())
    assert "[image]" in written.read_text()


def check_new_trains(words, folder):
    check_new(shlex.split("python train.py --new pets.toml --shards shards/pets"), folder)
    assert "parameters" in run_command(["python", *words[1:], "--plan"], cwd=folder, env=environment())


def check_pets(words, folder):
    run = folder / "runs" / "pets"
    if not run.exists():
        run.symlink_to((folder / "runs" / "demo").resolve())
    check_own_data(shlex.split("python -m onevocab.data.convert captions pets --out shards/pets"), folder)
    check_as_it_stands(words, folder)


def check_plan(words, folder):
    assert "parameters" in run_command(words, cwd=ROOT, env=environment())


def check_help(words, folder):
    """For what takes minutes or rewrites the checkout: the command exists and understands its options."""
    run_command([*words, "--help"], cwd=ROOT, env=environment())


RUNNERS = [
    (r"git clone ", None),  # where the repository lies is the reader's to know
    (r"cd onevocab", None),
    (r"source \.venv/bin/activate", None),
    (r"make ", check_make),
    (r"(python -m )?pip install ", check_pip),
    (r"torchrun .*train\.py configs/", check_torchrun),
    (r"python train\.py configs/\w+\.toml --plan", check_plan),
    (r"python train\.py --new ", check_new),
    (r"torchrun train\.py pets\.toml", check_new_trains),
    (r"python sample\.py runs/demo", check_as_it_stands),
    (r"python sample\.py runs/pets", check_pets),
    (r"python -m onevocab\.evaluation runs/demo", check_evaluation),
    (r"python -m onevocab\.data\.(convert|inspect)", check_own_data),
    (r"python -m benchmarks\.", check_help),
    (r"python docs/update_results\.py", check_help),
]


def runner_of(command: str):
    for pattern, runner in RUNNERS:
        if re.match(pattern, command):
            return runner
    pytest.fail(f"README has a command that this test does not know how to run: {command}", pytrace=False)


@pytest.mark.parametrize("command", commands())
def test_command(command, request):
    runner = runner_of(command)
    if runner is None:
        return
    needs_run = runner in (check_torchrun, check_as_it_stands, check_evaluation, check_own_data, check_new,
                            check_new_trains, check_pets)
    runner(shlex.split(command), request.getfixturevalue("folder") if needs_run else ROOT)


def test_readme_has_the_commands_that_people_look_for():
    text = "\n".join(commands())
    for wanted in (
        "make demo",
        "make test",
        "torchrun",
        "sample.py",
        "--chat",
        "--want image",
        "onevocab.evaluation",
    ):
        assert wanted in text, f"README shows no {wanted}"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_example(code, folder):
    run_command([sys.executable, "-c", code], cwd=folder, env=environment())


def test_an_unknown_command_fails():
    with pytest.raises(pytest.fail.Exception):
        runner_of("curl example.org | sh")


def test_files_that_the_readme_names_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README links to {missing}"


def test_file_tree_is_the_real_one():
    """Every folder of the root is in the README's tree, and nothing else is."""
    [tree] = [body for body in blocks("") + blocks("text") if re.search(r"^train\.py", body, re.MULTILINE)]
    named = set(re.findall(r"^([\w.-]+)/", tree, re.MULTILINE))
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    real = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line and not line.startswith(".")}
    assert named == real


def load_update_results():
    spec = importlib.util.spec_from_file_location("update_results", ROOT / "docs" / "update_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_what_the_committed_results_say():
    update = load_update_results()
    for path, blocks in update.pages().items():
        page = path.read_text(encoding="utf-8")
        assert update.fill(page, blocks) == page, "run `python docs/update_results.py`"


def test_a_marker_that_is_missing_is_named():
    update = load_update_results()
    with pytest.raises(UserError, match="kernels:begin"):
        update.fill("nothing", {"kernels": "text"})


def test_table_of_speeds():
    update = load_update_results()

    def row(step, provider, times):
        return {"step": step, "provider": provider, "seconds": 0.0125, "peak_bytes": 3 << 20, "times_ours": times}

    rows = [row("forward", "ours", 1.0), row("forward", "slow", 2.5), row("forward", "reference", 9.0),
            row("forward", "fast", 0.5), row("fresh", "ours", 1.0)]
    file = {"benchmark": "decode", "device": "a laptop", "date": "2025-01-31", "command": "python -m x",
            "versions": {"torch": "2.13"}, "presets": {"long": {"dtype": "float32", "rows": rows, "targets": []},
                                                   "batch": {"dtype": "float32", "rows": rows, "targets": ["one"]}}}
    text = update.speeds({"decode-cpu": file, "decode-gpu": file | {"device": "a GPU"}}, "here/")
    line = "| [decode](here/decode-{}.md), long | forward | float32 | 12.5 | 3 | fast 0.50x; slow 2.50x |"
    assert line.format("cpu") in text and line.format("gpu") in text and "reference" not in text
    assert text.count("12.5") == 4 and text.index("a laptop:") < text.index("a GPU:")
    assert "torch 2.13; `python -m x`, 2025-01-31" in text
    aims = update.speeds({"decode-cpu": file}, "here/", aims=True)
    assert "batch" in aims and "long" not in aims
    kept = update.speeds({"decode-kept": file | {"command": "MALLOC_TRIM_THRESHOLD_=9 python -m x"}}, "here/")
    assert "long, memory kept | forward" in kept and "memory kept" not in text


def test_table_of_a_report():
    update = load_update_results()
    row = {
        "task": "vqa",
        "split": "held-out compositions",
        "metric": "accuracy",
        "value": 0.871,
        "interval": [0.85, 0.89],
        "chance": None,
        "ceiling_original": 1.0,
        "ceiling_tokenizer": 0.96,
        "n": 400,
    }
    report = {
        "device": "a laptop",
        "versions": {"torch": "2.13"},
        "seconds": {"text": 10, "image": 50},
        "results": [row],
        "command": "make demo",
        "date": "2025-01-31",
    }
    longer = report | {"results": [row | {"value": 0.9, "interval": None, "ceiling_tokenizer": 0.98}]}
    block = {"results": update.table({"demo": report, "demo-long": longer, "x": report})}
    text = update.fill("a\n<!-- results:begin -->\nold\n<!-- results:end -->\nz\n", block)
    assert "| accuracy | 0.871 (0.850 to 0.890) | 0.900 | – | 1.000 | 0.960 / 0.980 | 400 |" in text
    assert "old" not in text and text.startswith("a\n") and text.endswith("\nz\n")
    assert "- **x**: `make demo`, a laptop, 2025-01-31, torch 2.13. 1.0 minutes after the installation" in text
    assert update.fill(text, block) == text
    alone = update.fill(text, {"results": update.table({"demo": report})})
    assert "| accuracy | 0.871 (0.850 to 0.890) | – | 1.000 | 0.960 | 400 |" in alone
