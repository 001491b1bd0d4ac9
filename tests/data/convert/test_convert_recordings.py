"""Converters of sounds and videos."""

import io
import sys

import numpy as np
import pytest
import soundfile
from layouts import WAV, as_csv, converted, llava, lost, plain, put, records
from PIL import Image
from samples import flac

from onevocab.common.errors import UserError
from onevocab.data.convert import convert, video
from onevocab.data.convert.media import MediaFolder
from onevocab.data.convert.samples import Dropped, fill

CLOTHO = "file_name caption_1 caption_2 caption_3 caption_4 caption_5"

# format, files, options, what the shards say, what is dropped or left out
CASES = {
    "clotho":
    ("clotho", {"clotho.csv": as_csv(CLOTHO.split(), ["a, é.wav", *"54321"], ["gone.wav", *"abcde"]), "a, é.wav": WAV},
     {"captions": 3}, [plain(WAV, c) for c in "543"], {"missing media": 1}),
    "audiocaps":
    ("audiocaps", {"train.csv": as_csv("audiocap_id youtube_id start_time caption".split(), (1, "-0a", 30, "a dog"),
                                       (2, "zz", 0, "lost"), (3, "-0a", 30, "")), "-0a_30.wav": WAV},
     {"file": "{youtube_id}_{start_time}.wav"}, [plain(WAV, "a dog")], {"missing media": 1, "empty text": 1}),
    "wavcaps": ("wavcaps", {"as.json": {"num_captions_per_audio": 1, "data": [*records(
        "id caption", ("Yx.wav", "rain"), ("17", ["a", "b"]), ("9", "gone")), {"title": "no id"}]},
        "Yx.flac": flac(0), "17.flac": flac(1)},
     {}, [plain(flac(0), "rain"), plain(flac(1), "a"), plain(flac(1), "b")], {"missing media": 1, "bad record": 1}),
    "librispeech":
    ("librispeech", {"84/121/84-121.trans.txt": "84-121-0000 GO ON\n84-121-0001 GONE\n84-121-0002\n../../x HOSTILE\n",
                     "84/121/84-121-0000.flac": flac(0), "84/121/84-121-0002.flac": flac(1)},
     {}, [plain(flac(0), "GO ON")], {"missing media": 1, "empty text": 1, "unsafe path": 1}),
    "numbers in a CSV": ("audiocaps", {"t.csv": as_csv("youtube_id start_time caption".split(), ("007", 30, "a"),
                                                       ("x", "?", "b")), "007_000030.wav": WAV},
                         {"file": "{youtube_id}_{start_time:06d}.wav"}, [plain(WAV, "a")], {"bad record": 1}),
}


@pytest.mark.parametrize("name, files, options, expected, dropped", CASES.values(), ids=CASES)
def test_layouts(tmp_path, name, files, options, expected, dropped):
    report, samples = converted(name, put(tmp_path / "in", files), tmp_path / "out", **options)
    assert samples == expected and lost(report) == dropped


def test_common_voice(tmp_path):
    put(tmp_path / "in", {"clips/b.txt": "", "validated.tsv": (
        'client_id\tpath\tsentence\tup_votes\nx\ta.mp3\tHe said "é\t2\ny\ta\tNo ending"\t2\nz\tgone.mp3\tx\t0\n'
        "z\ta.mp3\tone\tcell\tmore\n")})
    soundfile.write(tmp_path / "in" / "clips" / "a.mp3", np.zeros(8000), 16000)
    report, samples = converted("common-voice", tmp_path / "in" / "validated.tsv", tmp_path / "out")
    assert [turns[0][1][1] for turns in samples] == ['He said "é', 'No ending"'] and report.reencoded == 2
    assert all(soundfile.info(io.BytesIO(turns[0][1][0])).format == "FLAC" for turns in samples)
    assert report.dropped == {"missing media": 1, "bad record": 1}


