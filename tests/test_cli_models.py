"""`attnvariants models` and `attnvariants patch-check`: tables, exit codes, and bad input."""

import json

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from test_cli import error_of, run  # noqa: E402

from attnvariants.hf import masks  # noqa: E402
from attnvariants.hf.architectures import tiny  # noqa: E402
from attnvariants.hf.names import registered_masks  # noqa: E402

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}


def bare(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def test_models_writes_what_it_prints(tmp_path):
    json_path, markdown = tmp_path / "models.json", tmp_path / "models.md"
    # no test hangs on how fast a machine is
    types = "models", "llama", "wavlm", "resnet", "--timeout", "900", "--json", json_path
    result = run(*types, "--markdown", markdown)
    words = "3 model types: 1 identical, 1 refused, 1 no attention."
    assert words in result.stdout
    rows = {row["model_type"]: row for row in json.loads(json_path.read_text())["rows"]}
    assert rows["llama"]["verdict"] == "identical"
    assert rows["wavlm"]["verdict"] == "refused"
    lines = markdown.read_text().splitlines()
    assert sum(line.startswith("| `") for line in lines) == 3
    assert any(f"transformers {transformers.__version__}, torch" in line for line in lines)
    before = json_path.read_text()
    assert words in run(*types, "--resume").stdout
    assert json_path.read_text() == before


def test_models_of_bad_input(tmp_path):
    assert "did you mean 'llama'" in error_of("models", "lama")
    assert "pass --json too" in error_of("models", "llama", "--resume")
    assert "there is no folder" in error_of("models", "llama", "--json", tmp_path / "no" / "x")
    (tmp_path / "x.json").write_text("[]")
    message = error_of("models", "llama", "--json", tmp_path / "x.json", "--resume")
    assert "holds no results of a sweep: it is JSON, but not" in message
    assert "did you mean 'llama'" in error_of("models", "lama", "--json", tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == "[]"


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_bare_config(tmp_path, where):
    path = bare(tmp_path)
    output = run("patch-check", path if where == "folder" else path / "config.json").stdout
    assert "LlamaForCausalLM (random weights) with softmax: all tests passed" in output
    for name in ("future leak", "left padding", "identity to eager attention", "restore"):
        line = next(line for line in output.splitlines() if line.startswith(name))
        assert " passed " in line, output


def test_a_large_config_is_shrunk_and_says_so(tmp_path):
    path = bare(tmp_path, hidden_size=4096, vocab_size=128256, num_hidden_layers=80)
    assert "shrunk to toy sizes" in run("patch-check", path).stdout


def test_a_saved_model_with_several_variants(tmp_path):
    torch.manual_seed(0)
    config = tiny.tiny_config(transformers.MistralConfig)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    arguments = ("--variant", "relu", "--variant", "ssmax", "--masks", "bool")
    output = run("patch-check", tmp_path, *arguments).stdout
    assert "with relu: all tests passed" in output
    assert "with ssmax: all tests passed" in output
    text = run("patch-check", tmp_path, "--variant", "relu", "--option", "length=kv", code=1).stdout
    assert "FAILED" in text
    assert "counts hidden keys" in " ".join(text.split())


def test_exit_codes(tmp_path, monkeypatch):
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps(bloom))
    assert "computes attention itself" in " ".join(
        run("patch-check", tmp_path, code=1).stdout.split()
    )
    assert "all tests passed" in run("patch-check", tmp_path, "--backend", "softmax-hook").stdout
    registry = registered_masks()
    for key in masks.KEYS:
        monkeypatch.setitem(registry, key, lambda *args, **kwargs: None)
    assert "FAILED" in run("patch-check", bare(tmp_path), code=1).stdout


def test_patch_check_of_bad_input(tmp_path):
    assert "there is no" in error_of("patch-check", tmp_path / "nothing")
    assert "holds no config.json" in error_of("patch-check", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as a config" in error_of("patch-check", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    assert "cannot be read as a config" in error_of("patch-check", tmp_path)
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert "cannot be read as a config" in error_of("patch-check", tmp_path)
    bare(tmp_path)
    assert "unknown variant" in error_of("patch-check", tmp_path, "--variant", "softpik")
    for option in ("x", "variant=relu", "impl=triton"):
        assert "NAME=VALUE" in error_of("patch-check", tmp_path, "--option", option)
    assert "no preset" in error_of("patch-check", tmp_path, "--preset", "retrofit")
    assert "masks must be" in error_of("patch-check", tmp_path, "--masks", "x")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "is pickled" in error_of("patch-check", tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    bare(tmp_path, num_attention_heads=5)
    assert "cannot be" in error_of("patch-check", tmp_path)
    bare(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 40)
    assert "error: " in error_of("patch-check", tmp_path)
