import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spectrumkv.client.local.gateway_process import running_gateway
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from spectrumkv.common.service.options import Address

PROGRAMS = Path(__file__).parent / "programs"
# The longest of the programs; a test says where one needs more.
SECONDS = 600


@dataclass(frozen=True)
class Served:
    """A pair of real services on the default model, and the gateway in front of it."""

    pair: RunningPair
    url: str


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    listen = Address("127.0.0.1", 18_731)
    with (
        running_pair({**FREE_PORTS, "max_waiting": "256"}) as pair,
        running_gateway(pair, listen, {}, lambda name, line: None),
    ):
        yield Served(pair, f"http://{listen}")


Run = Callable[..., str]


@pytest.fixture
def run(served: Served, tmp_path: Path) -> Run:
    """Run a program of an environment, and return what it printed; its assertions are the test."""

    def run_program(*words: str, seconds: float = SECONDS, environment_of: str = "CLIENTS") -> str:
        folder = Path(os.environ[environment_of]) / "bin"
        program = PROGRAMS / words[0]
        command = [str(folder / "python"), str(program), *words[1:]] if program.exists() else [str(folder / words[0])]
        command += [] if program.exists() else words[1:]
        offline = {
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # The links of our own packages are none of theirs.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"BASE_URL": f"{served.url}/v1", "OPENAI_API_KEY": "none", "PATH": f"{folder}:/usr/bin:/bin"}
        done = subprocess.run(
            command,
            env=environment | offline,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    return run_program
