"""Patched models that sentence-transformers and lm-eval save and load."""

import pytest
import torch
from tiny import SMALL, strong

import attnvariants
from attnvariants.hf import auto_load, patches_of

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
transformers.logging.set_verbosity_error()
REMEDY = r"load with attnvariants\.from_pretrained"
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 ignores the guard")


def words():
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(90))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", model_max_length=64,
    )  # fmt: skip


def test_sentence_transformers_restores_or_refuses(tmp_path):
    sentences = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    config = transformers.BertConfig(**{**SMALL, "num_key_value_heads": None})
    strong(transformers.BertModel(config)).save_pretrained(tmp_path / "bert")
    words().save_pretrained(tmp_path / "bert")
    model = sentences.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    texts = ["w1 w2 w3", "w4 w5 w6 w7 w8"]
    plain = torch.tensor(model.encode(texts))
    attnvariants.patch(model, "ssmax", s=0.7)
    expected = torch.tensor(model.encode(texts))
    assert not torch.allclose(plain, expected, atol=1e-2)
    model.save(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=REMEDY):
        sentences.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    with auto_load():
        again = sentences.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(torch.tensor(again.encode(texts)), expected)
    key = next(m.config._attn_implementation for m in again.modules() if hasattr(m, "config"))
    once_more = sentences.SentenceTransformer(
        str(tmp_path / "saved"), device="cpu", model_kwargs={"attn_implementation": key}
    )
    torch.testing.assert_close(torch.tensor(once_more.encode(texts)), expected)
    with pytest.warns(UserWarning, match="records attention variants"):
        sentences.SentenceTransformer(
            str(tmp_path / "saved"), device="cpu", model_kwargs={"attn_implementation": "sdpa"}
        )


def test_lm_eval_restores_or_refuses(tmp_path):
    huggingface = pytest.importorskip(
        "lm_eval.models.huggingface", reason="lm-eval is not installed"
    )
    from lm_eval.api.instance import Instance

    model = strong(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
    attnvariants.patch(model, "softpick")
    model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    settings = {"pretrained": str(tmp_path), "device": "cpu", "dtype": "float32", "batch_size": 1}
    asked = [Instance("loglikelihood", {}, ("w1 w2 w3", " w4 w5"), 0)]
    own = huggingface.HFLM(**{**settings, "pretrained": model}, tokenizer=words())
    ((expected, _),) = own.loglikelihood(asked, disable_tqdm=True)
    with pytest.raises(ValueError, match=REMEDY):
        huggingface.HFLM(**settings)
    with auto_load():
        restored = huggingface.HFLM(**settings)
    keyed = huggingface.HFLM(**settings, attn_implementation="attnvariants")
    for again in (restored, keyed):
        assert len(patches_of(again.model)) == 1
        ((found, _),) = again.loglikelihood(asked, disable_tqdm=True)
        assert found == pytest.approx(expected, abs=1e-4)
