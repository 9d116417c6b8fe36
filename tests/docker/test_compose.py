import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from spectrumkv.client import health
from spectrumkv.client.cli import flags
from spectrumkv.common.security import ChannelSecurity, ServerSecurity, TlsFiles
from spectrumkv.common.service.command_line import load
from spectrumkv.common.service.config import DecodeConfig, PrefillConfig, ServerConfig
from spectrumkv.common.service.options import parse_bytes
from spectrumkv.gateway.config import GatewayConfig
from tests.docker.deployment import (
    COMPOSE_FILES,
    DOCKER,
    PROMETHEUS,
    ROOT,
    SERVICES,
    Reset,
    command,
    interpolate,
    read_compose,
)

CONFIGS: dict[str, type[ServerConfig]] = {"prefill": PrefillConfig, "decode": DecodeConfig}

each_file = pytest.mark.parametrize("file", COMPOSE_FILES)
each_service = pytest.mark.parametrize("service", SERVICES)


def config(file: str, service: str, **environment: str) -> ServerConfig:
    program, *arguments = command(file, service, **environment)
    return load(CONFIGS[service], arguments, program)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "a=4GiB "), ({"K": "8GiB", "M": "q/r"}, "a=8GiB --model=q/r"), ({"K": "", "M": ""}, "a=4GiB ")],
)
def test_interpolation_follows_compose(environment: dict[str, str], expected: str) -> None:
    assert interpolate("a=${K:-4GiB} ${M:+--model=${M:-}}", environment) == expected


def test_compose_warns_of_no_variable_that_is_not_set() -> None:
    """It does so for each `${NAME}` that says nothing of its absence, inside of another one's replacement, too."""
    for path in DOCKER.glob("compose*.yaml"):
        assert re.findall(r"\$\{\w+\}", path.read_text()) == [], path.name


def test_plain_compose_up_from_a_clone_finds_the_services() -> None:
    entry = read_compose(ROOT / "compose.yaml")
    assert [(ROOT / path).resolve() for path in entry["include"]] == [COMPOSE_FILES["gpu"]]
    assert entry["name"] == read_compose(COMPOSE_FILES["gpu"])["name"]