def test_msrvtt(tmp_path, monkeypatch):
    videos = records("video_id split", ("video0", "train"), ("video1", "test"), ("video2", "train"))
    sentences = records("video_id caption", *((f"video{said[0]}", said[1]) for said in ("0a", "1x", "0b", "2y", "9z")))
    put(tmp_path / "in", {"info.json": {"videos": videos, "sentences": sentences}, "video0.mp4": b"\0\0\0\x18ftypmp42"})
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="needs PyAV"):
        convert("msrvtt", tmp_path / "in" / "info.json", tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())  # free for another try
    seen = []

    def frames_and_sound(path, **options):
        seen.append((path.name, options))
        return ["0:00.0\n", Image.new("RGB", (8, 8), "red"), (np.zeros(1600, np.float32), 16000)]

    monkeypatch.setattr(video, "frames_and_sound", frames_and_sound)
    report, samples = converted("msrvtt", tmp_path / "in" / "info.json", tmp_path / "out", split="train", frames=4)
    assert seen == [("video0.mp4", {"max_frames": 4})] and report.media == {"image": 2, "audio": 2}
    assert [turns[0][1][::3] for turns in samples] == [["0:00.0\n", "a"], ["0:00.0\n", "b"]]
    assert report.dropped == {"other split": 1, "missing media": 1, "bad record": 1}


def test_videos(tmp_path, monkeypatch):
    """A cp1252 .srt costs a video its subtitles and nothing else; LLaVA-Video writes `<image>` for a video."""
    seen = []

    def frames_and_sound(path, **options):
        seen.append((path.name, options))
        return ["0:00.0\n", Image.new("RGB", (8, 8), (10 * len(seen), 0, 0))]

    monkeypatch.setattr(video, "frames_and_sound", frames_and_sound)
    cue = "1\n00:00:01,000 --> 00:00:02,000\ncafé\n"
    put(tmp_path / "in", {f"{name}.mp4": name for name in "ab"} | {f"{name}.txt": name for name in "ab"}
        | {"a.srt": cue.encode("cp1252"), "b.srt": cue, "c.srt": cue})
    report, samples = converted("captions", tmp_path / "in", tmp_path / "out")
    assert [turns[0][1][2] for turns in samples] == ["a", "b"] and report.dropped == {"unknown ending": 1}
    assert report.left_out == {"unreadable subtitles": 1} and report.first["unknown ending"] == ["c.srt"]
    assert [options for _, options in seen] == [{"max_frames": 8, "subtitles": False}, {"max_frames": 8}]
    put(tmp_path / "in", {"v.json": [llava(None, "<image>\nWhy?", "So.") | {"video": "b.mp4"}]})
    report, samples = converted("llava", tmp_path / "in" / "v.json", tmp_path / "v")
    assert [part for part in samples[0][0][1] if isinstance(part, str)] == ["0:00.0\n", "Why?"]
    assert report.media == {"image": 1}


def test_decoded_sounds():
    take, sound = MediaFolder(".").take, np.sin(np.arange(1600) / 9).tolist()
    for array, length in ((sound, 1600), ([sound, sound], 1600)):
        (_, medium), = take({"path": "gone.wav", "array": array, "sampling_rate": 16000})
        samples, rate = soundfile.read(io.BytesIO(medium.content))
        assert medium.ending == "flac" and medium.reencoded and rate == 16000
        assert len(samples) == length and np.allclose(samples, sound, atol=1e-4)
    # Prepared as any other sound: integers scaled, channels found wherever they stand, none of them cancelled out.
    whole = (np.array(sound) * 32767).astype(np.int16)
    for array in (whole, np.stack([whole, whole], 1), [sound, [-value for value in sound]]):
        (_, medium), = take({"path": "gone.wav", "array": array, "sampling_rate": 16000})
        assert np.allclose(soundfile.read(io.BytesIO(medium.content))[0], sound, atol=1e-3)
    for array, rate in (([0.0] * 6010, 10), ([], 16000), ([0.1, float("nan")], 16000), ([3, 4], 16000), ([0.1], None),
                        ([[0.1], []], 16000), ("x", 16000), ([0.1], -1)):
        with pytest.raises(Dropped, match="unreadable media"):
            take({"path": None, "array": array, "sampling_rate": rate})


def test_names_by_template():
    assert fill("{a}_{b:04d}_{c:>3}", {"a": "007", "b": "7", "c": "x"}) == "007_0007_  x"
    with pytest.raises(Dropped, match="bad record"):
        fill("{a:04d}", {"a": "x"})
