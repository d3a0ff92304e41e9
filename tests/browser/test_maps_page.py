"""The page of `baatt analyze maps --html` in headless Chromium: it draws, reads values, and switches layer and head.

Needs chromium and chromedriver; skipped where they are missing, unless BAATT_BROWSER=required.
"""

import os
import shutil

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from baatt.attention import make_plan
from baatt.cli.main import main
from baatt.lab.capture import Capture, Heads, save_capture
from baatt.lab.maps import PAGE_CELLS, attention_cells
from tests.settings import sorted_config

TOKENS, SIZE = 520, 32
ORDERS = {"BA-Att, unsorted": ("none", None), "BA-Att, qk in 128": ("qk", 128)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if program is None or driver is None:
        if os.environ.get("BAATT_BROWSER") == "required":
            pytest.fail("BAATT_BROWSER=required, and chromium or chromedriver is not installed")
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    folder = tmp_path_factory.mktemp("profile")
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-quic", "window-size=1300,1100", f"user-data-dir={folder}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def capture():
    generator = torch.Generator().manual_seed(0)
    layers = {
        layer: Heads(*(2 * torch.randn(1, heads, TOKENS, 16, generator=generator) for heads in (count, 2, 2)))
        for layer, count in ((1, 4), (5, 2))
    }
    return Capture(layers, 0.25, {"model": "tiny </script> & co"})


@pytest.fixture(scope="module")
def page(capture, browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    save_capture(capture, folder / "capture.safetensors")
    sizes = [
        "--preset",
        "paper",
        "--sort",
        "none,qk",
        "--block-size",
        str(SIZE),
        "--segment",
        "128",
        "--sparsity",
        "0.75",
    ]
    html = folder / "maps.html"
    assert main(["analyze", "maps", str(folder / "capture.safetensors"), *sizes, "--html", str(html)]) == 0
    assert "src=" not in html.read_text()  # nothing is fetched from elsewhere
    assert "http" not in html.read_text()
    browser.get(html.as_uri())
    return browser


def choose(page, layer, head):
    Select(page.find_element(By.ID, "layer")).select_by_visible_text(str(layer))
    Select(page.find_element(By.ID, "head")).select_by_visible_text(str(head))


def read(page, order, row, column, cell):
    """What the page says of the middle of a cell."""
    box = page.find_element(By.CSS_SELECTOR, f'.map[data-order="{order}"]')
    size = page.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.width, b.height]", box
    )  # fmt: skip
    across = [(min(TOKENS, at * cell) + min(TOKENS, (at + 1) * cell)) / 2 / TOKENS - 0.5 for at in (column, row)]
    ActionChains(page).move_to_element_with_offset(
        box, round(across[0] * size[0]), round(across[1] * size[1])
    ).perform()  # fmt: skip
    return page.find_element(By.ID, "value").text


def test_title_and_choices(page):
    assert "tiny </script> & co, layers 1, 5, 520 queries, 520 keys" in page.find_element(By.ID, "title").text
    for name, values in (("layer", ["1", "5"]), ("head", ["0", "1", "2", "3"])):
        assert [one.text for one in Select(page.find_element(By.ID, name)).options] == values
    assert [one.get_attribute("data-order") for one in page.find_elements(By.CLASS_NAME, "map")] == list(ORDERS)


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize(("layer", "head"), [(1, 2), (5, 0)])
def test_values_under_the_pointer(page, capture, order, layer, head):
    choose(page, layer, head)
    q, k, _ = capture.layers[layer]
    sort, segment = ORDERS[order]
    plan = make_plan(q, k, sorted_config(SIZE, 0.75, sort, segment), scale=capture.scale, impl="reference")
    cells = attention_cells(q, k, plan, head, PAGE_CELLS)
    cell = -(-TOKENS // PAGE_CELLS)
    for row, column in ((0, 0), (17, 60), (len(cells) - 1, 40)):
        text = read(page, order, row, column, cell)
        queries = f"queries {row * cell} to {min(TOKENS, (row + 1) * cell) - 1}, "
        assert text.startswith(f"{order}: {queries}keys {column * cell} to {(column + 1) * cell - 1}: "), text
        value = float(text.split(": ")[-1].split(" times")[0])
        assert value == pytest.approx(float(cells[row, column]), rel=2e-3)
        block = row * cell // SIZE, column * cell // SIZE
        kept = block[1] in plan.selection.index[0, head, block[0], : plan.selection.count[0, head, block[0]]]
        assert text.endswith(f"block pair {block} is {'kept' if kept else 'skipped'}")


def test_outlines_are_drawn_and_can_be_hidden(page):
    def painted():
        return page.execute_script(
            "return [...document.querySelectorAll('.map')].map((box) => { const c = box.children[1];"
            "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((x) => x) })"
        )

    assert painted() == [True, True]
    page.find_element(By.ID, "outline").click()
    assert painted() == [False, False]
    page.find_element(By.ID, "outline").click()
    assert painted() == [True, True]


def test_another_head_gives_another_picture(page):
    pictures = set()
    for layer, head in ((1, 0), (1, 1), (5, 1)):
        choose(page, layer, head)
        pictures.add(page.execute_script("return document.querySelector('.map canvas').toDataURL()"))
    assert len(pictures) == 3
    note = page.find_element(By.CSS_SELECTOR, "figcaption span").text
    assert note.strip().startswith("keeps 85 of 289 block pairs")


def test_a_layer_offers_its_own_heads(page):
    choose(page, 1, 3)
    Select(page.find_element(By.ID, "layer")).select_by_visible_text("5")
    head = Select(page.find_element(By.ID, "head"))
    assert [one.text for one in head.options] == ["0", "1"]
    assert head.first_selected_option.text == "1"


def test_nothing_was_complained_about(page):
    # A warning may be about this test, which reads the pictures back.
    assert [one for one in page.get_log("browser") if one["level"] == "SEVERE"] == []
