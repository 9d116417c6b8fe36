"""The compose files without a GPU, as users start them: they answer, are scraped, drain, and come back."""

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import Sampling
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.security import ChannelSecurity, TlsFiles
from tests.common.security.certificates import Authority
from tests.docker.images.engine import (
    Project,
    container_address,
    health,
    inspect,
    metric,
    wait_for,
)
from tests.docker.images.load import Load
from tests.docker.prometheus_server import query

TOKENS = {"client": "c" * 32, "decode": "d" * 32}
DRAIN_SECONDS = 45.0
ALL_UP = {"spectrumkv-prefill": "up", "spectrumkv-decode": "up", "spectrumkv-gateway": "up"}


def answer(address: str, security: ChannelSecurity = ChannelSecurity()) -> str:  # noqa: B008  # frozen
    with SpectrumClient(address, security) as client:
        sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
        return client.generate("The capital of France is", sampling=sampling).result().text


@pytest.fixture(scope="module")
def project(cpu_image: str, prometheus_image: str, model: Path) -> Iterator[Project]:
    environment = {"MODEL": "/model", "TEST_MODEL": str(model), "KV_MEMORY": "256MiB"}
    with Project("spectrumkv-test", ("compose.yaml", "compose.cpu.yaml"), environment) as started:
        started.up("gateway", "prometheus")
        yield started


def ask_gateway(url: str, token: str | None = None, context: ssl.SSLContext | None = None) -> str:
    """Ask for one of two answers, and return it."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(f"{url}/v1/models", headers=headers)
    with urllib.request.urlopen(request, timeout=10, context=context) as response:
        (model,) = json.load(response)["data"]
    asked = {"model": model["id"], "prompt": "Is it so?", "structured_outputs": {"choice": ["yes", "no"]}}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=60, context=context) as response:
        (choice,) = json.load(response)["choices"]
    return str(choice["text"])


def targets(url: str) -> dict[str, str]:
    """The health of each job's target, as Prometheus has it."""
    with urllib.request.urlopen(f"http://{url}/api/v1/targets?state=active", timeout=10) as response:
        active = json.load(response)["data"]["activeTargets"]
    return {one["labels"]["job"]: one["health"] for one in active}


def test_clients_are_answered_and_prometheus_scrapes_all(project: Project) -> None:
    address = project.published("prefill", 50051)
    assert len(answer(address)) > 0
    url = project.published("prometheus", 9090)
    wait_for(lambda: targets(url) == ALL_UP, "Prometheus has scraped the services", 60)

    def counted() -> float:
        found = query(f"http://{url}", 'sum(spectrumkv_requests_total{job="spectrumkv-decode",code="OK"})', None)
        return float(found[0]["value"][1]) if found else 0.0

    wait_for(lambda: counted() >= 1, "Prometheus has the request", 60)


def test_the_gateway_answers_and_holds_answers_to_a_form(project: Project) -> None:
    assert ask_gateway(f"http://{project.published('gateway', 8000)}") in ("yes", "no")


def test_containers_have_the_limits_of_the_files(project: Project) -> None:
    for service, memory in (("prefill", 6 << 30), ("decode", 6 << 30), ("gateway", 2 << 30), ("prometheus", 2 << 30)):
        (container,) = project.containers(service)
        host = inspect(container)["HostConfig"]
        assert (host["ReadonlyRootfs"], host["Memory"], host["CapDrop"]) == (True, memory, ["ALL"])
        assert host["PidsLimit"] > 0
    assert "this process may use" in project.logs("decode")
    assert "6.00 GiB of memory" in project.logs("decode")


def test_a_decode_that_is_killed_comes_back(project: Project) -> None:
    address = project.published("prefill", 50051)
    before = answer(address)
    (container,) = project.containers("decode")
    with Load(address) as load:
        wait_for(lambda: any(one.error is None for one in load.sent), "requests are answered", 60)
        project.compose("exec", "-T", "decode", "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)")
        wait_for(lambda: inspect(container)["RestartCount"] == 1, "Docker has started it again", 60)
        wait_for(lambda: health(container) == "healthy", "decode is healthy again")
        count = len(load.sent)
        wait_for(lambda: any(one.error is None for one in load.sent[count:]), "requests are answered again", 60)
    assert [one for one in load.errors if not one.startswith("UNAVAILABLE: ")] == []
    assert answer(address) == before


