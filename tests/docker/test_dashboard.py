import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.dashboard import DOCUMENT, EXPRESSIONS, PANELS, as_promql, without_records
from tests.docker.deployment import (
    COMPOSE_FILES,
    DASHBOARD,
    DOCKER,
    PROMETHEUS,
    metric_names,
    read_compose,
    unknown_metrics,
)
from tests.docker.prometheus_server import query, recorded_prometheus

GRID_COLUMNS = 24

each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


def cells(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    place = panel["gridPos"]
    columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return itertools.product(columns, rows)


def test_panels_do_not_overlap_or_leave_the_grid() -> None:
    taken = [cell for panel in DOCUMENT["panels"] for cell in cells(panel)]
    assert len(taken) == len(set(taken))
    assert max(column for column, _ in taken) < GRID_COLUMNS
    assert len({panel["id"] for panel in DOCUMENT["panels"]}) == len(DOCUMENT["panels"])


@each_panel
def test_panels_explain_themselves(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"][0]["value"] is None


@each_panel
def test_panels_read_the_provisioned_data_source(panel: dict[str, Any]) -> None:
    folder = DOCKER / "grafana" / "provisioning" / "datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yml").read_text())["datasources"]
    assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_queries_read_metrics_that_exist(expression: str) -> None:
    assert unknown_metrics(expression) == set()


def test_every_metric_is_shown() -> None:
    text = " ".join(without_records(expression) for expression in EXPRESSIONS)
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in metric_names()}
    assert {family for family in families if family not in text} == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
def test_queries_parse(tmp_path: Path) -> None:
    rules = [{"record": f"panel:query:{i}", "expr": as_promql(text)} for i, text in enumerate(EXPRESSIONS)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(EXPRESSIONS)} rules found" in checked.stdout


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with recorded_prometheus(tmp_path_factory.mktemp("prometheus")) as url:
        yield url


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on PATH")
@pytest.mark.parametrize("expression", [text for text in EXPRESSIONS if not text.startswith("ALERTS")])
def test_queries_find_what_the_services_export(prometheus: str, expression: str) -> None:
    found = query(prometheus, without_records(as_promql(expression)))
    assert found
    assert all(series["value"][1] != "NaN" for series in found if series["metric"].get("job") != "spectrumkv-decode")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on PATH")
def test_the_budget_panel_shows_bytes_sent_over_fp16_bytes(prometheus: str) -> None:
    (panel,) = [panel for panel in PANELS if panel["type"] == "timeseries" and panel["title"] == "Counted budget"]
    (series,) = query(prometheus, as_promql(panel["targets"][0]["expr"]))
    assert float(series["value"][1]) == pytest.approx(0.5)


def test_grafana_finds_the_dashboard_where_compose_mounts_it() -> None:
    grafana = read_compose(COMPOSE_FILES["gpu"])["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    folder = DOCKER / "grafana" / "provisioning" / "dashboards"
    (provider,) = yaml.safe_load((folder / "spectrumkv.yml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{mounts['./grafana/dashboards']}/{DASHBOARD.name}"


def test_the_data_source_steps_with_the_scrapes() -> None:
    folder = DOCKER / "grafana" / "provisioning" / "datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yml").read_text())["datasources"]
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
