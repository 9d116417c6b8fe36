"""Looks the locked dependencies up among known vulnerabilities, with pip-audit: `make audit` runs it.

pip-audit says of a package that its database does not answer for "could not be audited" and ends with status 0. A run
that audited nothing must not pass for a clean one, so this says which it was.
"""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = ("locked.txt", "triton.txt", "torch-cuda.txt")


def main() -> int:
    """Return 1 where a vulnerability is known, 0 where none is or nothing could be asked; print which it was."""
    requirements = [argument for name in FILES for argument in ("-r", str(FOLDER / name))]
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "-f", "json", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        print(f"skipped: pip-audit could not ask its database: {done.stderr.strip().splitlines()[-1:]}")
        return 0
    packages = json.loads(done.stdout)["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    vulnerable = [package for package in audited if package["vulns"]]
    for package in vulnerable:
        names = ", ".join(found["id"] for found in package["vulns"])
        print(f"{package['name']} {package['version']}: {names}")
    if not audited:
        print(f"skipped: the vulnerability database answered for none of {len(packages)} packages")
        return 0
    print(f"{len(audited)} of {len(packages)} packages looked up, {len(vulnerable)} with known vulnerabilities")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
