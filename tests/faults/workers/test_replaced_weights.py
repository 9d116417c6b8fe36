"""One side is started again on other weights of the same path, shape, size and time: the two sides do not pair."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spectrumkv.client.request import KvChoice, Sampling
from spectrumkv.common.errors import FailedPreconditionError, UnavailableError
from tests.faults.deployment import Service, until
from tests.faults.fleet import Fleet, restart_in_order, running_fleet
from tests.faults.incubator import Incubator
from tests.faults.requests import prompt
from tests.tiny_models import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OPTIONS = {"policy": "fp16", "budget": "1", "kv_memory": "64MiB", "grace": "1"}
REFUSAL = "different models: weights_digest is [0-9a-f]{64} on decode and [0-9a-f]{64} on prefill"


@dataclass(frozen=True)
class Weights:
    """A model's weights file, and two contents that only reading tells from each other."""

    file: Path
    kept: dict[str, Path]

    @classmethod
    def of(cls, model: Path, directory: Path) -> "Weights":
        """Keep the model's own weights as A, and others as B."""
        file = model / "model.safetensors"
        kept = {name: directory / name for name in "AB"}
        shutil.copy2(file, kept["A"])
        others = {name: tensor.flip(0) if "lm_head" in name else tensor for name, tensor in load_file(file).items()}
        save_file({name: tensor.contiguous() for name, tensor in others.items()}, kept["B"], {"format": "pt"})
        assert kept["A"].stat().st_size == kept["B"].stat().st_size
        return cls(file, kept)

    def put(self, name: str) -> None:
        """Put one of the contents in the file's place; size and time of modification stay."""
        time = self.file.stat().st_mtime_ns
        partial = self.file.with_suffix(".partial")
        shutil.copyfile(self.kept[name], partial)
        os.utime(partial, ns=(time, time))
        partial.rename(self.file)
        assert self.file.stat().st_mtime_ns == time


@dataclass(frozen=True)
class Deployed:
    """A prefill service and two decode services on one directory's model, and that model's weights."""

    fleet: Fleet
    weights: Weights

    @property
    def prefill(self) -> Service:
        return self.fleet.prefills[0]

    def restart(self, service: Service, weights: str) -> None:
        """Start a service again after its weights were replaced, and wait until prefill knows all its workers."""
        self.weights.put(weights)
        restart_in_order(service)
        running = [one for one in self.fleet.decodes if one.process and one.process.returncode is None]
        taking = lambda: self.prefill.metrics().get("decode_worker_accepting")  # noqa: E731
        until(lambda: taking() == len(running), 60, "prefill knows its workers")

    def ask(self) -> list[int]:
        with self.fleet.client() as client:
            sampling = Sampling(max_tokens=8, ignore_eos=True)
            completion = client.generate(
                prompt(40), sampling=sampling, kv=KvChoice(policy="fp16"), timeout=60
            ).result()
        return [token.token_id for token in completion.tokens]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, incubator: Incubator) -> Iterator[Deployed]:
    directory = tmp_path_factory.mktemp("replaced")
    model = Path(shutil.copytree(tiny_model("llama"), directory / "model"))
    with running_fleet(directory, model, incubator, size=2, prefills=1, **OPTIONS) as fleet:
        yield Deployed(fleet, Weights.of(model, directory))


def received(service: Service) -> float:
    """Of how many tokens a decode service has received KV since its start; Begin and the basis have none."""
    return service.metrics().get("kv_tokens_total", 0.0)


def test_a_decode_worker_that_comes_back_with_other_weights_gets_no_kv(deployed: Deployed) -> None:
    replaced, other = deployed.fleet.decodes
    expected = deployed.ask()
    deployed.restart(replaced, "B")
    passed_over = deployed.fleet.passed_over()
    assert [deployed.ask() for _ in range(8)] == [expected] * 8
    assert deployed.fleet.passed_over() > passed_over, "no request was offered to the worker with other weights"
    assert received(replaced) == 0
    assert received(other) > 0

    other.kill()
    # The other one may come back, so that a later request may be served.
    with pytest.raises(UnavailableError, match=REFUSAL):
        deployed.ask()
    assert received(replaced) == 0

    deployed.restart(replaced, "A")
    assert deployed.ask() == expected
    assert received(replaced) > 0
    other.start()
    other.wait_until_serving()


def test_a_prefill_that_comes_back_with_other_weights_sends_no_kv(deployed: Deployed) -> None:
    expected = deployed.ask()
    before = [received(one) for one in deployed.fleet.decodes]
    deployed.restart(deployed.prefill, "B")
    for _ in range(4):
        with pytest.raises(FailedPreconditionError, match=REFUSAL):
            deployed.ask()
    assert [received(one) for one in deployed.fleet.decodes] == before

    deployed.restart(deployed.prefill, "A")
    assert deployed.ask() == expected
