"""How long does the distortion score take?

    python tests/bench_distortion.py                 a clip of 49 frames at 480x720, and one of the bundled clips

Prints seconds a clip, the median of --runs, once for the clip alone: statistics of the reference are made once and kept.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import torch  # noqa: E402

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
        print(
            f"{name}: {statistics.median(seconds):.2f} s a clip, {len(clips)} reference clips, {torch.get_num_threads()} threads"
        )


if __name__ == "__main__":
    main()
