"""Only regular files are read where a service starts; a pipe that nobody writes to holds nothing up."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.files import MOST_TEXT_BYTES, check_regular, open_regular, read_bytes, read_text
from spectrumkv.common.model.cache import read_entry
from spectrumkv.common.model.files.configuration import read_object
from spectrumkv.common.model.files.directory import find_model
from spectrumkv.common.security import TlsFiles
from spectrumkv.common.security.token_file import read_tokens
from spectrumkv.common.service.command_line import load
from spectrumkv.common.service.config import DecodeConfig
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.timeout(20)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    # A path of pytest's may be longer than a socket's name.
    os.chdir(path.parent)
    listener.bind(path.name)
    listener.close()


def a_link_to_a_pipe(path: Path) -> None:
    a_pipe(path.with_name("behind"))
    path.symlink_to("behind")


def an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = {a_pipe: "named pipe", a_socket: "", a_link_to_a_pipe: "named pipe", an_endless_device: "device"}


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def odd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that is no file's."""
    monkeypatch.chdir(tmp_path)
    request.param(tmp_path / "odd")
    return tmp_path / "odd"


READERS: dict[str, Callable[[Path], object]] = {
    "--config": lambda path: load(DecodeConfig, ["--config", str(path)], "server"),
    "--token-file": lambda path: read_tokens("--token-file", path),
    "--tls-ca": lambda path: TlsFiles(ca=path).watch(),
    "--tls-cert": lambda path: TlsFiles(cert=path, key=path).watch(),
}


@pytest.mark.parametrize("option", READERS)
def test_an_option_that_names_no_file_is_refused(option: str, odd: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{option} {odd} cannot be read: .") as caught:
        READERS[option](odd)
    if not odd.is_socket():
        assert "and not a regular file" in caught.value.message


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
def test_a_model_with_something_else_among_its_files_is_refused(name: str, odd: Path) -> None:
    model = odd.with_name("model")
    model.mkdir()
    for file in tiny_model("llama").iterdir():
        (model / file.name).symlink_to(file)
    (model / name).unlink(missing_ok=True)
    odd.rename(model / name)
    with pytest.raises(FailedPreconditionError, match=name.replace(".", r"\.")):
        find_model(str(model))


def test_a_template_beside_the_first_one_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    a_pipe(tmp_path / "additional_chat_templates" / "tool.jinja")
    with pytest.raises(FailedPreconditionError, match="it is a named pipe, and not a regular file"):
        find_model(str(tmp_path))


def test_a_part_of_a_model_and_an_entry_of_the_cache_are_files(odd: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FailedPreconditionError, match=odd.name):
        read_object(odd)
    assert read_entry(odd, "the number", int) is None
    assert f"cannot use the number kept in {odd}" in caplog.text


def test_files_and_links_to_files_are_read(tmp_path: Path) -> None:
    # As Kubernetes mounts a secret.
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "token").write_bytes("grün\r\n".encode())
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "token").symlink_to("..data/token")
    assert read_text(tmp_path / "token") == "grün\n"
    with open_regular(tmp_path / "token") as file:
        assert file.read() == "grün\r\n".encode()
    check_regular(tmp_path / "token")
    check_regular(tmp_path)
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "gone")


def test_a_vast_file_is_refused_before_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vast = tmp_path / "config.json"
    with vast.open("wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(OSError, match=f"it has {40 << 30} bytes, more than {MOST_TEXT_BYTES}"):
        read_text(vast)
    with pytest.raises(FailedPreconditionError, match=r"config\.json"):
        read_object(vast)
    assert read_entry(vast, "the number", int) is None
    assert f"cannot use the number kept in {vast}" in caplog.text


def test_a_file_may_have_as_many_bytes_as_it_should(tmp_path: Path) -> None:
    (tmp_path / "whole").write_bytes(b"12345")
    assert read_bytes(tmp_path / "whole", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, more than 4"):
        read_bytes(tmp_path / "whole", 4)
    # It has no size, and contents all the same.
    with pytest.raises(OSError, match="bytes, more than 4"):
        read_bytes(Path("/proc/self/status"), 4)


def test_what_was_opened_in_vain_is_closed(tmp_path: Path) -> None:
    a_pipe(tmp_path / "pipe")
    before = os.listdir("/dev/fd")
    with pytest.raises(OSError, match="named pipe"):
        open_regular(tmp_path / "pipe")
    assert os.listdir("/dev/fd") == before
