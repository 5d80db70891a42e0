"""A headless Chromium, as a visitor of the live page has one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

SECONDS = 60
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars")


class Page:
    """The live page of one server."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self["model"].text or self["problem"].text)

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Any) -> None:
        """Until the condition holds. What the page has replaced while it was looked at is looked at again."""
        wait = WebDriverWait(self.driver, SECONDS, 0.05, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda _: condition())

    def set(self, selector: str, value: str | int | float) -> None:
        """Gives a control a value, as a person's typing or choosing would."""
        script = """
            const control = document.querySelector(arguments[0]);
            control.value = arguments[1];
            for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind, {bubbles: true}));
        """
        self.driver.execute_script(script, selector, str(value))

    def run(self) -> None:
        """Presses Run and waits until the figures are there."""
        self["run"].click()
        self.wait(lambda: self["stop"].get_attribute("aria-disabled") == "true" and self["results"].is_displayed())

    def cells(self, pane: int) -> list[dict[str, Any]]:
        """Of every byte of a column: its kind, its pass, whether it begins a patch."""
        script = """
            const pane = document.querySelectorAll(".pane")[arguments[0]];
            return [...pane.querySelectorAll("[data-place]")].map((cell) => ({
                kind: cell.dataset.kind, pass: Number(cell.dataset.pass ?? 0),
                patch: cell.classList.contains("patch"), text: cell.textContent,
            }));
        """
        found: list[dict[str, Any]] = self.driver.execute_script(script, pane)
        return found

    def complaints(self) -> list[str]:
        """What the browser's console has, without what the server answered."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["source"] != "network"]


@contextmanager
def browser(width: int = 1280, height: int = 1000, *, dark: bool = False) -> Iterator[Chrome]:
    options = ChromeOptions()
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService("/usr/bin/chromedriver"))
    try:
        # A window is not made as narrow as a phone.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()
