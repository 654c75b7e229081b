"""Compare constraints.txt with the known advisories, through pip-audit: PyPI's, else OSV's.

    python .ci/audit.py [SERVICE ...]

Exit codes: 0 no known advisory, 1 advisories found, 3 not checked: no service can be asked, or it does not know some
packages. A service is trusted only if it names an advisory for a release that is known to have some: a mirror of the
package index may answer and know of none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
SERVICES = ("pypi", "osv")
KNOWN_BAD = "jinja2==2.4"  # CVE-2014-0012, CVE-2016-10745 and later ones


def main(services: list[str]) -> int:
    """Audit, print the findings, and return the exit code."""
    reasons = []
    for service in services or SERVICES:
        known, reason = _audit(service, KNOWN_BAD)
        if not any(package.get("vulns") for package in known):
            reasons.append(f"{service}: {reason or 'it answers, but knows no advisory of ' + KNOWN_BAD}")
            continue
        packages, reason = _audit(service, CONSTRAINTS.read_text())
        if not packages:
            reasons.append(f"{service}: {reason}")
            continue
        return _report(service, packages)
    print("audit: not checked, no advisory service could be asked from here", *reasons, sep="\n  ", file=sys.stderr)
    print("  needed https to PyPI or OSV themselves; run make audit where one of them is reachable", file=sys.stderr)
    return 3


def _report(service: str, packages: list[dict[str, Any]]) -> int:
    found = [(package, advisory) for package in packages for advisory in package.get("vulns", [])]
    for package, advisory in found:
        fixed = ", ".join(advisory["fix_versions"]) or "no release yet"
        print(f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    checked = len(packages) - len(skipped)
    print(f"audit: {checked} packages of {CONSTRAINTS.name} by {service}: {len(found) or 'no'} advisories")
    if found:
        return 1
    if skipped:
        print(f"audit: not checked, unknown to {service}: {', '.join(skipped)}", file=sys.stderr)
        return 3
    return 0


def _audit(service: str, requirements: str) -> tuple[list[dict[str, Any]], str]:
    """Return what pip-audit reports for each package, or an empty list and the reason."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements + "\n")
        file.flush()
        options = ["-s", service, "--disable-pip", "--no-deps", "--progress-spinner", "off", "-f", "json"]
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *options, "-r", file.name], capture_output=True, text=True, check=False
        )
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (ValueError, KeyError):
        lines = [line for line in done.stderr.splitlines() if line.strip() and "--no-deps" not in line]
        return [], lines[-1][:300] if lines else f"pip-audit ended with {done.returncode} and said nothing"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