@each_file
@each_service
def test_programs_are_installed_by_the_package(file: str, service: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert command(file, service)[0] in scripts
    assert command(file, service)[0] == f"spectrumkv-{service}"


@each_file
@each_service
def test_services_accept_their_flags(file: str, service: str) -> None:
    options = config(file, service)
    assert options.model is None
    assert options.device == {"gpu": "cuda", "cpu": "cpu"}[file]
    assert not options.listen.is_loopback
    assert (options.allow_plaintext, options.allow_plaintext_metrics) == (True, False)


@each_file
@each_service
def test_the_environment_reaches_the_flags(file: str, service: str) -> None:
    options = config(file, service, MODEL="Qwen/Qwen3-8B", LOG_LEVEL="debug", KV_MEMORY="8GiB", BUDGET="0.3")
    assert (options.model, options.log_level) == ("Qwen/Qwen3-8B", "debug")
    if isinstance(options, DecodeConfig):
        assert options.kv_memory == 8 << 30
    if isinstance(options, PrefillConfig):
        assert options.budget == 0.3


MOUNTED = Path("/run/spectrumkv")
SECURED = DOCKER / "compose.secured.yaml"


@each_file
def test_secrets_guard_both_services(file: str) -> None:
    prefill, decode = config(file, "prefill", SECRETS_DIR="/s"), config(file, "decode", SECRETS_DIR="/s")
    assert isinstance(prefill, PrefillConfig)
    guards = {
        service: ServerSecurity.from_config(one) for service, one in {"prefill": prefill, "decode": decode}.items()
    }
    for service, guard in guards.items():
        assert guard.tls is not None
        assert guard.tls.cert == MOUNTED / f"{service}.crt"
        assert guard.tls.key == MOUNTED / f"{service}.key"
    # Clients have tokens, prefill has a certificate too.
    assert not guards["prefill"].verify_clients
    assert guards["decode"].verify_clients
    towards = ChannelSecurity.to_decode(prefill)
    assert towards.tls == TlsFiles(MOUNTED / "prefill.crt", MOUNTED / "prefill.key", MOUNTED / "ca.crt")
    assert towards.token_file == guards["decode"].token_file == MOUNTED / "decode-tokens"
    assert guards["prefill"].token_file == MOUNTED / "client-tokens"
    plain = config(file, "decode")
    assert ServerSecurity.from_config(plain) == ServerSecurity()


@each_file
@each_service
def test_with_secrets_only_the_metrics_are_plaintext(file: str, service: str) -> None:
    options = config(file, service, SECRETS_DIR="/s")
    assert (options.allow_plaintext, options.allow_plaintext_metrics) == (False, True)


@each_service
def test_secrets_are_mounted_read_only_and_health_checks_show_them(service: str) -> None:
    definition = read_compose(SECURED)["services"][service]
    (volume,) = definition["volumes"]
    # Of its own: not the other service's key.
    assert volume.endswith(f"}}/{service}:{MOUNTED}:ro")
    kind, program, *arguments = definition["healthcheck"]["test"]
    parsed = health.build_parser().parse_args(arguments)
    assert (kind, program) == ("CMD", "spectrumkv-health")
    # Itself: the service's name leads to any replica.
    assert parsed.server == flags.DEFAULT_SERVER
    assert parsed.tls_name == service
    assert parsed.tls_ca == str(MOUNTED / "ca.crt")
    assert (parsed.tls_cert is not None) == (service == "decode")


@each_file
def test_prefill_finds_decode(file: str) -> None:
    prefill, decode = config(file, "prefill"), config(file, "decode")
    assert isinstance(prefill, PrefillConfig)
    assert [str(address) for address in prefill.decode] == [f"decode:{decode.listen.port}"]
    several = config(file, "prefill", DECODE_WORKERS="decode:50052,decode-2:50052")
    assert isinstance(several, PrefillConfig)
    assert [address.host for address in several.decode] == ["decode", "decode-2"]


@each_file
@each_service
def test_prometheus_scrapes_where_the_services_publish(file: str, service: str) -> None:
    scrapes = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = next(one["dns_sd_configs"] for one in scrapes if one["job_name"] == f"spectrumkv-{service}")
    # Every address of the name, so that replicas are found.
    assert (found["names"], found["type"]) == ([service], "A")
    assert found["port"] == config(file, service).metrics_listen.port


@each_file
@each_service
def test_docker_waits_longer_than_the_grace(file: str, service: str) -> None:
    period = read_compose(COMPOSE_FILES["gpu"])["services"][service]["stop_grace_period"]
    assert int(interpolate(period, {}).removesuffix("s")) >= config(file, service).grace + 15
    assert config(file, service, GRACE="120").grace == 120


@each_file
@each_service
def test_health_checks_ask_the_service_itself(file: str, service: str) -> None:
    asked = read_compose(COMPOSE_FILES["gpu"])["services"][service]["environment"]["SPECTRUMKV_SERVER"]
    assert asked == f"127.0.0.1:{config(file, service).listen.port}"


@pytest.mark.parametrize(("service", "variable"), [("prefill", "PREFILL_GPU"), ("decode", "DECODE_GPU")])
def test_each_service_reserves_one_gpu_of_choice(service: str, variable: str) -> None:
    definition = read_compose(COMPOSE_FILES["gpu"])["services"][service]
    (device,) = definition["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert [interpolate(one, {}) for one in device["device_ids"]] == ["0"]
    assert [interpolate(one, {variable: "3"}) for one in device["device_ids"]] == ["3"]


@each_service
def test_without_a_gpu_nothing_is_reserved_and_no_cuda_is_installed(service: str) -> None:
    definition = read_compose(COMPOSE_FILES["cpu"])["services"][service]
    assert isinstance(definition["deploy"], Reset)
    assert definition["build"]["target"] == "cpu"
    assert definition["image"] != read_compose(COMPOSE_FILES["gpu"])["services"][service]["image"]


def test_decode_is_ready_before_prefill_starts() -> None:
    prefill = read_compose(COMPOSE_FILES["gpu"])["services"]["prefill"]
    assert prefill["depends_on"]["decode"]["condition"] == "service_healthy"


def test_only_loopback_is_published_and_never_decode() -> None:
    services = read_compose(COMPOSE_FILES["gpu"])["services"]
    published = {name for name, definition in services.items() if "ports" in definition}
    assert published == {"prefill", "gateway", "prometheus", "grafana"}
    for name in published:
        for port in services[name]["ports"]:
            assert interpolate(port, {}).startswith("127.0.0.1:")


def test_every_container_drops_privileges() -> None:
    for definition in read_compose(COMPOSE_FILES["gpu"])["services"].values():
        assert definition["cap_drop"] == ["ALL"]
        assert definition["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in definition


def test_every_container_is_held_to_its_volumes_to_memory_and_to_processes() -> None:
    for definition in read_compose(COMPOSE_FILES["gpu"])["services"].values():
        assert definition["read_only"] is True
        assert definition["tmpfs"] == ["/tmp"]
        assert re.fullmatch(r"\d+g", interpolate(definition["mem_limit"], {}))
        assert definition["pids_limit"] > 0


@each_file
@each_service
def test_memory_limits_can_be_set_and_leave_room_for_kv(file: str, service: str) -> None:
    limit = read_compose(COMPOSE_FILES[file])["services"][service]["mem_limit"]
    assert interpolate(limit, {f"{service.upper()}_MEMORY": "7g"}) == "7g"
    options = config(file, service)
    if isinstance(options, DecodeConfig) and file == "cpu":
        assert options.kv_memory < parse_bytes(interpolate(limit, {}).replace("g", "GiB")) / 2


def test_mounted_files_exist_and_volumes_are_declared() -> None:
    compose = read_compose(COMPOSE_FILES["gpu"])
    for definition in compose["services"].values():
        for volume in definition.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DOCKER / source).is_dir() if source.startswith(".") else source in compose["volumes"]


def test_no_service_can_write_what_another_one_executes() -> None:
    services = read_compose(COMPOSE_FILES["gpu"])["services"]
    sources = {name: {volume.split(":")[0] for volume in services[name]["volumes"]} for name in SERVICES}
    writable = [
        volume.split(":")[0]
        for definition in services.values()
        for volume in definition.get("volumes", ())
        if not volume.endswith(":ro")
    ]
    assert len(writable) == len(set(writable))
    assert sources["prefill"].isdisjoint(sources["decode"])


def test_images_of_others_are_pinned() -> None:
    for name in ("prometheus", "grafana"):
        image = read_compose(COMPOSE_FILES["gpu"])["services"][name]["image"]
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", image)


def gateway(secured: bool) -> tuple[GatewayConfig, list[str]]:
    """The gateway's options, and the health check of its container."""
    path = SECURED if secured else COMPOSE_FILES["gpu"]
    definition = read_compose(path)["services"]["gateway"]
    program, *arguments = shlex.split(interpolate(definition["command"], {}))
    assert program == "spectrumkv-gateway"
    return load(GatewayConfig, arguments, program), definition["healthcheck"]["test"]


@pytest.mark.parametrize("secured", [False, True], ids=["plaintext", "secured"])
def test_the_gateway_asks_prefill_and_is_scraped_and_asked_at_its_own_port(secured: bool) -> None:
    options, check = gateway(secured)
    port = options.listen.port
    assert [str(one) for one in options.prefill] == [f"prefill:{config('gpu', 'prefill').listen.port}"]
    (mapping,) = read_compose(COMPOSE_FILES["gpu"])["services"]["gateway"]["ports"]
    assert interpolate(mapping, {}) == f"127.0.0.1:{port}:{port}"
    kind, program, flag, code = check
    assert (kind, program, flag) == ("CMD", "python", "-c")
    assert f'("127.0.0.1", {port}, ' in code
    assert '"/health"' in code
    scraped = yaml.safe_load((PROMETHEUS / f"{'secured' if secured else 'prometheus'}.yml").read_text())
    (job,) = (one for one in scraped["scrape_configs"] if one["job_name"] == "spectrumkv-gateway")
    assert [one["port"] for one in job["dns_sd_configs"]] == [port]
    assert (job.get("scheme", "http"), options.tls_cert is not None) == (
        ("https", True) if secured else ("http", False)
    )


def test_with_secrets_nothing_of_the_gateway_is_plaintext() -> None:
    options, check = gateway(secured=True)
    assert not options.allow_plaintext
    assert options.tls_cert == f"{MOUNTED}/gateway.crt"
    assert options.tls_key == f"{MOUNTED}/gateway.key"
    assert options.prefill_tls_ca == f"{MOUNTED}/ca.crt"
    # Callers' tokens go on to prefill.
    assert (options.token_file, options.prefill_token_file) == (None, None)
    assert f'cafile="{MOUNTED}/ca.crt"' in check[-1]
    volumes = {name: one["volumes"] for name, one in read_compose(SECURED)["services"].items()}
    assert [one.partition("}/")[2] for one in volumes["gateway"]] == [f"gateway:{MOUNTED}:ro"]
    assert volumes["prometheus"][0] == "./prometheus/secured.yml:/etc/prometheus/prometheus.yml:ro"


def test_prometheus_asks_the_same_of_secured_services() -> None:
    plain, secured = (yaml.safe_load((PROMETHEUS / f"{name}.yml").read_text()) for name in ("prometheus", "secured"))
    (job,) = (one for one in secured["scrape_configs"] if one["job_name"] == "spectrumkv-gateway")
    assert (job.pop("scheme"), job.pop("tls_config")) == (
        "https",
        {"ca_file": f"{MOUNTED}/ca.crt", "server_name": "gateway"},
    )
    assert plain == secured
