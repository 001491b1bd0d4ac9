"""Moving pictures and subtitles: Pillow (and PyAV, where it is installed) write the files, and strangers do."""

import struct
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onevocab.common.errors import UserError
from onevocab.data.convert.video import (
    MAX_CUES,
    MAX_SUBTITLES,
    Cue,
    frames_and_sound,
    moments,
    parse_subtitles,
    read_subtitles,
    timestamp,
)

# ------------------------------------------------------------------------------------------------ animations

LOSSLESS = {"gif": {}, "webp": {"lossless": True}, "png": {}}


def colours(n: int) -> list[tuple[int, int, int]]:
    return [(i * 250 // n, 255 - i * 250 // n, i * 37 % 256) for i in range(n)]


def animation(path, n: int, milliseconds, size=(32, 24), noise: bool = False):
    """n frames, one colour each (or noise, which does not compress), written by Pillow."""
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)) if noise
              else Image.new("RGB", size, colour) for colour in colours(n)]
    options = LOSSLESS[path.suffix[1:]]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options)
    return path


def seen(found) -> list:
    return [(round(seconds, 3), part.getpixel((3, 3))) for seconds, part in found]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_frames_at_a_rate(tmp_path, kind):
    path, shades = animation(tmp_path / f"a.{kind}", 6, 500), colours(6)
    assert seen(moments(path, rate=2)) == [(i / 2, shades[i]) for i in range(6)]
    assert seen(moments(path, rate=1)) == [(0, shades[0]), (1, shades[2]), (2, shades[4])]
    assert seen(moments(path, rate=0.1)) == [(0, shades[0])]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_many_frames_are_thinned_evenly_and_large_ones_made_smaller(tmp_path, kind):
    path = animation(tmp_path / f"a.{kind}", 40, 100, size=(120, 40))
    found = moments(path, rate=10, max_frames=8, max_side=60)
    assert [round(seconds, 3) for seconds, _ in found] == [0, 0.8, 1.6, 2.4, 3.2]
    assert [part.getpixel((3, 3)) for _, part in found] == colours(40)[::8]
    assert {part.size for _, part in found} == {(60, 20)} and {part.mode for _, part in found} == {"RGB"}
    assert len(moments(path, rate=10, max_frames=1)) == 1 and len(moments(path, rate=10, max_frames=40)) == 40


def test_a_slide_that_stays_is_shown_once_and_no_duration_means_100_ms(tmp_path):
    slides = animation(tmp_path / "slides.gif", 3, [5000, 200, 1000])
    assert [round(seconds, 3) for seconds, _ in moments(slides, rate=1)] == [0, 5]
    assert [round(seconds, 3) for seconds, _ in moments(slides, rate=10)] == [0, 5, 5.2]
    fast = animation(tmp_path / "fast.gif", 3, 0)
    assert [round(seconds, 3) for seconds, _ in moments(fast, rate=10)] == [0, 0.1, 0.2]


def test_transparency_lies_over_white_and_a_still_picture_is_one_moment(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "still.png")
    assert seen(moments(tmp_path / "still.png")) == [(0, (255, 255, 255))]


def test_the_picture_for_old_readers_is_no_frame_of_an_apng(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in colours(3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=1000, default_image=True)
    assert seen(moments(tmp_path / "a.png")) == [(0, colours(3)[1]), (1, colours(3)[2])]


def test_parts_are_in_time_order_with_their_times_as_text(tmp_path):
    path = animation(tmp_path / "a.gif", 3, 1000)
    (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\ntwo\n\n"
                                    "2\n00:00:00,500 --> 00:00:01,000\nHello\n\n"
                                    "3\n00:01:00,000 --> 00:01:01,000\nafter the end\n", encoding="utf-8")
    expected = ["0:00.0\n", None, "0:00.5 Hello\n0:01.0\n", None, "0:01.0 two\n0:02.0\n", None]
    for options in ({}, {"subtitles": tmp_path / "a.srt"}):  # found beside it, too
        parts = frames_and_sound(path, **options)
        assert [part if isinstance(part, str) else None for part in parts] == expected
        assert all(isinstance(part, str | Image.Image) for part in parts)
    silent = frames_and_sound(path, subtitles=False)
    assert [part for part in silent if isinstance(part, str)] == ["0:00.0\n", "0:01.0\n", "0:02.0\n"]


def test_a_link_beside_a_video_is_not_followed(tmp_path):
    path = animation(tmp_path / "a.gif", 2, 1000)
    (tmp_path / "secret").write_text("1\n00:00:00,000 --> 00:00:01,000\nsecret\n")
    (tmp_path / "a.srt").symlink_to(tmp_path / "secret")
    assert all("secret" not in part for part in frames_and_sound(path) if isinstance(part, str))


def test_timestamps():
    assert [timestamp(s) for s in (0, 0.1 + 0.2, 59.96, 60, 83.25, 3600)] == [
        "0:00.0", "0:00.3", "0:59.9", "1:00.0", "1:23.2", "60:00.0"]


# ------------------------------------------------------------------------------------------------ hostile animations


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_files_are_refused(tmp_path, kind, share):
    path = animation(tmp_path / f"a.{kind}", 5, 200, noise=True)
    assert len(moments(path, rate=10)) == 5
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="cannot read .*a[.]"):
        moments(path, rate=10)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(LOSSLESS)), st.integers(0, 2000), st.integers(1, 255))
