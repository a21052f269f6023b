"""verl's updates with entropy controls: the same for every division, and equal to verl's own losses where it is right.

Differences of parameters are of rounding: 1e-6 after 4 updates with learning rate 1e-3.
"""

import math

import pytest
import torch

pytest.importorskip("verl")

from tests.integrations.verl import cases
from tests.integrations.verl.worker import Case, make_worker, on_ranks, policy_loss_config, rollout, run, score

ROUNDING = 1e-6


class Whole(dict):
    """Control -> what it comes to on one rank with one micro-batch, run when it is first asked for."""

    def __init__(self, model: str):
        self.model = model

    def __missing__(self, name: str):
        self[name] = run(self.model, cases.case(name))
        return self[name]


@pytest.fixture(scope="module")
def whole(model):
    return Whole(model)


@pytest.fixture(scope="module")
def plain(model):
    return run(model, Case({"loss_mode": "vanilla"}, rollouts=cases.ROLLOUTS))


@pytest.fixture(scope="module")
def two_ranks(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, cases.in_two_processes, model, str(folder / "stored"), folder=str(folder))


def far(a, b) -> float:
    return float((a.parameters - b.parameters).abs().max())


def ours(metrics: dict) -> dict[str, list[float]]:
    return {name: value for name, value in metrics.items() if name.startswith("entcov/")}


def check_same(a, b):
    assert far(a, b) < ROUNDING
    assert a.chosen == b.chosen
    for one, other in zip(a.metrics, b.metrics, strict=True):
        assert ours(one).keys() == ours(other).keys()
        for name, value in ours(one).items():
            assert value == pytest.approx(other[name], rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("name", cases.CONTROLS)
def test_a_control_acts_and_no_division_changes_it(model, whole, plain, name):
    assert far(whole[name], plain) > 100 * ROUNDING
    check_same(run(model, cases.case(name, micro=2)), whole[name])


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "clip_b"])
@pytest.mark.parametrize("division", [{"micro": 1}, {"max_tokens": 24}, {"rows": cases.SHUFFLED, "micro": 4}], ids=str)
def test_single_sequences_dynamic_batches_and_other_orders_of_rows(model, whole, name, division):
    check_same(run(model, cases.case(name, **division)), whole[name])


@pytest.mark.parametrize("name", ["clip_cov", "clip_b", "aent"])
def test_nested_fields_as_of_verls_v1_trainer(model, whole, name):
    nested = cases.case(name, cases.SHUFFLED, micro=2)
    nested.nested = True
    check_same(run(model, nested), whole[name])


def test_a_rollout_that_nothing_has_scored_is_scored_where_a_control_decides_over_it(model, whole):
    for name, passes in (("clip_b", (4, 4)), ("clip_cov", (6, 4)), ("aent", (2, 4))):
        case = cases.case(name)
        case.forget = True
        outcome = run(model, case)
        check_same(outcome, whole[name])
        assert outcome.passes == passes


def test_two_data_parallel_ranks_train_like_one(whole, two_ranks):
    (first, *_), (second, *_) = two_ranks
    for name, outcome in first.items():
        check_same(outcome, whole[name if name in cases.CONTROLS else "clip_cov"])
        assert torch.equal(outcome.parameters, second[name].parameters)


def test_the_state_is_that_of_the_ranks_that_have_the_models_outputs(two_ranks):
    assert [state["step"] for _, state, _ in two_ranks] == [7, 7]


def test_a_pipeline_stage_without_outputs_takes_part_in_the_passes_and_nothing_else(model):
    worker = make_worker(model, policy_loss=policy_loss_config({"controls": {"clip_cov": cases.CONTROLS["clip_cov"]}}))
    training, batch, asked = worker.engine.training, rollout(), []
    training.has_outputs = False
    score(worker, batch)
    data = batch.local(calculate_entropy=False)
    assert training.begin(worker, data) == {}

    def infer(data):
        asked.append("infer")
        return {}

    for expected in (["train"], ["infer", "train"]):  # the first update is under the weights that were scored
        asked.clear()
        output = training.train_batch(data, "verl's", infer, lambda data, loss: asked.append("train") or {"loss": loss})
        assert asked == expected and output == {"loss": "verl's"}
        training.weights_changed()
    assert training.end() == {} and training.controlled.updates == 0


def test_megatron_with_half_of_the_vocabulary_on_each_rank_begins_like_fsdp(whole, two_ranks):
    """The numbers of the first update, before two optimizers with different settings have moved the weights."""
    for name, (metrics, chosen) in two_ranks[0][2].items():
        expected = whole[name].metrics[0]
        assert ours(metrics).keys() == ours(expected).keys()
        for key in [*ours(expected), "grad_norm", "actor/pg_loss"]:
            assert metrics[key][0] == pytest.approx(expected[key][0], rel=1e-5, abs=1e-6), (name, key)
        assert chosen[:1] == whole[name].chosen[:1] and chosen == two_ranks[1][2][name][1]
        assert two_ranks[1][2][name][0] is None  # verl hears the first tensor-parallel rank alone


def test_tokens_are_chosen(whole):
    sizes = [sum(len(rollout(seed=i).columns["response_mask"].nonzero()) for _ in range(1)) for i in range(2)]
    for name, ratio in (("clip_cov", 0.1), ("kl_cov", 0.1)):
        assert [len(ids) for ids in whole[name].chosen] == [int(ratio * n) for n in sizes for _ in range(2)]
    assert whole["clip_cov"].chosen[0] != whole["clip_cov"].chosen[1]


