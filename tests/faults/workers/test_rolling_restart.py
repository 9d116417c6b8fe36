"""All workers are restarted, one after another, under load: no request is lost, and every answer is right."""

from pathlib import Path

import pytest

from tests.faults.deployment import NOTHING, until
from tests.faults.fleet import restart_in_order, running_fleet
from tests.faults.incubator import Incubator
from tests.faults.report import tell
from tests.faults.workers.load import CLIENTS, Load
from tests.tiny_models import tiny_model


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rolling_restart_loses_no_request(
    tmp_path: Path, incubator: Incubator, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_fleet(tmp_path, tiny_model("llama"), incubator, kv_memory="64MiB") as fleet:
        load = Load(fleet)
        for service in (fleet.decodes[0], fleet.prefills[0], fleet.decodes[1], fleet.prefills[1]):
            before = load.answers
            restart_in_order(service)
            until(lambda before=before: load.answers > before + CLIENTS, 60, "requests go on")
        load.stop()
        tell(capsys, f"{load.answers} requests while 4 workers restarted in turn, {len(load.errors)} lost")
        assert load.errors == []
        for service in fleet.services:
            until(lambda service=service: service.held() == NOTHING, 10, f"{service.name} holds nothing")
