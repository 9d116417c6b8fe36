import pytest

from spectrumkv.client.cli.output import check_writable
from spectrumkv.common.errors import InvalidArgumentError


def test_what_can_be_written_is_neither_created_nor_cut_short(tmp_path, monkeypatch):
    earlier, new, link = tmp_path / "earlier.json", tmp_path / "new.json", tmp_path / "link.json"
    earlier.write_text("earlier")
    link.symlink_to(new)
    monkeypatch.chdir(tmp_path)
    for destination in (None, "-", "new.json", str(new), str(earlier), str(link), "/dev/stdout"):
        check_writable("--json", destination)
    assert earlier.read_text() == "earlier"
    assert not new.exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "--json '': the name is empty"),
        (".", "it is a folder"),
        ("missing/new.json", "its folder does not exist"),
        ("astray.json", "its folder does not exist"),
        ("earlier.json/new.json", "Not a directory"),
        ("loop.json", "Too many levels of symbolic links"),
        ("n" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_named_with_the_reason(name, problem, tmp_path, monkeypatch):
    (tmp_path / "earlier.json").touch()
    (tmp_path / "astray.json").symlink_to(tmp_path / "missing" / "new.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgumentError) as caught:
        check_writable("--json", name)
    assert caught.value.message.startswith("--json ")
    assert f"{problem}; name a file that can be written" in caught.value.message


@pytest.mark.parametrize("exists", [True, False], ids=["a file", "a folder"])
def test_what_this_user_may_not_write(exists, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    if exists:
        path.touch()
    # Root may write everything, whatever the modes say.
    monkeypatch.setattr("os.access", lambda place, mode: place != (path if exists else tmp_path))
    with pytest.raises(InvalidArgumentError, match=r"--plot .*result\.json: it may not be written; name"):
        check_writable("--plot", str(path))
