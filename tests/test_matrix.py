"""`make matrix`: what it reads, writes and fails for."""

import json

import pytest

from bench import matrix

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two"><skipped message="no"/></testcase>
<testcase classname="tests.test_a" name="test_three"><failure message="no">x</failure></testcase>
<testcase classname="tests.test_a" name="test_four"><error message="no">x</error></testcase>
</testsuite></testsuites>"""
GOOD = {"passed": 3, "skipped": 1, "failed": [], "seconds": 2}
BAD = {"passed": 3, "skipped": 0, "failed": ["tests.test_a::test_three"], "seconds": 2}


def result(**groups):
    return {
        "date": "2026-01-01",
        "why": "the reason",
        "versions": {"Python": "3.11.7", "torch": "2.6.0", "transformers": "4.56.2"},
        "groups": groups,
    }


def test_a_report_is_read_whole():
    found = matrix.read(REPORT)
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert found["failed"] == ["tests.test_a::test_four", "tests.test_a::test_three"]


def test_a_failure_and_an_environment_that_cannot_be_built_are_not_good():
    assert matrix.is_good(result(call=GOOD))
    assert not matrix.is_good(result(call=GOOD, verify=BAD))
    assert not matrix.is_good({**result(), "error": "no such version"})


def test_the_page_names_versions_dates_and_failures():
    bad = result(verify=BAD) | {"error": "no such version"}
    page = matrix.markdown(
        {"machine": "Linux", "columns": {"oldest": result(call=GOOD), "newest": bad}}
    )
    for text in ("2026-01-01", "4.56.2", "3 passed, 1 skipped, 2 s", "**1 failed**"):
        assert text in page
    assert "newest could not be installed: no such version" in page
    assert "- newest, failed: `tests.test_a::test_three`" in page


@pytest.mark.parametrize(("group", "code"), [(GOOD, 0), (BAD, 1)])
def test_a_failure_is_the_exit_status_and_other_columns_stay(group, code, monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "page.md")
    kept = {"machine": "Linux", "columns": {"oldest": result(call=BAD)}}
    matrix.RESULTS.write_text(json.dumps(kept))
    monkeypatch.setattr(matrix, "measure", lambda *_: result(call=group))
    words = ["--folder", str(tmp_path), "--pinned", str(tmp_path), "--only", "newest"]
    assert matrix.main([*words, "--check"]) == code
    assert not matrix.PAGE.exists()
    assert matrix.main(words) == code
    written = json.loads(matrix.RESULTS.read_text())["columns"]
    assert written == {"oldest": result(call=BAD), "newest": result(call=group)}


def test_a_group_in_which_no_test_runs_fails(tmp_path):
    import sys
    from pathlib import Path

    group = matrix.Group("nothing", ("tests/test_matrix.py", "-k", "no_such_test_anywhere"))
    assert matrix.test(group, Path(sys.executable), [])["failed"]


def test_every_file_of_the_set_is_there():
    files = [word for group in matrix.GROUPS.values() for word in group.tests]
    assert all((matrix.ROOT / word).exists() for word in files if word.startswith("tests/"))
    named = {name for column in matrix.columns().values() for name in column.groups}
    assert named == set(matrix.GROUPS)


def test_the_page_is_what_was_measured():
    results = json.loads(matrix.RESULTS.read_text())
    assert matrix.PAGE.read_text() == matrix.markdown(results)
    assert all(map(matrix.is_good, results["columns"].values()))
