"""The notebooks as a reader meets them, on GitHub or in Jupyter: whole, in one form, described, and kept honest by nbval."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
import regenerate_notebooks as regenerate
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.name[0].isdigit()]
EXERCISE = re.compile(r"\*\*Exercise (\d+\.\d+)\.\*\*")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    read = nbformat.read(request.param, as_version=4)
    nbformat.validate(read)
    read.path = request.param
    return read


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request):
    read = nbformat.read(request.param, as_version=4)
    read.path = request.param
    return read


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def headings(notebook):
    """(level, text) of each heading, in order; lines in fenced code are none."""
    text = re.sub(r"(?ms)^```.*?^```", "", prose(notebook))
    return [(len(marks), words) for marks, words in re.findall(r"(?m)^(#+) (.*)$", text)]


def test_there_are_lessons_and_their_solutions():
    assert LESSONS and (ROOT / "notebooks/solutions.ipynb") in NOTEBOOKS


# ------------------------------------------------------------------------------------------------------------ execution


def test_every_cell_was_executed_once_in_order(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))


def test_no_cell_failed_or_complained(notebook):
    assert not [o for o in outputs(notebook) if o.output_type == "error"]
    assert not [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]


def test_outputs_fit_where_notebooks_are_shown(notebook):
    assert notebook.path.stat().st_size < regenerate.MOST_NOTEBOOK
    assert max(len(json.dumps(output)) for output in outputs(notebook)) < regenerate.MOST_OUTPUT


def test_nothing_is_left_of_the_machine_it_ran_on(notebook):
    """No paths, no user, no widget state that GitHub would stumble over, no time stamps or versions in the metadata."""
    text = notebook.path.read_text("utf-8")
    for words in ("/home/", "/root/", "/tmp/", "/Users/", str(ROOT)):
        assert words not in re.sub(r'"image/png": "[^"]*"', "", text), words
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert regenerate.WIDGET not in text
    assert not [cell.metadata for cell in notebook.cells if set(cell.metadata) - {"tags"}]


def test_some_results_are_compared_by_nbval_in_every_notebook(notebook):
    checked = [cell for cell in code(notebook) if "NBVAL_CHECK_OUTPUT" in cell.source]
    assert checked
    for cell in checked:  # progress and pictures would differ from run to run
        assert cell.outputs and {(o.output_type, o.get("name")) for o in cell.outputs} == {("stream", "stdout")}


def test_cells_hold_nothing_that_outputs_would_trip_over(notebook):
    for cell in code(notebook):
        for words in ("clear_output", "interact(", "from IPython", "!pip", "%pip", "import *"):
            assert words not in cell.source, words


# ----------------------------------------------------------------------------------------------------------------- form


def test_one_title_and_no_level_is_skipped(notebook):
    levels = [level for level, _ in headings(notebook)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))


def test_the_header_says_what_for_with_what_and_how_long(notebook):
    head = notebook.cells[0].source
    badge, link = re.search(r"\[!\[Open in Colab\]\((\S+)\)\]\((\S+)\)", head).groups()
    assert badge == regenerate.BADGE
    assert link.endswith(f"/{regenerate.REPOSITORY}/blob/main/notebooks/{notebook.path.name}")
    for row in ("You will learn", "You need", "Running time", "Take away"):
        assert re.search(rf"(?m)^\| \*\*{row}\*\* \| \S.*\|$", head), row
    assert re.search(r"\*\*Running time\*\* \| (\d+ min )?\d+ s on .*, measured", head)


def told_seconds(path):
    """The running time in a notebook's header."""
    minutes, seconds = re.search(r"\*\*Running time\*\* \| (?:(\d+) min )?(\d+) s ", path.read_text("utf-8")).groups()
    return 60 * int(minutes or 0) + int(seconds)


def test_a_lesson_took_less_than_three_minutes_and_all_notebooks_less_than_eighteen():
    assert max(map(told_seconds, LESSONS)) < 180
    assert sum(map(told_seconds, (ROOT / "notebooks").glob("*.ipynb"))) < 1080


