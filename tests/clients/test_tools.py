"""Load generators and evaluation harnesses that others made, against a real pair."""

import json
import os
import shutil
from pathlib import Path

from spectrumkv.common.model.files.directory import find_model
from tests.clients.conftest import PROGRAMS, Run, Served

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "lm-eval.json"
MODEL = "SmolLM2-135M-Instruct"
# How the KV is sent.
SETTINGS = {"fp16": {"policy": "fp16", "budget": 1.0}, "0.3": {"budget": 0.3}, "0.1": {"budget": 0.1}}
# The share of the answers that must be right at each setting; all are, as bench/results/lm-eval.json says.
LEAST = 0.8


def test_lm_eval_scores_a_generating_task_at_each_setting(run: Run, tmp_path: Path) -> None:
    for file in ("capitals.yaml", "capitals.jsonl"):
        shutil.copy(PROGRAMS / file, tmp_path)
    run("lm_eval_capitals.py", MODEL, str(tmp_path), json.dumps(SETTINGS))
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found.keys() == SETTINGS.keys()
    assert min(one["exact_match"] for one in found.values()) >= LEAST, found
    assert found["fp16"]["budget_counted"] > found["0.3"]["budget_counted"] > found["0.1"]["budget_counted"]
    if os.environ.get("WRITE_RESULTS"):
        kept = {name: {"task": "capitals", "kv": kv, **found[name]} for name, kv in SETTINGS.items()}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def put_tokenizer_into_cache(home: Path) -> str:
    """Lay the default model's tokenizer out as the hub's cache, where aiperf looks; return its name there."""
    entry, revision = home / "hub" / "models--local--default", "0" * 40
    (entry / "refs").mkdir(parents=True)
    (entry / "snapshots").mkdir()
    (entry / "refs" / "main").write_text(revision)
    (entry / "snapshots" / revision).symlink_to(find_model(None)[1], target_is_directory=True)
    return "local/default"


def test_aiperf_finds_no_error(run: Run, served: Served, tmp_path: Path) -> None:
    tokenizer = put_tokenizer_into_cache(tmp_path / "hf")
    run(
        *("aiperf", "profile", "--model", MODEL, "--url", served.url, "--endpoint-type", "completions"),
        *("--streaming", "--concurrency", "4", "--request-count", "12", "--ui", "none"),
        *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "8", "--tokenizer", tokenizer),
    )
    (written,) = tmp_path.rglob("profile_export_aiperf.json")
    found = json.loads(written.read_text())
    assert found["request_count"]["avg"] == 12
    assert not found.get("error_summary")


def test_vllm_bench_serve_completes(run: Run, served: Served, tmp_path: Path) -> None:
    printed = run(
        *("vllm_bench_serve.py", "--backend", "openai", "--base-url", served.url, "--endpoint", "/v1/completions"),
        *("--model", MODEL, "--tokenizer", str(find_model(None)[1]), "--dataset-name", "random"),
        *("--random-input-len", "64", "--random-output-len", "8", "--num-prompts", "12", "--max-concurrency", "4"),
        *("--ignore-eos", "--save-result", "--result-dir", str(tmp_path), "--result-filename", "served.json"),
        environment_of="VLLM",
    )
    found = json.loads((tmp_path / "served.json").read_text())
    assert (found["completed"], found["failed"]) == (12, 0)
    assert found["total_output_tokens"] == 12 * 8
    assert "Mean TTFT (ms)" in printed
