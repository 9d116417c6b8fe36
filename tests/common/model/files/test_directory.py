import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.files.directory import find_model, weight_files
from tests.tiny_models import tiny_model


@contextmanager
def hub_that_answers(status: int, code: str) -> Iterator[str]:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def empty_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_directory_is_called_by_its_last_part(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_model("llama")
    assert find_model(str(directory)) == (directory.name, directory)
    monkeypatch.chdir(directory)
    assert find_model(".") == (directory.name, Path())


@pytest.mark.parametrize("name", ["./missing", "/no/such/model", "~/no-such-model", "models/of/mine"])
def test_a_path_that_is_no_directory_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(FailedPreconditionError, match=f"{name}' is not a directory; name a directory with config"):
        find_model(name)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FailedPreconditionError, match=r"'model\.gguf' is not a directory"):
        find_model("model.gguf")


def test_an_incomplete_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match=r"has no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FailedPreconditionError, match=r"no model\.safetensors.*save_pretrained"):
        find_model(str(tmp_path))


def test_shards_are_found_and_other_weights_left_alone(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in [*reversed(names), "consolidated.safetensors", "adapter_model.safetensors"]:
        (tmp_path / name).touch()
    index = {"weight_map": {f"layer {i}": name for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(tmp_path)] == names


def test_what_the_index_names_is_read_and_nothing_else(tmp_path: Path) -> None:
    names = ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"]
    for name in [*names, "model-00001-of-00001.safetensors"]:
        (tmp_path / name).touch()
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(FailedPreconditionError, match=r"shards of the weights without model\.safe"):
        weight_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert [file.name for file in weight_files(tmp_path)] == names
    (tmp_path / names[1]).unlink()
    with pytest.raises(FailedPreconditionError, match=f"lacks {names[1]}, which model.safetensors.index.json names"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}',
     '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": []}}'],
)  # fmt: skip
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FailedPreconditionError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


def test_an_unreachable_hub_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_that_answers(200, "") as address:
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    with pytest.raises(FailedPreconditionError, match=r"hub cannot be reached .* name a local directory"):
        find_model("organization/model")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "RepoNotFound", "the hub has no model of that name; check the spelling"),
        (403, "GatedRepo", "is gated; accept its terms"),
    ],
)
def test_the_hubs_refusals_are_explained(
    status: int, code: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_that_answers(status, code) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(FailedPreconditionError, match=expected):
            find_model("organization/model")


def test_a_name_that_the_hub_does_not_allow_is_refused() -> None:
    with pytest.raises(FailedPreconditionError, match="cannot fetch model 'bad name!'"):
        find_model("bad name!")
