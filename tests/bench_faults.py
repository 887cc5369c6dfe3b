"""Runs that are killed (SIGKILL) at random moments, through coding, training, saving and sampling, and go on with
--resume until they end. Each must end with the bits of one that nobody killed: weights, metrics and samples.

    python tests/bench_faults.py [--kills 20] [--seed 0]       about ten minutes on two cores
    python tests/bench_faults.py --at coding saving sampling   the same at chosen moments, as in the suite

A run is a fork of this process, so that the libraries are imported once. The folder that it works in is temporary.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork must not find itself in a pool of threads that it has not

import torch
from conftest import SPIDER, tiny_pipeline
from safetensors.torch import load_file

import cogvideo_lite as cl

STEPS = 40  # enough for training and saving to take their share of the time
METHODS = {"lora": [], "full": ["--ema", "0.9", "--optimizer", "adamw8bit"]}


def prepare(folder):
    """A tiny pipeline and four clips."""
    tiny_pipeline(folder / "model", "5b")
    (folder / "clips").mkdir()
    rows = (SPIDER / "metadata.jsonl").read_text("utf-8").splitlines()[:4]
    for row in rows:
        shutil.copy(SPIDER / json.loads(row)["file_name"], folder / "clips")
    (folder / "clips/metadata.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


def begin(folder, method, name, resume=False, hook=None):
    """Start a run of its own cache in a fork. Returns its process id."""
    here = ["--model", folder / "model", "--data", folder / "clips", "--cache", folder / name / "cache"]
    how = ["--steps", STEPS, "--checkpoint-every", 1, "--batch-size", 2, "--rank", 4, "--lr", 1e-2, "--warmup", 1]
    how += ["--sampling-steps", 3, "--validation-prompts", "a red spider", "a blue fish", *METHODS[method]]
    arguments = [f"--{method}", *here, *how, "--out", folder / name / "run", *["--resume"] * resume]
    sys.stdout.flush(), sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    status, cl.save_samples = 3, keeping(cl.save_samples)
    try:
        if hook:
            hook()
        status = cl.main(list(map(str, arguments)))
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def keeping(save_samples):
    """The function, and samples as they were drawn beside the clips: their coding is not always the same to the bit."""

    def save(folder, when, clips, fps):
        for k, clip in enumerate(clips):
            torch.save(clip, folder / f"{when}-{k}.pt")
        save_samples(folder, when, clips, fps)

    return save


def ended(process):
    """Wait for the end of a run. Returns its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def phase(folder):
    """What a run that was killed was at, by the files that it left."""
    run = folder / "run"
    if not (run / "config.json").exists():
        return "coding"
    if list(run.glob("checkpoint-*.partial")):
        return "saving"
    if not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        return "sampling before"
    if (run / f"checkpoint-{STEPS}").exists():
        return "sampling after"
    return "training"


def outcome(run):
    """Everything that a run ends with, comparable bit for bit: tensors, metrics but for times, and samples."""
    files = sorted(
        [*run.glob("*.safetensors"), *run.glob("transformer/*.safetensors"), *run.glob("checkpoint-*/**/*.safetensors")]
    )
    tensors = {str(f.relative_to(run)): {k: t.clone() for k, t in load_file(str(f)).items()} for f in files}
    metrics = [{k: v for k, v in row.items() if k != "step_s"} for row in cl.read_metrics(run / "metrics.jsonl")]
    samples = {p.name: torch.load(p).tolist() for p in sorted((run / "samples").glob("*-[0-9].pt"))}
    return tensors, metrics, samples


def same(a, b):
    (first, *rest), (second, *others) = outcome(a), outcome(b)
    return (
        rest == others
        and {f: sorted(t) for f, t in first.items()} == {f: sorted(t) for f, t in second.items()}
        and all(
            torch.equal(tensor, second[file][name])
            for file, tensors in first.items()
            for name, tensor in tensors.items()
        )
    )


