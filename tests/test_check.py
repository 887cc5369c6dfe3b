"""--check: what of a folder of clips will be trained on, and what is likely to harm, worst first, with remedies."""

import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import NANO, ROOT, SPIDER
from PIL import Image
from test_inputs import TURNS, coloured, moving, sticker, write, write_sound

import cogvideo_lite as cl

check = cl.load_instrument("check")
CAPTION = "a spider named kumo moving up over grass"
WAYS = [f"{way} over {ground}" for way in ("up", "down", "left", "right") for ground in ("sand", "stone", "snow")]


def captioned(path, text=CAPTION):
    path.with_suffix(".txt").write_text(text, "utf-8")
    return path


def small(frames=24, height=64, width=64, seed=0):
    """Pictures that move, and that differ from those of other seeds."""
    noise = np.random.default_rng(seed).integers(40, 256, (height // 8, width // 8, 3), np.uint8)
    noise = noise.repeat(8, 0).repeat(8, 1)
    return [np.roll(noise, (k, 2 * k), (0, 1)) for k in range(frames)]


def fine(folder, number=12):
    """Clips that nothing is wrong with."""
    for k in range(number):
        write(captioned(folder / f"fine{k:02}.mp4", f"a spider named kumo moving {WAYS[k]}"), small(seed=k + 100))


def config(folder, **options):
    return cl.Config(data=str(folder), model=str(NANO), **options)


def report_of(folder, **options):
    return check.check(config(folder, **options), download=False)


def harm(folder, words, **options):
    """The one harm whose text holds the words, as (text, remedy)."""
    harms = report_of(folder, **options).harms
    found = [(h.text, h.remedy) for h in harms if words in h.text]
    assert len(found) == 1, [str(h) for h in harms]
    assert found[0][1]
    return found[0]


def looked(path, **size):
    """Look of one clip."""
    how = {"frames": 17, "height": 64, "width": 64, "fps": 8} | size
    return check.look_at(cl.Clip(path, CAPTION, **how), "train")


# What is said of a clip.


@pytest.mark.parametrize("turn, told", [
    ("as it is", ""), ("a quarter clockwise", "90 deg"), ("half", "180 deg"), ("a quarter counterclockwise", "270 deg"),
    ("left to right", "180 deg mirrored"), ("upside down", "mirrored"),
])  # fmt: skip
def test_the_size_is_that_which_a_player_shows(tmp_path, turn, told):
    (a, b, c, d), _ = TURNS[turn]
    matrix = [v * 65536 for v in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
    path = write(tmp_path / "v.mp4", small(24, 64, 96), prepare=lambda s: s.set_display_matrix(matrix))
    look = looked(path)
    assert look.shown == ((96, 64) if b else (64, 96)) and look.turned == told
    assert look.cropped == pytest.approx(1 / 3) and look.scale == pytest.approx(1)


def test_pixels_that_are_not_square_count_as_they_are_shown(tmp_path):
    path = write(tmp_path / "v.mp4", small(24, 64, 64),
                 prepare=lambda s: setattr(s.codec_context, "sample_aspect_ratio", cl.Fraction(2)))  # fmt: skip
    assert looked(path).shown == (64, 128) and looked(path).cropped == pytest.approx(1 / 2)


@pytest.mark.parametrize("fps, suffix, repeated", [(1, ".mp4", 14), (4, ".mkv", 8), (8, ".mov", 0), (30, ".avi", 0)])
def test_frames_that_repeat_are_counted_from_packets(tmp_path, fps, suffix, repeated):
    path = write(tmp_path / f"v{suffix}", small(4 * fps, 32, 32), fps)
    look = looked(path)
    assert look.repeats == repeated and look.fps == pytest.approx(fps) and look.seconds == pytest.approx(4, abs=0.3)


KINDS = {
    "short groups": dict(name="v.mp4", group=5), "one long group": dict(name="v.mp4", group=250),
    "B-frames": dict(name="v.mp4", group=20, between=3), "Matroska": dict(name="v.mkv", group=12, between=2),
    "VP9": dict(name="v.webm", codec="libvpx-vp9", group=10), "H.265": dict(name="v.mp4", codec="libx265", group=10),
    "AVI": dict(name="v.avi", between=2), "transport stream": dict(name="v.ts", group=12, between=2),
    "raw": dict(name="v.h264", format="h264"), "MPEG-4": dict(name="v.mp4", codec="mpeg4", group=12, between=2),
    "uneven": dict(name="v.mp4", group=7, times=[0, 33, *range(2000, 5000, 60)][:48]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_pictures_are_the_first_middle_and_last_frame_of_training(tmp_path, kind):
    how = dict(KINDS[kind])
    path, group, between = tmp_path / how.pop("name"), how.pop("group", 12), how.pop("between", 0)

    def prepare(stream):
        stream.codec_context.gop_size = group
        if between:
            stream.codec_context.max_b_frames = between

    write(path, moving(48, 64, 64), 16, prepare=prepare, **how)
    video = cl.read_video(path, 17, 48, 48, 8).permute(0, 2, 3, 1)
    look = looked(path, height=48, width=48)
    assert not look.bad and len(look.pictures) == 3
    for picture, k in zip(look.pictures, (0, 8, 16)):
        assert np.array_equal(picture, (video[k] * 255).round().byte().numpy())


def test_a_recording_that_begins_amid_a_stream_shows_what_training_reads(tmp_path):
    path = write(tmp_path / "v.ts", moving(90, 64, 64), 24, prepare=lambda s: setattr(s.codec_context, "gop_size", 12))
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 10 // 188 * 188 :])
    video = cl.read_video(path, 17, 64, 64, 8).permute(0, 2, 3, 1)
    for picture, k in zip(looked(path).pictures, (0, 8, 16)):
        assert np.array_equal(picture, (video[k] * 255).round().byte().numpy())


def test_delays_of_a_gif_are_kept(tmp_path):
    pictures = [Image.fromarray(picture) for picture in small(6)]
    delays = [2000, 100, 100, 100, 100, 1000]
    pictures[0].save(tmp_path / "v.gif", save_all=True, append_images=pictures[1:], duration=delays)
    look, video = looked(tmp_path / "v.gif"), cl.read_video(tmp_path / "v.gif", 17, 64, 64, 8)
    assert look.repeats >= 15  # a second picture at 2.0 s
    assert np.array_equal(look.pictures[2], (video[16].permute(1, 2, 0) * 255).round().byte().numpy())


def test_only_what_three_frames_need_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "v.mp4", small(240), 30, prepare=lambda s: setattr(s.codec_context, "gop_size", 30))
    decoded = []
    turn = cl.Footage.frames
    monkeypatch.setattr(cl.Footage, "frames", lambda self: (decoded.append(f) or f for f in turn(self)))
    sparse = check.sparsely
    monkeypatch.setattr(check, "sparsely", lambda *a: (decoded.append(f) or f for f in sparse(*a)))
    assert len(looked(path, frames=49).pictures) == 3
    assert len(decoded) < 40  # of 181


# A folder of everything.


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One clip of each kind that people have, good and bad."""
    folder = tmp_path_factory.mktemp("mixed") / "clips"
    folder.mkdir()
    matrix = [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30]
    write(folder / "turned.mp4", small(24, 64, 128, 1), prepare=lambda s: s.set_display_matrix(matrix))
    write(folder / "wide_pixels.mp4", small(24, 64, 64, 2),
          prepare=lambda s: setattr(s.codec_context, "sample_aspect_ratio", cl.Fraction(2)))  # fmt: skip
    write(folder / "gap.mkv", small(33, seed=3), 30, times=[0, 33, *range(2000, 3001, 33)][:33])
    write(folder / "raw.h264", small(72, seed=4), 24, format="h264")
    write(folder / "slow.mp4", small(4, seed=5), 1)
    write(folder / "tiny.mp4", small(24, 32, 32, 6))
    Image.fromarray(sticker()[0]).save(folder / "still.gif", save_all=True, duration=[3000])
    write(folder / "sticker.webm", sticker(24), 8, "libvpx-vp9", "yuva420p")
    coloured(folder / "hdr.mp4", (200, 60, 90), "bt2020", color_primaries=9, color_trc=18)
    write(folder / "black.mp4", [np.zeros((64, 64, 3), np.uint8)] * 24)
    write(folder / "short.mp4", small(12, seed=7))
    whole = write(folder / "cut.mp4", moving(96), 24, options={"movflags": "faststart"})
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 5])
    shutil.copy(folder / "tiny.mp4", folder / "twin.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"not a video" * 99)
    (folder / "pointer.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Image.fromarray(small(1)[0]).save(folder / "picture.mp4", "PNG")
    write_sound(folder / "sound.mp4")
    spoiled = bytearray(write(folder / "damaged.mp4", moving(), 24).read_bytes())
    for place in range(len(spoiled) // 4, len(spoiled) * 3 // 4, 40):
        spoiled[place] ^= 0x55
    (folder / "damaged.mp4").write_bytes(spoiled)
    for path in list(folder.iterdir()):
        captioned(path, f"a spider named kumo, {path.stem.split('_')[0]}")
    captioned(folder / "turned.mp4", "a <b>蜘蛛</b> & a spider named kumo " + "moves very slowly " * 9)
    return folder


BAD = {
    "hdr.mp4": "HDR (HLG)", "short.mp4": "12 frames at 8 fps, 17 needed", "cut.mp4": "cut short",
    "empty.mp4": "it is empty", "text.mp4": "cannot be read", "pointer.mp4": "cannot be read",
    "picture.mp4": "a picture, no video", "sound.mp4": "sound, but no video", "damaged.mp4": "damaged",
}  # fmt: skip


def test_a_mixed_folder_is_told_truly(mixed):
    report = report_of(mixed)
    looks = {look.name: look for look in report.looks}
    assert len(looks) == 19
    assert {name for name, look in looks.items() if look.bad} == set(BAD)
    assert {name: looks[name].bad for name, words in BAD.items() if words not in looks[name].bad} == {}
    assert looks["turned.mp4"].shown == (128, 64) and looks["turned.mp4"].turned == "90 deg"
    assert looks["wide_pixels.mp4"].shown == (64, 128)
    assert looks["gap.mkv"].repeats == 14 and looks["slow.mp4"].repeats == 14 and looks["raw.h264"].repeats == 0
    assert looks["tiny.mp4"].scale == 2 and looks["twin.mp4"].copies == "tiny.mp4"
    assert looks["sticker.webm"].pictures[0][2, 2].min() > 250  # transparency is white
    assert looks["turned.mp4"].tokens[0].cut and looks["turned.mp4"].tokens[0].unknown == ["<b>蜘蛛</b>", "&"]


def test_what_is_bad_is_what_training_refuses(mixed):
    for look in report_of(mixed).looks:
        try:
            look.clip.video
        except cl.UserError:
            assert look.bad, look.name
        else:
            assert not look.bad, (look.name, look.bad)


def test_a_mixed_folder_gets_harms_worst_first(mixed):
    harms = report_of(mixed).harms
    assert harms == sorted(harms, key=lambda h: -h.weight) and all(h.remedy for h in harms)
    texts = [h.text for h in harms]

    def place(words):
        return next(k for k, text in enumerate(texts) if words in text)

    ends = [place(words) for words in ("be used", "HDR", "too short")]
    wrong = [place(words) for words in ("fewer pictures", "portrait", "black in", "not move", "tokens", "another name")]
    less = [place(words) for words in ("scaled up",)]
    assert max(ends) < min(wrong) and max(wrong) < min(less)


def test_the_page_holds_everything_and_escapes_captions(mixed, tmp_path, capsys):
    assert cl.main(["--check", "--data", str(mixed), "--model", str(NANO), "--out", str(tmp_path / "new/folder")]) == 0
    html, out = (tmp_path / "new/folder/check.html").read_text("utf-8"), capsys.readouterr().out
    assert f"see {tmp_path / 'new/folder/check.html'}" in out
    assert (
        "<b>蜘蛛" not in html and "&lt;b&gt;蜘蛛&lt;/b&gt;" in html and "<mark>&amp;</mark>" in html and "<del>" in html
    )
    assert not re.findall(r'(?:src|href)="?(?!data:|["d])', html) and "<script" not in html
    good = [look for look in report_of(mixed).looks if not look.bad]
    assert html.count("<figure>") >= 3 * len(good) and html.count("Cannot be used") == len(BAD)
    for name in (path.name for path in mixed.iterdir() if path.suffix != ".txt"):
        assert name in html and sum(line.startswith(name) for line in out.splitlines()) == 1


# Each harm, with its remedy.


def test_nothing_is_said_of_good_clips(tmp_path, capsys):
    fine(tmp_path)
    assert report_of(tmp_path, heldout=str(SPIDER.with_name("spider-heldout"))).harms == []
    assert check.warnings(config(tmp_path)) == []


@pytest.mark.parametrize("size, text, cut", [((128, 64), "portrait: 50 %", "crop=iw:iw:0:TOP"),
                                             ((64, 160), "landscape: 60 %", "crop=ih:ih:LEFT:0")])  # fmt: skip
def test_clips_of_another_shape_lose_a_share_of_each_picture(tmp_path, size, text, cut):
    fine(tmp_path)
    write(captioned(tmp_path / "odd.mp4"), small(24, *size))
    told, remedy = harm(tmp_path, text)
    assert "1 of 13 clips is" in told and "of each is cropped away ('odd.mp4')" in told and cut in remedy


def test_small_clips_are_scaled_up(tmp_path):
    fine(tmp_path)
    write(captioned(tmp_path / "small.mp4"), small(24, 32, 32))
    told, remedy = harm(tmp_path, "scaled up")
    assert "scaled up 2.0 times ('small.mp4')" in told and "originals" in remedy


def test_slow_clips_repeat_frames(tmp_path):
    fine(tmp_path)
    write(captioned(tmp_path / "slow.mp4"), small(12), 4)
    told, remedy = harm(tmp_path, "fewer pictures a second")
    assert "than the 8" in told and "8 of 16 steps repeat a frame in 'slow.mp4'" in told and "higher rate" in remedy


@pytest.mark.parametrize("skip", [False, True])
def test_clips_that_are_too_short_get_the_frames_that_all_have(tmp_path, skip):
    fine(tmp_path)
    write(captioned(tmp_path / "short.mp4"), small(13))
    told, remedy = harm(tmp_path, "too short", skip_bad=skip)
    assert "17 frames at 8 fps are needed, more than 2.0 s; there are 13 ('short.mp4')" in told
    assert "--frames 9 takes all" in remedy and "--skip-bad" in remedy
    assert report_of(tmp_path, frames=9).harms == []


def test_hdr_comes_with_the_command_that_converts_it(tmp_path):
    fine(tmp_path)
    coloured(captioned(tmp_path / "hdr.mp4"), (200, 60, 90), "bt2020", color_primaries=9, color_trc=16)
    assert "ffmpeg -i IN -vf zscale" in harm(tmp_path, "HDR")[1]


def test_black_clips_still_clips_and_bars(tmp_path):
    fine(tmp_path)
    write(captioned(tmp_path / "dark.mp4"), [np.zeros((64, 64, 3), np.uint8)] * 24)
    write(captioned(tmp_path / "rest.mp4"), small(1) * 24)
    bars = [np.pad(picture, ((16, 16), (0, 0), (0, 0))) for picture in small(24, 32, 64)]
    write(captioned(tmp_path / "bars.mp4"), bars)
    assert "1 of 15 clips is black" in harm(tmp_path, "black in")[0]
    assert "'rest.mp4'" in harm(tmp_path, "not move")[0]
    told, remedy = harm(tmp_path, "black bars")
    assert re.search(r"(4[7-9]|5[0-3]) % of the picture \('bars.mp4'\)", told) and "crop=" in remedy


def test_a_clip_that_fades_in_harms_an_image_to_video_model_alone(tmp_path, tiny):
    fine(tmp_path, 12)
    black = [np.zeros((64, 64, 3), np.uint8)]
    write(captioned(tmp_path / "fades.mp4"), black * 2 + small(30))
    found = {family: check.check(cl.Config(model=str(tiny(family)), data=str(tmp_path), fps=8)).harms for family in ("1.5", "1.5-i2v")}
    told = {family: [h for h in harms if "blank in the first frame" in h.text] for family, harms in found.items()}
    assert not told["1.5"] and "'fades.mp4'" in told["1.5-i2v"][0].text and "-ss" in told["1.5-i2v"][0].remedy


@pytest.mark.parametrize("family, advised", [("5b", True), ("5b-i2v", False)])
def test_fewer_frames_are_not_advised_for_a_model_that_takes_no_other_number(tmp_path, tiny, family, advised):
    model, clips = shutil.copytree(tiny(family), tmp_path / "model"), tmp_path / "clips"
    settings = json.loads((model / "transformer/config.json").read_text()) | {"sample_frames": 17}
    (model / "transformer/config.json").write_text(json.dumps(settings))
    clips.mkdir()
    for k in range(3):
        write(captioned(clips / f"{k}.mp4"), small(12, seed=k))
    harms = check.check(cl.Config(model=str(model), data=str(clips))).harms
    (remedy,) = [h.remedy for h in harms if "too short" in h.text]
    assert ("--frames 9 takes all" in remedy) == advised and "drop them" in remedy


def test_of_long_clips_only_the_start_is_read(tmp_path):
    fine(tmp_path)
    write(captioned(tmp_path / "long.mp4"), small(60))
    told, remedy = harm(tmp_path, "longer than")
    assert "first 2.0 s ('long.mp4')" in told and "-f segment -segment_time 3" in remedy


def test_a_caption_that_is_too_long_is_named_with_what_is_cut(tmp_path):
    fine(tmp_path)
    text = "a spider named kumo moving over sand and grass and then stone and snow, again and again"
    write(captioned(tmp_path / "wordy.mp4", text), small())
    number = len(cl.find_base(str(NANO)).load("tokenizer")(text).input_ids)
    told, remedy = harm(tmp_path, "tokens")
    assert f"than the 16 that the model reads: of 'wordy.mp4' {number - 16} of {number} are cut" in told
    tokens = next(look for look in report_of(tmp_path).looks if look.name == "wordy.mp4").tokens[0]
    assert text.startswith(tokens.kept_text) and 0 < len(tokens.kept_text) < len(text)


def test_words_that_the_model_cannot_read_are_counted_and_the_first_is_named(tmp_path):
    fine(tmp_path)
    write(captioned(tmp_path / "z.mp4", "a spider \U0001f642 moves left"), small())
    told, remedy = harm(tmp_path, "cannot read")
    assert "1 of 13 clips has" in told and "first '\U0001f642' of 'z.mp4'" in told and "<unk>" in remedy


@pytest.mark.parametrize("caption, words", [("dog", "fewer than 4 words"), (CAPTION, "captions are the same")])
def test_captions_that_say_little(tmp_path, caption, words):
    for k in range(12):
        write(captioned(tmp_path / f"{k}.mp4", caption), small(seed=k))
    assert "what is to be seen" in harm(tmp_path, words)[1]


def test_captions_without_a_shared_name_get_a_hint_which_comes_last(tmp_path):
    for k, text in enumerate(("two dogs run on sand", "one cat sleeps under trees", "some boats sail past cliffs")):
        write(captioned(tmp_path / f"{k}.mp4", text), small(seed=k))
    harms = report_of(tmp_path).harms
    assert "no word stands in most captions" in harms[-1].text and "a name of its own" in harms[-1].remedy
    assert not any("no word" in line for line in check.warnings(config(tmp_path)))


def test_the_same_content_under_two_names(tmp_path):
    fine(tmp_path)
    shutil.copy(tmp_path / "fine03.mp4", captioned(tmp_path / "other.mp4"))
    told, remedy = harm(tmp_path, "another name")
    assert "1 of 13 clips is the same file" in told and "'other.mp4' is 'fine03.mp4'" in told and "drop one" in remedy


def test_the_same_content_on_both_sides(tmp_path):
    data, heldout = tmp_path / "clips", tmp_path / "clips-heldout"
    data.mkdir(), heldout.mkdir()
    fine(data)
    shutil.copy(data / "fine03.mp4", captioned(heldout / "kept.mp4"))
    report = report_of(data)
    told, remedy = harm(data, "held-out")
    assert "1 of 13 clips is the same as a held-out clip, and so not trained on ('fine03.mp4')" in told
    assert {look.name: look.side for look in report.looks if look.side != "train"} == {
        "fine03.mp4": "copy", "kept.mp4": "held out"}  # fmt: skip


def test_a_clip_that_was_coded_again_looks_like_the_other(tmp_path):
    fine(tmp_path)
    write(captioned(tmp_path / "again.mkv"), small(seed=105), prepare=lambda s: setattr(s, "options", {"crf": "30"}))
    assert "'again.mkv' and 'fine05.mp4'" in harm(tmp_path, "like another")[0]


@pytest.mark.parametrize("number", [2, 9])
def test_few_clips(tmp_path, number):
    fine(tmp_path, number)
    told, remedy = harm(tmp_path, "to train on")
    assert f"only {number - 1} clip" in told and "50" in remedy


def test_one_clip_alone_is_shown_and_said_to_end_a_run(tmp_path):
    fine(tmp_path, 1)
    report = report_of(tmp_path)
    assert len(report.looks) == 1 and "every clip is held out" in report.harms[0].text


def test_mixed_sizes(tmp_path):
    fine(tmp_path)
    write(captioned(tmp_path / "large.mp4"), small(24, 256, 256))
    assert "from 64x64 to 256x256" in harm(tmp_path, "mixed sizes")[0]


def test_what_more_clips_have_weighs_more(tmp_path):
    fine(tmp_path)
    for k in range(4):
        write(captioned(tmp_path / f"tall{k}.mp4"), small(24, 128, 64, k))
    write(captioned(tmp_path / "slow.mp4"), small(12, seed=9), 4)
    texts = [h.text for h in report_of(tmp_path).harms]
    assert "4 of 17 clips are portrait" in texts[0] and "1 of 17 clips has fewer pictures" in texts[1]


# The command line.


@pytest.fixture
def offline(monkeypatch):
    """No network, and no model that was downloaded before."""
    import huggingface_hub

    def nothing(*arguments, **options):
        raise OSError("there is no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)


@pytest.mark.parametrize("method", [[], ["--lora"], ["--qlora"], ["--full", "--l2-to-base", "0.1"]])
def test_it_goes_with_any_method_or_none(clips, method, capsys):
    assert cl.main(["--check", *method, "--data", str(clips)]) == 0
    out = capsys.readouterr().out
    assert "only 5 clips to train on" in out and (clips.parent / "check.html").exists()


@pytest.mark.parametrize("model, size", [("THUDM/CogVideoX-2b", "480x720"), ("THUDM/CogVideoX-5b", "480x720"),
                                         ("zai-org/CogVideoX1.5-5B", "768x1360")])  # fmt: skip
def test_a_published_model_needs_neither_its_weights_nor_the_network(clips, model, size, offline, capsys):
    rows = (clips / "metadata.jsonl").read_text().splitlines(keepends=True)
    (clips / "metadata.jsonl").write_text("".join(rows[:2]))
    command = ["--check", "--data", str(clips), "--model", model, "--frames", "9", "--fps", "8"]
    assert cl.main(command) == 0
    out = capsys.readouterr().out
    assert f"9 frames at 8 fps (1.0 s), {size}" in out
    assert f"caption tokens are not counted: the tokenizer of {model} cannot be had (there is no network)" in out


def test_a_tokenizer_that_was_downloaded_before_is_used(clips, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **how: str(NANO))
    assert cl.main(["--check", "--data", str(clips), "--model", "THUDM/CogVideoX-5b", "--frames", "9"]) == 0
    assert "not counted" not in capsys.readouterr().out


def test_a_run_of_a_configuration_file_is_checked(clips, tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"method": "full", "l2_to_base": 0.1, "data": str(clips), "frames": 9}))
    assert cl.main(["--check", "--config", str(file)]) == 0
    assert "read: the first 9 frames" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["--check", "--plan", "--lora"], "--check and --plan: one at a time"),
    (["--check", "--judge", "x"], "--check: alone, or with --lora, --qlora or --full"),
    (["--check", "--data", "nowhere"], "no such folder"), (["--check", "--model", "nowhere/at/all"], "no such folder"),
    (["--check", "--frames", "16"], "--frames 16: must be 8k + 1"), (["--check", "--clips", "x"], "invalid int"),
    (["--check", "--out", __file__], "a file; --check takes a folder"), ([], "--check is required"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "--out" in arguments:
        fine(tmp_path, 2)
        arguments = [*arguments, "--data", str(tmp_path)]
    assert cl.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_bad_captions_are_one_line_as_in_training(clips, capsys):
    (clips / "metadata.jsonl").write_text('{"file_name": "gone.mp4", "text": "x"}\n')
    lines = []
    for action in ("--check", "--lora"):
        assert cl.main([action, "--data", str(clips)]) == 2
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1] and "line 1: clip 'gone.mp4' is not there" in lines[0]


def test_the_page_goes_beside_the_data_or_here(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path_of_run := tmp_path / "clips")
    monkeypatch.setattr(check.os, "access", lambda path, mode: False)
    assert cl.main(["--check", "--data", str(clips)]) == 0
    assert (tmp_path_of_run / "check.html").exists()


def test_names_that_are_no_text_are_shown(tmp_path):
    path = write(tmp_path / "v.mp4", small())
    odd = tmp_path / "a\udcff\n<i>.mp4"
    path.rename(odd)
    look = looked(odd)
    assert not look.bad and look.name == "a\\udcff\\n<i>.mp4" and "&lt;i&gt;" in check.card_html(look)


# Before a run.


def test_before_a_run_what_is_likely_to_harm_is_said(tmp_path, monkeypatch, capsys):
    fine(tmp_path)
    write(captioned(tmp_path / "tall.mp4"), small(24, 128, 64))
    monkeypatch.setattr(cl, "train", lambda config: None)
    assert cl.main(["--lora", "--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 and out[0].startswith("check: 1 of 13 clips is portrait: 50 % of each is cropped away")


def test_nothing_is_said_of_the_bundled_clips_and_in_no_time(monkeypatch, capsys):
    monkeypatch.setattr(cl, "train", lambda config: None)
    check.warnings(cl.Config())  # imports what training imports too
    begun = time.process_time()
    assert cl.main(["--lora"]) == 0 and capsys.readouterr().out == ""
    assert time.process_time() - begun < 2


def test_no_more_time_is_taken_than_is_given(tmp_path, monkeypatch):
    fine(tmp_path)
    write(captioned(tmp_path / "a_tall.mp4"), small(24, 128, 64))
    ticking = iter(range(1000))
    monkeypatch.setattr(check.time, "perf_counter", lambda: next(ticking))
    assert "more clips were not looked at; --check looks at all" in check.warnings(config(tmp_path))[-1]


def test_what_goes_wrong_before_a_run_is_left_to_the_run(tmp_path, monkeypatch, offline):
    assert check.warnings(cl.Config(data="nowhere")) == []
    fine(tmp_path, 3)
    monkeypatch.setattr(check, "look_at", lambda *a: 1 / 0)
    assert check.warnings(config(tmp_path)) == ["check: left out (ZeroDivisionError: division by zero)"]
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")
    assert check.warnings(config(tmp_path)) == []


def test_without_the_instrument_one_line_says_so_and_training_goes_on(tmp_path):
    shutil.copy(ROOT / "cogvideo_lite.py", tmp_path)
    code = (
        "import sys, cogvideo_lite as cl; cl.train = lambda config: print('trained'); sys.exit(cl.main(sys.argv[1:]))"
    )

    def start(*arguments):
        command = [sys.executable, "-c", code, *arguments, "--model", str(NANO), "--data", str(SPIDER)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = start("--check")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "notebooks/check.py is not there" in done.stderr
    done = start("--lora")
    assert done.returncode == 0 and done.stdout.count("left out: ") == 1 and "trained" in done.stdout
