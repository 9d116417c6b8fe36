"""Load generators and evaluation harnesses that others made, against a real pair."""

import json
import os
import shutil
from pathlib import Path

import pytest

from spectrumkv.common.model.directory import find_model
from tests.clients.conftest import PROGRAMS, Run, Served

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "lm-eval.json"
MODEL = "SmolLM2-135M-Instruct"
# The precision of the KV, and the least share of the answers that must be right over it.
SETTINGS = {
    "fp16": ({"policy": "fp16", "budget": 1.0}, 0.8),
    "0.3": ({"budget": 0.3}, 0.8),
    "0.1": ({"budget": 0.1}, 0.0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_lm_eval_scores_a_generating_task(run: Run, served: Served, tmp_path: Path, name: str) -> None:
    kv, least = SETTINGS[name]
    for file in ("capitals.yaml", "capitals.jsonl"):
        shutil.copy(PROGRAMS / file, tmp_path)
    arguments = (
        f"model={MODEL},base_url={served.url}/v1/completions,num_concurrent=4,max_retries=1,"
        "tokenizer_backend=None,tokenized_requests=False"
    )
    run(
        *("lm_eval", "run", "--model", "local-completions", "--model_args", arguments),
        *("--tasks", "capitals", "--include_path", ".", "--output_path", "out.json"),
        *("--gen_kwargs", json.dumps({"kv": kv})),
    )
    (written,) = tmp_path.rglob("out*.json")
    score = json.loads(written.read_text())["results"]["capitals"]["exact_match,first_word"]
    assert score >= least
    if os.environ.get("WRITE_RESULTS"):
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | {name: {"kv": kv, "task": "capitals", "exact_match": score}}, indent=1))


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
