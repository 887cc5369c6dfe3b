"""How long do the two judges of samples take?

    python tests/bench_distortion.py                 a clip of 49 frames at 480x720, and one of the bundled clips

Prints seconds a clip of the distortion score, the median of --runs: statistics of the reference are made once and kept.
Then what strangeness costs at the end of a run of the bundled model, as a share of drawing the run's samples.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

import cogvideo_lite as cl  # noqa: E402
import distortion  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    clips = [clip.video for clip in cl.read_clips("data_samples/spider")[:32]]
    reference = distortion.reference_statistics(clips)
    large = torch.nn.functional.interpolate(clips[0], size=(480, 720), mode="bicubic").clamp(0, 1)
    large = large.repeat_interleave(3, dim=0)[:49]
    for name, clip in (("49x480x720", large), ("17x64x64", clips[0])):
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            distortion.distortion(clip, reference)
            seconds.append(time.perf_counter() - start)
        threads = torch.get_num_threads()
        print(f"{name}: {statistics.median(seconds):.2f} s a clip, {len(clips)} reference clips, {threads} threads")
    for method in ("lora", "full"):
        share = statistics.median(cost_of_strangeness(method) for _ in range(runs))
        print(f"strangeness, {method}: {share:.1%} of drawing the samples")


def cost_of_strangeness(method):
    """Seconds of `Trainer.judge_by_base`, loading the base anew included, over those of drawing a run's samples."""
    config, base, _ = cl.resolve(cl.Config(method=method, compute_dtype="float32"))
    with tempfile.TemporaryDirectory() as folder:
        folder, trainer = Path(folder), cl.Trainer(config, base, cl.cache_clips(config), Accelerator(cpu=True))
        (folder / "samples").mkdir()
        start = time.perf_counter()
        for when in cl.SAMPLED:
            trainer.draw_samples(folder, when)
        drawn = time.perf_counter()
        trainer.judge_by_base(folder)
        return (time.perf_counter() - drawn) / (drawn - start)


if __name__ == "__main__":
    main()
