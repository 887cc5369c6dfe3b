"""Reading and writing clips: three forms of a data folder, resampling, cropping, and what is said of bad ones."""

import csv
import json

import av
import numpy as np
import pytest
import torch

import cogvideo_lite as cl


def write_grey(path, levels, fps, size=(32, 32), codec="libx264"):
    """A video whose frame k is grey of level k: written by PyAV here, not by the code under test."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for level in levels:
            picture = np.full((*size, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def levels_of(video):
    return (video.mean(dim=(1, 2, 3)) * 255).round().int().tolist()


@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv", "videos.txt", "text files"])
def test_every_form_of_a_data_folder_gives_the_same_clips(tmp_path, form):
    names, texts = ["b.mp4", "a.mp4"], ["a dog, running", "a cat"]
    for name in names:
        write_grey(tmp_path / name, [10, 20], 8)
    if form == "metadata.jsonl":
        (tmp_path / form).write_text(
            "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in zip(names, texts))
        )
    elif form == "metadata.csv":
        with open(tmp_path / form, "w", newline="") as file:
            csv.writer(file).writerows([["file_name", "text"], *zip(names, texts)])
    elif form == "videos.txt":
        (tmp_path / "videos.txt").write_text("\n".join(names) + "\n")
        (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n")
    else:
        for name, text in zip(names, texts):
            (tmp_path / name).with_suffix(".txt").write_text(text + "\n")
    clips = cl.read_clips(tmp_path)
    assert {(c.path.name, c.caption) for c in clips} == set(zip(names, texts))
    assert clips[0].video.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "source_fps, expected", [(8, [0, 10, 20, 30, 40]), (24, [0, 30, 60, 90, 120]), (30, [0, 30, 70, 110, 150])]
)
def test_resampling_takes_the_frame_that_is_on_show_at_each_instant(tmp_path, source_fps, expected):
    write_grey(tmp_path / "v.mp4", range(0, 200, 10), source_fps)
    video = cl.read_video(tmp_path / "v.mp4", frames=5, fps=8)
    assert np.abs(np.array(levels_of(video)) - expected).max() <= 2


def test_resampling_to_a_higher_rate_repeats_frames(tmp_path):
    write_grey(tmp_path / "v.mp4", [0, 50, 100, 150], 4)
    levels = levels_of(cl.read_video(tmp_path / "v.mp4", frames=8, fps=8))  # the last is on show as long as the others
    assert levels == pytest.approx([0, 0, 50, 50, 100, 100, 150, 150], abs=1)


def test_resizing_covers_the_size_and_crops_around_the_centre(tmp_path):
    picture = torch.zeros(3, 3, 64, 128)
    picture[..., 32:96] = 1.0  # the middle half is white; a centred square shows nothing else
    cl.write_video(tmp_path / "v.mp4", picture, 8)
    video = cl.read_video(tmp_path / "v.mp4", height=32, width=32)
    assert video.shape == (3, 3, 32, 32)
    assert video[..., 2:-2].min() > 0.9


def test_a_written_clip_reads_back_as_it_was(tmp_path):
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    clip = torch.stack([torch.stack([x, y, (x + y + 0.1 * k) % 1 * 0 + 0.05 * k]) for k in range(9)])
    cl.write_video(tmp_path / "v.mp4", clip, 8)
    error = (cl.read_video(tmp_path / "v.mp4") - clip).pow(2).mean()
    assert -10 * torch.log10(error) > 33  # dB; yuv420p halves the resolution of colour


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda d: (d / "metadata.jsonl").write_text(""), ["no clips"]),
        (lambda d: (d / "metadata.jsonl").write_text("{not json\n"), ["metadata.jsonl', line 1", "no JSON"]),
        (lambda d: (d / "metadata.jsonl").write_text('{"file_name": "a.mp4"}\n'), ["metadata.jsonl', line 1", "text"]),
        (
            lambda d: (d / "metadata.jsonl").write_text('{"file_name": "gone.mp4", "text": "x"}\n'),
            ["gone.mp4", "not there"],
        ),
        (
            lambda d: (d / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": " "}\n'),
            ["a.mp4", "caption ' ' of", "is empty"],
        ),
        (lambda d: (d / "metadata.jsonl").unlink(), ["a.mp4", "no caption", "a.txt"]),
    ],
)
def test_a_bad_data_folder_is_named_with_what_to_do(tmp_path, spoil, words):
    write_grey(tmp_path / "a.mp4", [1, 2], 8)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "a cat"}\n')
    spoil(tmp_path)
    with pytest.raises(cl.UserError) as caught:
        cl.read_clips(tmp_path)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_clip_too_short_says_how_many_frames_it_has_and_needs(tmp_path):
    write_grey(tmp_path / "a.mp4", [1] * 30, 30)
    with pytest.raises(cl.UserError, match="a.mp4': 8 frames at 8 fps, 17 needed; lower --frames or drop it"):
        cl.read_video(tmp_path / "a.mp4", frames=17, fps=8)


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(cl.UserError, match="a.mp4': cannot be read"):
        cl.read_video(tmp_path / "a.mp4")
