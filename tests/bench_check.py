"""How long --check takes for 50 clips of a phone, and how much memory.

    python tests/bench_check.py [--clips 50] [--keyframes 30]

The clips are 1080x1920, H.264, 30 fps, of 6 to 10 s and 8 Mbit/s, half of them turned by their display matrix. PyAV
makes five of them, and the others are copies under another title. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import cogvideo_lite as cl  # noqa: E402

GIB = 2**20  # of ru_maxrss, which counts KiB


def film(path, seconds, keyframes, turned, seed):
    """A noisy picture that moves."""
    height, width = (1080, 1920) if turned else (1920, 1080)
    noise = np.random.default_rng(seed).integers(40, 220, (height // 8, width // 8, 3), np.uint8)
    noise = noise.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(
            "libx264", rate=30, options={"preset": "superfast", "x264-params": f"keyint={keyframes}"}
        )
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = height, width, "yuv420p", 8_000_000
        if turned:
            stream.set_display_rotation(90)
        for k in range(30 * seconds):
            picture = np.ascontiguousarray(np.roll(noise, (2 * k, 5 * k), (0, 1)))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def make(folder, clips, keyframes):
    """Clips with captions. A title at the end of a file makes its content differ from others'."""
    for k in range(min(5, clips)):
        film(folder / f"IMG_{k:03}.mp4", 6 + k, keyframes, k % 2, k)
    for k in range(clips):
        path = folder / f"IMG_{k:03}.mp4"
        if k >= 5:
            shutil.copy(folder / f"IMG_{k % 5:03}.mp4", path)
            title = f"copy {k}".encode()
            with open(path, "ab") as file:  # a box that players pass over
                file.write((8 + len(title)).to_bytes(4, "big") + b"free" + title)
        path.with_suffix(".txt").write_text(f"a patchwork moves slowly over itself, take {k}")


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clips", type=int, default=50)
    options.add_argument("--keyframes", type=int, default=30, help="frames from one keyframe to the next")
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "clips"
        data.mkdir()
        # in a process of its own, whose memory does not count
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(data, options.clips, options.keyframes))
        maker.start()
        maker.join()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
        begun, cpu = time.perf_counter(), time.process_time()
        status = cl.main(["--check", "--data", str(data), "--model", "THUDM/CogVideoX-5b", "--out", folder])
        size = (Path(folder) / "check.html").stat().st_size
    measured = {
        "status": status,
        "clips": options.clips,
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "page_mb": round(size / 1e6, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB, 2),
        "peak_before_gib": round(before, 2),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
