import re

import pytest

from tests.docker.deployment import COMPOSE_FILES, OPERATIONS, alert_rules, metric_names

TEXT = OPERATIONS.read_text()


def test_every_metric_is_explained_and_no_other() -> None:
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in metric_names()}
    explained = set(re.findall(r"^\| `(spectrumkv_\w+)", TEXT, re.MULTILINE))
    assert explained == families


@pytest.mark.parametrize("alert", alert_rules())
def test_every_runbook_names_its_alert(alert: str) -> None:
    anchor = alert_rules()[alert]["annotations"]["runbook"].split("#")[1]
    headings = {
        heading.lower().replace(" ", "-"): body
        for heading, body in re.findall(r"^### (.+)\n((?:(?!^#).*\n)*)", TEXT, re.MULTILINE)
    }
    assert f"`{alert}`" in headings[anchor]


def test_every_variable_of_the_compose_files_is_explained_and_no_other() -> None:
    used = {name for path in COMPOSE_FILES.values() for name in re.findall(r"\$\{(\w+)", path.read_text())}
    settings = TEXT.split("### Settings")[1].split("\n### ")[0]
    explained = set(re.findall(r"^\| `([A-Z0-9_]+)`", settings, re.MULTILINE))
    passed_on = set(re.findall(r"^ +([A-Z0-9_]+):$", COMPOSE_FILES["gpu"].read_text(), re.MULTILINE))
    assert "HF_TOKEN" in passed_on
    assert explained == used | passed_on
