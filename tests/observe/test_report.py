"""The report: self-contained, complete, and safe against what a model wrote."""

import pytest

from dapo.errors import DataError
from dapo.observe.report import write_report
from dapo.observe.run_folder import RunFolder
from tests.observe import run_folder
from tests.observe.run_folder import STEPS


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder, _, journal = run_folder.make(tmp_path_factory.mktemp("report"))
    journal.append("ended", STEPS, status="finished", reason="done")
    return write_report(folder).read_text()


def test_shows_accuracy_before_and_after(page):
    assert "50.0 %" in page
    assert "75.0 %" in page
    assert "finished" in page


def test_has_a_curve_for_what_was_measured_and_none_for_what_was_not(page):
    for title in ("Accuracy", "Reward", "Entropy", "Groups by verdict", "Time of a step"):
        assert f"<h3>{title}</h3><svg" in page
    assert "<h3>Gradient norm</h3>" not in page


def test_needs_nothing_from_elsewhere(page):
    outside = [part for part in page.split('"') if part.startswith(("http://", "https://")) and "w3.org" not in part]
    allowed = ("http://purl.org", "http://creativecommons.org", "https://matplotlib.org")
    assert [link for link in outside if not link.startswith(allowed)] == []
    assert "<script" not in page  # of the page itself, and of what the model wrote


def test_a_run_that_has_just_begun_has_a_report_too(tmp_path):
    folder, _, _ = run_folder.make(tmp_path)
    folder.journal.write_text(folder.journal.read_text().splitlines(keepends=True)[0])
    assert "running" in write_report(folder).read_text()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        write_report(RunFolder(tmp_path))
