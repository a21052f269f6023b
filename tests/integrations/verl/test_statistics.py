"""Statistics in verl's engines against float64, and against verl's own where those are right.

Bounds: the model runs in float32 and its logits reach 40, so log-probabilities have errors of a few 1e-6; gradients are
relative to the norm of the whole gradient.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl")

from tests.integrations.verl import engines, statistics_cases, worker
from tests.integrations.verl.statistics_cases import EVERYTHING, PLAIN, TEMPERATURE, fused

VALUE, GRADIENT = 2e-5, 1e-5
pytestmark = pytest.mark.usefixtures("model")  # it starts verl's platform, before verl is imported


@pytest.fixture(scope="module", autouse=True)
def engines_of_verl(model):
    """The engines that these tests put into verl's registry are gone after them."""
    from verl.workers.engine.base import EngineRegistry

    before = {
        name: {key: dict(found) for key, found in kinds.items()} for name, kinds in EngineRegistry._engines.items()
    }
    yield
    EngineRegistry._engines = before


def check(errors):
    assert {name for name in errors if not name.startswith("d ")} >= set(PLAIN) and engines.all_below(
        errors, VALUE, GRADIENT
    ), errors


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    return {"untied": worker.tiny_model(str(tmp_path_factory.mktemp("untied")), tied=False), "tied": model}


@pytest.fixture(scope="module")
def batch():
    return engines.weighted_rollout()


@pytest.fixture(scope="module")
def exact(folders, batch):
    return {name: engines.oracle(folder, batch, temperature=TEMPERATURE) for name, folder in folders.items()}


@pytest.fixture
def engine_of():
    """Engines of verl with entcov's statistics, or without."""
    from entcov.integrations.verl.statistics import FSDPStatistics

    def make(folder, *mixins, **options):
        engines.use_engine("fsdp2", *(mixins or (FSDPStatistics,)))
        return worker.make_worker(folder, **options).engine

    yield make
    engines.use_engine("fsdp2")


def packing(packed: bool) -> dict:
    return {"hf_model": {"use_remove_padding": packed}}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_every_statistic_and_its_gradient(folders, batch, exact, engine_of, name, packed):
    asked = {"packed": packed, "temperature": TEMPERATURE, **EVERYTHING}
    found = engines.found_by(engine_of(folders[name], **packing(packed)), batch, **asked)
    assert set(found.columns) == set(exact[name].columns)
    check(engines.worst(found, exact[name], batch))
    without_logits = engines.found_by(engine_of(folders[name], **fused("entcov", packed=packed)), batch, **asked)
    check(engines.worst(without_logits, exact[name], batch))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_equal_to_verls_own_where_it_is_right(folders, batch, engine_of, packed):
    asked = {"packed": packed, "temperature": TEMPERATURE}
    engines.use_engine("fsdp2")
    verls = engines.found_by(worker.make_worker(folders["untied"], **packing(packed)).engine, batch, **asked)
    ours = engines.found_by(engine_of(folders["untied"], **packing(packed)), batch, **asked)
    assert set(ours.columns) == set(verls.columns) == set(PLAIN)
    check(engines.worst(ours, verls, batch))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_temperature_for_each_sequence(folders, batch, engine_of, packed):
    temperature = torch.tensor([1.0, 1.0, 0.5, 0.7, 0.7, 0.7, 1.3, 1.0])
    asked = {"packed": packed, "temperature": temperature, **EVERYTHING}
    right = engines.oracle(folders["untied"], batch, temperature=temperature)
    check(
        engines.worst(engines.found_by(engine_of(folders["untied"], **packing(packed)), batch, **asked), right, batch)
    )
    engine = engine_of(folders["untied"], **fused("entcov", packed=packed))
    assert "must have one temperature, and has 2" in engines.raised(lambda: engines.found_by(engine, batch, **asked))


