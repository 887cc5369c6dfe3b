"""What people have: clips from phones, screen recorders and downloads, captions from spreadsheets and editors. Each is
read as a player or its maker shows it, or refused in one line that says where and what to do. Inputs are made here."""

import json
import os
import shutil

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cogvideo_lite as cl
from test_clips import levels_of, write_grey

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def write(path, pictures, fps=8, codec="libx264", pix_fmt="yuv420p", times=None, prepare=lambda stream: None, **how):
    """A video of uint8 (H, W, 3 or 4) pictures. times: in milliseconds, for frames at uneven times. how: of av.open."""
    with av.open(str(path), "w", **how) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pix_fmt
        if codec == "libx264":
            stream.options = {"crf": "1"}
        if codec == "libvpx" and pix_fmt == "yuva420p":
            stream.options = {"auto-alt-ref": "0"}
        if times:
            stream.codec_context.time_base = stream.time_base = cl.Fraction(1, 1000)
        prepare(stream)
        for k, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.shape[2] == 3 else "rgba")
            if times:
                frame.pts, frame.time_base = times[k], cl.Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def quarters(height=32, width=48):
    """Red and green above blue and white."""
    picture = np.zeros((height, width, 3), np.uint8)
    for k, colour in enumerate((RED, GREEN, BLUE, WHITE)):
        y, x = k // 2 * height // 2, k % 2 * width // 2
        picture[y : y + height // 2, x : x + width // 2] = colour
    return picture


def moving(frames=48, height=96, width=128):
    """Pictures in which every frame differs from the others, and no part is easy to guess."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.roll(noise, (k, 3 * k), (0, 1)) for k in range(frames)]


def corners(video):
    """The names of the colours in the four quarters of the first frame, in the order of reading."""
    _, _, height, width = video.shape
    seen = []
    for y, x in ((1, 1), (1, 3), (3, 1), (3, 3)):
        pixel = video[0, :, y * height // 4, x * width // 4].numpy() * 255
        distance = {name: np.abs(pixel - rgb).sum() for name, rgb in zip("RGBW", (RED, GREEN, BLUE, WHITE))}
        seen.append(min(distance, key=distance.get))
    return "".join(seen)


def refusal(call, *arguments):
    """The one line that a call is refused with."""
    with pytest.raises(cl.UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# How a clip is shown.

# (a, b, c, d) of a display matrix shows the pixel at (x, y) at (a x + c y, b x + d y); the eight are EXIF's eight.
TURNS = {
    "as it is": ((1, 0, 0, 1), "RGBW"), "a quarter clockwise": ((0, 1, -1, 0), "BRWG"),
    "half": ((-1, 0, 0, -1), "WBGR"), "a quarter counterclockwise": ((0, -1, 1, 0), "GWRB"),
    "left to right": ((-1, 0, 0, 1), "GRWB"), "upside down": ((1, 0, 0, -1), "BWRG"),
    "transposed": ((0, 1, 1, 0), "RBGW"), "the other diagonal": ((0, -1, -1, 0), "WGBR"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("turn", TURNS)
def test_a_clip_is_turned_and_mirrored_as_its_display_matrix_says(tmp_path, turn, suffix):
    (a, b, c, d), expected = TURNS[turn]
    matrix = [v * 65536 for v in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
    path = write(tmp_path / f"v{suffix}", [quarters()] * 3, prepare=lambda s: s.set_display_matrix(matrix))
    video = cl.read_video(path)
    assert corners(video) == expected and video.shape[2:] == ((48, 32) if b else (32, 48))
    assert corners(cl.read_video(path, 3, 24, 24, 8)) == expected


@pytest.mark.parametrize(
    "aspect, shown", [((2, 1), (32, 96)), ((1, 2), (64, 48)), ((4, 3), (32, 64)), ((1, 1), (32, 48))]
)
@pytest.mark.parametrize("turned", [False, True])
def test_pixels_that_are_not_square_are_shown_at_their_shape(tmp_path, aspect, shown, turned):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = cl.Fraction(*aspect)
        if turned:
            stream.set_display_rotation(90)

    path = write(tmp_path / "v.mp4", [quarters()] * 3, prepare=prepare)
    assert cl.read_video(path).shape[2:] == (shown[::-1] if turned else shown)


def test_a_square_of_wide_pixels_is_cut_from_what_is_shown(tmp_path):
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, 8:24] = 255  # shown 64 x 32, of which the middle square is white
    path = write(tmp_path / "v.mp4", [picture] * 3,
                 prepare=lambda s: setattr(s.codec_context, "sample_aspect_ratio", cl.Fraction(2)))  # fmt: skip
    assert cl.read_video(path, height=32, width=32)[..., 2:-2].min() > 0.9


# When a frame is shown.


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_frame_is_on_show_until_the_next(tmp_path, suffix):
    pictures = [np.full((32, 32, 3), level, np.uint8) for level in (0, 0, *range(100, 131))]
    path = write(tmp_path / f"v{suffix}", pictures, times=[0, 33, *range(2000, 3001, 33)][:33])
    levels = levels_of(cl.read_video(path, frames=17, fps=8))
    assert levels[:16] == [0] * 16 and levels[16] == 100


@pytest.mark.parametrize("delays, fps, expected", [
    ([2000, 100, 100, 100, 100, 1000], 2, [0, 0, 0, 0, 1, 5]),
    ([500, 1000, 500], 4, [0, 0, 1, 1, 1, 1, 2, 2]),
])  # fmt: skip
def test_delays_of_a_gif_are_kept(tmp_path, delays, fps, expected):
    pictures = [Image.fromarray(np.full((16, 16, 3), 40 * k, np.uint8)) for k in range(len(delays))]
    pictures[0].save(tmp_path / "v.gif", save_all=True, append_images=pictures[1:], duration=delays)
    video = cl.read_video(tmp_path / "v.gif", frames=len(expected), fps=fps)
    assert levels_of(video) == [40 * k for k in expected]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".mov", ".flv", ".webm"])
@pytest.mark.parametrize("source_fps", [24, 25, 30, 12])
def test_containers_agree_on_the_frame_that_is_on_show(tmp_path, suffix, source_fps):
    pictures = [np.full((32, 32, 3), 4 * k, np.uint8) for k in range(source_fps + 1)]
    path = write(tmp_path / f"v{suffix}", pictures, source_fps, "libvpx-vp9" if suffix == ".webm" else "libx264")
    expected = [4 * (k * source_fps // 8) for k in range(9)]
    assert levels_of(cl.read_video(path, frames=9, fps=8)) == pytest.approx(expected, abs=1.5)


@pytest.mark.parametrize("start", [0, 33, 1000, 5033])
def test_instants_count_from_the_first_frame(tmp_path, start):
    pictures = [np.full((32, 32, 3), 4 * k, np.uint8) for k in range(31)]
    path = write(tmp_path / "v.mkv", pictures, fps=30, times=[start + round(1000 * k / 30) for k in range(31)])
    expected = [4 * (30 * k // 8) for k in range(9)]
    assert levels_of(cl.read_video(path, frames=9, fps=8)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    "codec, suffix", [("libx264", ".h264"), ("mpeg4", ".m4v"), ("libx265", ".hevc"), ("mjpeg", ".mjpeg")]
)
def test_a_stream_without_time_stamps_runs_at_its_own_rate(tmp_path, codec, suffix):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    container = {".mjpeg": "mjpeg", ".h264": "h264", ".hevc": "hevc", ".m4v": "m4v"}[suffix]
    rate = 25 if codec in ("mjpeg", "mpeg4") else 24  # those hold no rate: FFmpeg takes 25
    path = write(tmp_path / f"v{suffix}", moving(51, 64, 64), rate, codec, pix_fmt, format=container)
    assert len(cl.read_video(path)) == 51
    assert len(cl.read_video(path, 17, 64, 64, 8)) == 17


def test_frames_before_an_edit_are_not_shown(tmp_path):
    """B-frames begin at a time above zero, which an edit list takes back."""
    path = write(tmp_path / "v.mp4", [np.full((32, 32, 3), 5 * k, np.uint8) for k in range(24)], 24,
                 prepare=lambda s: setattr(s.codec_context, "max_b_frames", 3))  # fmt: skip
    assert levels_of(cl.read_video(path, 8, fps=8)) == pytest.approx([15 * k for k in range(8)], abs=2)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_of_an_avi_come_in_the_order_of_display(tmp_path, codec):
    """It has no times of display; with B-frames, those that FFmpeg guesses jump back and forth."""
    pictures = [np.full((32, 32, 3), 3 * k, np.uint8) for k in range(72)]
    path = write(tmp_path / "v.avi", pictures, 24, codec,
                 prepare=lambda s: setattr(s.codec_context, "max_b_frames", 2))  # fmt: skip
    assert levels_of(cl.read_video(path, 17, fps=8)) == pytest.approx([9 * k for k in range(17)], abs=2)


# Colours.


def coloured(path, rgb, matrix, full=False, tags=True, size=(64, 64), pix_fmt="yuv420p", **colour):
    """A clip of one colour, coded by hand with the luma weights (red, blue) of a colour matrix."""
    number, red, blue = {"bt709": (1, 0.2126, 0.0722), "bt601": (5, 0.299, 0.114), "fcc": (4, 0.30, 0.11),
                         "smpte240m": (7, 0.212, 0.087), "bt2020": (9, 0.2627, 0.0593)}[matrix]  # fmt: skip
    r, g, b = np.array(rgb) / 255
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    y, u, v = (255 * y, 128 + 255 * u, 128 + 255 * v) if full else (16 + 219 * y, 128 + 224 * u, 128 + 224 * v)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if tags:
            stream.codec_context.colorspace = number
            stream.codec_context.color_range = 2 if full else 1
        for name, value in colour.items():
            setattr(stream.codec_context, name, value)
        planes = np.full((size[0] * 3 // 2, size[1]), round(y), np.uint8)
        planes[size[0] : size[0] * 5 // 4], planes[size[0] * 5 // 4 :] = round(u), round(v)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.colorspace, frame.color_range = stream.codec_context.colorspace, stream.codec_context.color_range
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def colour_of(path):
    video = cl.read_video(path)
    return [round(255 * v) for v in video[0, :, video.shape[2] // 2, video.shape[3] // 2].tolist()]


@pytest.mark.parametrize("matrix", ["bt709", "bt601", "fcc", "smpte240m", "bt2020"])
@pytest.mark.parametrize("full", [False, True])
def test_colours_follow_the_matrix_and_the_range_of_the_file(tmp_path, matrix, full):
    path = coloured(tmp_path / "v.mp4", (200, 60, 90), matrix, full)
    assert colour_of(path) == pytest.approx([200, 60, 90], abs=4)


@pytest.mark.parametrize("size, matrix", [((64, 64), "bt601"), ((576, 720), "bt601"), ((720, 1280), "bt709"),
                                          ((1280, 720), "bt709"), ((64, 1920), "bt709")])  # fmt: skip
def test_untagged_colours_are_bt709_in_hd_and_bt601_below(tmp_path, size, matrix):
    path = coloured(tmp_path / "v.mp4", (220, 30, 30), matrix, tags=False, size=size)
    assert colour_of(path) == pytest.approx([220, 30, 30], abs=4)


@pytest.mark.parametrize("transfer", [1, 2, 14])
def test_wide_colours_are_refused_with_the_command_that_converts_them(tmp_path, transfer):
    path = coloured(tmp_path / "v.mp4", (200, 150, 120), "bt2020", color_primaries=9, color_trc=transfer)
    line = refusal(cl.read_video, path)
    assert "v.mp4': BT.2020, where" in line and "ffmpeg -i IN -vf colorspace=all=bt709:iall=bt2020" in line


def test_display_p3_is_shown_as_a_screen_that_does_not_know_it_shows_it(tmp_path):
    path = coloured(tmp_path / "v.mp4", (200, 150, 120), "bt709", color_primaries=12, color_trc=1)
    assert colour_of(path) == pytest.approx([200, 150, 120], abs=4)


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_with_the_command_that_converts_it(tmp_path, transfer, name):
    path = coloured(tmp_path / "v.mp4", (200, 60, 90), "bt2020", color_primaries=9, color_trc=transfer)
    assert f"v.mp4': HDR ({name})" in (line := refusal(cl.read_video, path)) and "ffmpeg -i IN -vf zscale" in line


def test_a_matrix_that_cannot_be_converted_is_refused_with_a_command(tmp_path):
    path = coloured(tmp_path / "v.mp4", (200, 60, 90), "bt709", colorspace=8)  # YCgCo
    assert "colour matrix 8; convert it: ffmpeg" in refusal(cl.read_video, path)


@pytest.mark.parametrize("codec, pix_fmt, suffix", [
    ("libx264", "yuv422p", ".mp4"), ("libx264", "yuv444p", ".mkv"), ("libx264", "yuv420p10le", ".mp4"),
    ("libx264rgb", "rgb24", ".mkv"), ("mjpeg", "yuvj420p", ".avi"), ("prores_ks", "yuv422p10le", ".mov"),
    ("ffv1", "bgr0", ".mkv"), ("rawvideo", "yuv420p", ".avi"), ("rawvideo", "bgr24", ".avi"), ("png", "rgb24", ".mov"),
    ("libvpx-vp9", "yuv420p", ".webm"), ("libx265", "yuv420p", ".mp4"), ("mpeg4", "yuv420p", ".m4v"),
    ("mpeg2video", "yuv420p", ".ts"), ("wmv2", "yuv420p", ".wmv"), ("libvpx", "yuv420p", ".webm"),
    ("libsvtav1", "yuv420p", ".mp4"), ("h263", "yuv420p", ".3gp"), ("flv", "yuv420p", ".flv"),
])  # fmt: skip
def test_codecs_and_pixel_formats_show_the_same_picture(tmp_path, codec, pix_fmt, suffix):
    size = (96, 128)
    path = write(tmp_path / f"v{suffix}", [quarters(*size)] * 25, 25, codec, pix_fmt)
    video = cl.read_video(path, 5, *size, 8)
    assert corners(video) == "RGBW" and video.shape == (5, 3, *size)
    assert suffix in cl.VIDEO_SUFFIXES


def sticker(frames=9):
    """A red square on nothing; where there is nothing, black is written."""
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[16:48, 16:48] = (255, 0, 0, 255)
    return [picture] * frames


@pytest.mark.parametrize("codec, pix_fmt, suffix", [
    ("libvpx-vp9", "yuva420p", ".webm"), ("libvpx", "yuva420p", ".webm"), ("libvpx-vp9", "yuva420p", ".mkv"),
    ("png", "rgba", ".mov"), ("qtrle", "argb", ".mov"), ("prores_ks", "yuva444p10le", ".mov"), ("ffv1", "bgra", ".mkv"),
    ("apng", "rgba", ".apng"), ("gif", None, ".gif"),
])  # fmt: skip
def test_what_is_transparent_is_shown_on_white_in_every_container(tmp_path, codec, pix_fmt, suffix):
    path = tmp_path / f"v{suffix}"
    if codec == "gif":
        pictures = [Image.fromarray(p) for p in sticker()]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=125, disposal=2)
    else:
        write(path, sticker(), 8, codec, pix_fmt)
    video = cl.read_video(path)
    assert video[0, :, 4, 4].tolist() == pytest.approx([1, 1, 1], abs=0.02)
    assert video[0, :, 32, 32].tolist() == pytest.approx([1, 0, 0], abs=0.06)


# Files that are not whole, or no video.


@pytest.mark.parametrize(
    "codec, suffix", [("libx264", ".mp4"), ("libx264", ".mkv"), ("mpeg4", ".avi"), ("mjpeg", ".mov")]
)
def test_a_damaged_clip_is_named_and_never_read_smeared(tmp_path, codec, suffix):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write(tmp_path / f"v{suffix}", moving(), 24, codec, pix_fmt)
    whole, data, refused = cl.read_video(path, 16, 48, 64, 8), path.read_bytes(), 0
    for seed in range(6):
        chance, spoiled = np.random.default_rng(seed), bytearray(data)
        for place in chance.integers(len(data) // 4, len(data) * 3 // 4, 6):
            spoiled[place] ^= int(chance.integers(1, 256))
        path.write_bytes(spoiled)
        try:
            video = cl.read_video(path, 16, 48, 64, 8)
            assert (video - whole).abs().mean() < 0.01
        except cl.UserError as error:
            refused += "damaged" in str(error)
    assert refused >= 3


@pytest.mark.parametrize(
    "suffix, options", [(".mp4", {"movflags": "faststart"}), (".mkv", {}), (".avi", {}), (".flv", {})]
)
def test_a_clip_that_is_cut_short_is_named_so(tmp_path, suffix, options):
    path = write(tmp_path / f"v{suffix}", moving(96), 24, options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    assert "cut short" in refusal(cl.read_video, path, 25, 64, 64, 8)
    assert len(cl.read_video(path, 5, 64, 64, 8)) == 5  # what is there is fine


@pytest.mark.parametrize("make, words", [
    (lambda p: p.write_bytes(b""), "it is empty"),
    (lambda p: p.write_bytes(b"not a video" * 99), "cannot be read"),
    (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "cannot be read"),
    (lambda p: Image.fromarray(quarters()).save(p, "PNG"), "a picture, no video"),
    (lambda p: Image.fromarray(quarters()).save(p, "JPEG"), "a picture, no video"),
    (lambda p: Image.fromarray(quarters()).save(p, "WEBP"), "a picture, no video"),
    (lambda p: write_sound(p), "sound, but no video"),
    (lambda p: write_sound(p, cover=True), "sound, but no video"),
    (lambda p: None, "cannot be read"),
], ids=["empty", "text", "pointer", "png", "jpeg", "webp", "sound", "cover", "gone"])  # fmt: skip
def test_what_is_no_video_is_refused_in_a_line(tmp_path, make, words):
    make(tmp_path / "a.mp4")
    line = refusal(cl.read_video, tmp_path / "a.mp4", 9, 32, 32, 8)
    assert "a.mp4'" in line and words in line and "replace or drop it" in line


def write_sound(path, cover=False):
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        picture = file.add_stream("mjpeg", rate=1) if cover else None
        if cover:
            picture.height, picture.width, picture.pix_fmt = 32, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(quarters(), format="rgb24")
            file.mux(picture.encode(frame))
            file.mux(picture.encode())
        for k in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 8000, 1024 * k
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "libx265"])
def test_a_recording_that_begins_amid_a_stream_is_read_from_its_first_whole_picture(tmp_path, codec):
    def prepare(stream):
        stream.codec_context.gop_size = 12

    path = write(tmp_path / "v.ts", moving(60), 24, codec, prepare=prepare)
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 10 // 188 * 188 :])
    video = cl.read_video(path, 9, 96, 128, 8)
    assert len(video) == 9


def test_a_header_in_another_encoding_does_no_harm(tmp_path):
    path = write(tmp_path / "v.mkv", [quarters()] * 3, prepare=lambda s: s.metadata.update(title="Kamera"))
    path.write_bytes(path.read_bytes().replace(b"Kamera", "Камера".encode("cp1251")))
    assert corners(cl.read_video(path)) == "RGBW"


def test_the_memory_of_a_large_clip_is_that_of_its_frames_as_trained(tmp_path, monkeypatch):
    """Each frame is scaled before the next is decoded: no more than a few large ones are alive."""
    large = []
    scale = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda x, **kw: large.append(x.shape) or scale(x, **kw))
    path = write(tmp_path / "v.mp4", moving(12, 480, 640), 8)
    assert cl.read_video(path, 9, 48, 64, 8).shape == (9, 3, 48, 64)
    assert large == [(1, 3, 480, 640)] * 9


# Captions and folders.

NAMES = [f"c{k}.mp4" for k in range(4)]
TEXTS = ["a red square", "a green square", "a blue square", "a white square"]


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        write_grey(tmp_path / name, [1, 2], 8)
    return tmp_path


def lines(*rows):
    return "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows).encode()


CSV = "file_name,text\n" + "".join(f"{n},{t}\n" for n, t in zip(NAMES, TEXTS))
PAIR = {"videos.txt": "\n".join(NAMES).encode(), "prompts.txt": "\n".join(TEXTS).encode()}
ALL = lines(*zip(NAMES, TEXTS))
BESIDE = {name.replace("mp4", "txt"): text.encode() for name, text in zip(NAMES, TEXTS)}
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("files", [
    {"metadata.jsonl": ALL}, {"metadata.jsonl": BOM + ALL}, {"metadata.jsonl": ALL.replace(b"\n", b"\r\n")},
    {"metadata.jsonl": ALL.replace(b"\n", b"\n\n")}, {"metadata.jsonl": ALL.rstrip()},
    {"metadata.jsonl": ALL.replace(b'"text"', b'"caption"')}, {"metadata.jsonl": ALL.replace(b'"text"', b'"prompt"')},
    {"metadata.jsonl": ALL.replace(b'"c', b'"./c')},
    {"metadata.csv": CSV.encode()}, {"metadata.csv": BOM + CSV.encode()},
    {"metadata.csv": CSV.replace(",", ";").encode()}, {"metadata.csv": CSV.replace(",", "\t").encode()},
    {"metadata.csv": CSV.replace("\n", "\r\n").encode()}, {"metadata.csv": CSV.replace(",", ", ").encode()},
    {"metadata.csv": CSV.encode() + b",\n\n"}, PAIR, {k: BOM + v for k, v in PAIR.items()},
    {k: v.replace(b"\n", b"\r\n") + b"\r\n" for k, v in PAIR.items()}, {k: v + b"\n\n" for k, v in PAIR.items()},
    {"videos.txt": PAIR["videos.txt"], "prompt.txt": PAIR["prompts.txt"]}, BESIDE,
    {k: BOM + v + b"\r\n" for k, v in BESIDE.items()},
])  # fmt: skip
def test_captions_are_read_in_every_form_that_editors_and_spreadsheets_write(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert [(c.path.name, c.caption) for c in cl.read_clips(folder)] == list(zip(NAMES, TEXTS))


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0c", "\x1c", "\u2029", "\x0b"])
@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv", "prompts.txt", "c0.txt"])
def test_only_line_feeds_end_lines(folder, form, mark):
    texts = [f"a red{mark}square", *TEXTS[1:]]
    rows = list(zip(NAMES, texts))
    files = {
        "metadata.jsonl": "\n".join(json.dumps({"file_name": n, "text": t}, ensure_ascii=mark < " ") for n, t in rows),
        "metadata.csv": "file_name,text\n" + "".join(f"{n},{t}\n" for n, t in rows),
        "prompts.txt": "\n".join(texts),
        **{name.replace("mp4", "txt"): text for name, text in rows},
    }
    if form == "c0.txt":
        kept = [name.replace("mp4", "txt") for name in NAMES]
    else:
        kept = [form]
        (folder / "videos.txt").write_text("\n".join(NAMES)) if form == "prompts.txt" else None
    for name in kept:
        (folder / name).write_bytes(files[name].encode())
    assert [c.caption for c in cl.read_clips(folder)] == texts


def test_a_quoted_caption_may_hold_separators_quotes_and_line_breaks(folder):
    text = 'a red square; then, "slowly",\na green one\tas well'
    for separator in ",;\t":
        quoted = '"' + text.replace('"', '""') + '"'
        (folder / "metadata.csv").write_text(f"file_name{separator}text\nc0.mp4{separator}{quoted}\n")
        assert [c.caption for c in cl.read_clips(folder)] == [text]


def test_a_list_is_several_captions_of_a_clip(folder):
    rows = [("c0.mp4", ["a red square", "another"]), ("c1.mp4", "a green square")]
    (folder / "metadata.jsonl").write_bytes(lines(*rows))
    first, second = cl.read_clips(folder)
    assert (first.caption, first.captions) == ("a red square", ("a red square", "another"))
    assert second.captions == ("a green square",)


def test_a_file_that_is_listed_again_adds_a_caption_and_stays_one_clip(folder):
    os.symlink(folder / "c0.mp4", folder / "link.mp4")
    rows = [*zip(NAMES, TEXTS), ("c0.mp4", "told otherwise"), ("link.mp4", "by another name"), ("./c0.mp4", TEXTS[0])]
    (folder / "metadata.jsonl").write_bytes(lines(*rows))
    clips = cl.read_clips(folder)
    assert len(clips) == 4 and clips[0].captions == ("a red square", "told otherwise", "by another name")


@pytest.mark.parametrize("file, data, words", [
    ("metadata.csv", b"file_name,text\nc0.mp4,a red square, then a green one\n", ["line 2", "3 cells", "quotes"]),
    ("metadata.csv", b'file_name,text\nc1.mp4,"two\nlines"\nc0.mp4,a, b, c\n', ["line 4", "4 cells"]),
    ("metadata.csv", b"file_name,text\nc0.mp4\n", ["line 2", "1 cells"]),
    ("metadata.csv", b'file_name,text\nc0.mp4,"never closed\n', ["line", "quotes"]),
    ("metadata.csv", b"name,words\nc0.mp4,x\n", ["line 2", "file_name"]),
    ("metadata.csv", b"file_name,text\nc0.mp4,\n", ["line 2", "caption '' of 'c0.mp4' is empty"]),
    ("metadata.csv", "file_name,text\nc0.mp4,caf\xe9\n".encode("cp1252"), ["line 2", "not UTF-8", "save it as UTF-8"]),
    ("metadata.jsonl", ALL.decode().encode("utf-16"), ["not UTF-8"]),
    ("metadata.jsonl", ALL.decode().encode("utf-16-le"), ["not UTF-8"]),
    ("metadata.jsonl", b"{not json\n", ["line 1", "no JSON"]),
    ("metadata.jsonl", b'\n{"file_name": "c0.mp4", "text": "x"} trailing\n', ["line 2", "no JSON"]),
    ("metadata.jsonl", b"[1, 2]\n", ["line 1", "file_name"]),
    ("metadata.jsonl", b"[" * 100_000 + b"\n", ["line 1"]),
    ("metadata.jsonl", b'{"file_name": "c0.mp4"}\n', ["line 1", "text"]),
    ("metadata.jsonl", b'{"text": "x"}\n', ["line 1", "file_name"]),
    ("metadata.jsonl", b'{"file_name": "c0.mp4", "text": "x", "prompt": "y"}\n', ["line 1", "caption or prompt"]),
    ("metadata.jsonl", lines((None, "x")), ["line 1", "file_name is None"]),
    ("metadata.jsonl", lines((7, "x")), ["line 1", "file_name is 7"]),
    ("metadata.jsonl", lines(("c0.mp4", 7)), ["line 1", "c0.mp4", "caption 7"]),
    ("metadata.jsonl", lines(("c0.mp4", None)), ["line 1", "c0.mp4", "None"]),
    ("metadata.jsonl", lines(("c0.mp4", ["x", None])), ["line 1", "None"]),
    ("metadata.jsonl", lines(("c0.mp4", [])), ["line 1", "of 'c0.mp4' is empty"]),
    ("metadata.jsonl", lines(("c0.mp4", ["x", " "])), ["line 1", "of 'c0.mp4' is empty"]),
    ("metadata.jsonl", lines(("c0.mp4", {"en": "x"})), ["line 1", "caption {'en': 'x'}"]),
    ("metadata.jsonl", b'{"file_name": "c0.mp4", "text": "\\ud800"}\n', ["line 1", "ud800"]),
    ("metadata.jsonl", lines(("gone.mp4", "x")), ["line 1", "gone.mp4", "not there"]),
    ("metadata.jsonl", lines(("c\0.mp4", "x")), ["line 1", "not there"]),
    ("metadata.jsonl", lines(("x" * 5000, "x")), ["line 1", "not there"]),
    ("metadata.jsonl", b'{"file_name": "\\ud800.mp4", "text": "x"}\n', ["line 1", "not there"]),
    ("metadata.jsonl", lines(("../clips/c0.mp4", "x")), ["line 1", "leads out of the data folder"]),
    ("metadata.jsonl", lines(("/etc/passwd", "x")), ["line 1", "leads out of the data folder"]),
    ("metadata.jsonl", lines(("a/../../x.mp4", "x")), ["line 1", "leads out of the data folder"]),
    ("metadata.jsonl", lines((".", "x")), ["line 1", "not there"]),
    ("metadata.jsonl", b"", ["no clips"]),
    ("metadata.csv", b"", ["no clips"]),
    ("prompts.txt", b"a red square\n\na blue square\na white square\nstray\n", ["prompts.txt', line 2", "empty"]),
    ("prompts.txt", b"a red square\na green one\na blue square\n", ["prompts.txt', line 4", "4 lines in videos.txt"]),
    ("prompts.txt", "caf\xe9\n".encode("cp1252"), ["prompts.txt', line 1", "not UTF-8"]),
    ("other.txt", b"x", ["prompt.txt", "cannot be read"]),
    ("c3.txt", "caf\xe9\n".encode("cp1252"), ["c3.txt', line 1", "not UTF-8"]),
    ("c3.txt", b" \n", ["c3.txt'", "of 'c3.mp4' is empty"]),
    ("none.txt", b"x", ["c0.mp4", "no caption", "c0.txt"]),
])  # fmt: skip
def test_bad_captions_are_refused_with_file_and_line(tmp_path, file, data, words):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(b"not looked into")
    if file in ("prompts.txt", "other.txt"):
        (folder / "videos.txt").write_text("\n".join(NAMES))
    if file == "c3.txt":
        for name in NAMES:
            (folder / name).with_suffix(".txt").write_text("fine")
    (folder / file).write_bytes(data)
    line = refusal(cl.read_clips, folder)
    assert all(word in line for word in words), line


def test_lines_pair_up_by_number_on_the_side_of_the_clips_too(folder):
    (folder / "videos.txt").write_text("c0.mp4\n\nc1.mp4\n")
    (folder / "prompts.txt").write_text("x\ny\nz\n")
    assert "videos.txt', line 2: empty" in refusal(cl.read_clips, folder)


def test_the_layout_of_cogvideos_own_trainer_is_read(folder):
    for sub in ("videos/more", "labels/more"):
        (folder / sub).mkdir(parents=True)
    for name, text, sub in zip(NAMES, TEXTS, ("", "", "more/", "more/")):
        shutil.move(folder / name, folder / f"videos/{sub}{name}")
        (folder / f"labels/{sub}{name}").with_suffix(".txt").write_text(text)
    assert [c.caption for c in cl.read_clips(folder)] == TEXTS


def test_subfolders_are_read_in_every_form(folder):
    (folder / "a/b").mkdir(parents=True)
    shutil.move(folder / "c0.mp4", folder / "a/b/c0.mp4")
    for name, text in zip(("a/b/c0", "c1", "c2", "c3"), TEXTS):
        (folder / f"{name}.txt").write_text(text)
    assert sorted(c.caption for c in cl.read_clips(folder)) == sorted(TEXTS)
    for name in ("a/b/c0.mp4", "a\\b\\c0.mp4", "a/../a/b/c0.mp4"):
        (folder / "metadata.jsonl").write_bytes(lines((name, "x")))
        assert [c.path for c in cl.read_clips(folder)] == [folder / "a/b/c0.mp4"]


def test_system_files_are_passed_over_and_the_rest_is_told_once(folder, capsys):
    for name, text in zip(NAMES, TEXTS):
        (folder / name).with_suffix(".txt").write_text(text)
    (folder / "__MACOSX").mkdir()
    for name in ("._c0.mp4", "Thumbs.db", "desktop.ini", ".DS_Store", "__MACOSX/c9.mp4", ".hidden.mp4"):
        (folder / name).write_bytes(b"x")
    assert len(cl.read_clips(folder)) == 4 and capsys.readouterr().out == ""
    for name in ("cover.png", "notes.docx"):
        (folder / name).write_bytes(b"x")
    cl.read_clips(folder), cl.read_clips(folder)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "2 files are left out" in told and "cover.png" in told
    (folder / "metadata.jsonl").write_bytes(lines(("c0.mp4", "x")))
    (folder / "metadata.csv").write_text(CSV)
    assert len(cl.read_clips(folder)) == 1
    told = capsys.readouterr().out
    assert "metadata.jsonl is read, metadata.csv left out" in told and "5 files are left out" in told


def test_a_linked_clip_is_read(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    os.symlink(folder / "c0.mp4", elsewhere / "linked.mp4")
    (elsewhere / "linked.txt").write_text("x")
    assert [c.path.name for c in cl.read_clips(elsewhere)] == ["linked.mp4"]


# No traceback, whatever stands in the files.

NO_TRACEBACK = settings(max_examples=int(os.environ.get("EXAMPLES", 150)), deadline=None, database=None,
                        suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(NAMES + ["..", "/", "a\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from(["file_name", "text", "caption", "prompt", "x"]), VALUES) | VALUES
PIECES = [b"\n", b"\r\n", b'"', b",", b";", b"\t", b"c0.mp4", b"file_name", b"text", b"{", b"}", b":", BOM, b"\0"]
BYTES = st.binary(max_size=60) | st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=20).map(b"".join)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoiled")
    for name in NAMES:
        (folder / name).write_bytes(b"not looked into")
    return folder


def read_or_refuse(folder, files):
    for name in ("metadata.jsonl", "metadata.csv", "videos.txt", "prompts.txt", *BESIDE):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        clips = cl.read_clips(folder)
    except cl.UserError as error:
        assert str(error)
    else:
        assert clips and all(text.strip() and text.encode() for clip in clips for text in clip.captions)
        assert len({clip.path.resolve() for clip in clips}) == len(clips)


@NO_TRACEBACK
@given(name=st.sampled_from(["metadata.jsonl", "metadata.csv", "videos.txt", "c0.txt"]), data=BYTES, other=BYTES)
def test_any_bytes_are_read_or_refused(spoiled, name, data, other):
    files = {**BESIDE, name: data}
    read_or_refuse(spoiled, files | ({"prompts.txt": other} if name == "videos.txt" else {}))


@NO_TRACEBACK
@given(rows=st.lists(ROWS, max_size=4))
def test_any_rows_of_json_are_read_or_refused(spoiled, rows):
    read_or_refuse(spoiled, {"metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})


@NO_TRACEBACK
@given(cells=st.lists(st.lists(st.text(max_size=9) | st.sampled_from(NAMES), max_size=3), max_size=4),
       separator=st.sampled_from(",;\t"))  # fmt: skip
def test_any_table_is_read_or_refused(spoiled, cells, separator):
    text = "\n".join(separator.join(row) for row in [["file_name", "text"], *cells])
    read_or_refuse(spoiled, {"metadata.csv": text.encode("utf-8", "surrogatepass")})
