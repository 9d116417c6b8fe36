"""The page's files, as the gateway serves them, and `/workers`. tests/clients has the page in a browser."""

import re
from pathlib import Path

import pytest

from spectrumkv.client.kv_map import LEVELS
from tests.client.fake_servers import FakePrefill
from tests.gateway.running import RunningGateway, running_gateway

FOLDER = Path(__file__).parents[2] / "gateway" / "page"
TOKEN = "alice-0123456789abcdef"


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_file_that_the_page_names_is_served(gateway: RunningGateway) -> None:
    page = gateway.get("/")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'"(/page/[\w.]+)"', "".join(one.read_text() for one in FOLDER.iterdir())))
    assert named == {f"/page/{one.name}" for one in FOLDER.iterdir()} - {"/page/index.html"}
    for path in named:
        served = gateway.get(path)
        assert served.status == 200
        assert served.body == (FOLDER / Path(path).name).read_bytes()
        assert served.headers["x-content-type-options"] == "nosniff"


def test_the_page_may_load_nothing_of_others_and_run_nothing_inline(gateway: RunningGateway) -> None:
    page = gateway.get("/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == policy["frame-ancestors"] == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}
    markup = page.body.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://", markup)
    assert re.findall(r"<script[^>]*>", markup) == ['<script type="module" src="/page/page.js">']


@pytest.mark.parametrize("path", ["/page/index.html", "/page/no.js", "/page/../app.py", "/page/%2e%2e%2fapp.py"])
def test_nothing_else_is_served(gateway: RunningGateway, path: str) -> None:
    assert gateway.get(path).status == 404


def test_every_control_has_a_label() -> None:
    markup = (FOLDER / "index.html").read_text()
    labelled = set(re.findall(r'for="([\w-]+)"', markup))
    in_labels = "".join(re.findall(r"<label>.*?</label>", markup))
    for control, attributes in re.findall(r"<(input|select|textarea)\b([^>]*)>", markup):
        name = re.search(r'id="([\w-]+)"', attributes)
        assert (name and name[1] in labelled) or f"<{control}{attributes}>" in in_labels


def test_levels_are_those_of_the_client_and_can_be_read() -> None:
    listed = re.findall(r'\{ least: ([\de.-]+), name: "([^"]+)" \}', (FOLDER / "map.js").read_text())
    assert [(float(least), name) for least, name in listed] == [(one.least, one.name) for one in LEVELS]
    styles = (FOLDER / "page.css").read_text()
    coloured = re.findall(r"\.level-(\d+) \{ background: (#\w{6}); color: (#\w{6}); \}", styles)
    assert [(int(place), ground) for place, ground, _ in coloured] == [
        (place, level.colour) for place, level in enumerate(LEVELS)
    ]
    assert min(contrast(ground, text) for _, ground, text in coloured) >= 4.5


def test_text_can_be_read_in_light_and_dark() -> None:
    schemes = re.findall(r":root \{(.*?)\}", (FOLDER / "page.css").read_text(), re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6});", scheme))
        for ground in ("ground", "panel"):
            for text in ("text", "muted", "problem"):
                assert contrast(colours[ground], colours[text]) >= 4.5, (ground, text)
        assert contrast(colours["accent"], colours["on-accent"]) >= 4.5
        # Borders of controls, and what shows where the keyboard is.
        assert contrast(colours["ground"], colours["line"]) >= 3
        assert contrast(colours["panel"], colours["accent"]) >= 3


def test_workers_are_what_each_prefill_service_says(gateway: RunningGateway, prefill: FakePrefill) -> None:
    (said,) = gateway.get("/workers").json["prefill"]
    assert (said["address"], said["answers"], said["model"]) == (prefill.address, True, "tiny-llama")
    assert said["policies"] == [{"name": "greedy", "min_budget": 0.25, "max_budget": 1.0, "budget_kind": "tier_cost"}]
    assert [(one["address"], one["state"]) for one in said["decode_workers"]] == [
        ("127.0.0.1:50052", "serving"),
        ("127.0.0.1:50062", "away"),
        ("127.0.0.1:50072", "ejected"),
    ]


def test_a_prefill_service_that_does_not_answer_is_named(prefill: FakePrefill) -> None:
    with running_gateway(f"{prefill.address},127.0.0.1:1") as gateway:
        said = gateway.get("/workers").json["prefill"]
    assert [(one["address"], one["answers"]) for one in said] == [(prefill.address, True), ("127.0.0.1:1", False)]
    assert "127.0.0.1:1" in said[1]["error"]


def test_the_page_needs_no_token_and_workers_do(prefill: FakePrefill, tmp_path: Path) -> None:
    accepted = tmp_path / "accepted"
    accepted.write_text(f"alice:{TOKEN}\n")
    with running_gateway(prefill.address, token_file=str(accepted)) as gateway:
        assert gateway.get("/").status == gateway.get("/page/page.js").status == 200
        assert gateway.get("/workers").status == 401
        assert gateway.ask("GET", "/workers", headers={"Authorization": f"Bearer {TOKEN}"}).status == 200
