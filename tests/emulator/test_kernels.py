"""The CUDA kernels, unmodified, on the CPU (tests/emulator): right on every kind of row, in every schedule, clean under
the sanitizers; and faults planted in them are caught.

Most tests are those of the CPU kernels: whatever they promise, these promise too.
"""

import ctypes
import json
import math
import subprocess
import sys

import pytest
import torch

from entcov.ops import core
from entcov.ops.message import hash_values
from entcov.stats.logit_covariance import logit_covariance
from entcov.stats.token_stats import token_stats
from entcov.verify.check import check_rows
from tests.emulator import build, emulated
from tests.support import local_ops as ops
from tests.support.processes import run_command
from tests.support.repeated import cases_of, module_of
from tests.support.row_kinds import rows, targets

IGNORE = -100

# Collected here once more, under the fixtures of this file.
CPU_TESTS = {
    "ops/test_row_stats": """
        every_kind_of_row_matches_float64 every_vocabulary_size_matches_float64 no_rows_and_no_columns
        entropy_of_a_nearly_certain_row_keeps_its_digits exponential_vanishes_below_the_range_of_fp32
        exponential_is_as_accurate_as_promised bounds_hold_with_room_where_the_errors_of_all_exponentials_agree
        logits_of_any_size
        fp16_is_read_exactly a_row_depends_on_itself_alone nan_and_plus_infinity_stay_in_their_row
        ignored_rows_are_zero_and_not_read
        a_row_of_nan_or_nan_beside_minus_infinity padding_columns_do_not_exist merge_is_associative
        merge_of_one_shard_and_of_empty_shards_changes_nothing shards_whose_maxima_are_out_of_sight_of_each_other
        shards_merge_to_the_whole_row
    """,
    "ops/test_logits_grad": """
        fp32_gradient_matches_float64_on_every_kind_of_row large_vocabularies impossible_tokens_get_no_gradient
        peaked_rows_keep_the_digits_of_small_gradients in_place_has_the_bits_of_out_of_place nan_stays_in_its_row
        half_types_are_the_fp32_gradient_rounded_to_nearest_even a_row_depends_on_itself_alone no_rows_and_no_columns
        shards_give_the_columns_of_the_whole_gradient
        padding_ignored_and_unwanted_rows_get_zeros_without_being_read
    """,
    "ops/test_covariance_stats": """
        every_kind_of_row_matches_float64 large_vocabularies a_small_step_keeps_its_digits equal_logits_change_nothing
        a_column_impossible_before_is_left_out a_column_impossible_only_afterwards_makes_the_kl_infinite
        parts_impossible_afterwards_join_a_possible_one nan_stays_in_its_row masked_rows_are_zero_and_not_read
        padding_columns_do_not_exist no_rows_and_no_columns shards_merge_to_the_whole_row merge_is_associative
        a_row_depends_on_itself_alone gradient_matches_float64 half_gradients_are_the_fp32_gradient_rounded
        changes_beyond_fp32_are_those_of_float64
    """,
    "ops/test_message": """
        hash_in_integers_of_python hash_sees_every_value_and_the_order bad_arguments_are_named
        a_rank_that_failed_is_marked_and_no_other_is messages_carry_the_payload_bit_by_bit
        merges_accept_shards_exactly_when_they_cover_the_vocabulary_once
        merges_refuse_ranks_that_were_called_differently_or_failed
    """,
    "objective/test_selection_kernels": """
        covariance_and_summary_have_the_bits_of_the_torch_code the_chosen_tokens_are_those_of_the_torch_code
        means_of_many_values_and_scores_have_the_bits_of_the_torch_code repeated_ids_are_counted_as_by_the_torch_code
        draws_go_by_the_hash_of_seed_step_and_id scores_sort_as_numbers_do zero_and_minus_zero_tie
        the_quantile_is_the_order_statistic stages_one_by_one_give_what_all_at_once_do
    """,
    "objective/test_selection_splits": "ranks_in_threads",
    "stats/test_sharded_without_waiting": """
        ranks_that_agree_get_the_bits_of_the_checked_way ranks_that_disagree_all_get_nan
        a_rank_that_fails_raises_and_the_others_get_nan
    """,
}
for file, names in CPU_TESTS.items():
    globals().update(cases_of(file, names, prefix=file.partition("/test_")[2] + "_"))
ranks = module_of("stats/test_sharded_without_waiting").ranks  # a fixture
expected = module_of("objective/test_selection_splits").expected  # another


@pytest.fixture(autouse=True)
def emulated_gradient(emulation, monkeypatch):
    monkeypatch.setitem(module_of("ops/test_logits_grad").gradient.__kwdefaults__, "op", ops.logits_grad)