def test_continuous_integration_runs_the_test_command_of_the_readme():
    command = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert command.endswith("-m pytest -c tests/pytest.ini --rootdir .")
    _, told, *_ = re.findall(r"```bash\n(.*?)\n```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert told == command  # the first trains


def test_every_notebook_is_set_up_by_the_same_cell(notebook):
    ours, first = (code(n)[0].source for n in (notebook, nbformat.read(LESSONS[0], 4)))
    assert ours == first and f'HOME = "https://github.com/{regenerate.REPOSITORY}"' in ours
    assert len(ours.splitlines()) <= 10


MOST_WORDS = {"05_compare_step_counts": 1_500}  # of a lesson, hints included; of the others 1,600
MOST_COLUMNS, MOST_LINES = 110, 25  # of a code cell


def test_a_lesson_is_short(lesson):
    assert len(prose(lesson).split()) <= MOST_WORDS.get(lesson.path.stem, 1_600)
    for cell in code(lesson):
        lines = cell.source.splitlines()
        assert max(map(len, lines)) <= MOST_COLUMNS, max(lines, key=len)
        assert len(lines) <= MOST_LINES or "loss.backward()" in cell.source, cell.source  # the loop stays in one piece


def test_the_first_lesson_shows_the_training_step_and_that_the_script_takes_the_same():
    sources = [cell.source for cell in code(nbformat.read(LESSONS[0], 4))]
    (loop,) = [k for k, source in enumerate(sources) if "loss.backward()" in source]
    assert len(sources[loop].splitlines()) <= MOST_LINES
    assert "optimizer.step()" in sources[loop] and not re.search(r"\bcl\.", sources[loop])
    assert any("torch.testing.assert_close" in source for source in sources[loop + 1 :])


def test_all_notebooks_together_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 6_000_000


def test_recap_and_exercises_come_last(lesson):
    assert [words for level, words in headings(lesson) if level == 2][-2:] == ["Recap", "Exercises"]


def test_every_section_closes_with_an_assertion(lesson):
    """Set-up, recap and the list of exercises apart. A section runs from one heading of level 2 to the next."""
    sections, current = {}, None
    for cell in lesson.cells:
        heading = re.match(r"## (.*)", cell.source) if cell.cell_type == "markdown" else None
        current = heading[1] if heading else current
        sections.setdefault(current, []).append(cell)
    for name, cells in sections.items():
        if name not in (None, "Set-up", "Recap", "Exercises"):
            assert any(re.search(r"(?m)^\s*assert |testing\.assert_", c.source) for c in cells), name


def test_a_lesson_has_three_to_five_exercises_each_with_a_hint(lesson):
    assert 3 <= len(EXERCISE.findall(prose(lesson))) <= 5
    for cell in lesson.cells:
        if cell.cell_type == "markdown":
            assert cell.source.count("<details>") == len(EXERCISE.findall(cell.source)), cell.source


def test_every_picture_is_followed_by_a_sentence_and_carries_it_as_its_alt_text(notebook):
    pictures = 0
    for cell in code(notebook):
        for output, after in zip(cell.outputs, [*cell.outputs[1:], None]):
            if "image/png" in output.get("data", {}):
                pictures += 1
                assert len(output.metadata["image/png"]["alt"]) > 30
                assert after and after.data["text/markdown"].startswith("*Figure: ")
    assert pictures or notebook.path.name == "solutions.ipynb"


def test_no_picture_but_the_badge_comes_from_elsewhere(notebook):
    assert re.findall(r"!\[[^\]]*\]\((http[^)]*)\)", prose(notebook)) == [regenerate.BADGE]


def test_links_lead_somewhere(notebook):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(notebook)):
        assert link.startswith("https://") or (notebook.path.parent / link.partition("#")[0]).exists(), link


def test_every_exercise_has_its_solution_and_is_listed_at_the_end(lesson):
    number = lesson.path.name[:2].lstrip("0") or "0"
    exercises = EXERCISE.findall(prose(lesson))
    assert exercises == [f"{number}.{k + 1}" for k in range(len(exercises))] and exercises
    solved = [w.split()[0] for _, w in headings(nbformat.read(ROOT / "notebooks/solutions.ipynb", 4)) if w[0].isdigit()]
    listed = lesson.cells[-1].source
    for exercise in exercises:
        assert solved.count(exercise) == 1, exercise
        assert re.search(rf"(?m)^- {re.escape(exercise)} ", listed), exercise


