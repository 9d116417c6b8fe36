import json

from spectrumkv.client.cli.main import main
from tests.client.fake_servers import FakePrefill, prefill_server, serving


def test_info_of_prefill(prefill, capsys):
    assert main(["info", "--server", prefill.address, "--wait", "10"]) == 0
    # A narrow terminal wraps the lines.
    out = " ".join(capsys.readouterr().out.split())
    for shown in (
        "ready", "tiny-llama", "30 layers, 3 KV heads of 64", "policy greedy",
        "budget 0.25 to 1 of the FP16 tier cost",
        "attention, position", "absmax v1", "budget 0.5, policy adaptive", "allowed (probe)",
        "2 of 3 needles [found]", "[/b] 7", "127.0.0.1:50052, 127.0.0.1:50062 (takes no requests)",
        "127.0.0.1:50072 (ejected: it failed one request after another)",
        "runs on the CPU: slots differ by 2", "4.9e-05", "+0.038", "2 of 3", "-0.500",
    ):  # fmt: skip
        assert shown in out


def test_info_as_json(prefill, decode_address, capsys):
    assert main(["info", "--server", prefill.address, "--json", "-"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["service"], info["serving"], info["model"]["kv_heads"]) == ("prefill", True, 3)
    assert info["policies"] == [
        {"name": "greedy", "min_budget": 0.25, "max_budget": 1.0, "budget_kind": "BUDGET_KIND_TIER_COST"}
    ]
    assert [trial["found"] for trial in info["int4_probe"]["trials"]] == [True, False]
    assert [one["safe"] for one in info["int4_probe"]["settings"]] == [True, False]
    assert info["int4_probe"]["safe_budget"] == 0.25
    assert main(["info", "--server", decode_address, "--json", "-"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["service"], info["slots_total"]) == ("decode", 2**40)


def test_info_of_decode(decode_address, capsys):
    assert main(["info", "--server", decode_address]) == 0
    assert "512 of 1,099,511,627,776 reserved" in capsys.readouterr().out


def test_info_of_a_server_that_is_not_ready(capsys):
    server = prefill_server(FakePrefill())
    with serving(server) as address:
        server._health.enter_graceful_shutdown()
        assert main(["info", "--server", address]) == 1
        assert "NOT ready" in capsys.readouterr().out
        assert main(["info", "--server", address, "--wait", "0.2"]) == 1
        assert capsys.readouterr().err.startswith("DEADLINE_EXCEEDED: ")