def test_bf16_logits_are_not_divided_by_their_temperatures():
    from entcov.integrations.verl.statistics import Request, named_statistics

    logits = (30 * torch.randn(1, 6, 50, generator=torch.Generator().manual_seed(0))).bfloat16()
    target, temperature = torch.arange(6)[None], torch.tensor([[0.7, 0.7, 1.1, 1.1, 0.7, 1.3]])
    request = Request({"log_probs": "logprob"}, {})
    found = named_statistics(logits, target, temperature, request)["log_probs"]
    right = (logits.double() / temperature[..., None].double()).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    assert (found - right).abs().max() < VALUE
    rounded = (
        (logits / temperature[..., None].bfloat16()).double().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    )
    assert (rounded - right).abs().max() > 1e-2  # as verl divides


def test_lora(folders, batch, engine_of):
    lora = {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    asked = {"packed": False, "temperature": TEMPERATURE, **EVERYTHING}
    found = []
    for options in (packing(False), fused("entcov")):
        torch.manual_seed(0)
        engine = engine_of(folders["untied"], hf_model=options["hf_model"] | lora)
        found.append(engines.found_by(engine, batch, **asked))
    assert len(found[0].gradients) == 8
    check(engines.worst(found[1], found[0], batch))


def test_a_head_without_a_request_gives_logits():
    from entcov.integrations.verl.fused_head import StatisticsHead, install, installed

    class Model(torch.nn.Module):
        def __init__(self, last):
            super().__init__()
            self.lm_head, self.last = torch.nn.Linear(4, 7, bias=False), last

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, hidden):
            return self.last(self.lm_head(hidden))

    hidden = torch.randn(2, 3, 4)

    def ask(last):
        model = Model(last)
        install(model)
        model.lm_head.ask(lambda hidden, weight, bias: hidden @ weight.T[:, :2])
        return model, model(hidden)

    model, made = ask(lambda logits: logits)
    assert made.shape == (2, 3, 2) and model.lm_head.take(made) is made
    assert torch.equal(model(hidden), torch.nn.functional.linear(hidden, model.lm_head.weight))
    for last in (lambda x: 30 * torch.tanh(x / 30), lambda x: x.mul_(0.5), lambda x: x / 8):
        model, made = ask(last)
        with pytest.raises(NotImplementedError, match=r"changes its logits after .*use_fused_kernels=False"):
            model.lm_head.take(made)
    with pytest.raises(NotImplementedError, match="does not call its output embedding"):
        model.lm_head.take(made)
    assert type(installed(model)) is StatisticsHead
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(NotImplementedError, match=r"must not be wrapped \(by LoRA\), and is Sequential"):
        installed(model)
    model.lm_head = model.lm_head[0]
    with pytest.raises(NotImplementedError, match="must be torch.nn.Linear, and is StatisticsHead"):
        install(model)


def test_a_head_with_a_bias(batch):
    from entcov.integrations.verl.statistics import _linear_statistics, _statistics

    data = batch.local(use_remove_padding=True, calculate_entropy=True, temperature=TEMPERATURE, **EVERYTHING)
    tokens = data["input_ids"].values()
    arguments = {"micro_batch": data, "output_args": {"input_ids_rmpad_rolled": tokens.roll(-1)}}
    head = torch.nn.Linear(16, worker.VOCABULARY)
    hidden = torch.randn(1, len(tokens), 16)
    right = _statistics(head(hidden), data, arguments["output_args"])
    found = _linear_statistics(hidden, head.weight, head.bias, **arguments)
    assert len(right) == 6 and all(
        torch.allclose(x, y, atol=1e-5) for x, y in zip(found.unbind(-1), right.values(), strict=True)
    )


@pytest.mark.parametrize("softcap", [30.0, None])
def test_a_model_with_a_softcap_is_refused(tmp_path, batch, engine_of, softcap):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=worker.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=softcap,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    right = engines.found_by(engine_of(str(tmp_path), **packing(False)), batch, packed=False)
    engine = engine_of(str(tmp_path), **fused("entcov"))
    if softcap is None:
        check(engines.worst(engines.found_by(engine, batch, packed=False), right, batch))
    else:
        text = engines.raised(lambda: engines.found_by(engine, batch, packed=False))
        assert text.startswith("NotImplementedError") and "changes its logits after" in text


