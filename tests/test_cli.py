"""The command line: what it prints, what it writes, and one sentence for bad input."""

import json
import re
import subprocess
import sys

import pytest
import torch

typer_testing = pytest.importorskip("typer.testing")

from attnvariants import __version__, list_variants, register  # noqa: E402
from attnvariants.cli import app  # noqa: E402
from attnvariants.diagnostics import local  # noqa: E402
from attnvariants.registry import get_variant  # noqa: E402

WORDS = ("the", "of", "and", "a", "to", "in", "is", "that", "for", "it")


def run(*arguments, code=0):
    result = typer_testing.CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [str(argument) for argument in arguments]
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def error_of(*arguments):
    """The one sentence that bad input gives."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


def make_tokenizer(special=False):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<unk>", "<s>", "</s>", *WORDS]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_model(folder, kind="llama", vocab=13, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=2, **changes,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
            vocab_size=vocab, max_position_embeddings=64, pad_token_id=0,
        )  # fmt: skip
        model = transformers.BertModel(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("models") / "tiny")
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(WORDS) * 1 + " " + " ".join(WORDS[::-1] * 30), encoding="utf-8")
    return path


def test_list_names_every_variant():
    output = run("list").stdout
    for name in list_variants():
        assert name in output
        assert get_variant(name).arxiv in output


def test_markdown_is_one_table():
    lines = run("list", "--markdown").stdout.strip().split("\n")
    assert len(lines) == len(list_variants()) + 2
    assert {line.replace("\\|", "").count("|") for line in lines} == {7}
    assert any("`eps=1e-06`" in line and "abs/2504.20966" in line for line in lines)


@pytest.mark.parametrize("name", list_variants())
def test_show(name):
    output, variant = run("show", name).stdout, get_variant(name)
    assert variant.summary in output
    for line in variant.formula.split("\n"):
        assert line in output
    for option, description in variant.options.items():
        assert f"  {option}: {description.doc}" in output
    for feature, reason in variant.refuses.items():
        assert f"{feature}: {reason}" in output
    for preset in variant.presets:
        assert f"  {preset}: " in output
    assert f"https://arxiv.org/abs/{variant.arxiv}" in output


def test_show_a_variant_from_outside(monkeypatch):
    from dataclasses import replace

    from attnvariants import registry

    monkeypatch.setattr(registry, "_registered", {})
    register("mine", replace(get_variant("softmax"), doc="Mine.\n\n    w = 1\n"))
    assert "mine: Mine." in run("show", "mine").stdout
    assert "| `mine` | Mine |" in run("list", "--markdown").stdout


def test_version():
    assert run("--version").stdout.strip() == f"attnvariants {__version__}"


def test_list_imports_neither_transformers_nor_matplotlib():
    code = (
        "import sys; from typer.testing import CliRunner; from attnvariants.cli import app;"
        "print(CliRunner().invoke(app, ['list']).exit_code,"
        "[m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_module_entry():
    done = subprocess.run(
        [sys.executable, "-m", "attnvariants", "show", "softpik"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown variant 'softpik'; did you mean 'softpick'?")
    assert "Traceback" not in done.stderr


def test_diagnose(folder, text, tmp_path):
    report, picture = tmp_path / "report.json", tmp_path / "heads.png"
    output = run(
        "diagnose", folder, "--text", text, "--window", 16, "--windows", 5,
        "--json", report, "--plot", picture,
    ).stdout  # fmt: skip
    assert "tiny: 5 windows of 16 tokens" in output
    assert "sink_share: Sum of the |weights| on token 0" in re.sub(r"\s+", " ", output)
    record = json.loads(report.read_text())
    assert list(record) == ["as saved"]
    assert record["as saved"]["variants"] == ["softmax"]
    assert record["as saved"]["sequences"] == 5
    assert record["as saved"]["tokens"] == 80
    assert picture.stat().st_size > 10_000


def test_diagnose_compares_with_a_variant(folder, text, tmp_path):
    report, picture = tmp_path / "report.json", tmp_path / "heads.svg"
    output = run(
        "diagnose", folder, "--variant", "softpick", "--option", "eps=1e-3", "--text", text,
        "--json", report, "--plot", picture, "--no-definitions",
    ).stdout  # fmt: skip
    assert "Sum of the" not in output
    record = json.loads(report.read_text())
    assert list(record) == ["as saved", "softpick"]
    assert record["as saved"]["summary"]["row_mass"] == pytest.approx(1.0, abs=1e-5)
    assert record["softpick"]["summary"]["row_mass"] < 0.99
    assert record["softpick"]["summary"]["loss"] > 0
    assert (tmp_path / "heads_softpick.svg").exists()


def test_diagnose_with_a_preset(folder, text):
    output = run("diagnose", folder, "--variant", "ssmax", "--preset", "retrofit", "--text", text)
    assert "ssmax" in output.stdout


def test_diagnose_has_a_text_of_its_own(folder):
    assert "2 windows of 64 tokens" in run("diagnose", folder, "--windows", 2).stdout


def test_diagnose_an_encoder(tmp_path, text):
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ < "5":
        pytest.skip("transformers 4 computes BERT's attention itself, which patch refuses")
    save_model(tmp_path / "bert", "bert")
    make_tokenizer(special=True).save_pretrained(tmp_path / "bert")
    output = run("diagnose", tmp_path / "bert", "--text", text, "--window", 12).stdout
    assert "encoder.layer.*" in output
    assert "loss" not in output


def test_diagnose_a_bare_model_has_no_loss(tmp_path, text, folder):
    transformers = pytest.importorskip("transformers")
    transformers.LlamaModel.from_pretrained(folder).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    result = run("diagnose", tmp_path, "--text", text, "--no-definitions")
    assert "loss" not in result.stdout
    assert result.stderr == ""


def test_diagnose_warns_of_random_weights(tmp_path, text):
    safetensors = pytest.importorskip("safetensors.torch")
    make_tokenizer().save_pretrained(save_model(tmp_path))
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    safetensors.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stderr = run("diagnose", tmp_path, "--text", text, "--no-definitions").stderr
    assert "lacks 1 of the model's weights" in stderr
    assert "model.layers.1.self_attn.q_proj.weight" in stderr


def test_diagnose_a_model_saved_with_a_variant(tmp_path, text, folder):
    transformers = pytest.importorskip("transformers")
    from attnvariants import patch
    from attnvariants.diagnostics import diagnose

    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    patch(model, "ssmax", s=torch.tensor([0.0, 2.0, 8.0, 20.0]), layers=[0])
    patch(model, "softpick", eps=0.5, layers=[1])
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "report.json"
    run("diagnose", tmp_path, "--text", text, "--window", 16, "--json", path)
    record = json.loads(path.read_text())["as saved"]
    assert record["variants"] == ["ssmax", "softpick"]
    ids = local.text_windows(make_tokenizer(), text.read_text(), 16, 16)
    expected = diagnose(model, ids)
    assert record["summary"] == pytest.approx(expected.summary(), rel=1e-5)

    config = json.loads((tmp_path / "config.json").read_text())
    config["attn_variants"]["patches"][0] |= {"learned": [], "initial": {}}
    config["attn_variants"]["patches"][0]["variant"] = "softmax"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "learned values do not match its config" in error_of("diagnose", tmp_path)


def test_windows_hold_special_tokens_and_follow_the_text():
    ids = local.text_windows(make_tokenizer(special=True), " ".join(WORDS * 4), 8, 3)
    assert ids.shape == (3, 8)
    assert ids[:, 0].tolist() == [1] * 3
    assert ids[:, -1].tolist() == [2] * 3
    assert ids[:, 1:-1].flatten().tolist() == [3 + i % 10 for i in range(18)]
    plain = local.text_windows(make_tokenizer(), " ".join(WORDS * 2), 8, 9)
    assert plain.flatten().tolist() == [3 + i % 10 for i in range(16)]


def test_no_folder(tmp_path):
    assert "there is no folder" in error_of("diagnose", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_folder_is_a_file(text):
    assert "is a file" in error_of("diagnose", text)


def test_no_config(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert "holds no config.json" in error_of("diagnose", tmp_path)


def test_no_tokenizer(tmp_path):
    save_model(tmp_path)
    assert "holds no tokenizer" in error_of("diagnose", tmp_path)


def test_no_weights(tmp_path):
    make_tokenizer().save_pretrained(save_model(tmp_path))
    weights = tmp_path / "model.safetensors"
    torch.save({}, tmp_path / "pytorch_model.bin")
    content = weights.read_bytes()
    weights.unlink()
    assert "pickled ones are not loaded" in error_of("diagnose", tmp_path)
    weights.write_bytes(content[: len(content) // 2])
    assert "cannot be loaded" in error_of("diagnose", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"model_type": "no_such_model"}',
        "{}",
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "hidden_size": 17, "num_attention_heads": 2}',
    ],
)
def test_bad_config(tmp_path, content):
    make_tokenizer().save_pretrained(save_model(tmp_path))
    (tmp_path / "config.json").write_text(content)
    assert "cannot be loaded" in error_of("diagnose", tmp_path)


def test_code_in_the_folder_is_not_run(tmp_path):
    make_tokenizer().save_pretrained(save_model(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "cannot be loaded" in error_of("diagnose", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_short_text(folder, tmp_path):
    (tmp_path / "short.txt").write_text("the of and")
    message = error_of("diagnose", folder, "--text", tmp_path / "short.txt")
    assert "the text has 3 tokens, fewer than the window of 64" in message
    (tmp_path / "empty.txt").write_text("")
    assert "has 0 tokens" in error_of("diagnose", folder, "--text", tmp_path / "empty.txt")


def test_bad_text(folder, tmp_path):
    assert "there is no text file" in error_of("diagnose", folder, "--text", tmp_path / "no.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    assert "no UTF-8" in error_of("diagnose", folder, "--text", tmp_path / "latin.txt")


def test_window_longer_than_the_model(folder):
    assert "64 positions, fewer than the window of 65" in error_of(
        "diagnose", folder, "--window", 65
    )


def test_another_models_tokenizer(tmp_path, text):
    make_tokenizer().save_pretrained(save_model(tmp_path, vocab=9))
    assert "another model's" in error_of("diagnose", tmp_path, "--text", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "softpik"], "did you mean 'softpick'"),
        (["--variant", "softpick", "--preset", "retrofit"], "softpick has no preset 'retrofit'"),
        (["--variant", "softpick", "--option", "eps=-1"], "softpick's eps must be"),
        (["--variant", "softpick", "--option", "alpha=2"], "softpick takes eps; got 'alpha'"),
        (["--variant", "softpick", "--option", "eps"], "--option takes NAME=VALUE, got 'eps'"),
        (["--option", "eps=1"], "name it with --variant"),
        (["--threshold", "2"], "sink_threshold must be a number between 0 and 1, got 2.0"),
        (["--json", "no/such/report.json"], "there is no folder no/such"),
        (["--plot", "."], "is a folder"),
        (["--plot", "heads.docx"], "docx"),
    ],
)
def test_bad_arguments(folder, text, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_of("diagnose", folder, "--text", text, *arguments)
    assert not list(tmp_path.iterdir())


def test_usage_errors_end_with_2(folder):
    run("diagnose", folder, "--window", 1, code=2)
    run("diagnose", code=2)
    run("nothing", code=2)


@pytest.mark.parametrize("seeds", ["", "a", "1,-2", "1.5", str(2**63)])
def test_demo_refuses_seeds(seeds):
    assert "--seeds takes integers" in error_of("demo", "--seeds", seeds)


def test_demo_refuses_a_variant_and_a_file(tmp_path):
    assert "did you mean 'softpick'" in error_of("demo", "--variants", "softmax,softpik")
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of("demo", "--out", tmp_path / "file")
    assert "cannot be written" in error_of("demo", "--out", tmp_path / "file" / "under")


def test_demo_passes_its_arguments_on(tmp_path, monkeypatch):
    import inspect

    from attnvariants import demo

    signature, seen = inspect.signature(demo.run_demo), {}
    monkeypatch.setattr(demo, "run_demo", lambda **given: seen.update(given))
    out = tmp_path / "new" / "folder"
    run("demo", "--quick", "--seeds", "3,1", "--variants", "softmax, relu", "--out", out)
    signature.bind(**seen)
    assert seen.pop("console") is not None
    assert seen == {
        "seeds": (3, 1), "variants": ["softmax", "relu"], "quick": True, "out": out, "jobs": None,
    }  # fmt: skip
    assert out.is_dir()
    assert not list(out.iterdir())
