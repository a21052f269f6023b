"""Packed sequences: the same statistics and gradients as padded rows, in memory that grows with the tokens."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from entcov.rl.config import ModelConfig
from entcov.rl.hf import packed_attention
from entcov.rl.hf.model import batch_token_stats, build_model
from entcov.rl.hf.packed_attention import NAME, boundaries, keeps_apart, use_boundaries
from tests.support.random_batch import QWEN, batch_of

MODELS = {
    "grouped heads": QWEN,
    "a sliding window": QWEN | {"model_type": "mistral", "sliding_window": 5},
    "learned positions": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "alibi": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "a state": {"model_type": "mamba", "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
}
ELSEWHERE = ("alibi", "a state")  # their layers say less to the attention than the mask does


def model_of(kind: str, **settings):
    if kind in ELSEWHERE:
        settings |= {"attn_implementation": "eager"}
    return build_model(
        ModelConfig(config=MODELS[kind], tokenizer="char", **settings), seed=0, device=torch.device("cpu")
    )[0]


def one_by_one(query, key, value, starts, starts_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """What torch's varlen_attn is documented to compute."""
    assert starts is starts_k and starts.dtype == torch.int32 and longest == longest_k == int(starts.diff().max())
    assert query.dtype == key.dtype == value.dtype and enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0 and query.stride(-1) == 1
    out, lengths = [], starts.diff().tolist()
    for own in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in own)
        back = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        seen = (back >= 0) & (back <= window_size[0] if window_size[0] >= 0 else True)
        seen_values = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        out.append(seen_values[0].transpose(0, 1))
    return torch.cat(out)


def with_boundaries(model, monkeypatch):
    model = copy.deepcopy(model)
    model.set_attn_implementation(NAME)
    monkeypatch.setattr(packed_attention, "varlen_attn", one_by_one)
    return model


def statistics_and_gradients(model, batch, packing: bool):
    stats = batch_token_stats(model, batch, packing=packing, temperature=0.8)
    (stats.logprob.sum() + 0.5 * stats.entropy.sum()).backward()
    found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    return torch.stack([stats.logprob, stats.entropy]).detach(), found


@pytest.mark.parametrize("kind", MODELS)
def test_packed_and_padded_rows_have_the_same_statistics_and_gradients(kind, monkeypatch):
    model, batch = model_of(kind), batch_of((9, 3, 14, 1))
    expected, gradient = statistics_and_gradients(model, batch, packing=False)
    for packed in (model, *([] if kind in ELSEWHERE else [with_boundaries(model, monkeypatch)])):
        found, own = statistics_and_gradients(packed, batch, packing=True)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(own, gradient, atol=2e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_boundaries_reach_the_attention_that_a_backward_pass_computes_again(monkeypatch):
    model, batch = model_of("grouped heads", gradient_checkpointing=True), batch_of((9, 3, 14))
    _, expected = statistics_and_gradients(model, batch, packing=False)
    _, found = statistics_and_gradients(with_boundaries(model, monkeypatch), batch, packing=True)
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4)


def test_the_boundaries_of_transformers_flash_attention_are_given_as_well():
    """Without them it would find each layer's anew, and wait for the GPU to do so."""

    def flash(module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
              scaling, **_):  # fmt: skip
        assert attention_mask is None
        heads = (x[0].transpose(0, 1) for x in (query, key, value))
        limits = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return one_by_one(*heads, *limits, scale=scaling, window_size=(-1, 0), enable_gqa=True)[None], None

    AttentionInterface.register("flash_of_this_test", flash)
    model, batch = model_of("grouped heads"), batch_of((9, 3, 14))
    expected, _ = statistics_and_gradients(model, batch, packing=False)
    model.config._attn_implementation = "flash_of_this_test"  # its setter would look for a package
    found, _ = statistics_and_gradients(model, batch, packing=True)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_half_precision_reaches_the_attention(monkeypatch):
    """Rotary embeddings make float32 of queries and keys under autocast, which flash attention refuses."""
    seen = []
    model = with_boundaries(model_of("grouped heads", compute_dtype="bfloat16"), monkeypatch)
    monkeypatch.setattr(
        packed_attention, "varlen_attn", lambda q, *rest, **kw: (seen.append(q.dtype), one_by_one(q, *rest, **kw))[1]
    )
    batch_token_stats(model, batch_of((5, 8)), packing=True)
    assert seen == [torch.bfloat16] * 2


