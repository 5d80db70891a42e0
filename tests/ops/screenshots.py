"""`python -m tests.ops.screenshots`: the pictures of docs/page.md, of a real server with models/nano."""

from pathlib import Path
from tempfile import TemporaryDirectory

from tests.ops.browser import Page, browser
from tests.serving import ROOT, running_server

IMAGES = ROOT / "docs" / "images"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder, running_server(ROOT / "models" / "nano", Path(folder) / "log") as server:
        with browser(1280, 1270) as driver:
            page = Page(driver, server.url)
            page.set(".pane:nth-child(2) [name=decoder]", "blt-dv")
            page.run()
            page.wait(lambda: page.all("#throughput path, #throughput polyline"))
            driver.save_screenshot(str(IMAGES / "page-compare.png"))
        with browser(390, 1270, dark=True) as driver:
            page = Page(driver, server.url)
            page["compare"].click()
            page.set(".pane:nth-child(1) [name=decoder]", "blt-d")
            page.run()
            driver.save_screenshot(str(IMAGES / "page-phone.png"))


if __name__ == "__main__":
    main()
