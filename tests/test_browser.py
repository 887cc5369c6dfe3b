"""A reader in a real browser: JupyterLab opens the dashboard, runs it, and other settings show other pictures."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import playwright.sync_api as playwright
import pytest
from conftest import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # Debian's package is the first
RUN_S, INSTALL_S = 300, 600


def launched(chromium):
    """A headless browser: the system's, or else the one that `playwright install chromium` fetches."""
    failed = None
    for path in (*filter(None, map(shutil.which, BROWSERS)), None):  # None: Playwright's own
        try:
            return chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            failed = error
    raise failed


def install():
    """Debian's package where apt can install it, or else Playwright's own browser."""
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        commands = [["apt-get", "update"], ["apt-get", "install", "-y", "chromium"], *commands]
    for command in commands:
        if not any(map(shutil.which, BROWSERS)):
            subprocess.run(command, timeout=INSTALL_S, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


@pytest.fixture
def page():
    """A page of a headless browser. Where there is none its test is skipped; with REQUIRE_BROWSER=1 one is installed,
    and it is a failure if that does not help."""
    with playwright.sync_playwright() as running:
        try:
            browser = launched(running.chromium)
        except playwright.Error as error:
            if not os.environ.get("REQUIRE_BROWSER"):
                pytest.skip(f"no browser: none of {', '.join(BROWSERS)}, nor Playwright's own ({error.message[:200]})")
            install()
            browser = launched(running.chromium)
        yield browser.new_page(viewport={"width": 1200, "height": 1600})
        browser.close()


@pytest.fixture
def notebook(tmp_path):
    """The dashboard's section of its lesson, after the set-up, in a folder where JupyterLab may save what it likes."""
    (tmp_path / "notebooks").mkdir()
    modules = [path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.py")]
    for name in ("cogvideo_lite.py", "data_samples", "notebooks/results", *modules):
        (tmp_path / name).symlink_to(ROOT / name)
    read = nbformat.read(ROOT / "notebooks/05_compare_step_counts.ipynb", as_version=4)
    sources = [cell.source for cell in read.cells]
    first = next(i for i, source in enumerate(sources) if source.startswith("## The dashboard"))
    last = next(i for i, source in enumerate(sources) if "lesson.Dashboard(" in source)
    sections = [i for i, source in enumerate(sources) if source.startswith("## ")]  # the first is the set-up
    read.cells = [*read.cells[: sections[1]], *read.cells[first : last + 1]]
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


def test_a_moved_slider_and_a_pressed_button_show_other_pictures(page, lab):
    page.goto(lab, timeout=120_000)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
    page.get_by_text(re.compile(r"\| Idle")).first.wait_for(timeout=120_000)  # or Lab would ask for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    picture, sentence = page.locator("img.widget-image"), page.locator(".widget-html-content")
    picture.wait_for(timeout=1000 * RUN_S)
    assert not page.locator(".jp-OutputArea-output[data-mime-type*='stderr']").count()

    def after(act):
        """(sentence, picture) once an act has changed them."""
        told = sentence.inner_text()
        act()
        page.wait_for_function("told => document.querySelector('.widget-html-content').innerText != told", arg=told)
        page.wait_for_timeout(500)
        return sentence.inner_text(), picture.screenshot()

    first = sentence.inner_text(), picture.screenshot()
    page.locator(".noUi-handle").first.focus()
    further = after(lambda: page.keyboard.press("ArrowRight"))
    assert "125 steps" in first[0] and "250 steps" in further[0] and further[1] != first[1]
    assert after(lambda: page.keyboard.press("ArrowLeft")) == first  # looked up, not made anew
    other = after(lambda: page.get_by_role("button", name="LoRA", exact=True).click())
    assert first[0].startswith("full fine-tuning") and other[0].startswith("LoRA") and other[1] != first[1]