def test_a_flipped_byte_is_read_or_refused(tmp_path_factory, kind, at, flip):
    path = tmp_path_factory.mktemp("flip") / f"a.{kind}"
    content = bytearray(animation(path, 3, 200, size=(16, 16), noise=True).read_bytes())
    content[at % len(content)] ^= flip
    path.write_bytes(content)
    try:
        assert 1 <= len(moments(path, rate=10, max_frames=5)) <= 5
    except UserError:
        pass


def gif_of(width: int, height: int) -> bytes:
    """One frame of one pixel on a screen of any size."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00;"


def test_bombs_are_refused_by_their_headers(tmp_path):
    (tmp_path / "large.gif").write_bytes(gif_of(8000, 8000))
    with pytest.raises(UserError, match="8000x8000 pixels, over the 50,000,000"):
        moments(tmp_path / "large.gif")
    (tmp_path / "huge.gif").write_bytes(gif_of(65535, 65535))
    with pytest.raises(UserError, match="cannot read .*huge.gif"):
        moments(tmp_path / "huge.gif")
    with pytest.raises(UserError, match="lasts more than the 2 s"):
        moments(animation(tmp_path / "long.gif", 5, 1000), max_seconds=2, piece_seconds=1)


def test_work_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("onevocab.data.convert.video.MAX_ANIMATION_WORK", 32 * 24 * 3)
    assert len(moments(animation(tmp_path / "a.gif", 3, 1000))) == 3
    with pytest.raises(UserError, match="over all its frames"):
        moments(animation(tmp_path / "b.gif", 4, 1000))


def test_what_is_no_video(tmp_path, monkeypatch):
    for name, content in [("empty.mp4", b""), ("text.gif", b"hello"), ("a.avi", b"RIFF\0\0\0\0AVI "),
                          ("list.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/"),
                          ("concat.mkv", b"ffconcat version 1.0\nfile '/etc/passwd'\n")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is no video that is understood"):
            moments(tmp_path / name)
    for path in (tmp_path, tmp_path / "none.mp4"):
        with pytest.raises(UserError, match="cannot read"):
            moments(path)
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(20))
    with pytest.raises(UserError, match=r"onevocab\[video\]"):
        moments(tmp_path / "a.mp4")


@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": float("nan")}, {"max_frames": 0}, {"max_side": 10**6},
                                     {"piece_seconds": 0}, {"piece_seconds": 700}])
def test_options_that_do_not_fit(tmp_path, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} of a video is"):
        moments(animation(tmp_path / "a.gif", 2, 1000), **options)


# ------------------------------------------------------------------------------------------------ mp4


def write_mp4(path, seconds: int = 3, rate: int = 44_100, sound: bool = True):
    """A second each of colours(seconds) at 10 frames a second, and a tone of 440 Hz."""
    av = pytest.importorskip("av")
    with av.open(str(path), mode="w") as output:
        video = output.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = output.add_stream("aac", rate=rate) if sound else None
        if sound:
            audio.codec_context.format, audio.codec_context.layout = "fltp", "mono"
        for colour in colours(seconds):
            for _ in range(10):
                picture = Image.new("RGB", (64, 48), colour)
                output.mux(video.encode(av.VideoFrame.from_image(picture)))
        output.mux(video.encode(None))
        tone = np.sin(2 * np.pi * 440 * np.arange(seconds * rate) / rate).astype(np.float32)[None] / 2
        for first in range(0, seconds * rate if sound else 0, 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone[:, first : first + 1024]), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
            output.mux(audio.encode(frame))
        if sound:
            output.mux(audio.encode(None))
    return path


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_mp4_becomes_frames_and_sound(tmp_path, ending):
    found = moments(write_mp4(tmp_path / f"a.{ending}"), rate=1, piece_seconds=2)
    pictures = [(seconds, part) for seconds, part in found if isinstance(part, Image.Image)]
    sounds = [(seconds, part) for seconds, part in found if isinstance(part, tuple)]
    assert [round(seconds, 1) for seconds, _ in pictures] == [0, 1, 2]
    for (_, picture), colour in zip(pictures, colours(3), strict=True):
        assert picture.size == (64, 48) and np.abs(np.array(picture.getpixel((30, 20))) - colour).max() < 40
    assert [round(seconds, 1) for seconds, _ in sounds] == [0, 2]
    assert [samples.dtype for _, (samples, _) in sounds] == [np.float32] * 2 and {rate for _, (_, rate) in sounds} == {
        16_000}
    assert len(sounds[0][1][0]) == 32_000 and abs(len(sounds[1][1][0]) - 16_000) < 3200
    spectrum = np.abs(np.fft.rfft(sounds[0][1][0]))
    assert abs(np.argmax(spectrum) / 2 - 440) < 2 and abs(np.abs(sounds[0][1][0]).max() - 0.5) < 0.1
    tenths = [int(seconds * 10 + 1e-3) for seconds, _ in found]
    assert tenths == sorted(tenths)


def test_mp4_without_sound_damaged_and_too_long(tmp_path):
    path = write_mp4(tmp_path / "a.mp4", sound=False)
    assert [type(part) for part in frames_and_sound(path)] == [str, Image.Image] * 3
    with pytest.raises(UserError, match="lasts more than the 1 s"):
        moments(path, max_seconds=1, piece_seconds=1)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])  # the index at its end is gone
    with pytest.raises(UserError, match="cannot read .*a.mp4 as a video"):
        moments(path)


# ------------------------------------------------------------------------------------------------ subtitles

SRT = """1
00:00:01,000 --> 00:00:02,500
Hello,
<i>world</i>!

