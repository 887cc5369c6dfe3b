"""What the notebooks share: pictures that every viewer shows, sliders that only look up, progress in one line, memory counted."""

import io
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SPIDER
from PIL import Image

sys.path.insert(0, str(ROOT / "notebooks"))

import cogvideo_lite as cl  # noqa: E402
import lesson  # noqa: E402


@pytest.fixture
def shown(monkeypatch):
    """What a lesson displays, in order; what an update replaces is replaced."""
    seen = []

    class Handle:
        def __init__(self, at):
            self.at = at

        def update(self, item, raw=False):
            seen[self.at] = item

    def display(item, raw=False, display_id=False):
        seen.append(item)
        return Handle(len(seen) - 1) if display_id else None

    monkeypatch.setattr(lesson, "display", display)
    return seen


def pictures(data):
    """Frames of an APNG as arrays."""
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    for k in range(getattr(image, "n_frames", 1)):
        image.seek(k)
        yield np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("frames, kept", [(9, 9), (17, 17), (49, 17)])
def test_an_animation_is_a_png_with_as_many_frames_as_github_can_bear(frames, kept):
    clips = torch.rand(2, frames, 3, 16, 16)
    assert len(list(pictures(lesson.animation(list(clips), ["a", "b"], fps=8)))) == kept


def test_an_animation_shows_its_clips_in_step_in_nearly_their_own_colours():
    """Eight grey levels in time; the frames of the animation have them, too, in their order."""
    levels = torch.linspace(0.1, 0.9, 9)
    clip = levels[:, None, None, None].expand(9, 3, 16, 16).clone()
    frames = list(pictures(lesson.animation([clip, clip.flip(0)], ["up", "down"], fps=8, px=16)))
    left, right = ([float(f[-8, x].mean()) / 255 for f in frames] for x in (8, 28))
    assert np.allclose(left, levels, atol=0.02) and np.allclose(right, levels.flip(0), atol=0.02)


def test_a_large_clip_is_shrunk_and_the_pixels_of_a_small_one_stay_sharp():
    small, large = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 480, 720)
    assert torch.equal(lesson.resized(small, 40)[..., ::2, ::2], small)
    assert lesson.resized(large, 120).shape == (2, 3, 120, 180)


def test_a_picture_carries_its_sentence_as_alt_text_and_below(shown):
    lesson.show(Image.new("RGB", (8, 8)), "a <dark> square (n = 1).")
    picture, sentence = shown
    assert picture._repr_mimebundle_()[1]["image/png"]["alt"] == "a &lt;dark&gt; square (n = 1)."
    assert sentence.data == "*Figure: a <dark> square (n = 1).*"


def test_clips_side_by_side_stand_in_columns_with_headers(shown):
    """Two methods, three prompts, two frames each: dark clips on the left, light ones on the right, in nearly their own grey."""
    columns = {"dark": [torch.full((9, 3, 16, 16), 0.2)] * 3, "light": [torch.full((9, 3, 16, 16), 0.8)] * 3}
    lesson.side_by_side(columns, ["a", "b", "c"], "dark and light clips (n = 3).", px=16)
    (frame,) = pictures(shown[0].data)
    assert frame.shape[:2] == (18 + 3 * 34, 2 * 32 + 8)
    assert abs(frame[-8, 8].mean() / 255 - 0.2) < 0.02 and abs(frame[-8, -8].mean() / 255 - 0.8) < 0.02


def test_sliders_look_up_and_refuse_a_combination_without_a_picture():
    made = {(a, t): (f"{a}{t}".encode(), f"{a} at {t}") for a in ("lora", "full") for t in (10, 20)}
    dashboard = lesson.Dashboard({"method": ["lora", "full"], "steps": [10, 20]}, made)
    assert dashboard.picture.value == b"lora10"
    dashboard.controls[0].value, dashboard.controls[1].value = "full", 20
    assert dashboard.picture.value == b"full20" and "full at 20" in dashboard.sentence.value
    with pytest.raises(ValueError, match="no picture for \\('lora', 30\\)"):
        lesson.Dashboard({"method": ["lora"], "steps": [10, 30]}, made)


def test_bars_become_one_line_and_other_words_pass(shown):
    passed = io.StringIO()
    bars = lesson.Bars(passed)
    bars.write("\rcoding clips: 10 %")
    bars.write("a warning\n")
    bars.done()
    assert passed.getvalue() == "a warning\n"
    assert len(shown) == 1 and shown[0]["text/plain"].startswith("done in")


def test_only_paths_of_this_repository_are_made_relative():
    out = io.StringIO()
    lesson.WithoutPaths(out).write(f"run  {ROOT}/runs/a of /elsewhere/b")
    assert out.getvalue() == "run  runs/a of /elsewhere/b"


def test_peak_memory_is_what_lives_at_once():
    """Of three tensors of 4 MiB two live at once; views and what was there before count for nothing."""
    there = torch.zeros(2**20)
    with lesson.PeakMemory() as counted:
        a = there + 1
        a.view(2, -1).add_(1)
        b = a * 2
        del a
        c = b + 1
    assert counted.mib == 8 and float(c[0]) == 5


def test_peak_memory_sees_what_backward_keeps():
    """A chain of tanh keeps every output until backward; without gradients one is enough."""
    x = torch.zeros(2**18, requires_grad=True)  # 1 MiB

    def chain():
        y = x
        for _ in range(10):
            y = y.tanh()
        return y.sum()

    with lesson.PeakMemory() as kept:
        chain().backward()
    with torch.no_grad(), lesson.PeakMemory() as free:
        chain()
    assert 10 <= kept.mib <= 13 and 2 <= free.mib < 3


def test_a_short_run_trains_as_the_program_does(quick, shown):
    """Step by step the same losses as `cl.train` of the same configuration."""
    short = lesson.short_run(quick())
    whole = cl.train(quick())
    assert [m["loss"] for m in short.metrics] == [m["loss"] for m in whole.metrics]
    assert (short.heldout_before, short.heldout_after) == tuple(
        whole.summary[f"heldout_{w}"] for w in ("before", "after")
    )


def test_a_training_is_shown_as_a_curve_with_its_sentence_and_one_line_of_progress(quick, shown, capsys):
    run = lesson.train(quick())
    curve, sentence, line = shown
    assert curve.data[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{run.summary['heldout_after']:.4f} after" in sentence.data
    assert line["text/plain"].startswith("done in") and not capsys.readouterr().err.strip()


def test_truth_is_known_of_the_bundled_clips_only(clips, tmp_path):
    assert lesson.has_truth(SPIDER)
    (tmp_path / "plain").mkdir()
    assert not lesson.has_truth(tmp_path / "plain")
