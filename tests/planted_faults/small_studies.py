"""Faults of the frame of studies, and of the studies that need no training run."""

from tests.planted_faults.fault import Fault

BASE, CLAMP, DRIFT, SPLITS = (
    f"entcov/studies/{name}.py" for name in ("base", "clamp_training", "drift_steps", "splits")
)
PROGRESS = "entcov/rl/record/progress.py"
T_PARTS, T_CLAMP, T_DRIFT, T_SPLITS = (
    f"tests/studies/test_{name}.py::test_" for name in ("parts", "clamp", "drift", "splits")
)
SAME_WAYS, INVARIANT = (
    T_CLAMP + "ways_that_are_the_same_train_the_same",
    T_SPLITS + "ours_is_invariant_and_the_reference_is_not",
)
FIRST_ORDER = T_DRIFT + "the_theorems_are_exact_to_first_order"

FAULTS = (
    # ---- the frame ---------------------------------------------------------------------------------------------------
    Fault(
        "stored_parts_of_other_arguments_are_taken",
        BASE,
        'if stored["part"] != _identity(part):',
        "if False:",
        [T_PARTS + "a_part_of_other_arguments_is_refused"],
    ),
    Fault(
        "parts_are_made_again",
        BASE,
        "if results[label] is None}",
        "}",
        [T_PARTS + "parts_are_stored_and_not_made_again"],
    ),
    Fault(
        "a_failed_part_is_not_named",
        BASE,
        'raise StudyError(f"{label}: {type(error).__name__}: {error}") from error',
        "raise error",
        [T_PARTS + "a_failed_part_is_named_and_keeps_the_others"],
    ),
    Fault(
        "workers_outlive_a_killed_study",
        BASE,
        "    Thread(target=_end_with, args=(parent_process().sentinel,), daemon=True).start()\n",
        "",
        [T_PARTS + "workers_end_with_a_killed_study"],
        slow="it waits for two minutes",
    ),
    Fault(
        "the_time_left_counts_stored_parts",
        PROGRESS,
        "own = self._done - self._before",
        "own = 0",
        [T_PARTS + "progress_in_a_log"],
    ),
    # ---- AEnt's clamp ------------------------------------------------------------------------------------------------
    Fault(
        "a_way_is_known_by_its_object",
        CLAMP,
        "controls = [] if way == NONE",
        "controls = [] if way is NONE",
        [SAME_WAYS],
    ),
    Fault(
        "the_clamp_is_not_asked_for",
        CLAMP,
        'given = {"clamp_p": self.clamp_p, "top_k": self.top_k}',
        'given = {"clamp_p": self.clamp_p and 1e-9, "top_k": self.top_k}',
        [SAME_WAYS],
    ),
    Fault(
        "decoys_are_worth_as_much",
        CLAMP,
        "torch.where((kind >= 1).all(1), 0.5, 0.0)",
        "torch.where((kind >= 1).any(1), 0.5, 0.0)",
        [T_CLAMP + "rewards_and_values_by_hand"],
    ),
    Fault(
        "the_coefficient_is_chosen_on_the_reporting_seeds",
        CLAMP,
        "train(task, way, c, budget.steps, budget.choosing)",
        "train(task, way, c, budget.steps, budget.reporting)",
        [T_CLAMP + "the_coefficient_is_chosen_on_the_choosing_seeds_alone"],
    ),
    # ---- first-order drift -------------------------------------------------------------------------------------------
    Fault(
        "advantages_are_not_centred",
        DRIFT,
        "    advantage -= (p * advantage).sum(-1, keepdim=True)\n",
        "    advantage += 1.0\n",
        [FIRST_ORDER],
    ),
    Fault(
        "the_prediction_has_the_wrong_sign",
        DRIFT,
        '"natural gradient": lambda eta: (eta * advantage, -eta',
        '"natural gradient": lambda eta: (eta * advantage, eta',
        [FIRST_ORDER],
    ),
    # ---- divisions ---------------------------------------------------------------------------------------------------
    Fault(
        "a_division_forgets_the_last_responses",
        SPLITS,
        "starts = range(0, -(-count // ranks), size)",
        "starts = range(0, count // ranks - size + 1, size)",
        [T_SPLITS + "a_division_takes_every_response_once"],
    ),
    Fault(
        "denominators_of_the_micro_batch",
        SPLITS,
        "        loss += _backward(part, head, controls, own, totals)\n",
        "        loss += _backward(part, head, controls, own, None)\n",
        [INVARIANT],
    ),
    Fault(
        "mean_of_means_is_the_mean",
        SPLITS,
        "torch.stack(means).mean()",
        "torch.stack(sums).sum()",
        [T_SPLITS + "mean_of_means_by_hand"],
    ),
)
