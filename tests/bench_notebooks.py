"""How long the notebooks take on a processor that has AVX2 and no more: each is executed in a fresh copy, and nothing is written.

    python tests/bench_notebooks.py            all of notebooks/, a line each
    python tests/bench_notebooks.py 00 04      those whose names begin so

On a processor that has more, torch's own kernels, oneDNN and MKL are held to AVX2 by the switches that each has for it. What
torch.compile makes is not: its compiler asks the processor.
"""

import os
import sys

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
os.environ.update(AVX2)  # before any kernel starts

import torch  # noqa: E402
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError  # noqa: E402
from regenerate_notebooks import ROOT, execute, machine, spelled  # noqa: E402


def main():
    total, failed = 0.0, []
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        sys.exit(f"bench_notebooks: torch computes with {torch.backends.cpu.get_cpu_capability()}, not with AVX2")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not sys.argv[1:] or any(path.name.startswith(name) for name in sys.argv[1:]):
            try:
                _, seconds, processor_s = execute(path)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                failed.append(path.name)
                print(f"{path.name:32} FAILED\n{error}", flush=True)
                continue
            total += seconds
            print(f"{path.name:32} {spelled(seconds):>12}   {processor_s:.0f} s of processor time", flush=True)
    print(f"{'together':32} {spelled(total):>12}   on {machine()}, held to AVX2")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
