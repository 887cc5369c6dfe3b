"""A reader in a real browser: JupyterLab opens the notebook with sliders, runs it, and a moved slider shows another picture."""

import json
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # Debian's package is the first
RUN_S = 300


@pytest.fixture
def page():
    """A page of headless Chromium: the system's, or else the one that `playwright install chromium` fetches."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as running:
        try:
            browser = running.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            pytest.skip(
                f"no browser: none of {', '.join(BROWSERS)}, and not Playwright's own ({str(error).splitlines()[0]})"
            )
        yield browser.new_page(viewport={"width": 1200, "height": 1600})
        browser.close()


@pytest.fixture
def notebook(tmp_path):
    """The first lesson up to its sliders, in a folder where JupyterLab may save what it likes."""
    (tmp_path / "notebooks").mkdir()
    for name in ("cogvideo_lite.py", "data_samples", "notebooks/lesson.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    read = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", as_version=4)
    last = next(i for i, cell in enumerate(read.cells) if "lesson.Dashboard(" in cell.source)
    read.cells = read.cells[: last + 1]
    for cell in read.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(read, tmp_path / "notebooks/sliders.ipynb")
    return tmp_path / "notebooks/sliders.ipynb"


@pytest.fixture
def lab(notebook, tmp_path):
    """Address of the notebook in a JupyterLab of its own, without virtual scrolling, which leaves out what is not in view."""
    settings = tmp_path / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", "--IdentityProvider.token=lesson",
        f"--ServerApp.root_dir={tmp_path}", f"--LabApp.user_settings_dir={tmp_path / 'settings'}",
    ]  # fmt: skip
    log = tmp_path / "lab.log"
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (port := re.search(r"http://localhost:(\d+)/lab", log.read_text())):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://localhost:{port[1]}/lab/tree/notebooks/sliders.ipynb?token=lesson"
    finally:
        server.terminate()  # its kernels end with it
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_a_moved_slider_shows_another_picture(page, lab):
    page.goto(lab, timeout=120_000)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
    page.get_by_text(re.compile(r"\| Idle")).first.wait_for(timeout=120_000)  # or Lab would ask for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    picture = page.locator("img.widget-image")
    picture.wait_for(timeout=1000 * RUN_S)
    assert not page.locator(".jp-OutputArea-output[data-mime-type*='stderr']").count()

    sentence, before, told = page.locator(".widget-html-content"), picture.screenshot(), []
    told.append(sentence.inner_text())
    slider = page.locator(".noUi-handle").nth(1)  # the second control: the timestep
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("told => document.querySelector('.widget-html-content').innerText != told", arg=told[0])
    page.wait_for_timeout(500)
    assert "t = 100" in told[0] and "t = 300" in sentence.inner_text()
    assert picture.screenshot() != before
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("told => document.querySelector('.widget-html-content').innerText == told", arg=told[0])
    page.wait_for_timeout(500)
    assert picture.screenshot() == before  # looked up, not made anew
