import io
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from attnvariants.demo import experiment, run_demo
from attnvariants.demo.findings import findings_of
from attnvariants.demo.measure import METRICS, weight_metrics
from attnvariants.demo.models import RetrievalRecipe, SinkRecipe
from attnvariants.demo.runner import Run, run_all
from attnvariants.demo.tasks import bigram_backcopy, retrieval_batch

TINY_SINKS = SinkRecipe(steps=6, batch=4, length=12, width=16, held_out=16, checks=3)
TINY_RETRIEVAL = RetrievalRecipe(
    steps=4, batch=4, train_pairs=8, queries=4, width=16, n_keys=64, contexts=4, factors=(1, 4)
)


def test_backcopy_follows_its_rules():
    data = bigram_backcopy(400, 24, vocab=10, triggers=2, seed=3)
    tokens, copied = data.tokens, data.copied
    assert tokens.shape == copied.shape == data.nats.shape == (400, 25)
    assert data.triggers.sum() == 2
    assert (tokens[:, 0] == 10).all()
    assert tokens[:, 1:].max() < 10
    assert not data.triggers[tokens[:, 1]].any()

    after_trigger = data.triggers[tokens[:, 1:-1]]
    assert torch.equal(copied[:, 2:], after_trigger)
    assert torch.equal(tokens[:, 2:][after_trigger], tokens[:, :-2][after_trigger])
    assert not copied[:, :2].any()


def test_backcopy_draws_from_its_bigrams():
    data = bigram_backcopy(4000, 32, vocab=6, triggers=1, seed=0)
    counts = torch.zeros(6, 6, dtype=torch.float64)
    drawn = ~data.copied[:, 2:]
    pairs = data.tokens[:, 1:-1][drawn], data.tokens[:, 2:][drawn]
    counts.index_put_(pairs, torch.ones(len(pairs[0]), dtype=torch.float64), accumulate=True)
    seen = counts.sum(1) > 0
    assert torch.equal(~seen, data.triggers)
    shares = counts[seen] / counts[seen].sum(1, keepdim=True)
    torch.testing.assert_close(shares, data.bigrams[seen], atol=0.02, rtol=0)
    torch.testing.assert_close(
        data.nats[:, 2:][drawn], -data.bigrams[pairs].log(), atol=1e-12, rtol=0
    )
    assert (data.nats[data.copied] == 0).all()


def test_backcopy_is_a_function_of_the_seed():
    first, again = bigram_backcopy(8, 16, seed=5), bigram_backcopy(8, 16, seed=5)
    other = bigram_backcopy(8, 16, seed=6)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.bigrams, other.bigrams)


def test_retrieval_has_one_answer():
    generator = torch.Generator().manual_seed(0)
    data = retrieval_batch(5, 40, queries=6, n_keys=64, n_values=7, generator=generator)
    assert data.keys.shape == data.values.shape == (5, 46)
    for row in range(5):
        assert max(Counter(data.keys[row, :40].tolist()).values()) == 1
    asked = data.keys[:, 40:]
    assert (data.values[:, 40:] == 7).all()
    hits = asked[:, :, None] == data.keys[:, None, :40]
    assert (hits.sum(-1) == 1).all()
    assert torch.equal(hits.long().argmax(-1), data.places)
    assert torch.equal(data.values[:, :40].gather(1, data.places), data.answers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bigram_backcopy(0, 8), "at least 1 sequence"),
        (lambda: bigram_backcopy(4, 8, vocab=3, triggers=3), "triggers must lie"),
        (lambda: retrieval_batch(1, 4, generator=torch.Generator()), "pairs must lie"),
        (lambda: run_demo(seeds=()), "one or more whole numbers"),
        (lambda: run_demo(seeds=(-1,)), "one or more whole numbers"),
        (lambda: run_demo(jobs=0), "jobs must be"),
        (lambda: run_demo(variants=["softpik"]), "did you mean 'softpick'"),
        (lambda: run_demo(variants="softmax"), "several names"),
        (lambda: run_demo(variants=()), "at least one name"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder"):
        run_demo(out=tmp_path / "file")


def test_weight_metrics_by_hand():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])[None, None]
    metrics = weight_metrics(weights)
    assert metrics["sink_rate"] == 1.0
    assert metrics["sink_rate_without_query_0"] == 0.0
    assert metrics["sink_share"] == 0.5
    assert metrics["row_mass"] == pytest.approx(2 / 3)
    assert metrics["sparsity"] == pytest.approx(3 / 6)
    assert metrics["entropy"] == pytest.approx(math.log(2) / 2)