# ------------------------------------------------------------------------------------------------ lesson 6 and the README

ON_CARD = re.compile(r"`(python \S+ --(\w+) --model THUDM/CogVideoX-(2b|5b) [^`]*)`<br>([\d.]+) GiB, ([\d.]+) h")


def test_lesson_6_and_the_readme_tell_the_same_of_a_24_gb_card():
    """To the digit: memory and hours of each method, the command to type, and every other figure in GiB."""
    readme, lesson = (ROOT / "README.md").read_text("utf-8"), nbformat.read(LESSONS[6], as_version=4)
    (card,) = [line for line in readme.splitlines() if line.startswith("| **24 GB**")]
    told = {(method, model): (command, gib, hours) for command, method, model, gib, hours in ON_CARD.findall(card)}
    tables = [o.data["text/markdown"] for o in outputs(lesson) if "GiB, predicted" in o.get("data", {}).get("text/markdown", "")]
    rows = re.findall(r"\| (\w+) of (\w+) \| ([\d.]+) \| ([\d.]+) \|", tables[0])
    shown = {(method.lower(), model.lower()): (gib, hours) for method, model, gib, hours in rows}
    assert len(told) == 2 and len(shown) == 6
    for key, (_, *figures) in told.items():
        assert shown[key] == tuple(figures), key
    assert f"QLoRA ({shown['qlora', '5b'][0]} GiB) if other programs use the card" in card
    command, gib, hours = told["lora", "5b"]
    assert re.search(rf"{re.escape(command)} +# {gib} GiB, {hours} h", prose(lesson))
    sources = readme + "".join((ROOT / "tests" / name).read_text("utf-8") for name in ("README.md", "cards.csv"))
    for figure in re.findall(r"([\d.]+) GiB", prose(lesson)):
        assert figure in sources, figure


def test_lesson_6_names_the_symptoms_and_causes_of_the_readme():
    table = (ROOT / "README.md").read_text("utf-8").partition("## What can go wrong")[2].partition("\n## ")[0]
    symptoms = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| ")][2:]
    ours = prose(nbformat.read(LESSONS[6], as_version=4))
    assert len(symptoms) >= 6
    for symptom in symptoms:
        assert " | ".join(symptom) in ours, symptom


# ---------------------------------------------------------------------------------------------------------------- nbval


