"""The tables of tests/README.md, from the csv files beside it.

    python tests/tables.py      fills them in anew

On the page each table stands between `<!-- NAME -->` and `<!-- end -->`, and the function NAME below makes it. The
bench scripts write the csv files, with `--write`.
"""

import csv
import re
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"


def read(name):
    """Rows of tests/NAME.csv, as dicts."""
    with (HERE / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(name, rows):
    """Rows, dicts of the same keys, to tests/NAME.csv."""
    with (HERE / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows):
    """Rows, dicts of the same keys, as a table. Columns of numbers are set to the right."""
    def numeric(name):
        return all(re.fullmatch(r"[-+]?[\d.,]*( %)?", str(row[name])) for row in rows)

    head, *body = (f"| {' | '.join(map(str, cells))} |" for cells in (rows[0], *(row.values() for row in rows)))
    rule = "".join("|---:" if numeric(name) else "|---" for name in rows[0])
    return "\n".join([head, f"{rule}|", *body])


def said(row):
    """A row of measured_gpu.csv as people say it: "5b qlora, batch 2" of "5b-qlora,batch_size=2"."""
    first, *options = row.split(",")
    values = dict(option.split("=") for option in options if not option.startswith("cap="))
    words = {"gradient_checkpointing": "no checkpointing", "offload_activations": "activations on the host"}
    words |= {"optimizer": "8-bit Adam", "batch_size": f"batch {values.get('batch_size')}"}
    size = "x".join(values[name] for name in ("frames", "height", "width") if name in values)
    parts = [first.replace("-", " "), *(words[name] for name in values if name in words), size]
    return ", ".join(filter(None, parts))


def plan_errors():
    """How far predictions of reserved memory were from measured peaks."""
    def errors(rows, column):
        return [float(row[column].removesuffix("%")) for row in rows if row[column].endswith("%")]

    groups = {"other trainers": errors(read("plan_against_published"), "judged")}
    card = read("plan_against_h200")
    for phase in ("training", "sampling"):
        of_phase = [row for row in card if row["phase"] == phase]
        groups[f"H200, {phase}"] = errors(of_phase, "reserved_error")
        unseen = [row for row in of_phase if row["day"] == "2"]
        groups[f"its new runs, {phase}"] = errors(unseen, "reserved_error")
    return [
        {
            "measured": name,
            "n": len(found),
            "median error": f"{statistics.median(map(abs, found)):.1f} %",
            "lowest": f"{min(found):+.1f} %",
            "highest": f"{max(found):+.1f} %",
        }
        for name, found in groups.items()
    ]


H200_STEPS = [
    "2b-lora", "2b-full", "5b-lora", "5b-qlora", "5b-full", "5b-qlora,offload_activations=True",
    "5b-lora,gradient_checkpointing=False,cap=0", "5b-lora,batch_size=8,cap=80",
    "1.5-lora,frames=49,height=768,width=1360", "2b-full,frames=17,height=256,width=384",
]  # fmt: skip


def h200_steps():
    """Training on the card: memory beside the plan, and time."""
    memory = {row["row"]: row for row in read("plan_against_h200") if row["phase"] == "training"}
    return [
        {
            "run": said(row["row"]),
            "GiB": memory[row["row"]]["reserved_gib"],
            "planned": memory[row["row"]]["reserved_predicted_gib"],
            "s a step": row["step_s"],
            "of published rate": row["share_of_published_rate"],
        }
        for row in sorted(read("h200_step_times"), key=lambda row: [*H200_STEPS, row["row"]].index(row["row"]))
        if row["row"] in H200_STEPS
    ]


def capacity():
    """Largest batch at the native size, or else the size that fits."""
    rows = [row for row in read("capacity") if row["method"] in ("lora", "qlora", "full")]
    native = {row["model"]: row["80_gb"].split(",")[0].strip("~") for row in rows}

    def short(cell, size):
        if cell.startswith("none"):
            return "-"
        tight = "~" * cell.endswith("~")
        there, _, batch = cell.strip("~").partition(", batch ")
        return f"{batch or 1}{tight}" if there == size else there + tight

    return [
        {"clips a step": f"{row['model']} {row['method']}"}
        | {name.replace("_gb", " GB"): short(row[name], native[row["model"]]) for name in row if name.endswith("_gb")}
        for row in rows
    ]


def cpu_steps():
    return [
        {
            "run": f"{row['model']} {row['method']}",
            "loading, GiB": row["loading_peak_gib"],
            "training, GiB": row["training_peak_gib"],
            "tensors, planned": row["tensors_predicted_gib"],
            "target": row["target_gib"],
            "s a step": row["step_s"],
        }
        for row in read("step_24gb_cpu")
    ]


def optimizers():
    return [
        {
            "optimizer": row["candidate"],
            "bytes/weight": row["bytes_per_weight"],
            "GiB for 5B": row["gib_for_5b"],
            "distance": row["distance"],
            "changed": row["changed_share"],
            "held-out loss ± sd": f"{row['heldout_loss']}±{row['heldout_loss_sd']}",
        }
        for row in read("optimizers")
    ]


def processes():
    """What a process holds, and its time, alone and as one of two."""
    rows = [row for row in read("processes") if row["method"] != "lora"]
    engines, methods = (dict.fromkeys(row[name] for row in rows) for name in ("engine", "method"))
    cells = {(row["method"], row["engine"]): f"{row['held_mib']}/{float(row['step_s']):.1f}" for row in rows}
    return [
        {"held, MiB/s a step": method} | {engine: cells.get((method, engine), "") for engine in engines}
        for method in methods
    ]


def together():
    """GiB on each of some cards that share full fine-tuning of 5B, and how many of 24 GB are enough."""
    rows = read("cards_together")
    peaks = {row["kept"]: {} for row in rows}
    for row in rows:
        peaks[row["kept"]][row["cards"]] = row
    return [
        {"weights, optimizer": kept}
        | {f"{n} card{'s' * (n != '1')}": of[n]["peak_gib"] for n in ("1", "2", "4")}
        | {"enough of 24 GB": next(n for n, row in of.items() if row["verdict"] == "fits")}
        for kept, of in peaks.items()
    ]


TABLES = (plan_errors, h200_steps, capacity, cpu_steps, optimizers, processes, together)


def filled(text):
    """The page's text with its tables made anew."""
    for table in TABLES:
        place = re.compile(rf"(<!-- {table.__name__} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        text, found = place.subn(lambda place: f"{place[1]}{markdown(table())}\n", text)  # noqa: B023
        if found != 1:
            raise SystemExit(f"{PAGE.name}: {found} places for the table {table.__name__}, 1 needed")
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), encoding="utf-8")
