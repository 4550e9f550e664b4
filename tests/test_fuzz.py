"""The fuzz finds nothing in a few hundred calls, and finds what is planted."""

import json

import pytest
import torch
from engines import ENGINES, torch_engines

from attnvariants import chunked
from attnvariants.geometry import Geometry
from attnvariants.testing import fuzz
from attnvariants.testing.__main__ import main
from attnvariants.testing.cases import DEFAULTS, build, complete, draw, shorten

CASES = 20 if "triton" in ENGINES else 300


def found_by(cases, impl="chunked", seed=3):
    """What so many cases come to, or those up to the first that fails."""
    tally = fuzz.Tally()
    for index in range(cases):
        tally.add(fuzz.run(seed, index, index + 1, impl))
        if tally.findings:
            break
    return tally


def test_random_calls_are_as_good_as_the_reference():
    impl = "triton" if "triton" in ENGINES else "chunked"
    tally = found_by(CASES, impl)
    assert tally.findings == [], [str(each) for each in tally.findings]
    assert tally.cases + tally.refused.total() == CASES
    assert tally.cases > CASES // 2


@torch_engines
def test_random_calls_of_sdpa_are_as_good_as_the_reference():
    assert found_by(60, "sdpa").findings == []


@torch_engines
def test_a_wrong_sign_is_found(monkeypatch):
    right = chunked.gradients

    def wrong(*args):
        dq, dk, *others = right(*args)
        return [dq, None if dk is None else -dk, *others]

    monkeypatch.setattr(chunked, "gradients", wrong)
    (finding, *_) = found_by(50).findings
    assert any("key is off" in fault for fault in finding.faults)


@torch_engines
def test_a_window_without_its_left_end_is_found(monkeypatch):
    right = Geometry.edges

    def wrong(self, rows, cols):
        return right(Geometry(self.q_len, self.kv_len, self.offset, None, self.right), rows, cols)

    monkeypatch.setattr(Geometry, "edges", wrong)
    (finding, *_) = found_by(200).findings
    # shrunk to what it takes
    assert complete(finding.case)["window"] is not None
    assert complete(finding.case)["mask"] is None


@torch_engines
def test_one_key_too_many_is_found(monkeypatch):
    right = chunked._Part.__init__

    def wrong(self, *args):
        right(self, *args)
        self.rows = self.rows._replace(visible=self.rows.visible + 1)

    monkeypatch.setattr(chunked._Part, "__init__", wrong)
    (finding, *_) = found_by(200).findings
    # those that read n
    assert complete(finding.case)["variant"] in ("relu", "lssar")


@torch_engines
def test_a_failure_is_shrunk_and_reproduced_by_its_line(monkeypatch, capsys):
    # of one feature alone: nothing else is left of the case
    right = chunked._Part.drop
    monkeypatch.setattr(chunked._Part, "drop", lambda self, x: right(self, x) * 1.01)
    (finding, *_) = found_by(20).findings
    assert len(finding.case) <= 3
    line = str(finding)
    assert line.startswith("--only '{")
    case = line[len("--only '") : line.index("'  #")]
    assert main(["fuzz", "--only", case]) == 1
    assert "off by" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["fuzz", "--only", case]) == 0


@torch_engines
def test_an_error_in_an_engine_is_a_failure(monkeypatch):
    def broken(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(chunked, "forward", broken)
    (finding, *_) = found_by(10).findings
    assert "RuntimeError: planted" in finding.faults[0]


def test_the_same_seed_draws_the_same_calls():
    for index in range(20):
        case = draw(5, index)
        assert case == draw(5, index)
        assert json.loads(json.dumps(case)) == case
        assert shorten(complete(case)) == case
        one, other = build(case), build(case)
        assert all(torch.equal(one.leaves[name], other.leaves[name]) for name in one.leaves)
    assert draw(5, 0) != draw(6, 0)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"a case has the fields .*; got 'varian'"):
        complete({"varian": "softmax"})


@torch_engines
def test_coverage_is_written(tmp_path, capsys):
    assert main(["fuzz", "--cases", "30", "--seed", "4", "--out", str(tmp_path)]) == 0
    assert "30 calls of impl='chunked' judged" in capsys.readouterr().out
    summary = json.loads((tmp_path / "coverage.json").read_text())
    assert summary["cases"] == 30
    assert sum(row["cases"] for row in summary["covered"] if row["feature"] == "any") == 30
    assert "| any |" in (tmp_path / "coverage.md").read_text()
    assert set(DEFAULTS) >= {name for each in summary["failures"] for name in each["case"]}
