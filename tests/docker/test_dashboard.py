import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.dashboard import DOCUMENTS, PANELS, as_promql, expressions, panels, without_records
from tests.docker.deployment import (
    COMPOSE_FILES,
    DASHBOARD,
    DOCKER,
    PROMETHEUS,
    VLLM_DASHBOARD,
    metric_names,
    read_compose,
    unknown_metrics,
    vllm_metric_names,
)
from tests.docker.prometheus_server import query, recorded_prometheus

GRID_COLUMNS = 24

ALL_PANELS = [panel for document in DOCUMENTS.values() for panel in panels(document)]
ALL_EXPRESSIONS = [text for document in DOCUMENTS.values() for text in expressions(document)]

each_panel = pytest.mark.parametrize("panel", ALL_PANELS, ids=lambda panel: panel["title"])
each_document = pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)


def cells(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    place = panel["gridPos"]
    columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return itertools.product(columns, rows)


@each_document
def test_panels_do_not_overlap_or_leave_the_grid(document: dict[str, Any]) -> None:
    taken = [cell for panel in document["panels"] for cell in cells(panel)]
    assert len(taken) == len(set(taken))
    assert max(column for column, _ in taken) < GRID_COLUMNS
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])


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


@pytest.mark.parametrize("expression", ALL_EXPRESSIONS)
def test_queries_read_metrics_that_exist(expression: str) -> None:
    assert unknown_metrics(expression) == set()


@pytest.mark.parametrize(
    ("dashboard", "names"), [(DASHBOARD, metric_names()), (VLLM_DASHBOARD, vllm_metric_names())], ids=["own", "vllm"]
)
def test_every_metric_is_shown(dashboard: Path, names: set[str]) -> None:
    text = " ".join(without_records(expression) for expression in expressions(DOCUMENTS[dashboard.stem]))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
    assert {family for family in families if family not in text} == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
def test_queries_parse(tmp_path: Path) -> None:
    rules = [{"record": f"panel:query:{i}", "expr": as_promql(text)} for i, text in enumerate(ALL_EXPRESSIONS)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(ALL_EXPRESSIONS)} rules found" in checked.stdout


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with recorded_prometheus(tmp_path_factory.mktemp("prometheus")) as url:
        yield url


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on PATH")
@pytest.mark.parametrize("expression", [text for text in ALL_EXPRESSIONS if not text.startswith("ALERTS")])
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