@pytest.fixture
def isa():
    """The imported tests run on each instruction set of the CPU; here there is one machine."""
    return "emulated"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_token_stats_and_logit_covariance_with_gradients(dtype):
    lines = list(check_rows(((6, 7), (5, 1000), (3, 4099)), (dtype,), ops=("token_stats", "logit_covariance")))
    assert len(lines) > 200
    assert not [line.cells() for line in lines if not line.passed]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_cut_into_segments(dtype):
    kinds = ("gaussian", "peaked", "offset 1e4", "-inf columns")
    lines = list(check_rows(((2, 151936),), (dtype,), kinds, ops=("token_stats", "logit_covariance")))
    assert not [line.cells() for line in lines if not line.passed]


def test_bits_do_not_depend_on_the_schedule(products):
    logits = rows("gaussian", 3, 50257, torch.bfloat16)
    target = targets(logits)
    results = []
    try:
        for seed in range(4):
            emulated.set_seed(products["plain"], seed)
            stats = ops.row_stats(logits, target, 0, 50257, 0.7, True, IGNORE)
            pair = ops.covariance_stats(logits, logits.flip(1).contiguous(), 0, 50257, 0.7, None)
            results.append(torch.cat((stats, pair), 1))
    finally:
        emulated.set_seed(products["plain"], 0)
    assert all(torch.equal(result, results[0]) for result in results)


def test_bits_of_a_segmented_row_do_not_depend_on_the_batch():
    logits = rows("gaussian", 5, 41003, torch.float16)
    target = targets(logits)
    together = ops.row_stats(logits, target, 0, 41003, 1.0, True, IGNORE)
    for t in range(5):
        alone = ops.row_stats(logits[t : t + 1], target[t : t + 1], 0, 41003, 1.0, True, IGNORE)
        assert torch.equal(alone[0], together[t])


def test_values_that_many_blocks_hash_have_the_bits_of_the_cpu(kernels):
    """In 256 parts at most, of which the last have a value less than the first."""
    count = 256 * 4096 + 70001
    values = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(0))
    assert [kernels.hash_parts(n) for n in (0, 1, 4096, 4097, 131072, count)] == [1, 1, 1, 2, 32, 256]
    sent = torch.empty(4)
    core._cpu.message(0, 0, values.data_ptr(), count, 5, 0, 0, sent.data_ptr(), 0, 1)
    assert torch.equal(hash_values(values, 5)[None].view(torch.int32), sent[:2].view(torch.int32))


# ---- what differs from the CPU: values are poisoned, not raised for -------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 60, 2**40])
def test_a_target_outside_the_vocabulary_makes_its_row_nan(bad):
    logits = rows("gaussian", 3, 60).requires_grad_()
    target = targets(logits.detach())
    good = token_stats(logits, target)
    target[1] = bad
    stats = token_stats(logits, target)
    assert stats.logprob[1].isnan() and stats.entropy[1].isnan()
    assert torch.equal(stats.logprob[[0, 2]], good.logprob[[0, 2]])
    (grad,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), logits)
    assert grad[1].isnan().all() and not grad[[0, 2]].isnan().any()


def test_a_target_on_another_shard_is_no_bad_target():
    logits = rows("gaussian", 2, 60)
    stats = ops.row_stats(logits, torch.tensor([70, 5]), 0, 120, 1.0, False, IGNORE)
    assert stats[0, 3] == -math.inf and stats[1, 3] == logits[1, 5]


@pytest.mark.parametrize("V", [60, 41003])  # a row of one block, and one that is cut
def test_logits_written_since_the_forward_pass_make_the_targets_gradient_nan(V):
    logits = rows("gaussian", 4, V, torch.bfloat16)
    target = targets(logits)
    target[3] = IGNORE
    stats = ops.row_stats(logits, target, 0, V, 1.0, False, IGNORE)
    stats = ops.merge_row_stats(stats[None], target, 1.0, IGNORE)
    settings = (target, stats, torch.ones(4), None, None, None, 0, V, 1.0, IGNORE)
    for factor in (1.0, 2.0, 0.5):
        grad = ops.logits_grad(logits * factor, *settings)
        at_target = torch.arange(V) == target[:, None]
        assert torch.equal(grad.isnan(), at_target & (target != IGNORE)[:, None] & (factor != 1.0))
        in_place = logits * factor
        ops.logits_grad_(in_place, *settings)
        assert not in_place.isnan().any()


def test_a_row_without_a_finite_logit_is_nan():
    logits = rows("gaussian", 4, 60)
    logits[1] = -math.inf
    target = targets(logits[[0]].repeat(4, 1))
    target[3] = IGNORE
    logits[3] = -math.inf
    stats = token_stats(logits, target, moments=True)
    for name in ("logprob", "entropy", "collision", "varentropy", "entropy_drift"):
        assert getattr(stats, name)[1].isnan() and not getattr(stats, name)[[0, 2, 3]].isnan().any(), name
    changed = logit_covariance(logits, logits + 1)
    assert all(value[1].isnan() and not value[[0, 2]].isnan().any() for value in changed)


