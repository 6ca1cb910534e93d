"""The documentation agrees with the program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_command_reference_is_up_to_date(tmp_path: Path) -> None:
    """docs/cli.md is what typer makes of the program's help; CONTRIBUTING.md says how to make it again."""
    target = tmp_path / "cli.md"
    command = [sys.executable, "-m", "typer", "boft_export.cli.main", "utils", "docs", "--name", "boft-export"]
    subprocess.run(
        [*command, "--output", str(target)], check=True, capture_output=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert target.read_text() == (ROOT / "docs" / "cli.md").read_text()


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_finding_of_a_validation_is_documented() -> None:
    """Policies allow findings by name, so people must be able to look them up."""
    page = (ROOT / "docs" / "validation.md").read_text()
    code = "".join(p.read_text() for p in (ROOT / "boft_export" / "validation").glob("*.py"))
    names = set(re.findall(r'"([a-z]+(?:-[a-z]+)+)"', code))
    assert len(names) > 40
    # What never leaves the diagnosis: it becomes inconclusive.
    assert {n for n in names if f"`{n}`" not in page} == {"lost-effect"}


def test_changelog_has_this_version_or_what_comes() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
