"""Finds the packages in the folders and generates the gRPC code whenever the project is built or installed.

The folders at the top are imported under one name, `spectrumkv`: a bare `kernels` would shadow Hugging Face's package
of that name, which transformers imports, and a bare `proto` would shadow proto-plus. This file is the one place that
knows the mapping: every folder with an `__init__.py` is a package, and `python setup.py source_tree` lays the same
mapping out as links for tools that read folders (mypy, import-linter).
"""

from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROTO_ROOT = Path("proto")
SOURCE_TREE = Path("build/source_tree/spectrumkv")
# Folders with code that is no part of the package.
NOT_PACKAGED = {"tests", "build", "docs", "docker", "proto"}


def top_level_folders() -> dict[str, Path]:
    """Return the folder behind each name below `spectrumkv`, relative to the root."""
    found = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    folders = {name: Path(name) for name in found if name not in NOT_PACKAGED}
    return folders | {"v1": PROTO_ROOT / "spectrumkv" / "v1"}


def package_directories() -> dict[str, str]:
    """Return the folder of every package, by the name that it is imported under."""
    directories = {}
    for name, folder in top_level_folders().items():
        directories[f"spectrumkv.{name}"] = str(folder)
        for inner in find_packages(str(ROOT / folder)):
            directories[f"spectrumkv.{name}.{inner}"] = str(folder / inner.replace(".", "/"))
    return directories


def generate_grpc_code() -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` beside every .proto file.

    Raises:
        SystemExit: protoc refused a file.
    """
    import grpc_tools
    from grpc_tools import protoc

    well_known_types = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(path) for path in PROTO_ROOT.rglob("*.proto"))
    outputs = [f"--{kind}_out={PROTO_ROOT}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"-I{PROTO_ROOT}", f"-I{well_known_types}", *outputs, *sources])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status} on {', '.join(sources)}")


class BuildWithGrpcCode(build_py):
    """`build_py`, preceded by code generation."""

    def run(self) -> None:
        """Generate, then copy as usual."""
        generate_grpc_code()
        super().run()


class SourceTree(Command):
    """Lay out the packages as links below `build/source_tree`."""

    description = "link the top-level folders below build/source_tree/spectrumkv, for tools that read folders"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """There are no options."""

    def finalize_options(self) -> None:
        """There are no options."""

    def run(self) -> None:
        """Make each link that is not there yet."""
        SOURCE_TREE.mkdir(parents=True, exist_ok=True)
        for name, folder in top_level_folders().items():
            link = SOURCE_TREE / name
            if not link.is_symlink():
                link.symlink_to((ROOT / folder).resolve(), target_is_directory=True)


packages = package_directories()
setup(
    packages=sorted(packages),
    package_dir=packages,
    cmdclass={"build_py": BuildWithGrpcCode, "source_tree": SourceTree},
)
