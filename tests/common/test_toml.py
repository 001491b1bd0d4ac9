"""A TOML as editors write it."""

import pytest

from onevocab.common.errors import UserError
from onevocab.common.files import read_toml


def test_the_mark_of_utf8_and_windows_ends_of_lines(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b'\xef\xbb\xbffolder = "runs/caf\xc3\xa9"\r\n[model]\r\nlayers = 2\r\n')
    assert read_toml(path) == {"folder": "runs/café", "model": {"layers": 2}}


def test_what_is_no_toml(tmp_path):
    path = tmp_path / "a.toml"
    for content, said in ((b"[text\n", f"it: {path} is not valid TOML"), ("a = 1".encode("utf-16"), "save it as UTF-8"),
                          (b'a = "\xe9"', "is not UTF-8 .* at byte 5")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_toml(path, f"it: {path}")
    with pytest.raises(OSError):
        read_toml(tmp_path / "none.toml")