def test_no_control_is_verls_vanilla_loss(model):
    modes = ("entcov_none", "vanilla")
    none, vanilla = (run(model, Case({"loss_mode": mode}, {"micro": 2}, rollouts=cases.ROLLOUTS)) for mode in modes)
    assert far(none, vanilla) < ROUNDING
    for one, other in zip(none.metrics, vanilla.metrics, strict=True):
        for name in ("actor/pg_loss", "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_every_aggregation_has_verls_denominators(model, aggregation):
    """A sequence that is masked as a whole counts in verl's denominators of sequences."""
    mask = rollout().columns["response_mask"].clone()
    mask[3] = 0
    actor = {"loss_agg_mode": aggregation, "loss_scale_factor": 6, "entropy_coeff": 0.01, "use_kl_loss": True}
    columns = {"response_mask": mask, "ref_log_prob": torch.full(mask.shape, -4.0)}
    runs = [
        run(model, Case({"loss_mode": mode}, {"actor": actor, "micro": 2}, columns=columns))
        for mode in ("vanilla", "entcov_none")
    ]
    assert far(*runs) < ROUNDING
    assert runs[0].metrics[0]["actor/pg_loss"] == pytest.approx(runs[1].metrics[0]["actor/pg_loss"], rel=1e-4)


def test_verls_clip_cov_is_ours_where_all_candidates_are_taken(model):
    """Then nothing is drawn. verl's candidates are those of an open interval, without tokens that the clip stops."""
    keys = {"clip_cov_ratio": 0.5, "clip_cov_lb": 1.0, "clip_cov_ub": 9.0}
    verls = run(model, Case({"loss_mode": "clip_cov", **keys}, rollouts=2))
    controls = {"clip_cov": keys | {"semantics": "reference"}}
    entcov = run(model, Case({"controls": controls}, rollouts=2))
    assert far(entcov, verls) < ROUNDING
    for one, other in zip(entcov.metrics, verls.metrics, strict=True):
        assert one["entcov/cov_clipfrac"] == pytest.approx(other["actor/pg_clipfrac"])
        assert min(one["entcov/cov_clipfrac"]) > 0


def test_verls_kl_cov_is_ours(model, whole):
    verls = run(model, Case({"loss_mode": "kl_cov", **cases.CONTROLS["kl_cov"]}, rollouts=2))
    assert far(whole["kl_cov"], verls) < ROUNDING


def test_verls_keys_are_the_knobs_of_a_mode_without_controls(model, whole):
    for name in ("clip_cov", "kl_cov"):
        by_mode = run(model, Case({"loss_mode": f"entcov_{name}", **cases.CONTROLS[name]}, rollouts=2))
        assert torch.equal(by_mode.parameters, whole[name].parameters)


def test_rollout_importance_weights_scale_the_policy_gradient(model):
    weights = torch.rand(rollout().columns["response_mask"].shape, generator=torch.Generator().manual_seed(3)) + 0.5
    runs = [
        run(model, Case({"loss_mode": mode}, {"micro": 2}, columns={"rollout_is_weights": weights}))
        for mode in ("vanilla", "entcov_none")
    ]
    assert far(*runs) < ROUNDING
    assert far(runs[1], run(model, Case({"loss_mode": "entcov_none"}, {"micro": 2}))) > 100 * ROUNDING


def test_controls_compose(model):
    names = ("clip_cov", "aent")
    both = {"controls": {name: cases.CONTROLS[name] for name in names}}
    outcomes = [run(model, Case(both, {"micro": micro}, rollouts=2)) for micro in (8, 2)]
    check_same(*outcomes)
    assert {"entcov/cov_clipfrac", "entcov/entropy_coef"} <= set(outcomes[0].metrics[0])


def test_a_pass_is_made_only_where_a_control_selects_under_weights_that_nothing_has_scored(whole):
    """Two rollouts of two updates each: one scoring pass a rollout is verl's, and the first update reads it."""
    assert whole["entropy_bonus"].passes == whole["aent"].passes == whole["clip_b"].passes == (2, 4)
    assert whole["clip_cov"].passes == whole["entropic"].passes == (4, 4)


def test_mini_batches_of_one_rollout(model):
    """Updates after the first one see moved weights; what begin decided holds for all."""
    for name in ("clip_b", "clip_cov"):
        runs = []
        for micro in (4, 1):
            case = cases.case(name, micro=micro)
            case.mini, case.epochs = 4, 1
            runs.append(run(model, case))
        check_same(*runs)
    assert runs[0].passes == (4, 4)


def test_metrics_are_numbers_of_the_whole_mini_batch(whole, two_ranks):
    metrics = whole["aent"].metrics[1]
    assert len(metrics["entcov/loss"]) == 2 and len(metrics["entcov/entropy_coef"]) == 1
    assert all(isinstance(x, float) and math.isfinite(x) for name in ours(metrics) for x in metrics[name])
    assert "entcov/clip_b_frac" in whole["clip_b"].metrics[0]
    clipped = two_ranks[0][0]["clip_cov"].metrics[0]
    tokens = int(rollout().columns["response_mask"].sum())
    assert clipped["entcov/cov_clipfrac"] == [int(0.1 * tokens) / tokens] * 2
