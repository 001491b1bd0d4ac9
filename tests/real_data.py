"""Recorded speech and drawn pictures out of other projects' packages, for slow tests: fetched, never committed.

Asterisk's English prompts (CC-BY-SA 3.0, apt) with transcripts, Google's emoji (Apache-2.0, npm) with names.
"""

import csv
import gzip
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from onevocab.tokenizers.media import encode_audio

SPEECH = ("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en")
PICTURES = "emoji-datasource-google@16.0.0"


def _run(*command, cwd) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"cannot fetch real data: {' '.join(command)}: {error}")


def speech(folder: Path) -> tuple[Path, Path]:
    """(table of file and caption, folder of FLAC files): one woman's prompts, 16 kHz."""
    av = pytest.importorskip("av")
    folder.mkdir()
    _run("apt-get", "download", *SPEECH, cwd=folder)
    for package in sorted(folder.glob("*.deb")):
        _run("dpkg", "-x", package.name, "root", cwd=folder)
    clips = folder / "clips"
    clips.mkdir()
    sounds = folder / "root/usr/share/asterisk/sounds/en_US_f_Allison"
    text = gzip.open(folder / "root/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz", "rt")
    with text, open(folder / "table.csv", "w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table)
        rows.writerow(["file", "caption"])
        for line in text:
            name, colon, said = line.partition(":")
            source = sounds / f"{name.strip()}.g722"
            if not colon or line.startswith(";") or not source.is_file():
                continue
            with av.open(str(source), format="g722") as container:
                samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
            target = name.strip().replace("/", "-") + ".flac"
            (clips / target).write_bytes(encode_audio(samples.astype(np.float32) / 32768, 16000))
            rows.writerow([target, said.strip()])
    return folder / "table.csv", clips


def pictures(folder: Path, most: int) -> tuple[Path, Path]:
    """(table of file and caption, folder of 64 x 64 PNG files)."""
    folder.mkdir()
    _run("npm", "pack", PICTURES, cwd=folder)
    [package] = folder.glob("*.tgz")
    with tarfile.open(package) as tar:
        records = json.load(tar.extractfile("package/emoji.json"))[:most]
        for record in records:
            content = tar.extractfile(f"package/img/google/64/{record['image']}").read()
            (folder / record["image"]).write_bytes(content)
    table = folder / "table.jsonl"
    table.write_text("".join(json.dumps({"image": record["image"], "name": record["name"].lower()}) + "\n"
                             for record in records if record.get("has_img_google", True)), encoding="utf-8")
    return table, folder
