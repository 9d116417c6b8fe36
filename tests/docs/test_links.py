"""What the documents name exists: links with their anchors, files, and functions in files."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.documents import DOCUMENTS, ROOT, name_of

# What a reader writes and this repository does not have.
READERS_OWN = {"docker/compose.local-model.yaml", "docker/compose.decode-2.yaml"}
# Nobody commits these, so that their contents are no part of the project.
GENERATED = {"build"}
FILE_ENDINGS = ("py", "md", "proto", "yaml", "yml", "toml", "json", "txt", "png")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")
DOCUMENT_IN_CODE = re.compile(r"\bdocs/[\w/.-]+\.md\b")


def prose(document: Path) -> str:
    """Return a document without its blocks of code, whose paths are the reader's."""
    return CODE_BLOCK.sub("", document.read_text())


@cache
def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    texts = (LINK.sub(lambda link: link[0][1:].split("]")[0], heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def problem_of_link(document: Path, target: str) -> str | None:
    """Return what is wrong with a relative link, if anything is."""
    path, _, anchor = target.partition("#")
    found = (document.parent / path).resolve() if path else document
    if not found.exists():
        return f"{target}: there is no {path}"
    if anchor and anchor not in anchors(found):
        return f"{target}: {name_of(found)} has no heading {anchor}"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    targets = [target for target in LINK.findall(prose(document)) if "://" not in target]
    assert not [problem for target in targets if (problem := problem_of_link(document, target))]


@cache
def top_folders() -> set[str]:
    """Return the folders at the top of the project."""
    return {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."} - GENERATED


def is_path(quoted: str) -> bool:
    """Return whether a piece of code in a sentence means a file or folder of this project."""
    if not re.fullmatch(r"[\w*][\w./*-]*", quoted) or "/" not in quoted or quoted in READERS_OWN:
        return False
    first = quoted.split("/")[0]
    return first in top_folders() or (first not in GENERATED and quoted.rsplit(".", 1)[-1] in FILE_ENDINGS)


@cache
def names_in(path: Path) -> set[str]:
    """Return what a module defines: `function`, `Class`, `Class.method`, `CONSTANT`."""
    names = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    add(ast.parse(path.read_text()).body, "")
    return names


def problem_of_path(quoted: str) -> str | None:
    """Return what is wrong with a path, or with `path:name`, if anything is."""
    path, _, name = quoted.partition(":")
    if not is_path(path):
        return None
    if not list(ROOT.glob(path.rstrip("/"))):
        return f"there is no {path}"
    if name and name not in names_in(ROOT / path):
        return f"{path} does not define {name}"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_file_and_function_that_is_named_exists(document: Path) -> None:
    assert not [problem for quoted in QUOTED.findall(prose(document)) if (problem := problem_of_path(quoted))]


@cache
def folders_of_structure() -> tuple[str, ...]:
    """Return the folders that the tree in structure.md names."""
    tree = re.search(r"^## Folders\n+```\n(.*?)```", (ROOT / "docs" / "structure.md").read_text(), re.M | re.S)
    assert tree is not None
    parents: dict[int, Path] = {-2: ROOT}
    folders = []
    for line in tree[1].splitlines():
        # A line names a folder, or several with two spaces between, and then says what is in it.
        named = re.match(r"( *)((?:[\w/]+/(?: {2}(?=\w+/))?)+)", line)
        assert named is not None, line
        indent = len(named[1])
        found = [parents[indent - 2] / folder for folder in named[2].split()]
        parents[indent] = found[0]
        folders += map(name_of, found)
    return tuple(folders)


def test_every_folder_of_the_tree_in_structure_exists() -> None:
    assert not [folder for folder in folders_of_structure() if not (ROOT / folder).is_dir()]


def test_the_tree_in_structure_names_every_folder_with_code() -> None:
    # Tests mirror the other folders, and their own are said in a line.
    packages = {
        name_of(path.parent) for top in top_folders() - {"tests"} for path in (ROOT / top).rglob("__init__.py")
    }
    assert packages - set(folders_of_structure()) == set()


def test_every_document_that_code_names_exists() -> None:
    sources = [path for folder in top_folders() - {"docs"} for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in DOCUMENT_IN_CODE.findall(path.read_text())}
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
