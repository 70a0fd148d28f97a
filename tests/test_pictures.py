"""Screenshots in the documentation: there, small, and taken by a script that says what it needs."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_picture_of_a_page_is_there_and_small_and_every_one_is_used():
    used = {
        (page.parent / place).resolve()
        for page in PAGES
        for place in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", page.read_text())
    }
    assert used == set((ROOT / "docs" / "pictures").glob("*.png"))
    assert max(picture.stat().st_size for picture in used) < 300_000


def test_without_a_browser_the_script_says_what_to_install(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "BROWSER_BINARY"} | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/screenshots.py"), str(tmp_path)],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "apt install chromium" in done.stderr