def outcome(path):
    """Exit status and report of pytest, as the one test command has it, on one notebook."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ROOT / "tests/pytest.ini"),
        "--rootdir",
        str(path.parent),
        str(path),
    ]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout + done.stderr


def test_a_planted_change_of_a_result_makes_nbval_fail(tmp_path):
    """The first lesson up to its first compared cell, as it is and with one digit of what that cell printed changed."""
    (tmp_path / "notebooks").mkdir()
    for name in ("cogvideo_lite.py", "data_samples", "notebooks/lesson.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(LESSONS[0], as_version=4)
    compared = [cell for cell in code(notebook) if "NBVAL_CHECK_OUTPUT" in cell.source]
    last = notebook.cells.index(compared[0])
    notebook.cells = notebook.cells[: last + 1]
    path = tmp_path / "notebooks/cut.ipynb"
    nbformat.write(notebook, path)
    status, report = outcome(path)
    assert status == 0, report

    output = notebook.cells[last].outputs[0]
    digit = re.search(r"\d", output.text)
    output.text = output.text[: digit.start()] + str((int(digit[0]) + 1) % 10) + output.text[digit.end() :]
    nbformat.write(notebook, path)
    status, report = outcome(path)
    assert status == 1 and "1 failed" in report
    assert "mismatch" in report and f"Cell {len(code(notebook)) - 1}" in report


# ----------------------------------------------------------------------------------------------------- the regeneration


def made(*cells):
    return nbformat.v4.new_notebook(cells=list(cells))


def test_regeneration_strips_what_differs_from_run_to_run():
    cell = nbformat.v4.new_code_cell(
        "x", execution_count=1, metadata={"execution": {"iopub.status.idle": "now"}, "tags": ["t"]}
    )
    cell.outputs = [
        nbformat.v4.new_output("display_data", {regenerate.WIDGET: {"model_id": "1"}, "text/plain": "Sliders"}),
        nbformat.v4.new_output("stream", name="stdout", text="10 %\r50 %\rdone\nnext\n"),
    ]
    notebook = made(cell)
    notebook.metadata["widgets"] = {}
    kept = regenerate.normalised(notebook)
    assert "widgets" not in kept.metadata and "version" not in kept.metadata.language_info
    assert dict(kept.cells[0].metadata) == {"tags": ["t"]}
    assert kept.cells[0].outputs[0].data == {"text/plain": "Sliders"}
    assert kept.cells[0].outputs[1].text == "done\nnext\n"


def test_regeneration_fills_the_running_time_and_where_the_repository_is():
    head = nbformat.v4.new_markdown_cell(
        "# T\n\n[![Open in Colab](x)](y)\n\n| **Running time** | ? |\n| **Take away** | z |"
    )
    setup = nbformat.v4.new_code_cell('HOME = "https://github.com/a/b"\nprint(1)')
    filled = regenerate.with_header(made(head, setup), "00_a.ipynb", "3 s on a machine, measured")
    assert "| **Running time** | 3 s on a machine, measured |\n| **Take away** | z |" in filled.cells[0].source
    assert f"{regenerate.REPOSITORY}/blob/main/notebooks/00_a.ipynb" in filled.cells[0].source
    assert filled.cells[1].source.startswith(f'HOME = "https://github.com/{regenerate.REPOSITORY}"\n')


def test_a_fork_writes_its_address_without_executing_anything(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    head = nbformat.v4.new_markdown_cell("# T\n\n[![Open in Colab](x)](y)\n\n| **Running time** | 3 s |")
    setup = nbformat.v4.new_code_cell('HOME = "https://github.com/a/b"\n1 / 0', execution_count=7)
    nbformat.write(made(head, setup), tmp_path / "notebooks/00_a.ipynb")
    monkeypatch.setattr(regenerate, "ROOT", tmp_path)
    monkeypatch.setattr(regenerate, "REPOSITORY", "someone/fork")
    assert regenerate.main(["--addresses"]) == 0
    after = nbformat.read(tmp_path / "notebooks/00_a.ipynb", 4)
    assert "someone/fork/blob/main/notebooks/00_a.ipynb" in after.cells[0].source and "| 3 s |" in after.cells[0].source
    assert after.cells[1].source == 'HOME = "https://github.com/someone/fork"\n1 / 0'
    assert after.cells[1].execution_count == 7 and not after.cells[1].outputs


@pytest.mark.parametrize(
    "seconds, words", [(59.4, "59 s"), (59.7, "1 min 0 s"), (119.7, "2 min 0 s"), (70, "1 min 10 s")]
)
def test_times_are_spelled_as_a_clock_would(seconds, words):
    assert regenerate.spelled(seconds) == words


def test_a_time_taken_on_a_busy_machine_says_so():
    assert regenerate.running_time(70, 110, "2 cores") == "1 min 10 s on 2 cores, measured, from a fresh clone"
    assert "on a busy machine (1 min 10 s of processor time)" in regenerate.running_time(240, 70, "2 cores")


@pytest.mark.parametrize("bytes_, words", [(regenerate.MOST_OUTPUT + 1, "an output of"), (10, None)])
def test_regeneration_refuses_outputs_that_are_too_large(bytes_, words):
    cell = nbformat.v4.new_code_cell("x", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="x" * bytes_)]
    told = regenerate.too_large(made(cell))
    assert (words in told) if words else told is None


@pytest.mark.parametrize("source, words", [("1 / 0", "ZeroDivisionError"), ("import time\ntime.sleep(9)", "timed out")])
def test_a_notebook_that_fails_is_left_as_it_was(source, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks/00_fails.ipynb"
    nbformat.write(made(nbformat.v4.new_code_cell(source)), path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    before = path.read_bytes()
    monkeypatch.setattr(regenerate, "ROOT", tmp_path)
    monkeypatch.setattr(regenerate, "CELL_TIMEOUT_S", 3)
    assert regenerate.main([]) == 1
    told = capsys.readouterr()
    assert path.read_bytes() == before and words in told.out and path.name in told.err
