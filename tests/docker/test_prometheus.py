import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docker.deployment import (
    OPERATIONS,
    PROMETHEUS,
    ROOT,
    alert_rules,
    recorded_expressions,
    unknown_metrics,
)

RULE_TESTS = sorted((Path(__file__).parent / "rules").glob("*.yml"))

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)


def alert_cases() -> list[tuple[str, bool]]:
    """Every (alert, whether it is expected to fire) of the rule tests."""
    cases = [
        case
        for path in RULE_TESTS
        for group in yaml.safe_load(path.read_text())["tests"]
        for case in group.get("alert_rule_test", [])
    ]
    return [(case["alertname"], bool(case["exp_alerts"])) for case in cases]


def anchors() -> set[str]:
    """The anchors that GitHub gives to the headings of docs/operations.md."""
    headings = re.findall(r"^#+ (.+)$", OPERATIONS.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@needs_promtool
def test_configuration_is_valid() -> None:
    checked = promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "2 rule files found" in checked.stdout
    # The file of authorities is where Prometheus runs only.
    checked = promtool("check", "config", "--syntax-only", str(PROMETHEUS / "secured.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_rules(path: Path) -> None:
    tested = promtool("test", "rules", str(path))
    assert tested.returncode == 0, tested.stdout + tested.stderr


@needs_promtool
def test_a_rule_test_can_fail(tmp_path: Path) -> None:
    broken = (PROMETHEUS / "rules" / "alerts.yml").read_text().replace("p99_5m > 10", "p99_5m > 100")
    (tmp_path / "alerts.yml").write_text(broken)
    recording = PROMETHEUS / "rules" / "recording.yml"
    document = yaml.safe_load((Path(__file__).parent / "rules" / "latency.yml").read_text())
    document["rule_files"] = [str(recording), str(tmp_path / "alerts.yml")]
    (tmp_path / "latency.yml").write_text(yaml.safe_dump(document))
    assert promtool("test", "rules", str(tmp_path / "latency.yml")).returncode == 1


@pytest.mark.parametrize("alert", alert_rules())
def test_every_alert_is_tested_firing_and_silent(alert: str) -> None:
    assert {fires for name, fires in alert_cases() if name == alert} == {True, False}


def test_every_tested_alert_exists() -> None:
    assert {name for name, _ in alert_cases()} == alert_rules().keys()


@pytest.mark.parametrize("alert", alert_rules())
def test_every_alert_says_what_to_do(alert: str) -> None:
    rule = alert_rules()[alert]
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    document, anchor = rule["annotations"]["runbook"].split("#")
    assert ROOT / document == OPERATIONS
    assert anchor in anchors()


@pytest.mark.parametrize(
    "expression", [*recorded_expressions().values(), *(r["expr"] for r in alert_rules().values())]
)
def test_rules_read_metrics_that_exist(expression: str) -> None:
    assert unknown_metrics(expression) == set()


@pytest.mark.parametrize("name", ["spectrumkv_no_such_metric", "job:spectrumkv_no_such_record:p99_5m"])
def test_a_metric_that_does_not_exist_is_noticed(name: str) -> None:
    assert unknown_metrics(f'rate({name}{{job="spectrumkv_prefill"}}[5m])') == {name}