class Made(TorchDispatchMode):
    """The bytes of what every operation returns, and how often each shape was converted."""

    def __init__(self):
        super().__init__()
        self.entries, self.bytes, self.conversions = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.entries = max([self.entries, *(x.numel() for x in made)])
        if not func.is_view:
            self.bytes += sum(x.nbytes for x in made)
        if func is torch.ops.aten._to_copy.default:
            self.conversions += [tuple(x.shape) for x in made]
        return out


def made_by(model, batch) -> Made:
    with Made() as made:
        statistics_and_gradients(model, batch, packing=True)
    return made


@pytest.mark.parametrize("attention", ["sdpa", NAME])
def test_memory_grows_with_the_tokens_and_no_tensor_with_their_square(attention, monkeypatch):
    model = model_of("grouped heads")
    model = with_boundaries(model, monkeypatch) if attention == NAME else model
    few, many = (made_by(model, batch_of((30,) * count)) for count in (8, 32))
    tokens = len(batch_of((30,) * 32).tokens)
    assert many.entries <= tokens * QWEN["intermediate_size"] < tokens**2 / 10
    assert many.bytes < 4.1 * few.bytes


def test_sequences_one_by_one_share_the_weights_that_autocast_casts():
    """Else each sequence would keep a cast of the whole model for its backward pass."""
    model = model_of("grouped heads", compute_dtype="bfloat16")
    shape = tuple(model.model.layers[0].mlp.up_proj.weight.shape)

    def casts(count: int) -> int:
        with Made() as made:
            batch_token_stats(model, batch_of((5,) * count), packing=True)
        return made.conversions.count(shape)

    assert casts(6) == casts(1) > 0


@pytest.mark.skipif(packed_attention.varlen_attn is None, reason="torch before 2.10 has no varlen_attn")
def test_torchs_attention_takes_what_it_is_given():
    """The library's own function on the meta device: names, shapes and types of the arguments, and its derivative."""
    query = torch.empty(1, 4, 20, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key, value = torch.empty(2, 1, 2, 20, 16, dtype=torch.bfloat16, device="meta").requires_grad_()
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    for window in (None, 7):
        out, _ = packed_attention._attention(
            None, query, key, value, None, scaling=0.25, sliding_window=window, cu_seq_lens_q=starts, max_length_q=9
        )
        assert out.shape == (1, 20, 4, 16) and out.dtype == torch.bfloat16
        out.sum().backward()
        assert query.grad.shape == query.shape


def on_a_gpu(model, monkeypatch, capability):
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("kind", "changes", "dtype", "capability", "used"),
    [
        ("grouped heads", {}, torch.bfloat16, (8, 0), True),
        ("a sliding window", {}, torch.float16, (9, 0), True),
        ("grouped heads", {}, torch.float32, (9, 0), False),
        ("grouped heads", {}, torch.bfloat16, (7, 5), False),
        ("grouped heads", {"head_dim": 12}, torch.bfloat16, (9, 0), False),
        ("alibi", {}, torch.bfloat16, (9, 0), False),
        ("a state", {}, torch.bfloat16, (9, 0), False),
    ],
)
def test_boundaries_are_used_where_flash_attention_runs(kind, changes, dtype, capability, used, monkeypatch):
    monkeypatch.setitem(MODELS, kind, MODELS[kind] | changes)
    model = model_of(kind)
    assert not keeps_apart(model)
    on_a_gpu(model, monkeypatch, capability)
    use_boundaries(model, dtype)
    assert keeps_apart(model) is used and (model.config._attn_implementation == NAME) is used


def test_an_attention_that_was_asked_for_stays(monkeypatch):
    model = model_of("grouped heads", attn_implementation="eager")
    on_a_gpu(model, monkeypatch, (9, 0))
    use_boundaries(model, torch.bfloat16)
    assert model.config._attn_implementation == "eager" and not keeps_apart(model)


def test_a_model_with_a_state_goes_one_by_one_whatever_its_attention():
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    assert not keeps_apart(SimpleNamespace(_is_stateful=True, config=config))
    assert keeps_apart(SimpleNamespace(_is_stateful=False, config=config))
    assert "attention_mask" not in boundaries((2, 3), SimpleNamespace(config=config, device=torch.device("cpu")))
