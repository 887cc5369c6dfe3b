"""Execute the notebooks and write what came out back into them: the only writer of their outputs.

    python tests/regenerate_notebooks.py                      all of notebooks/
    python tests/regenerate_notebooks.py 00 04                those whose names begin so
    python tests/regenerate_notebooks.py --avx2               write nothing: how long do they take on a processor with AVX2 alone?
    python tests/regenerate_notebooks.py --addresses          only write REPOSITORY, below, into badges and setup cells: for a fork

The .ipynb files are the source: edit their cells in any editor, then run this. Each is executed in a fresh copy of the tracked
and new files, as a fresh clone has them: no coded clips, no runs. So the time that is measured, and written into the header
card, is what a reader will see on such a machine, and nothing is left behind. A notebook that fails, or that would be too
large for GitHub to show, is left as it was; exit status 1.

On a processor that has more than AVX2, --avx2 holds torch's own kernels, oneDNN and MKL to it by the switches that each has for
it. What torch.compile makes is not held: its compiler asks the processor.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "cogvideo-lite/cogvideo_lite"  # on GitHub: where the badges and the setup cells point
MOST_NOTEBOOK, MOST_OUTPUT = 3_000_000, 1_000_000  # bytes
CELL_TIMEOUT_S = 600
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # for the kernels
WIDGET = "application/vnd.jupyter.widget-view+json"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def machine():
    """Such as "2 threads of an AMD EPYC (avx512_bf16)": what a running time depends on most."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    threads = torch.get_num_threads()
    name, units = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", text)[1].strip() if "model name" in text else name
        units = next((f" ({u})" for u in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if u in text), "")
    return f"{threads} thread{'s' * (threads > 1)} of an {name}{units}"


def spelled(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def running_time(seconds, processor_s, where):
    """The header's sentence. Where the processor was kept from the kernel for much of the time, it says so: such a time is no
    measurement of the notebook."""
    busy = processor_s < 0.7 * seconds and "NVIDIA" not in where
    spent = f" on a busy machine ({spelled(processor_s)} of processor time)" if busy else ""
    return f"{spelled(seconds)}{spent} on {where}, measured, from a fresh clone"


def fresh_copy(folder):
    """The tracked and the new files of the repository, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def normalised(notebook):
    """Without what differs from run to run or only lives while a kernel does: times, versions, widgets."""
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    })  # fmt: skip
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)  # without its state GitHub shows an error in its place
            output.pop("transient", None)
            if "text" in output:  # what a terminal would show of a line that was written over
                output["text"] = re.sub(r"[^\n]*\r(?!\n)", "", output["text"])
    return notebook


def with_header(notebook, name, told=None):
    """Badge and clone address as REPOSITORY has them, and, if told, the running time."""
    link = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}"
    head = re.sub(
        r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)", f"[![Open in Colab]({BADGE})]({link})", notebook.cells[0].source
    )
    if told:
        head = re.sub(r"(?m)^\| \*\*Running time\*\* \|.*$", f"| **Running time** | {told} |", head)
    notebook.cells[0].source = head
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r'(?m)^HOME = ".*"', f'HOME = "https://github.com/{REPOSITORY}"', cell.source)
    return notebook


def too_large(notebook):
    """A sentence if an output, or the whole, is over its limit; else None."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            size = len(json.dumps(output))
            if size > MOST_OUTPUT:
                return f"cell {number} has an output of {size / 1e6:.1f} MB; {MOST_OUTPUT / 1e6:.0f} MB is the limit"
    size = len(nbformat.writes(notebook).encode())
    if size > MOST_NOTEBOOK:
        return f"{size / 1e6:.1f} MB; {MOST_NOTEBOOK / 1e6:.0f} MB is the limit"
    return None


def execute(path):
    """(executed notebook, seconds, seconds of processor time). Raises CellExecutionError, CellTimeoutError or DeadKernelError."""
    with tempfile.TemporaryDirectory() as folder:
        fresh_copy(Path(folder))
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", record_timing=False, store_widget_state=False,
            coalesce_streams=True, resources={"metadata": {"path": str(Path(folder) / "notebooks")}},
        )  # fmt: skip
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        client.execute()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        return notebook, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write(path, notebook):
    nbformat.validate(notebook)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(nbformat.writes(notebook, indent=1).rstrip("\n") + "\n", encoding="utf-8")
    os.replace(partial, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="how the files' names begin [all]")
    parser.add_argument(
        "--addresses", action="store_true", help="execute nothing; write REPOSITORY's address into them"
    )
    parser.add_argument("--avx2", action="store_true", help="write nothing; time them held to AVX2")
    args = parser.parse_args(argv)
    every = sorted((ROOT / "notebooks").glob("*.ipynb"))
    chosen = [p for p in every if not args.names or any(p.name.startswith(name) for name in args.names)]
    if not chosen:
        parser.error(f"no notebook's name begins with {' or '.join(args.names)}")
    if args.addresses:
        for path in chosen:
            write(path, with_header(nbformat.read(path, as_version=4), path.name))
        return 0
    if args.avx2:
        os.environ.update(AVX2)
    where, total, failed = machine() + ", held to AVX2" * args.avx2, 0.0, []
    for path in chosen:
        try:
            notebook, seconds, processor_s = execute(path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed.append(path.name)
            print(f"{path.name:32} FAILED\n{error}", flush=True)
            continue
        notebook = with_header(normalised(notebook), path.name, running_time(seconds, processor_s, where))
        problem = too_large(notebook)
        if problem:
            failed.append(path.name)
        elif not args.avx2:
            write(path, notebook)
        total += seconds
        size = f"{processor_s:.0f} s of processor time   {path.stat().st_size / 1e6:.2f} MB"
        print(f"{path.name:32} {spelled(seconds):>12}   {size}   {problem or ''}", flush=True)
    print(f"{'together':32} {spelled(total):>12}   on {where}")
    if failed and not args.avx2:
        print(f"left as they were: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