class Verls:
    """In the place of verl's engine."""

    model_config = SimpleNamespace(use_fused_kernels=False, fused_kernel_options=None)
    engine_config = SimpleNamespace(use_fused_kernels=True)

    def prepare_model_outputs(self, *args):
        return "verl's"

    def _lm_head_logits_processor(self, *args, **kwargs):
        return "verl's"


@pytest.mark.parametrize("entry", ["distillation_use_topk", "distillation_only", "use_fused_kernels"])
def test_what_entcov_does_not_cover_is_verls_or_refused(model, entry):
    from entcov.integrations.verl.statistics import FSDPStatistics

    engine = type("Engine", (FSDPStatistics, Verls), {})()
    data = worker.rollout().local(**{entry: True})
    assert engine.prepare_model_outputs(None, {}, data, None) == "verl's"
    data = worker.rollout().local(**{entry: True, "entcov_moments": True, "entcov_clamp": {"clamp_p": 0.1}})
    with pytest.raises(NotImplementedError, match="entcov_clamp, entcov_moments must not be asked for"):
        engine.prepare_model_outputs(None, {}, data, None)


# ---- two ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(folders, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("statistics"))
    return worker.on_ranks(2, statistics_cases.on_two_ranks, folders["untied"], folders["tied"], folder=folder)


def cases(two_ranks, kind: str) -> dict:
    """The errors of both ranks, by name."""
    return {f"{name}, rank {rank}": errors for rank in (0, 1) for name, errors in two_ranks[rank][kind].items()}


def test_without_logits_under_fsdp2_over_two_ranks(two_ranks):
    found = {name: errors for name, errors in cases(two_ranks, "data parallel").items() if name.startswith("entcov")}
    assert len(found) == 8
    for errors in found.values():
        check(errors)


def test_verls_fused_kernels_fail_where_fsdp2_wraps_the_head_by_itself(two_ranks):
    """verl 0.9.1 does so for untied embeddings. Its Triton kernels cannot run on a CPU."""
    found = cases(two_ranks, "data parallel")
    for rank in (0, 1):
        assert found[f"verl untied, rank {rank}"].startswith(
            "RuntimeError: aten.mm.default got mixed torch.Tensor and DT"
        )
        check(found[f"verl tied, rank {rank}"])


def test_logits_that_are_dtensors(two_ranks):
    found = cases(two_ranks, "sharded logits")
    assert sum("S(2) gathered 0" in name for name in found) == 4  # split over the vocabulary, evenly and not
    assert sum(name.count("gathered 1") for name in found) == 8
    for errors in found.values():
        check(errors)


def test_ulysses_sequence_parallelism(two_ranks):
    for errors in cases(two_ranks, "ulysses").values():
        check(errors)


def test_verls_megatron_engine_with_a_vocabulary_over_two_ranks(two_ranks):
    found = cases(two_ranks, "tensor parallel")
    ran = [name for name in found if name.startswith(("untied", "tied", "temperatures"))]
    assert len(ran) == 14
    for name in ran:
        check(found[name])


def test_verls_trainer_steps_alike_by_verls_and_by_entcovs_statistics(two_ranks):
    steps = {name: step for name, step in two_ranks[0]["tensor parallel"].items() if name.startswith("step untied")}
    assert len(steps) == 4
    for step in steps.values():
        for name, values in step.items():
            assert values == pytest.approx(steps["step untied verl"][name], rel=2e-6), name


def test_hard_logits_of_a_tensor_parallel_rank(two_ranks):
    """Entropy and gradient at logit scale 30, in bf16, with -inf, with columns that only pad the vocabulary.

    verl's errors are its own, and may go one day.
    """
    found = cases(two_ranks, "tensor parallel")
    for rank in (0, 1):
        for name in ("scale 30", "bf16", "-inf", "padding"):
            ours, verls = found[f"{name} entcov, rank {rank}"], found[f"{name} verl, rank {rank}"]
            assert ours["log_probs"] < VALUE and ours["entropy"] < 1e-6
            assert ours["d logits"] < (4e-3 if name == "bf16" else 1e-6)  # a gradient in bf16 is rounded to 8 bits
            assert not verls["entropy"] < 50 * ours["entropy"]
            assert not verls["d logits"] < 20 * ours["d logits"]