def test_a_prefill_that_is_stopped_under_load_ends_what_it_runs(project: Project) -> None:
    (container,) = project.containers("prefill")
    with Load(project.published("prefill", 50051), max_tokens=200) as load:
        wait_for(lambda: len(load.sent) >= 4, "requests are answered", 120)
        began = time.monotonic()
        project.compose("stop", "prefill")
        took = time.monotonic() - began
    assert took < DRAIN_SECONDS
    assert inspect(container)["State"]["ExitCode"] == 0
    # Whoever had a token got all of them; whoever came later was told at once.
    assert [one.error for one in load.sent if one.first_token is not None and one.error is not None] == []
    assert load.errors
    assert [one for one in load.errors if not one.startswith("UNAVAILABLE: ")] == []
    (decode,) = project.containers("decode")
    assert metric(decode, 9465, "spectrumkv_kv_slots_used_ratio") == 0


@dataclass(frozen=True)
class Secrets:
    """What docs/security.md lays into SECRETS_DIR, and what a client gets of it."""

    folder: Path
    authority: Authority = field(default_factory=lambda: Authority("ours"))

    def write(self) -> None:
        for service in ("prefill", "decode", "gateway", "prometheus"):
            own = self.folder / service
            own.mkdir(parents=True)
            files = {"ca.crt": self.authority.cert}
            if service != "prometheus":
                issued = self.authority.issue(service, names=(x509.DNSName(service),))
                files |= {f"{service}.crt": issued.cert, f"{service}.key": issued.key}
            if service in ("prefill", "decode"):
                files["decode-tokens"] = TOKENS["decode"].encode()
            if service == "prefill":
                files["client-tokens"] = TOKENS["client"].encode()
            for name, content in files.items():
                (own / name).write_bytes(content)
        (self.folder / "token").write_text(TOKENS["client"])

    @property
    def of_clients(self) -> ChannelSecurity:
        tls = TlsFiles(None, None, self.folder / "prefill" / "ca.crt")
        return ChannelSecurity(tls, self.folder / "token", server_name="prefill")


def test_with_secrets_each_service_is_healthy_and_asks_for_tokens(
    cpu_image: str, prometheus_image: str, model: Path, tmp_path: Path
) -> None:
    secrets = Secrets(tmp_path / "secrets")
    secrets.write()
    files = ("compose.yaml", "compose.cpu.yaml", "compose.secured.yaml")
    environment = {"MODEL": "/model", "TEST_MODEL": str(model), "SECRETS_DIR": str(secrets.folder)}
    with Project("spectrumkv-test-secured", files, environment) as project:
        project.up("gateway", "prometheus")
        address = project.published("prefill", 50051)
        assert len(answer(address, secrets.of_clients)) > 0
        without_token = ChannelSecurity(secrets.of_clients.tls, server_name="prefill")
        with pytest.raises(SpectrumKVError, match="token") as refused:
            answer(address, without_token)
        assert refused.value.code == "UNAUTHENTICATED"
        seen = project.compose("exec", "-T", "prefill", "ls", "/run/spectrumkv").split()
        assert "decode.key" not in seen
        assert "prefill.key" in seen
        context = ssl.create_default_context(cafile=secrets.folder / "gateway" / "ca.crt")
        # The address that Docker publishes is not in the certificate.
        context.check_hostname = False
        url = f"https://{project.published('gateway', 8000)}"
        assert ask_gateway(url, TOKENS["client"], context) in ("yes", "no")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask_gateway(url, context=context)
        prometheus = project.published("prometheus", 9090)
        wait_for(lambda: targets(prometheus) == ALL_UP, "Prometheus has scraped the secured services", 60)


def test_the_baked_model_is_served_without_an_index(baked_image: str) -> None:
    """Nothing can be reached from these containers, and no model is named."""
    files = ("compose.yaml", "compose.cpu.yaml")
    with Project("spectrumkv-test-baked", files, {"TEST_IMAGE": baked_image, "TEST_INTERNAL": "true"}) as project:
        project.up("prefill", "decode")
        (container,) = project.containers("prefill")
        from_here = f"{container_address(container)}:50051"
        security = ChannelSecurity(allow_plaintext=True)
        assert "Paris" in answer(from_here, security)