2
00:00:02,500 --> 00:00:04,000 X1:10 X2:20 Y1:30 Y2:40
{\\an8}<font color="#fff">1 < 2 &amp; 3 > 2</font>
3
01:00:00,040 --> 01:00:01,000
the empty line before this one is missing

4
00:00:05,000 --> 00:00:04,000

"""
SRT_CUES = [Cue(1, 2.5, "Hello, world!"), Cue(2.5, 4, "1 < 2 &amp; 3 > 2"),
            Cue(3600.04, 3601, "the empty line before this one is missing")]
VTT = """WEBVTT - a title
Kind: captions

STYLE
::cue { color: red }

NOTE this is
no cue

intro
00:00.500 --> 00:02.000 align:start position:10%
<v Ann>R&amp;D &lt;b&gt; <c.loud>isn't</c> <00:00:01.000>&nbsp;it?

123:00:00.000 --> 123:00:01.000
漢字 é

00:00.100 --> 00:00.200
first
"""
VTT_CUES = [Cue(0.1, 0.2, "first"), Cue(0.5, 2, "R&D <b> isn't it?"), Cue(442_800, 442_801, "漢字 é")]


@pytest.mark.parametrize("text, cues", [(SRT, SRT_CUES), (VTT, VTT_CUES)])
def test_subtitles(tmp_path, text, cues):
    assert parse_subtitles(text) == cues
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        for end in ("\n", "\r\n", "\r"):
            assert parse_subtitles(text.replace("\n", end).encode(encoding)) == cues
    (tmp_path / "a.srt").write_text(text, encoding="utf-8")
    assert read_subtitles(tmp_path / "a.srt") == cues


def test_empty_subtitles_have_no_cues():
    assert parse_subtitles("") == parse_subtitles("\n \n") == parse_subtitles("WEBVTT\n") == []


@pytest.mark.parametrize("content, reason", [
    ("just a text\nin lines", "neither SRT nor WebVTT"),
    ("1\n00:00:xx,000 --> 00:00:02,000\nhi", "line 2: not a timing"),
    ("1\n00:00:01,000 -->\nhi", "line 2: not a timing"),
    ("1\n9999999:00:01,000 --> 00:00:02,000\nhi", "line 2: not a timing"),
    ("1\n\u0661:00:01,000 --> 00:00:02,000\nhi", "line 2: not a timing"),
    ("WEBVTT\n\n1:2:3:4.5 --> 6", "line 3: not a timing"),
    (b"1\n00:00:01,000 --> 00:00:02,000\ncaf\xe9", "neither UTF-8 nor UTF-16"),
    ("x" * (MAX_SUBTITLES + 1), "characters allowed"),
    ("0:1 --> 0:2\n" * (MAX_CUES + 1), "cues allowed"),
])
def test_broken_subtitles_say_why(content, reason):
    with pytest.raises(UserError, match=f"^a.srt: .*{reason}"):
        parse_subtitles(content, "a.srt")


def test_subtitle_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.srt"):
        with pytest.raises(UserError, match="cannot read subtitles"):
            read_subtitles(path)


@pytest.mark.parametrize("piece", ["<", "<a", "</", "{\\", "{", ">", "<a<", "-->", "00:", "&", "&#", "&amp", "\n", "\r",
                                   "0", " ", "1\n", "<a>{\\", "\n\n-"])
def test_hostile_text_takes_no_time(piece):
    body = piece * (150_000 // len(piece))
    begin = time.perf_counter()
    for head in ("00:00:01,000 --> 00:00:02,000\n", "WEBVTT\n\n00:01.000 --> 00:02.000\n", ""):
        try:
            parse_subtitles(head + body)
        except UserError:
            pass
    assert time.perf_counter() - begin < 4  # a quadratic search takes ten times as long


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(st.sampled_from("0123:,.-> \n<a/{\\}&;WEBVTTNOTE"), max_size=300)))
def test_any_text_is_parsed_or_refused(content):
    try:
        cues = parse_subtitles(content)
    except UserError:
        return
    assert cues == sorted(cues, key=lambda cue: cue.start)
    assert all(cue.text and "\n" not in cue.text and cue.start <= cue.stop for cue in cues)
