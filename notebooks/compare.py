"""Finished runs side by side, on one HTML page with everything inside.

    python cogvideo_lite.py --compare runs/lora-... runs/full-...

Clips of the same prompts and seeds in step, what the judge found of them, what differs in the configurations, and
curves.
"""

import base64
import dataclasses
import datetime
import io
import json
import math
import os
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where the script lies

import cogvideo_lite as cl  # noqa: E402

distortion = cl.load_instrument("distortion")
judge = cl.load_instrument("judge")

def compare(runs, out=None):
    """Write one HTML page, with everything inside, that puts finished runs side by side. Returns its path
    [runs/compare-TIME.html]. Raises UserError."""
    runs = [cl.load_run(folder) for folder in runs]
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    bases = list(dict.fromkeys(run.config.model for run in runs))
    prompts = {}  # prompt, and the first frame of an image-to-video model -> a cell for each base, then one for each run
    for column, (name, run) in enumerate(zip(names, runs)):
        for k, row in enumerate(judged_rows(run.folder)):
            frame = run.folder / f"samples/first-{k}.png"
            key = row["prompt"], frame.read_bytes() if frame.exists() else b""
            cells = prompts.setdefault(key, [None] * (len(bases) + len(runs)))
            base, own = bases.index(run.config.model), len(bases) + column
            cells[base] = cells[base] or cell_of(run.folder, k, row, "before", f"before ({name})")
            cells[own] = cell_of(run.folder, k, row, "after", name)
    out = Path(os.path.expanduser(out)) if out else Path(f"runs/compare-{datetime.datetime.now():%Y%m%d-%H%M%S}.html")
    if out.is_dir():
        raise cl.UserError(f"--out '{out}': a folder; --compare writes one HTML file")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    page = comparison_page(names, differences(runs) + measurements(runs), prompts, curves(names, runs))
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out)
    return out


@dataclass
class Cell:
    """A sample on the page."""

    name: str
    file: Path
    distortion: object | None  # distortion.Distortion; None where there was nothing to compare with
    concept: float | None


def judged_rows(folder):
    """Rows of a run's samples/distortion.json. Raises UserError."""
    file = folder / "samples/distortion.json"
    if not file.exists():
        raise cl.UserError(f"run '{folder}': its samples were not judged; judge them with --judge {folder}")
    try:
        rows = json.loads(file.read_text("utf-8"))
        return [row | {"prompt": str(row["prompt"])} for row in rows]
    except (ValueError, TypeError, LookupError) as error:
        raise cl.UserError(f"{file}: cannot be read ({error}); judge the run anew with --judge {folder}")


def cell_of(folder, k, row, when, name):
    """The Cell of sample k of a run, "before" or "after" training. Raises UserError."""
    try:
        judged = distortion.Distortion(**row[when]) if row[when] else None
        return Cell(name, folder / f"samples/{when}-{k}.mp4", judged, row.get("concept", {}).get(when))
    except (TypeError, KeyError, AttributeError) as error:
        raise cl.UserError(
            f"{folder / 'samples/distortion.json'}: not what this version writes ({error}); judge the run anew with "
            f"--judge {folder}"
        )


def differences(runs):
    """(option, its value in each run) of what differs in the configurations."""
    configs = [dataclasses.asdict(run.config) for run in runs]
    differing = [k for k in configs[0] if k != "out" and len({json.dumps(c[k]) for c in configs}) > 1]
    return [(name, [c.get(name) for c in configs]) for name in differing]


def measurements(runs):
    """(measurement, its value in each run) of what any of their summaries has."""
    pairs = ("heldout", "concept", "concept_unasked", "distortion", *distortion.COMPANIONS, "similarity")
    shown = ["steps", "ruined", "strangeness", "strangeness_of_real", *(f"worse_{part}" for part in judge.PARTS)]
    shown += [*(f"{name}_{when}" for name in pairs for when in ("before", "after"))]
    shown += ["seconds", "peak_memory_gib"]
    rows = [(name, [measured(run.summary, name) for run in runs]) for name in shown]
    return [(name, values) for name, values in rows if any(value is not None for value in values)]


def measured(summary, name):
    """An entry of a summary; older runs call the subject's speed its motion."""
    return summary.get(name, summary.get(name.replace("speed_", "motion_")))


