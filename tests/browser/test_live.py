"""Live cells: the page's Python runs the reader's code, and the book's own cells, exercises and solutions."""

import re

import pytest
from built_site import pages_with

SETTLED = "cell => /^(Done|Stopped|Cell|Python)/.test(cell.querySelector('.live-status')?.textContent ?? '')"
CHECK = re.compile(r"exercises\.check\(\s*[\"']([^\"']+)")
HEAVY = re.compile(r"^\s*(?:import|from) (?:torch|triton)\b", re.MULTILINE)


def first_live_page():
    found = pages_with("tag_live")
    if not found:
        pytest.skip("no built page has a live cell")
    return found[0]


def run(page, cell, code=None):
    """Put code into a cell, run it and wait; the cell's output."""
    if not cell.locator("textarea").count():
        # a cell may be folded away: press what the reader would press after unfolding it
        cell.get_by_role("button", name="Edit and run", include_hidden=True).evaluate("b => b.click()")
    if code is not None:
        cell.locator("textarea").evaluate("(t, code) => { t.value = code; }", code)
    cell.locator(".live-status").evaluate("s => { s.textContent = ''; }")
    cell.locator(".live-run").evaluate("b => b.click()")
    page.wait_for_function(SETTLED, arg=cell.element_handle())
    return cell.locator(".live-output")


def test_edit_run_and_reset(live_visit):
    page = live_visit.open(first_live_page())
    cell = page.locator(".cell.tag_live").first
    cell.get_by_role("button", name="Edit and run").click()
    editor, before = cell.locator("textarea"), cell.locator("textarea").input_value()
    editor.fill("print(6 * 7)")
    editor.press("Shift+Enter")
    page.wait_for_function(SETTLED, arg=cell.element_handle())
    assert cell.locator(".live-output").inner_text().strip() == "42"
    cell.get_by_role("button", name="Reset").click()
    assert editor.input_value() == before
    assert cell.locator(".live-output").count() == 0
    live_visit.check()


def test_errors_show_the_readers_lines_and_stop_ends_a_loop(live_visit):
    page = live_visit.open(first_live_page())
    cell = page.locator(".cell.tag_live").first
    output = run(page, cell, "def f():\n    return 1 / 0\n\nf()")
    said = output.locator(".live-error").inner_text()
    assert "line 2, in f\n    return 1 / 0\n" in said and said.endswith("ZeroDivisionError: division by zero")
    assert "eval_code" not in said
    cell.locator("textarea").fill("print('on')\nwhile True:\n    pass")
    cell.locator("textarea").press("Shift+Enter")
    cell.locator(".live-stream").wait_for()
    cell.get_by_role("button", name="Stop").click()
    page.wait_for_function(SETTLED, arg=cell.element_handle())
    assert run(page, cell, "1 + 1").inner_text().strip() == "2", "Python starts anew after Stop"


def test_keyboard_can_leave_the_editor(visit):
    page = visit.open(first_live_page())
    cell = page.locator(".cell.tag_live").first
    button = cell.get_by_role("button", name="Edit and run")
    button.focus()
    button.press("Enter")
    editor = cell.locator("textarea")
    editor.fill("")
    editor.press("Tab")
    assert editor.input_value() == "    "
    editor.press("Escape")
    assert page.evaluate("document.activeElement.className") == "live-run"


def test_without_a_network_the_page_says_so(visit):
    page = visit.open(first_live_page())
    output = run(page, page.locator(".cell.tag_live").first)
    assert "could not be loaded" in output.inner_text()
    assert all("pyodide" in url for url in visit.outside)


@pytest.mark.having("tag_live")
def test_cells_exercises_and_solutions_run(live_visit, page_path):
    page = live_visit.open(page_path)
    cells = page.locator(".cell.tag_live")
    solutions = [
        "\n".join(solution.locator(".cell_input pre").all_text_contents())
        for solution in page.locator(".solution").all()
    ]
    for i in range(cells.count()):
        output = run(page, cells.nth(i))
        assert output.locator(".live-error").all_text_contents() == [], f"live cell {i + 1}"
    for exercise in page.locator(".cell.tag_exercise.tag_live").all():
        stub = exercise.locator("textarea").input_value()
        name = CHECK.search(stub).group(1)
        said = exercise.locator(".live-output .verdict").last.inner_text()
        assert said.startswith(("Not yet", "Not started yet")), f"{name}: the stub is told {said!r}"
        answer = next((code for code in solutions if name in CHECK.findall(code)), None)
        assert answer, f"{name} has no solution with a check"
        if HEAVY.search(answer):
            continue  # a kernel needs triton: Jupyter and Colab run it, and so does the book's own build
        said = run(page, exercise, answer).locator(".verdict").last.inner_text()
        assert said.startswith("Right"), f"{name}: the solution is told {said!r}"
    live_visit.check()
