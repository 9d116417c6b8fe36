"""Generates the gRPC code from the .proto files whenever the package is built or installed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROTO_ROOT = Path("proto")


def generate_grpc_code() -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` beside every .proto file."""
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


setup(cmdclass={"build_py": BuildWithGrpcCode})
