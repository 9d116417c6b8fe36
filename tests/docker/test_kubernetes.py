"""The manifests as kustomize builds them: they agree with the services' options and limits, and with each other."""

import re
import runpy
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectrumkv.common.service.command_line import load
from spectrumkv.common.service.config import DecodeConfig, PrefillConfig
from spectrumkv.common.service.serving import STOP_SECONDS
from spectrumkv.gateway.config import GatewayConfig
from spectrumkv.gateway.http.exchange import OPEN_PATHS
from tests.docker.deployment import DASHBOARD, DOCKER, OPERATIONS, ROOT, VLLM_DASHBOARD, unknown_metrics

KUBERNETES = DOCKER / "kubernetes"
OVERLAYS = ("cpu", "gpu", "secured", "autoscaled")
TLS_OVERLAYS = ("secured", "autoscaled")
KINDS = {"decode": "StatefulSet", "prefill": "Deployment"}
CONFIGS: dict[str, Any] = {"decode": DecodeConfig, "prefill": PrefillConfig, "gateway": GatewayConfig}
# What CoreDNS keeps an answer for in clusters as kubeadm makes them is 30 s, in most others 5 s.
NAME_SERVER_SECONDS = 5.0
# `make lint-kubernetes` brings one.
KUBECTL = shutil.which("kubectl", path=str(ROOT / "build" / "kubernetes" / "bin")) or shutil.which("kubectl")

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not there; make lint-kubernetes brings one")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
each_service = pytest.mark.parametrize("service", KINDS)


@cache
def built(overlay: str) -> tuple[dict[str, Any], ...]:
    """Every resource of an overlay."""
    command = [str(KUBECTL), "kustomize", str(KUBERNETES / "overlays" / overlay)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return tuple(yaml.safe_load_all(text))


def resources(overlay: str, kind: str) -> dict[str, Any]:
    return {one["metadata"]["name"]: one for one in built(overlay) if one["kind"] == kind}


def workload(overlay: str, service: str) -> Any:
    return resources(overlay, KINDS.get(service, "Deployment"))[service]


def pod(overlay: str, service: str) -> Any:
    return workload(overlay, service)["spec"]["template"]["spec"]


def container(overlay: str, service: str) -> Any:
    (one,) = pod(overlay, service)["containers"]
    return one


def labels(overlay: str, service: str) -> Any:
    return workload(overlay, service)["spec"]["template"]["metadata"]["labels"]


def options(overlay: str, service: str, folder: Path) -> Any:
    """The options as the service reads them: its flags, and the file that is mounted where --config says."""
    (volume,) = [one for one in pod(overlay, service)["volumes"] if one["name"] == "options"]
    path = folder / "options.toml"
    path.write_text(resources(overlay, "ConfigMap")[volume["configMap"]["name"]]["data"]["options.toml"])
    arguments = [
        text.replace("/etc/spectrumkv/options.toml", str(path)) for text in container(overlay, service)["args"]
    ]
    return load(CONFIGS[service], arguments, f"spectrumkv-{service}")


@each_overlay
@each_service
def test_the_options_are_allowed_and_the_ports_are_theirs(overlay: str, service: str, tmp_path: Path) -> None:
    config = options(overlay, service, tmp_path)
    ports = {one["name"]: one["containerPort"] for one in container(overlay, service)["ports"]}
    assert ports == {"grpc": config.listen.port, "metrics": config.metrics_listen.port}
    assert container(overlay, service)["command"][-1] == f"spectrumkv-{service}"
    assert resources(overlay, "Service")[service]["spec"]["ports"][0]["port"] == config.listen.port


@each_overlay
@each_service
def test_a_pod_serves_on_while_names_still_lead_to_it_and_then_has_time_to_drain(
    overlay: str, service: str, tmp_path: Path
) -> None:
    config = options(overlay, service, tmp_path)
    pause = container(overlay, service)["lifecycle"]["preStop"]["sleep"]["seconds"]
    # Two look-ups of prefill's, since the first may begin a moment too early.
    assert pause >= NAME_SERVER_SECONDS + 2 * PrefillConfig.resolve_interval
    assert pod(overlay, service)["terminationGracePeriodSeconds"] >= pause + config.grace + STOP_SECONDS
    assert (
        workload(overlay, service)["spec"]["minReadySeconds"]
        >= NAME_SERVER_SECONDS + 2 * PrefillConfig.resolve_interval
    )


@each_overlay
def test_prefill_finds_decode_by_its_headless_service(overlay: str, tmp_path: Path) -> None:
    config = options(overlay, "prefill", tmp_path)
    (target,) = config.decode
    service = resources(overlay, "Service")[target.host]["spec"]
    assert service["clusterIP"] == "None"
    assert service["ports"][0]["port"] == target.port
    assert service["selector"].items() <= labels(overlay, "decode").items()
    # A pod that is not ready has no address there, and gets no request.
    assert not service.get("publishNotReadyAddresses")


@each_overlay
@each_service
def test_probes_ask_what_the_service_answers(overlay: str, service: str) -> None:
    one = container(overlay, service)
    assert one["startupProbe"]["httpGet"] == one["livenessProbe"]["httpGet"] == {"path": "/live", "port": "metrics"}
    if overlay in TLS_OVERLAYS:
        assert one["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "metrics"}
    else:
        assert one["readinessProbe"]["grpc"]["port"] == one["ports"][0]["containerPort"]


@each_overlay
@each_service
def test_a_container_writes_to_its_cache_and_its_temporary_files_only(overlay: str, service: str) -> None:
    one = container(overlay, service)
    assert one["securityContext"]["readOnlyRootFilesystem"]
    writable = {mount["mountPath"] for mount in one["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/var/cache/spectrumkv", "/tmp"}
    home = re.search(r"HOME=(\S+)", (DOCKER / "Dockerfile").read_text())
    assert home is not None
    assert home[1] in writable
    claims = [
        claim["metadata"]["name"] for claim in workload(overlay, service)["spec"].get("volumeClaimTemplates", [])
    ]
    volumes = {volume["name"] for volume in pod(overlay, service)["volumes"]} | set(claims)
    assert {mount["name"] for mount in one["volumeMounts"]} == volumes
    # Kubernetes updates a secret's files in place only where they are not mounted one by one.
    assert not any("subPath" in mount for mount in one["volumeMounts"])


@each_overlay
def test_only_prefill_may_send_to_decode(overlay: str) -> None:
    policies = resources(overlay, "NetworkPolicy")
    assert policies["default-deny"]["spec"]["podSelector"] == {}
    opening = [rule for rule in ingress(policies, labels(overlay, "decode")) if {"port": "grpc"} in rule["ports"]]
    (rule,) = opening
    (sender,) = rule["from"]
    assert sender == {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "spectrumkv-prefill"}}}


def ingress(policies: dict[str, Any], pod_labels: dict[str, str]) -> Iterator[Any]:
    """Every rule that lets somebody in to pods with these labels."""
    for policy in policies.values():
        if selects(policy["spec"]["podSelector"], pod_labels):
            yield from policy["spec"].get("ingress", [])


def selects(selector: dict[str, Any], pod_labels: dict[str, str]) -> bool:
    """Whether a selector chooses pods with these labels."""
    among = all(pod_labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))
    return among and selector.get("matchLabels", {}).items() <= pod_labels.items()