def finished(folder, name, method, moments, chance=None):
    """Resume a killed run until it ends, now and then killing it again. Returns how often it was killed more."""
    more = 0
    while True:
        process = begin(folder, method, name, resume=True)
        if chance and chance.random() < 0.4 and more < 3:
            time.sleep(chance.random() * moments)
            os.kill(process, signal.SIGKILL)
        status = ended(process)
        if status == 0:
            return more
        if status != -signal.SIGKILL:
            raise SystemExit(f"{name}: ended with {status}\n{(folder / f'{name}.log').read_text()[-2000:]}")
        more += 1


# Moments to be killed at: each wraps a function of cogvideo_lite, which then kills its own process.


def killed_while(module, name, when):
    """Half of a file is written, and the process is killed, in the first call of a function for which `when` holds."""

    def hook():
        call = getattr(module, name)

        def fatal(*arguments, **more):
            file = next(str(a) for a in arguments if isinstance(a, (str, Path)))
            if not when(file):
                return call(*arguments, **more)
            Path(file).write_bytes(b"half of what was to be written")
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, fatal)

    return hook


CODED = itertools.count(1)  # clips, in the run that is killed; there are four
MOMENTS = {
    "coding": killed_while(cl, "save_file", lambda file: Path(file).name.startswith("clip-") and next(CODED) == 3),
    "saving": killed_while(cl, "save_file", lambda file: "checkpoint-4.partial/optimizer" in file),
    "sampling": killed_while(cl, "write_video", lambda file: "after-1" in file),
}


def at_chosen_moments(folder, moments):
    for moment in moments:
        process = begin(folder, "lora", moment, hook=MOMENTS[moment])
        if (status := ended(process)) != -signal.SIGKILL:
            raise SystemExit(f"{moment}: ended with {status}, not killed")
        was = phase(folder / moment)
        finished(folder, moment, "lora", None)
        fine = same(folder / "whole-lora/run", folder / moment / "run")
        print(f"killed while {moment} ({was}): {'same bits' if fine else 'DIFFERS'}", flush=True)


def at_random_moments(folder, kills, seed, seconds):
    chance, done, phases, right = random.Random(seed), 0, {}, 0
    while done < kills:
        method = list(METHODS)[done % 2]
        name = f"{method}-{done}"
        process = begin(folder, method, name)
        after = (done + chance.random()) / kills * seconds[method]  # each twentieth of a run has its turn
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
        if ended(process) == 0:
            continue  # it was faster than the first
        was = phase(folder / name)
        more = finished(folder, name, method, seconds[method], chance)
        fine = same(folder / f"whole-{method}/run", folder / name / "run")
        print(
            f"{name}: killed after {after:.1f} s ({was}), and {more} times more: {'same bits' if fine else 'DIFFERS'}",
            flush=True,
        )
        done, right, phases[was] = done + 1, right + fine, phases.get(was, 0) + 1
        shutil.rmtree(folder / name)
    print(f"{right} of {done} runs end with the same bits; first kills: {phases}")
    return right == done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", nargs="+", choices=list(MOMENTS))
    args = parser.parse_args()
    import bitsandbytes  # noqa: F401  what a run imports, once for all
    import peft  # noqa: F401
    from diffusers import CogVideoXPipeline  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        folder, seconds = Path(folder), {}
        prepare(folder)
        for method in ["lora"] if args.at else METHODS:
            started = time.perf_counter()
            if status := ended(begin(folder, method, f"whole-{method}")):
                raise SystemExit(
                    f"the unbroken run ended with {status}\n{(folder / f'whole-{method}.log').read_text()[-2000:]}"
                )
            seconds[method] = time.perf_counter() - started
            print(f"unbroken --{method}: {seconds[method]:.1f} s", flush=True)
        if args.at:
            return at_chosen_moments(folder, args.at)
        sys.exit(not at_random_moments(folder, args.kills, args.seed, seconds))


if __name__ == "__main__":
    main()