def test_importing_the_demo_is_light():
    code = (
        "import attnvariants.demo, sys; "
        "sys.exit(bool({'transformers', 'rich', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    console = pytest.importorskip("rich.console")
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    screen = console.Console(record=True, width=100, file=io.StringIO())
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experiment, "RECIPES", (TINY_SINKS, TINY_RETRIEVAL))
        report = run_demo(
            seeds=(4, 1), variants=("softmax", "softpick"), out=out, jobs=1, console=screen
        )
    assert torch.equal(before, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    return report, out, screen.export_text()


def test_report_is_the_json_file(demo):
    report, out, _ = demo
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_report_schema(demo):
    report, _, _ = demo
    assert report["schema"] == 1
    assert set(report["versions"]) == {"attnvariants", "python", "torch", "transformers"}
    assert report["machine"]["jobs"] == report["machine"]["threads_per_job"] == 1
    assert report["seeds"] == [4, 1]
    assert report["seconds"] > 0

    assert list(report["sinks"]["variants"]) == ["softmax", "softpick"]
    for variant in report["sinks"]["variants"].values():
        assert [run["seed"] for run in variant["runs"]] == [4, 1]
        assert set(variant["mean"]) == set(variant["spread"]) == set(METRICS)
        for run in variant["runs"]:
            assert set(run["metrics"]) == set(METRICS)
            assert run["history"]["step"] == [0, 2, 4, 6]
            assert len(run["history"]["sink_rate"]) == 4
            assert run["core_seconds"] > 0
            assert run["seconds"] > 0
    mass = report["sinks"]["variants"]["softmax"]["mean"]["row_mass"]
    assert mass == pytest.approx(1.0, abs=1e-5)

    assert report["retrieval"]["pairs"] == [8, 32]
    ways = report["retrieval"]["ways"]
    assert list(ways) == ["softmax", "ssmax_swapped_in", "ssmax"]
    for way in ways.values():
        assert len(way["mean"]["accuracy"]) == len(way["spread"]["needle_weight"]) == 2
        assert all(0 <= a <= 1 for run in way["runs"] for a in run["accuracy"])
    # The same weights with the preset for this length, untrained.
    expected = 8 / math.lgamma(9)
    for run in ways["ssmax_swapped_in"]["runs"]:
        assert run["learned"]["s"] == [pytest.approx(expected, rel=1e-5)]
    assert ways["ssmax_swapped_in"]["trained_with"] == "softmax"


def test_screen_says_what_was_measured(demo):
    report, _, text = demo
    flat = " ".join(text.split())
    for sentence in report["findings"]:
        assert sentence in flat
    for heading in ("sink rate", "row mass", "exact zeros", "softpick", "untrained"):
        assert heading in flat


def test_findings_come_from_the_numbers(demo):
    report = json.loads(json.dumps(demo[0]))
    variants = report["sinks"]["variants"]
    for name, rate in (("softmax", 0.91), ("softpick", 0.02)):
        for run in variants[name]["runs"]:
            run["metrics"] |= {"sink_rate": rate, "copy_accuracy": 0.99}
    text = " ".join(findings_of(report))
    assert "A sink on token 0 in every seed, sink rate at least 0.5: softmax (0.91)." in text
    assert "No sink in any seed, sink rate at most 0.05: softpick (0.02)." in text
    assert "Every model learned to copy (copy accuracy at least 0.99)" in text
    variants["softpick"]["runs"][0]["metrics"]["sink_rate"] = 0.8
    text = " ".join(findings_of(report))
    assert "different from seed to seed: softpick (0.02 to 0.80)." in text
    variants["softpick"]["runs"][0]["metrics"]["copy_accuracy"] = 0.3
    assert "stayed below 0.95 in some seed for softpick (0.30 to 0.99)" in " ".join(
        findings_of(report)
    )


def test_workers_give_what_one_process_gives():
    pytest.importorskip("transformers")
    runs = [Run("softmax", 0, TINY_SINKS), Run("softmax", 0, TINY_RETRIEVAL, ("ssmax",))]
    heard = []
    alone = run_all(runs, 1, lambda index, news: heard.append(index))
    assert set(heard) == {0, 1}
    shared = run_all(runs, 2, lambda index, news: None)
    assert shared[0]["metrics"] == alone[0]["metrics"]
    assert shared[1]["tests"] == alone[1]["tests"]


def test_a_failing_worker_run_is_a_value_error():
    wrong = Run("softmax", 0, SinkRecipe(length=1))
    with pytest.raises(ValueError, match="at least 1 sequence of length 2"):
        run_all([wrong, wrong], 2, lambda index, news: None)
    assert not multiprocessing.active_children()


class Fragile(Run):
    def execute(self, progress=None):
        if multiprocessing.parent_process() is not None:
            os._exit(3)
        return {"here": self.seed}


def test_where_workers_die_the_runs_are_done_here():
    runs = [Fragile("softmax", seed, TINY_SINKS) for seed in range(3)]
    assert run_all(runs, 2, lambda index, news: None) == [{"here": seed} for seed in range(3)]
