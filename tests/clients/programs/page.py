"""The page in Debian's Chromium: a prompt is sent, the map is waited for, and pictures are taken in light and dark.

page.py CHROMIUM FOLDER
"""

import os
import re
import sys
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect, sync_playwright

ANSWER_MS = 180_000
WIDE, NARROW = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}


def send_by_keyboard(page: Page) -> None:
    """Choose a setting and send without a pointer."""
    expect(page.get_by_role("group", name="Right").get_by_label("Policy")).to_have_value("spectral")
    page.get_by_label("At most").fill("12")
    budget = page.get_by_role("group", name="Right").get_by_label("Budget")
    budget.fill("0.25")
    budget.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("times the bytes", timeout=ANSWER_MS)


def share_in(figures: str) -> float:
    """The share of FP16's bytes that an answer's figures have in per cent."""
    (found,) = re.findall(r"([\d.]+) %", figures)
    return float(found) / 100


def check_answers(page: Page) -> None:
    """Both answers are there, with bytes by tier and the prompt in colours."""
    prompt = page.get_by_label("Prompt", exact=True).input_value()
    # FP16's share is above 1 by its framing; a budget of bytes is kept.
    for side, least, most in (("left", 1.0, 1.01), ("right", 0.24, 0.25)):
        answer = page.locator(f"#answer-{side}")
        assert answer.locator(".answer").inner_text()
        assert least <= share_in(answer.locator(".figures").inner_text()) <= most
        options = answer.get_by_role("option")
        texts = "".join(options.all_text_contents())
        assert prompt in texts.replace("↵\n", "\n")
        levels = set(options.evaluate_all("found => found.map(one => one.className)"))
        assert levels == {"level-10"} if side == "left" else len(levels) > 2, levels
        rows = answer.get_by_role("table").get_by_role("row")
        assert "framing" in rows.last.inner_text()


def check_layers(page: Page) -> None:
    """The slider shows one layer after another, and the arrow keys read one token after another."""
    right = page.locator("#answer-right")
    before = right.get_by_role("option").evaluate_all("found => found.map(one => one.className)")
    slider = right.get_by_role("slider")
    slider.press("ArrowRight")
    expect(right.locator(".layer-name")).to_have_text("layer 0")
    assert slider.get_attribute("aria-valuetext") == "layer 0"
    after = right.get_by_role("option").evaluate_all("found => found.map(one => one.className)")
    assert after != before
    slider.press("ArrowLeft")
    tokens = right.get_by_role("listbox")
    tokens.press("ArrowRight")
    tokens.press("ArrowRight")
    expect(right.locator(".reading")).to_contain_text("token 2,")
    expect(right.locator("[aria-selected]")).to_have_count(1)


def check_services(page: Page) -> None:
    rows = page.locator("#workers tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("prefill")
    expect(rows.last).to_contain_text("serving")


def check_accessible(page: Page) -> None:
    """axe-core finds nothing, and nothing is wider than the page."""
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(too_wide)


def check_token(page: Page, url: str) -> None:
    """A server that answers 401 is given a token, and only after that the field is shown."""

    def ask_for_token(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "this server asks for a bearer token"}})

    page.route(f"{url}/workers", ask_for_token)
    page.goto(f"{url}/")
    token = page.get_by_label("This server asks for a token")
    expect(token).to_be_visible()
    check_accessible(page)
    token.fill("secret")
    check_services(page)
    expect(token).to_be_visible()


def main() -> None:
    """Do all of it once, and take pictures in both colour schemes and on a narrow screen."""
    chromium, folder = sys.argv[1], Path(sys.argv[2])
    url = os.environ["BASE_URL"].removesuffix("/v1")
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        check_token(browser.new_page(), url)
        page = browser.new_page(viewport=WIDE, color_scheme="light")
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda one: None if one.url.startswith(f"{url}/") else problems.append(one.url))
        page.goto(f"{url}/")
        check_accessible(page)
        send_by_keyboard(page)
        check_answers(page)
        check_layers(page)
        check_services(page)
        for scheme, size, name in (("light", WIDE, "light"), ("dark", WIDE, "dark"), ("light", NARROW, "narrow")):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size(size)
            check_accessible(page)
            page.screenshot(path=folder / f"page-{name}.png", full_page=True)
        browser.close()
    assert not problems, problems


main()
