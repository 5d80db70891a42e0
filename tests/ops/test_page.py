"""The live page in a real browser, against a real server."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import ActionChains, Chrome, Keys

from tests.ops.browser import Page, browser
from tests.serving import ROOT, RunningServer, running_server

NANO = ROOT / "models" / "nano"
BYTES, SEED = 80, 3
KEY = "a-secret-of-these-tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(NANO, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    with browser() as driver:
        yield driver


@pytest.fixture
def page(driver: Chrome, server: RunningServer) -> Iterator[Page]:
    """The page as it is at first, but for a short run; nothing may have gone wrong in it."""
    page = Page(driver, server.url)
    page.set("#max-tokens", BYTES)
    page.set("#seed", SEED)
    yield page
    assert page.complaints() == []


def asked(server: RunningServer, page: Page, **fields: Any) -> dict[str, Any]:
    """What the API says to the request that the page makes."""
    body = {
        "model": "nano",
        "prompt": page["prompt"].get_attribute("value"),
        "max_tokens": BYTES,
        "temperature": 0.5,
        "seed": SEED,
        "trace": True,
        "patches": True,
        **fields,
    }
    with server.client() as http:
        choice: dict[str, Any] = http.post("/v1/completions", json=body).json()["choices"][0]
    return choice


CASES: dict[str, dict[str, Any]] = {
    "blt": {},
    "blt-s": {"draft_length": 5},
    "blt-d": {"block_size": 4, "unmask": {"rule": "confidence", "alpha": 0.5}},
    "blt-dv": {"block_size": 8, "unmask": {"rule": "entropy", "gamma": 1.5}},
}


@pytest.mark.parametrize("decoder", CASES)
def test_the_page_colours_bytes_as_the_engine_traced_them(server: RunningServer, page: Page, decoder: str) -> None:
    fields = CASES[decoder]
    page["compare"].click()
    pane = ".pane:nth-child(1)"
    page.set(f"{pane} [name=decoder]", decoder)
    for name, value in fields.items():
        if name == "unmask":
            page.set(f"{pane} [name=rule]", value["rule"])
            page.set(
                f"{pane} [name={'alpha' if 'alpha' in value else 'gamma'}]", value.get("alpha", value.get("gamma"))
            )
        else:
            page.set(f"{pane} [name={name}]", value)
    knobs = {control.get_attribute("name") for control in page.all(f"{pane} [name]") if control.is_displayed()}
    expected_knobs = {"decoder", *(name for name in fields if name != "unmask")}
    if "unmask" in fields:
        expected_knobs |= {"rule", "alpha" if "alpha" in fields["unmask"] else "gamma"}
    assert knobs == expected_knobs
    page.run()
    cells, choice = page.cells(0), asked(server, page, decoder=decoder, **fields)
    assert "".join(cell["text"] for cell in cells) == choice["text"]
    kinds, passes = [], []
    for told in choice["trace"]["rounds"]:
        for place in range(len(told["ids"])):
            drafted = place < told["accepted"]
            kinds.append(("block" if decoder == "blt-d" else "draft") if drafted else "own")
            passes.append(min(told["passes"][place] + 1, 8) if drafted and told["passes"] else 0)
    assert [cell["kind"] for cell in cells] == kinds
    assert [cell["pass"] for cell in cells] == passes
    assert {i for i, cell in enumerate(cells) if cell["patch"]} == set(choice["trace"]["patch_starts"]) - {BYTES}
    if decoder != "blt":
        assert len(set(kinds)) + len(set(passes)) > 2


def test_the_page_shows_patches_of_the_prompt_and_why_they_begin(server: RunningServer, page: Page) -> None:
    page["prompt"].clear()
    page["prompt"].send_keys("naïve_values = [entry for entry in ")
    page["compare"].click()
    page.run()
    told = asked(server, page)["patches"]
    starts, prompt = told["starts"], page["prompt"].get_attribute("value").encode()
    patches = page.all(".pane:nth-child(1) .before .patch")
    inner = [start for start in starts if 1 <= start < told["output_start"]]
    assert len(patches) == len(inner) > 3
    assert "".join(patch.get_attribute("textContent") for patch in patches) == prompt.decode()
    inspector = page.all(".pane:nth-child(1) [data-part=inspector]")[0]
    move, reasons = ActionChains(page.driver), set()
    for patch, start, behind in zip(patches, inner, [*inner[1:], told["output_start"]], strict=True):
        move.move_to_element(patch).perform()
        numbers = f"byte {start}" if behind == start + 1 else f"bytes {start} to {behind - 1}"
        named = prompt[start - 1 : behind - 1].hex(" ")
        page.wait(lambda: inspector.text.startswith(f"prompt, {numbers}: {named} · "))  # noqa: B023
        entropy = told["entropies"][start - 1]
        assert f"entropy {entropy:.2f} nats · begins a patch" in inspector.text
        assert ("above" in inspector.text) == (entropy > told["threshold"])
        reasons.add(inspector.text.rpartition("patch")[2])
    assert reasons
    # The arrow keys go on into the output and back.
    text = page.all(".pane:nth-child(1) [data-part=text]")[0]
    text.send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: inspector.text.startswith("byte 1: 0x"))
    assert f"entropy {told['entropies'][told['output_start'] - 1]:.2f} nats" in inspector.text
    text.send_keys(Keys.HOME)
    page.wait(lambda: inspector.text.startswith("prompt, byte"))
    strip = page.all(".pane:nth-child(1) [data-part=strip]")[0]
    page.wait(lambda: strip.find_elements("css selector", ".here"))
    assert strip.is_displayed() and len(strip.find_elements("css selector", ".threshold, .edge")) == 2
    (line,) = strip.find_elements("css selector", "path")
    assert line.get_attribute("d").count("V") == len(told["entropies"]) - 1


def test_the_page_compares_two_decoders(page: Page) -> None:
    page.run()
    assert f"The texts are equal: {BYTES} bytes" in page["verdict"].text
    rows = {row.text.splitlines()[0] for row in page.all("#costs tbody th")}
    assert {"Bytes read", "Bytes read, as the paper estimates", "Decoder passes", "Time"} <= rows
    figures = [cell.text for cell in page.all("#costs tbody td")]
    assert len(figures) == 3 * len(rows) and sum("×" in figure for figure in figures) == len(rows) - 1
    lines = [line.text for line in page.all("[data-part=progress]")]
    parts = rf"{BYTES} bytes in .* s · .* a round · .* decoder pass(es)? · .* global pass(es)? · .*B read"
    assert len(lines) == 2 and all(re.fullmatch(parts, line) for line in lines), lines
    page.set(".pane:nth-child(2) [name=decoder]", "blt-d")
    page.run()
    assert "The texts" in page["verdict"].text


def test_the_page_can_be_used_by_keyboard_alone(page: Page) -> None:
    """Ctrl+Enter runs, Escape stops, arrows go through the bytes."""
    page.set("#max-tokens", 3000)
    keys = ActionChains(page.driver)
    page["prompt"].send_keys("x = ")
    keys.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.wait(lambda: len(page.cells(0)) > 20)
    keys.send_keys(Keys.ESCAPE).perform()
    page.wait(lambda: page["stop"].get_attribute("aria-disabled") == "true")
    assert 20 < len(page.cells(0)) < 3000
    text = page.all(".pane:nth-child(1) [data-part=text]")[0]
    text.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.wait(lambda: page.all(".pane:nth-child(1) [data-part=inspector]")[0].text.startswith("byte 2: 0x"))
    focusable = set()
    page.driver.execute_script("document.activeElement.blur()")
    for _ in range(25):
        keys.send_keys(Keys.TAB).perform()
        focusable.add(page.driver.switch_to.active_element.get_attribute("id"))
    assert {"prompt", "max-tokens", "temperature", "seed", "compare", "run", "rejected"} <= focusable


def test_the_stop_button_aborts_the_request_on_the_server(server: RunningServer, page: Page) -> None:
    before = server.aborted()
    page.set("#max-tokens", 4096)
    # Within the page: a driver's click may come after the last byte.
    page.driver.execute_script("""
        new MutationObserver((_, observer) => {
            if (document.querySelectorAll("[data-place]").length <= 5) return;
            observer.disconnect();
            document.getElementById("stop").click();
        }).observe(document.getElementById("panes"), {childList: true, subtree: true});
    """)
    page["run"].click()
    page.wait(lambda: server.aborted() == before + 1)
    assert server.metrics("fastblt_running_sequences") == {"fastblt_running_sequences": 0}


def test_the_page_shows_the_message_of_a_refused_request(page: Page) -> None:
    page["prompt"].clear()
    page.driver.execute_script("document.getElementById('prompt').value = 'x'.repeat(60000)")
    page["run"].click()
    page.wait(lambda: any(problem.text for problem in page.all(".pane .problem")))
    assert "must have at most 24576 ids" in next(problem.text for problem in page.all(".pane .problem") if problem.text)


def test_the_page_shows_model_output_as_text_and_not_html(page: Page) -> None:
    page["prompt"].clear()
    page["prompt"].send_keys("<img src=x onerror=alert(1)><b>")
    page.run()
    assert not page.all(".pane img, .pane pre b")
    assert page.all(".pane:nth-child(1) .before")[0].text == "<img src=x onerror=alert(1)><b>"


def test_the_plots_show_the_servers_metrics(page: Page) -> None:
    page.run()
    decoders = page["throughput-now"]
    page.wait(lambda: "blt" in decoders.text)
    page.wait(lambda: any("B/s" in cell.text for cell in page.all("#bandwidth-now td")))
    page.wait(lambda: any("%" in cell.text for cell in page.all("#bandwidth-now td")))
    assert page.all("#throughput path, #throughput polyline")


def test_the_page_loads_nothing_from_other_hosts(server: RunningServer, page: Page) -> None:
    page.run()
    loaded: list[str] = page.driver.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert len(loaded) > 8 and all(name.startswith(server.url) for name in loaded)


def test_the_page_asks_for_an_api_key_and_keeps_it_in_the_tab(tmp_path: Path, driver: Chrome) -> None:
    with running_server(NANO, tmp_path / "log", "--api-keys", KEY) as closed:
        page = Page(driver, closed.url)
        assert page["key-form"].is_displayed() and "API key" in page["problem"].text
        page["key"].send_keys("wrong", Keys.ENTER)
        page.wait(lambda: "not valid" in page["problem"].text)
        page["key"].clear()
        page["key"].send_keys(KEY, Keys.ENTER)
        page.wait(lambda: "nano" in page["model"].text)
        page.set("#max-tokens", 8)
        page.run()
        assert len(page.cells(0)) == 8
        assert KEY not in driver.execute_script("return JSON.stringify(localStorage) + document.cookie")
        driver.get_log("browser")


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_screen(server: RunningServer, dark: bool) -> None:
    with browser(360, 740, dark=dark) as driver:
        page = Page(driver, server.url)
        page.set("#max-tokens", BYTES)
        page.set(".pane:nth-child(2) [name=decoder]", "blt-dv")
        page.run()
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        shade = sum(int(part) for part in background.strip("rgba()").split(",")[:3]) / 3
        assert (shade < 80) == dark
        assert page.complaints() == []


def test_the_page_can_be_switched_off(tmp_path: Path) -> None:
    with running_server(NANO, tmp_path / "log", "--no-page") as server:
        assert httpx.get(server.url).status_code == 404
