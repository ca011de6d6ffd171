"""The built site on localhost, and a headless Chromium that looks at it as a reader does."""

import shutil
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from built_site import PYODIDE, SITE, Files, Visit, pages, pages_with

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def pytest_generate_tests(metafunc):
    """A test that takes `page_path` runs on every page, or on those with the text of its `having` mark."""
    if "page_path" in metafunc.fixturenames:
        having = metafunc.definition.get_closest_marker("having")
        chosen = pages_with(having.args[0]) if having else pages()
        none = pytest.param(
            None, marks=pytest.mark.skip(reason="no built page has it: run `make book` first")
        )
        metafunc.parametrize("page_path", chosen or [none])


def pytest_configure(config):
    config.addinivalue_line("markers", "having(text): run on the pages whose source has the text")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def address():
    """Where the site is served."""
    if not pages():
        pytest.skip(f"no built site in {SITE}: run `make book` first")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """Debian's or the system's own Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """A fresh page, 1000 px wide."""
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.set_default_timeout(60_000)
    yield Visit(page, address)
    page.close()


@pytest.fixture
def live_visit(visit):
    """A page whose Python comes from a local Pyodide release, not from its network."""
    if not (PYODIDE / "pyodide.js").is_file():
        pytest.skip("no local Pyodide 0.27.7: name its folder in EFFATTN_PYODIDE")
    visit.page.set_default_timeout(120_000)
    visit.page.add_init_script("window.EFFATTN_PYODIDE = '/pyodide/'")
    return visit
