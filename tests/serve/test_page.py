"""The page in headless Chromium, with no network but the server's own port."""

import os
import shutil
from collections.abc import Iterator

import pytest
from serving import Running

from sjd_engine import Engine

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENSHOT = os.environ.get("SJD_PAGE_SCREENSHOT")  # a PNG to write

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def running(engine_bf16) -> Iterator[Running]:
    with Running(Engine(engine_bf16.model, max_batch_size=2)) as running:
        yield running


@pytest.fixture
def page(running) -> Iterator["playwright.Page"]:
    """Open, with what it asked other hosts for in `page.elsewhere` and what went wrong in `page.faults`."""
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1240, "height": 880}, reduced_motion="reduce")
        page.elsewhere, page.faults = [], []
        here = f"http://127.0.0.1:{running.port}/"

        def only_here(route) -> None:
            if route.request.url.startswith((here, "data:")):
                route.continue_()
            else:
                page.elsewhere.append(route.request.url)
                route.abort()

        page.route("**/*", only_here)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda line: page.faults.append(line.text) if line.type == "error" else None)
        page.goto(here)
        page.locator("#method option").first.wait_for(state="attached")
        yield page
        assert page.faults == []
        assert page.elsewhere == []
        browser.close()


def test_from_a_prompt_to_two_equal_images(page):
    """By keyboard alone, in the order of focus; `exact` and `ar` give one image."""
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("noto sunflower")
    order = []
    for _ in range(10):
        page.keyboard.press("Tab")
        order.append(page.evaluate("() => document.activeElement.id || document.activeElement.textContent"))
    assert order[4:] == ["method", "window", "seed", "dice", "beside", "draw"]
    page.keyboard.press("Enter")
    progress = page.get_by_role("progressbar").first
    seen = set()
    while (share := int(progress.get_attribute("aria-valuenow"))) < 100:
        seen.add(share)
    assert len(seen) > 3, "the image appears on its way"
    page.locator(".run[data-complete]").nth(1).wait_for(timeout=60_000)
    status = page.get_by_role("status")
    playwright.expect(status).to_contain_text("The same image, pixel for pixel. exact took")
    passes = [int(text) for text in page.locator(".passes").all_inner_texts()]
    assert passes[1] == 256
    assert passes[0] < 128
    for label in ("drawn with exact: complete after", "drawn with ar: complete after 256 passes"):
        assert page.get_by_role("img", name=label).count() == 1
    colours = page.evaluate(
        """() => [...document.querySelectorAll(".image")].map((canvas) => {
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(new Uint32Array(data.buffer)).size;
        })"""
    )
    assert colours[0] == colours[1] > 100
    if SCREENSHOT:
        page.screenshot(path=SCREENSHOT)


def test_a_refusal_is_told_and_stop_frees_the_server(page, running):
    page.get_by_label("Prompt").fill("word " * 200)
    page.get_by_role("button", name="Draw", exact=True).click()
    playwright.expect(page.get_by_role("status")).to_contain_text("shorten it")
    page.get_by_role("button", name="a red apple").click()
    page.get_by_label("Method").select_option("ar")
    page.get_by_role("button", name="Draw", exact=True).click()
    running.wait_until("num_requests_running", lambda images: images == 1)
    page.get_by_role("button", name="Stop").click()
    playwright.expect(page.get_by_role("status")).to_have_text("Stopped.")
    running.wait_until("num_requests_running", lambda images: images == 0)
    page.faults.clear()  # Chromium tells of the status 400


def test_every_control_has_a_name_and_a_readable_contrast(page):
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
            .filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim()))
            .map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours = page.evaluate(
            """(names) => {
                const probe = document.body.appendChild(document.createElement("i"));
                const read = (name) => {
                    probe.style.color = `var(--${name})`;
                    return getComputedStyle(probe).color.match(/\\d+/g).map(Number);
                };
                return Object.fromEntries(names.map((name) => [name, read(name)]));
            }""",
            ["ground", "surface", "sunken", "ink", "muted", "accent", "on-accent", "warn"],
        )
        pairs = [(text, on) for text in ("ink", "muted") for on in ("ground", "surface", "sunken")]
        for text, on in [*pairs, ("on-accent", "accent"), ("warn", "surface")]:
            assert contrast(colours[text], colours[on]) >= 4.5, (scheme, text, on)


def contrast(one: list[int], other: list[int]) -> float:
    """Of two sRGB colours, as WCAG defines it."""

    def luminance(colour: list[int]) -> float:
        shares = [value / 255 for value in colour]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)
