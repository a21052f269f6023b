"""The statistics of the patched models, against float64 of the model's own logits."""

import pytest
import torch

pytest.importorskip("trl")

import transformers
from trl.trainer.utils import add_fused_lm_head

from entcov.integrations.trl.head import PolicyHead

SIZES = {"vocab_size": 98, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "initializer_range": 0.3}  # fmt: skip
MODELS = {
    "plain": ("Qwen2", {"tie_word_embeddings": False}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "bias in the head": ("Phi", {}),
    "capped": ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0}),
    "scaled": ("Cohere", {"logit_scale": 0.25}),
    "divided": ("Granite", {"logits_scaling": 3.0}),
    "mixture of experts": ("Mixtral", {"num_local_experts": 4, "output_router_logits": True}),
}
IDS = torch.arange(40).reshape(2, 20) * 7 % 97 + 1


def built(kind):
    name, changed = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **changed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("lm_head.bias"):
                parameter.normal_()
    return model


def scored(model):
    labels = IDS.clone()
    labels[:, :9] = -100
    labels[1, 15:] = -100
    return labels, model(input_ids=IDS, labels=labels, fused_lm_head=True)


@pytest.mark.parametrize("kind", MODELS)
def test_the_columns_and_their_gradients(kind):
    model, oracle = built(kind), built(kind)
    if kind != "mixture of experts":  # whose grouped products have no float64
        oracle = oracle.double()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    head = PolicyHead(0.7, clamp={"top_k": 20}, moments=True)
    head.install(model)
    labels, out = scored(model)
    at = labels[:, 1:] != -100

    logp = torch.log_softmax(oracle(IDS).logits[:, :-1].double() / 0.7, -1)
    p, kept = logp.exp(), torch.log_softmax(logp.topk(20).values, -1)
    logprob = logp.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    entropy = -(p * logp).sum(-1)
    onehot = torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), 98)
    drift = -(p * (logp + entropy[..., None]) * (onehot - p)).sum(-1)
    expected = {"entropy": entropy, "clamped_entropy": -(kept.exp() * kept).sum(-1), "entropy_drift": drift,
                "collision": (p * p).sum(-1)}  # fmt: skip
    assert head.columns == tuple(expected) and out.entropy.shape == (2, 19, 4)
    # float32 logits of a model in float32: about 1e-5 of logits of 10
    torch.testing.assert_close(out.log_probs[at].double(), logprob[at], rtol=1e-5, atol=2e-5)
    for i, (name, value) in enumerate(expected.items()):
        torch.testing.assert_close(out.entropy[..., i][at].double(), value[at], rtol=1e-5, atol=2e-5, msg=name)
    assert not out.log_probs[~at].any() and not out.entropy[~at].any()

    (out.log_probs.sum() + 0.3 * out.entropy[..., 0].sum() + 0.2 * out.entropy[..., 1].sum()).backward()
    (logprob[at].sum() + 0.3 * entropy[at].sum() + 0.2 * expected["clamped_entropy"][at].sum()).backward()
    for (name, mine), other in zip(model.named_parameters(), oracle.parameters(), strict=True):
        if other.grad is not None:
            error = (mine.grad.double() - other.grad).norm() / other.grad.norm().clamp(min=1e-6)
            assert error < 2e-4, name


def test_the_auxiliary_loss_is_trl_s():
    ours, theirs = built("mixture of experts"), built("mixture of experts")
    for model in (ours, theirs):
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    PolicyHead(1.0).install(ours)
    torch.testing.assert_close(scored(ours)[1].aux_loss, scored(theirs)[1].aux_loss)


def test_a_batch_without_a_label_has_a_graph_and_no_gradient():
    model = built("plain")
    add_fused_lm_head(model)
    PolicyHead(1.0).install(model)
    out = model(input_ids=IDS, labels=torch.full_like(IDS, -100), fused_lm_head=True)
    out.log_probs.sum().backward()
    assert not out.log_probs.any() and not model.lm_head.weight.grad.any()


@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_no_more_than_the_labels_is_computed_and_generation_is_untouched(kind):
    model, before = built(kind).eval(), built(kind).eval()
    add_fused_lm_head(model)
    head = PolicyHead(1.0)
    head.install(model)
    torch.testing.assert_close(model(IDS).logits, before(IDS).logits, rtol=0, atol=0)
    assert model(IDS, labels=IDS).loss == before(IDS, labels=IDS).loss
    drawn = [m.generate(IDS, max_new_tokens=4, do_sample=False) for m in (model, before)]
    assert torch.equal(*drawn)
    rows, run = [], head._statistics
    head._statistics = lambda function, first, *args, **kw: rows.append(len(first)) or run(function, first, *args, **kw)
    labels, _ = scored(model)
    assert rows == [int((labels[:, 1:] != -100).sum())]


def test_a_head_in_float32():
    """cast_lm_head_to_fp32: a bf16 body and a head in float32 give float32's numbers for the same hidden states."""
    model = built("plain").bfloat16()
    model.lm_head = model.lm_head.float()
    add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
    PolicyHead(1.0, cast_to_fp32=True).install(model)
    labels, out = scored(model)
    hidden = model.model(IDS).last_hidden_state.double()
    logp = torch.log_softmax(hidden @ model.lm_head.weight.double().T, -1)[:, :-1]
    at = labels[:, 1:] != -100
    expected = logp.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0][at]
    torch.testing.assert_close(out.log_probs[at].double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft(saved):
    peft = pytest.importorskip("peft")
    model = built("plain")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=saved)
    model = peft.get_peft_model(model, config)
    PolicyHead(1.0).install(model.get_base_model())
    labels, out = scored(model)
    logp = torch.log_softmax(model(IDS).logits[:, :-1].double(), -1)
    at = labels[:, 1:] != -100
    torch.testing.assert_close(
        out.log_probs[at].double(), logp.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0][at], rtol=1e-5, atol=2e-5
    )
    out.log_probs.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in with_gradient)
    assert any("lm_head.modules_to_save" in name for name in with_gradient) == bool(saved)