def curves(names, runs):
    """SVG of loss, held-out loss and update ratio over steps."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, run in zip(names, runs):
        if not run.metrics:  # a blend of two models was never trained
            continue
        steps = [m["step"] for m in run.metrics]
        width = max(1, len(steps) // 40)
        for panel, key in zip(panels[::2], ("loss", "update_ratio")):
            values = [math.nan if m[key] is None else m[key] for m in run.metrics]  # DeepSpeed tells no ratio
            means = [cl.mean(values[max(0, i - width) : i + 1]) for i in range(len(values))]
            panel.plot(steps, means, label=name, linewidth=1)
        measured = [(0, run.summary["heldout_before"])] if "heldout_before" in run.summary else []
        measured += [(m["step"], m["heldout_loss"]) for m in run.metrics if "heldout_loss" in m]
        panels[1].plot(
            [step for step, _ in measured], [loss for _, loss in measured], marker="o", markersize=3, linewidth=1
        )
    for panel, title in zip(panels, ("training loss (running mean)", "held-out loss", "update ratio")):
        panel.set(title=title, xlabel="step")
        panel.set_yscale("log")
    panels[0].legend(fontsize=7)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cogvideo_lite"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<svg")[2]


def comparison_page(names, tables, prompts, svg):
    """HTML of `compare`."""
    def number(value):
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    def row(cells, tag="td"):
        return "<tr>" + "".join(f"<{tag}>{escape(number(c))}</{tag}>" for c in cells) + "</tr>"

    def clip(cell):
        if cell is None:
            return "<div class=clip>not sampled</div>"
        data, found = base64.b64encode(cell.file.read_bytes()).decode(), cell.distortion
        lines = ["not judged: too few real clips to compare with"]
        if found:
            parts = {name: getattr(found, name) for name in ("shape", "motion", "texture")}
            beside = {name: getattr(found, name) for name in distortion.COMPANIONS}
            lines = [f"<b>distortion {found.score:.2f}</b>: {listed(parts)}", f"of real clips': {listed(beside)}"]
            lines += [escape(reason) for reason in found.unjudged]
        if cell.concept is not None:
            lines.append(f"<b>concept score {cell.concept:.2f}</b>")
        video = f'<video muted loop playsinline src="data:video/mp4;base64,{data}"></video>'
        name, told = f"<div class=name>{escape(cell.name)}</div>", f"<div class=told>{'<br>'.join(lines)}</div>"
        return f"<div class=clip>{name}{video}{told}</div>"

    def listed(values):
        return ", ".join(f"{name} {value:.2f}" for name, value in values.items())

    def picture(frame):
        data = base64.b64encode(frame).decode()
        return f'<img alt="the first frame" src="data:image/png;base64,{data}">' * bool(frame)

    rows = "".join(
        f"<h3>{escape(prompt)} {picture(frame)}</h3><div class=row>{''.join(map(clip, cells))}</div>"
        for (prompt, frame), cells in prompts.items()
    )
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{escape(", ".join(names))}</title>
<style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; color: #1b1b1b; background: #fff }}
table {{ border-collapse: collapse; margin: .6rem 0 }} td, th {{ border: 1px solid #ccc; padding: .2rem .6rem; text-align: left }}
.row {{ display: flex; gap: 1rem; flex-wrap: wrap }} .clip {{ width: 15rem }} .name {{ font-weight: 600; overflow-wrap: anywhere }}
video {{ width: 100%; image-rendering: pixelated; background: #eee }} h3 img {{ height: 4rem; vertical-align: middle }} .told {{ font-size: 12px; color: #444 }}
.bar {{ position: sticky; top: 0; background: #fff; padding: .5rem 0; z-index: 1; border-bottom: 1px solid #ddd }}
svg {{ max-width: 100%; height: auto }} h3 {{ margin: 1.2rem 0 .4rem }}
</style>
<h1>Runs side by side</h1>
<p>What differs in their configurations, then what came out. Distortion: 0 is like real clips, larger is more bent; speed: how fast
subjects move, where real ones are 1, so that a frozen clip does not pass for a good one. Each run is compared with its own real
clips: scores of runs on other data are in other units. Concept score, of the bundled clips alone: how much of the subject is the
concept, about 0.8 for real clips of it; wanted where the prompt asks for it.</p>
<table>{row(["", *names], "th")}{"".join(row([name, *values]) for name, values in tables)}</table>
<svg{svg}
<h2>The same prompts, the same seeds</h2>
<div class=bar><button id=play>pause</button> <label>frame <input id=at type=range min=0 max=1000 value=0></label>
<label>speed <input id=speed type=range min=10 max=200 value=100></label></div>
{rows}
<script>
const videos = [...document.querySelectorAll("video")], play = document.getElementById("play"), at = document.getElementById("at");
const lead = videos[0], speed = document.getElementById("speed");
let running = true;
function follow() {{  // clips of other lengths keep step by their share of the way
  if (lead.duration) {{
    for (const v of videos) if (v !== lead && v.duration) {{
      const there = lead.currentTime / lead.duration * v.duration;
      v.playbackRate = speed.value / 100 * v.duration / lead.duration;
      if (Math.abs(v.currentTime - there) > 0.07) v.currentTime = there;
    }}
    if (running) at.value = 1000 * lead.currentTime / lead.duration;
  }}
  requestAnimationFrame(follow);
}}
function set(on) {{ running = on; play.textContent = on ? "pause" : "play"; for (const v of videos) on ? v.play() : v.pause(); }}
play.onclick = () => set(!running);
at.oninput = () => {{ set(false); for (const v of videos) v.currentTime = at.value / 1000 * v.duration; }};
speed.oninput = () => {{ lead.playbackRate = speed.value / 100; }};
set(true); follow();
</script></html>
"""
