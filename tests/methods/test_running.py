"""Rows that change how a model runs: its cache, its attention kernel, a draft ahead of it."""

import pytest
import torch

from fairway.methods import measure
from fairway.methods.cache_types import CacheType
from fairway.methods.drafted import Drafted
from fairway.methods.kernels import AttentionKernel, why_not
from fairway.methods.method import NotHere
from fairway.scoring.memory import Memory
from tests.models import ALL_ON, LOOPS, some_tokens, trained
from train_gpt import UserError


# ---- Cache ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("looping", [False, True])
def test_windows_read_what_a_cache_of_that_type_holds(storage, looping):
    model, tokens = trained(looping, **ALL_ON).eval(), some_tokens()
    kept = CacheType(storage).apply(model, None)
    with torch.inference_mode():
        wanted = Memory(model, storage=storage).logits(tokens)
        torch.testing.assert_close(kept.logits(tokens), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.equal(kept.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(("storage", "bytes_each"), [("fp32", 32), ("bf16", 16), ("int8", 10)])
@pytest.mark.parametrize("looping", [False, True])
def test_a_cache_grows_by_the_bytes_that_its_shape_says(storage, bytes_each, looping):
    model = trained(looping, **LOOPS).eval()
    passes = 13 if looping else 7  # layers 2, 3 and 4 twice more
    points = measure.cache_growth(model, storage, (8, 100, 300))
    for point in points:
        # Keys and values of two heads, eight channels wide; int8 adds a step of two bytes.
        assert point["analytic"] == point["tokens"] * passes * 2 * 2 * bytes_each
        assert point["measured"] == point["analytic"]
    assert [point["tokens"] for point in points] == [8, 100, 300]


# ---- Kernels -------------------------------------------------------------------------------------
def test_kernels_are_probed_and_chosen_alone():
    model = trained().eval()
    assert [why_not(model, name) for name in ("math", "flash")] == ["", ""]
    with AttentionKernel("math").running():
        assert (
            torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
        )
    assert torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(NotHere, match="no cudnn kernel on this cpu: .*; try a GPU"):
        AttentionKernel("cudnn").apply(model, None)


# ---- Speculation ---------------------------------------------------------------------------------
@pytest.mark.parametrize("draft", ["ngram", "suffix", "layers"])
def test_a_draft_writes_the_text_of_plain_decoding(draft, monkeypatch):
    monkeypatch.setattr(measure, "NEW_TOKENS", 12)
    model = Drafted(draft).apply(trained().eval(), None)
    texts = [[1, 5, 6, 5, 6], [1, 7]]
    plain, drafted = (measure.generation(model, texts, draft=d) for d in ("", draft))
    assert plain["text_sha256"] == drafted["text_sha256"]
    assert (plain["engine"], drafted["engine"]) == ("cache", f"cache, draft {draft}")
    result = measure.speculation(model, texts, draft)
    assert result["tokens_per_verification"] >= 1 and 0 <= result["acceptance"] <= 1
    monkeypatch.setattr(measure, "with_cache", lambda *_: [0] * 12)
    with pytest.raises(UserError, match="the text differs"):
        measure.speculation(model, texts, draft)