@each_overlay
@pytest.mark.parametrize("service", [*KINDS, "gateway"])
def test_budgets_and_monitors_choose_the_pods(overlay: str, service: str) -> None:
    budget = resources(overlay, "PodDisruptionBudget")[service]["spec"]
    assert selects(budget["selector"], labels(overlay, service))
    (monitor,) = [
        one["spec"]
        for one in resources(overlay, "PodMonitor").values()
        if selects(one["spec"]["selector"], labels(overlay, service))
    ]
    # The job that rules and dashboard know.
    assert labels(overlay, service)[monitor["jobLabel"]] == f"spectrumkv-{service}"
    ports = {one["name"] for one in container(overlay, service)["ports"]}
    assert {one["port"] for one in monitor["podMetricsEndpoints"]} <= ports


@each_overlay
def test_the_gateway_finds_prefill_and_drains_as_the_services_do(overlay: str, tmp_path: Path) -> None:
    config, one = options(overlay, "gateway", tmp_path), container(overlay, "gateway")
    (target,) = config.prefill
    service = resources(overlay, "Service")[target.host]["spec"]
    assert (service["clusterIP"], service["ports"][0]["port"]) == ("None", target.port)
    assert [port["containerPort"] for port in one["ports"]] == [config.listen.port]
    pause = one["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(overlay, "gateway")["terminationGracePeriodSeconds"] >= pause + config.grace + STOP_SECONDS
    assert one["readinessProbe"]["httpGet"]["path"] in OPEN_PATHS
    secured = overlay in TLS_OVERLAYS
    encrypts = [config.tls_cert is not None, config.prefill_tls_ca is not None, not config.allow_plaintext]
    assert encrypts == [secured] * 3
    assert (one["readinessProbe"]["httpGet"].get("scheme") == "HTTPS") is secured
    # Callers' tokens go on to prefill: the gateway lends nobody one of its own.
    assert config.token_file is config.prefill_token_file is None


@each_overlay
def test_prefill_lets_in_the_gateway_and_those_with_the_label_of_clients(overlay: str) -> None:
    policies = resources(overlay, "NetworkPolicy")
    (rule,) = [rule for rule in ingress(policies, labels(overlay, "prefill")) if {"port": "grpc"} in rule["ports"]]
    senders = [sender["podSelector"] for sender in rule["from"]]
    assert [selects(sender, labels(overlay, "gateway")) for sender in senders] == [True, False]
    assert senders[1] == {"matchLabels": {"spectrumkv.dev/client": "true"}}


@pytest.mark.parametrize("overlay", TLS_OVERLAYS)
def test_certificates_are_for_the_names_that_are_verified(overlay: str, tmp_path: Path) -> None:
    certificates = {
        name: set(one["spec"].get("dnsNames", [])) for name, one in resources(overlay, "Certificate").items()
    }
    prefill, decode = options(overlay, "prefill", tmp_path), options(overlay, "decode", tmp_path)
    assert not (prefill.allow_plaintext)
    assert not (decode.allow_plaintext)
    assert prefill.decode[0].host in certificates["decode"]
    assert decode.tls_client_names in certificates["prefill"]
    assert options(overlay, "gateway", tmp_path).prefill[0].host in certificates["prefill"]
    assert resources(overlay, "Service")["gateway"]["spec"]["ports"][0]["port"] == 443
    assert decode.tls_clients == "verified"
    for service, config in (("prefill", prefill), ("decode", decode)):
        secrets = {
            volume["name"]: volume["secret"]["secretName"]
            for volume in pod(overlay, service)["volumes"]
            if "secret" in volume
        }
        assert secrets == {"tls": f"{service}-tls", "tokens": f"{service}-tokens"}
        mounts = {mount["name"]: mount["mountPath"] for mount in container(overlay, service)["volumeMounts"]}
        assert {Path(config.tls_cert).parent, Path(config.tls_key).parent, Path(config.tls_ca).parent} == {
            Path(mounts["tls"])
        }
        assert Path(config.token_file).parent == Path(mounts["tokens"])


@each_service
def test_a_gpu_pod_gets_a_gpu_and_a_cpu_pod_none(service: str, tmp_path: Path) -> None:
    assert container("gpu", service)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert options("gpu", service, tmp_path).device == "cuda"
    assert "nvidia.com/gpu" not in container("cpu", service)["resources"]["limits"]
    assert (container("gpu", service)["image"], container("cpu", service)["image"]) == (
        "spectrumkv:gpu",
        "spectrumkv:cpu",
    )


def test_overlays_differ_from_the_base_in_what_they_are_for() -> None:
    for name in ("decode.toml", "prefill.toml"):
        base, gpu = (tomllib.loads((KUBERNETES / folder / name).read_text()) for folder in ("base", "overlays/gpu"))
        assert {key for key in base | gpu if base.get(key) != gpu.get(key)} <= {"device", "kv_memory"}


def test_what_scales_has_no_fixed_number_and_reads_metrics_that_exist() -> None:
    for service in KINDS:
        assert "replicas" not in workload("autoscaled", service)["spec"]
        assert workload("secured", service)["spec"]["replicas"] == 2
    for name, scaled in resources("autoscaled", "ScaledObject").items():
        assert scaled["spec"]["scaleTargetRef"] == {"kind": KINDS[name], "name": name}
        for trigger in scaled["spec"]["triggers"]:
            assert unknown_metrics(trigger["metadata"]["query"]) == set()
            assert f'job="spectrumkv-{name}"' in trigger["metadata"]["query"]


def test_the_rule_is_what_the_script_writes() -> None:
    script = runpy.run_path(str(KUBERNETES / "prometheus_rule.py"))
    assert script["MANIFEST"].read_text() == script["manifest"](), "run docker/kubernetes/prometheus_rule.py"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
def test_prometheus_takes_the_rule_and_the_queries_of_the_scalers(tmp_path: Path) -> None:
    (rule,) = resources("autoscaled", "PrometheusRule").values()
    queries = [
        trigger["metadata"]["query"]
        for scaled in resources("autoscaled", "ScaledObject").values()
        for trigger in scaled["spec"]["triggers"]
    ]
    scalers = [{"record": f"scaler:query:{number}", "expr": text} for number, text in enumerate(queries)]
    groups = [*rule["spec"]["groups"], {"name": "scalers", "rules": scalers}]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": groups}))
    checked = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{sum(len(group['rules']) for group in groups)} rules found" in checked.stdout


@each_overlay
def test_grafana_gets_the_dashboards(overlay: str) -> None:
    shown = resources(overlay, "ConfigMap")["grafana-dashboard"]
    assert shown["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert shown["data"] == {path.name: path.read_text() for path in (DASHBOARD, VLLM_DASHBOARD)}


def test_the_page_names_every_overlay_and_component() -> None:
    text = (OPERATIONS.parent / "kubernetes.md").read_text()
    for folder in ("overlays", "components"):
        for path in (KUBERNETES / folder).iterdir():
            assert f"{folder}/{path.name}" in text
