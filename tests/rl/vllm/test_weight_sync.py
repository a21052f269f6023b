"""What may be sent to a sampler's engine, without vLLM: a set that is not the model's must be an error that says so."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from entcov.rl.vllm.weight_sync import ByFile, ByReference, ExpectedWeights, WeightSync
from tests.support.recording_engine import RecordingEngine


def policy(tied: bool = True, model_type: str = "qwen3"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def synced(model, transport=None, dtype=torch.float32) -> tuple[RecordingEngine, WeightSync]:
    engine = RecordingEngine()
    return engine, WeightSync(engine, ExpectedWeights(model.config), transport or ByReference(), dtype=dtype)


def weights(model, **changed):
    """The model's weights, those named in `changed` replaced (`None`: left out; further names: added)."""
    tensors = dict(model.state_dict()) | {name.replace("__", "."): value for name, value in changed.items()}
    return lambda: iter([(name, tensor) for name, tensor in tensors.items() if tensor is not None])


@pytest.mark.parametrize("transport", [ByReference, ByFile])
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_set_arrives_once_and_the_cache_is_emptied_after_it(transport, tied):
    model = policy(tied)
    engine, sync = synced(model, transport())
    for version in (1, 4):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(version)
        engine.calls.clear()
        sync(version, weights(model))
        assert engine.calls == ["start", "update", f"finish {version}", "reset"] and sync.version == version
        sent = {name: w for name, w in model.state_dict().items() if not (tied and name == "lm_head.weight")}
        assert engine.tensors.keys() == sent.keys()
        assert all(torch.equal(engine.tensors[name], sent[name]) for name in sent)


def test_large_sets_go_in_pieces(monkeypatch):
    monkeypatch.setattr("entcov.rl.vllm.weight_sync.CHUNK_BYTES", 1000)
    model = policy()
    engine, sync = synced(model)
    sync(0, weights(model))
    assert engine.calls.count("update") > 3 and engine.calls[-2:] == ["finish 0", "reset"]
    assert len(engine.tensors) == len(dict(model.named_parameters()))


def test_weights_become_the_engines_type():
    model = policy()
    engine, sync = synced(model, dtype=torch.bfloat16)
    sync(0, weights(model))
    assert {tensor.dtype for tensor in engine.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_expected_weights_are_those_of_a_saved_checkpoint(tmp_path, model_type):
    from safetensors import safe_open

    for tied in (True, False):
        model = policy(tied, model_type)
        model.save_pretrained(tmp_path)
        expected = ExpectedWeights(transformers.AutoConfig.from_pretrained(tmp_path))
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            stored = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}
        assert {n: s for n, s in expected.shapes.items() if n not in expected.tied} == stored
        assert expected.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
FAULTS = {
    "missing": ({K_PROJ: None}, f"missing: {K_PROJ}"),
    "all missing": (dict.fromkeys(policy().state_dict()), "missing: model.embed_tokens.weight, .* and 16 more"),
    "unknown": ({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}, "unknown: model.layers.2.mlp.up_proj.weight"),
    "fused": ({"qkv_proj.weight": torch.zeros(1), K_PROJ: None}, f"missing: {K_PROJ}\n  unknown: qkv_proj.weight"),
    "misshaped": ({K_PROJ: torch.zeros(4, 16)}, f"misshaped: {K_PROJ} .is .4, 16., must be .8, 16.."),
    "a shard": ({"model.embed_tokens.weight": torch.zeros(10, 16)}, "misshaped: model.embed_tokens.weight .is .10,"),
    "tied, different": ({"lm_head.weight": torch.ones(20, 16)}, "lm_head.weight must equal model.embed_tokens.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_sent_of_a_set_that_is_not_the_models(fault):
    changed, message = FAULTS[fault]
    model = policy()
    engine, sync = synced(model)
    with pytest.raises(ValueError, match=message) as error:
        sync(0, weights(model, **changed))
    assert fault.startswith("tied") or re.search("must be the 24 weights .*nothing was sent", str(error.value))
    assert engine.calls == [] and sync.version is None
    sync(1, weights(model))  # nothing is broken
    assert sync.version == 1


def test_a_name_that_comes_twice():
    model = policy()
    engine, sync = synced(model)
    twice = [*model.state_dict().items(), (K_PROJ, torch.zeros(8, 16))]
    with pytest.raises(ValueError, match=f"repeated: {K_PROJ}$"):
        sync(0, lambda: iter(twice))
    assert engine.calls == []


@pytest.mark.parametrize("changed", [{K_PROJ: None}, {"more": torch.zeros(1)}, {K_PROJ: torch.zeros(4, 16)}])
def test_a_set_that_changes_later_leaves_an_engine_that_cannot_be_used(changed):
    model = policy()
    engine, sync = synced(model)
    sync(0, weights(model))
    with pytest.raises(ValueError, match="named_weights: weight .* was .* in the first set and is"):
        sync(1, weights(model, **changed))
    assert sync.version is None and "finish 1" not in engine.calls
    with pytest.raises(RuntimeError, match="an earlier one ended in the middle.*start the engine anew"):
        sync(2, weights(model))


def test_an_engine_that_fails_in_the_middle_cannot_be_used(monkeypatch):
    model = policy()
    engine, sync = synced(model)

    def fails(update_info):
        raise OSError("out of memory")

    monkeypatch.setattr(engine, "update_weights", fails)
    with pytest.raises(OSError, match="out of memory"):
        sync(0, weights(model))
    assert sync.version is None
    with pytest.raises(RuntimeError, match="start the engine anew"):
        sync(1, weights(model))


def test_a_rank_that_does_not_lead_only_goes_through_its_weights():
    model = policy()
    engine, sync = synced(model, ByFile())
    engine.leads = False
    seen = []
    sync(7, lambda: (seen.append(name) or (name, w) for name, w in model.state_dict().items()))
    assert engine.calls == ["reset"] and sync.version == 7
    assert seen[-25:] == list(model.state_dict())  # to the end: gathering a weight takes every rank
