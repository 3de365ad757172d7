"""Take the screenshots of docs/demo.md: python tests/web/screenshots.py MODEL, a folder with the ONNX form."""

import io
import shutil
import sys
from pathlib import Path

from demo_server import PAGE, serve
from PIL import Image
from playwright.sync_api import sync_playwright

SCREENS = {"light": (800, "light"), "dark": (800, "dark"), "phone": (360, "light")}
"""Width in pixels and color scheme, by name of the file."""
FOLDER = PAGE.parent / "docs/demo"


def main(model: Path) -> None:
    FOLDER.mkdir(exist_ok=True)
    with serve(model) as server, sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=shutil.which("chromium")).new_page()
        page.set_default_timeout(300_000)
        page.goto(f"{server.origin}/index.html")
        page.locator("#generate:enabled").click()
        page.locator("#status", has_text="tokens/s").wait_for()
        page.locator("#output").press("ArrowRight")
        for name, (width, scheme) in SCREENS.items():
            page.set_viewport_size({"width": width, "height": 740})
            page.emulate_media(color_scheme=scheme)
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            picture.quantize(64).save(FOLDER / f"{name}.png", optimize=True)  # a third of the size


if __name__ == "__main__":
    main(Path(sys.argv[1]))