def test_a_launch_may_load_its_kernel_while_a_graph_is_captured_and_leaves_the_mode(products):
    """The emulator refuses launches in other modes; 0 is cudaStreamCaptureModeGlobal, that of a new thread."""
    token_stats(rows("gaussian", 2, 60), torch.zeros(2, dtype=torch.int64))
    assert ctypes.CDLL(str(products["plain"])).cuda_emu_capture_mode() == 0


def test_a_failed_launch_says_what_was_launched(kernels):
    with pytest.raises(RuntimeError, match="merge_row_stats: the launch of 4294967296 blocks of 256 threads failed"):
        kernels.merge_row_stats((0, 1, 2**40, 4), 0, (0, 8, 1.0, IGNORE), 4, 0, (0,) * 5, 0)


def test_tensors_on_a_gpu_without_kernels_are_a_clear_error(monkeypatch):
    monkeypatch.delitem(core.KERNELS, "cuda", raising=False)
    with pytest.raises(RuntimeError, match="entcov: the tensors are on cuda:0, but it was built without CUDA kernels"):
        core.kernels_of(torch.device("cuda:0"))


# ---- sanitizers ------------------------------------------------------------------------------------------------------


def replay(extension, mode: str, seed: int, case: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(build.HERE / "replay.py"), str(extension), str(seed), case]
    return run_command(command, env=build.preload(mode))


@pytest.fixture(scope="session")
def plain_digests(products):
    return json.loads(replay(products["plain"], "plain", 0).stdout)


@pytest.mark.parametrize("mode, seed", [("plain", 1), ("plain", 2), ("asan", 3), ("tsan", 4)])
def test_every_build_and_schedule_gives_the_same_bits(mode, seed, products, plain_digests):
    done = replay(products[mode], mode, seed)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == plain_digests and len(plain_digests) >= 15


# ---- the tests' own test ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", build.MUTANTS)
def test_a_fault_planted_in_a_kernel_is_caught(name, products):
    mutant = build.MUTANTS[name]
    clean = replay(products[mutant.mode], mutant.mode, 2, mutant.case)
    assert clean.returncode == 0, clean.stderr[-4000:]
    done = replay(products[name], mutant.mode, 2, mutant.case)
    assert done.returncode != 0 and mutant.report in done.stderr, done.stderr[-4000:]


# fault: the build that catches it, and what is said. 719 is cudaErrorLaunchFailure.
FAULTS = {
    "out_of_bounds": ("asan", "AddressSanitizer: heap-buffer-overflow"),
    "shared_overrun": ("asan", "index 256 out of bounds"),
    "missing_barrier": ("tsan", "ThreadSanitizer: data race"),
    "missing_warp_sync": ("tsan", "ThreadSanitizer: data race"),
    "misaligned_load": ("plain", "719 misaligned 16-byte load"),
    "divergent_barrier": ("plain", "719 divergent __syncthreads"),
    "missing_lanes": ("plain", "719 deadlock: "),
    "uninitialised_shared": ("plain", "0  nan"),
}
RUN_FAULT = """
import ctypes, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from replay import Block
library = ctypes.CDLL(sys.argv[2])
library.cuda_emu_last_error.restype = ctypes.c_char_p
data, out = Block(np.ones(2048, np.uint16)), Block(np.zeros(256, np.float32))
arguments = [ctypes.c_void_p(data.pointer), ctypes.c_void_p(out.pointer), 2048, int(sys.argv[4])]
code = getattr(library, sys.argv[3] + "_fault")(*arguments)
print(code, library.cuda_emu_last_error().decode(), out.read().max())
"""


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_kernel_is_told_from_its_correct_twin(name, products):
    mode, report = FAULTS[name]
    command = [sys.executable, "-c", RUN_FAULT, str(build.HERE), str(products[f"faults {mode}"]), name]
    correct, faulty = (
        subprocess.run([*command, flag], env=build.preload(mode), capture_output=True, text=True) for flag in "01"
    )
    assert correct.returncode == 0 and correct.stdout.startswith("0 "), correct.stdout + correct.stderr[-4000:]
    assert "nan" not in correct.stdout
    assert report in faulty.stdout + faulty.stderr, faulty.stdout + faulty.stderr[-4000:]


def test_a_missing_barrier_gives_wrong_numbers_in_some_schedule(products):
    library = ctypes.CDLL(str(products["faults plain"]))
    data, out = torch.ones(2048, dtype=torch.bfloat16), torch.zeros(256)
    seen = {0: set(), 1: set()}
    for seed in range(4):
        library.cuda_emu_set_seed(seed)
        for faulty in (0, 1):
            pointers = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr())
            assert library.missing_barrier_fault(*pointers, 2048, faulty) == 0
            seen[faulty].add(str(out[0].item()))
    assert seen[0] == {"256.0"} and seen[1] != {"256.0"}
