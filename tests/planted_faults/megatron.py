"""Faults of the actor on Megatron-Core."""

from tests.planted_faults.fault import Fault

BATCHES = "megatron_integration/micro_batches.py"
T_PARITY = "tests/megatron/test_parity.py::test_"
NODE, T_NODE = "megatron_integration/node.py", "tests/megatron/test_node.py::test_"
SLOW = "importing Megatron-Core takes ten seconds"

FAULTS = (
    Fault(
        "megatron_actor_has_one_temperature",
        "megatron_integration/actor.py",
        '{"temperature": self.temperature_of(micro.sequences)} | options',
        '{"temperature": self.temperature} | options',
        [T_PARITY + "every_layout_updates_as_one_process_does[two processes]"],
        slow="eight layouts in two processes",
    ),
    Fault(
        "megatron_actor_does_not_clip_gradients",
        "megatron_integration/actor.py",
        "for optimizer in self.optimizer.chained_optimizers:",
        "for optimizer in []:",
        [T_PARITY + "every_layout_updates_as_one_process_does[two processes]"],
        slow="eight layouts in two processes",
    ),
    Fault(
        "a_record_of_what_every_replica_chose",
        "megatron_integration/actor.py",
        "op=dist.ReduceOp.MAX",
        "op=dist.ReduceOp.MIN",
        [T_PARITY + "every_layout_updates_as_one_process_does[two processes]"],
        slow="eight layouts in two processes",
    ),
    Fault(
        "a_replica_s_rollouts_reach_nobody",
        "megatron_integration/rollouts.py",
        "dist.recv(part, source, group)",
        "dist.recv(part.clone(), source, group)",
        ["tests/megatron/test_checkpoint.py::test_checkpoints_and_exports"],
        slow="two processes",
    ),
    Fault(
        "sampling_ahead_enters_the_collectives_of_the_updates",
        "megatron_integration/rollouts.py",
        "self.groups.sampling_node.once(",
        "self.groups.node.once(",
        ["tests/megatron/test_checkpoint.py::test_checkpoints_and_exports"],
        slow="two processes",
    ),
    Fault(
        "a_process_writes_into_the_memory_of_its_node",
        NODE,
        "shared=False",
        "shared=True",
        [T_NODE + "a_process_that_writes_changes_its_own_pages_alone"],
    ),
    Fault(
        "files_of_a_node_s_memory_stay_open",
        NODE,
        "files.callback(os.close, descriptor)",
        "pass",
        [T_NODE + "a_column_is_one_copy_on_the_node_and_is_freed"],
    ),
    Fault(
        "every_process_keeps_a_column_of_its_own",
        NODE,
        "dtype=dtype).view(shape)",
        "dtype=dtype).view(shape).clone()",
        [T_NODE + "a_column_is_one_copy_on_the_node_and_is_freed"],
    ),
    Fault(
        "two_nodes_of_torchrun_are_one",
        NODE,
        'os.environ.get("GROUP_RANK")',
        "None",
        [T_NODE + "two_nodes_have_a_leader_each"],
    ),
    Fault(
        "files_close_before_all_have_mapped_them",
        NODE,
        "dist.barrier(group=self.group)",
        "pass",
        [T_NODE + "every_process_gets_the_value_of_the_leader"],
    ),
    Fault(
        "swiglu_on_a_gpu_is_not_fused",
        "megatron_integration/bridge.py",
        '"bias_activation_fusion": True',
        '"bias_activation_fusion": False',
        [
            "tests/megatron/test_built_models.py::test_the_configuration_of_a_gpu_has_the_fusions_that_the_plan_counts_on"
        ],
        slow="builds the large models",
    ),
    Fault(
        "micro_batches_of_a_replica_mix_temperatures",
        BATCHES,
        "[temperatures[s] for s in own] if temperatures else ()",
        "()",
        [T_PARITY + "no_micro_batch_of_a_replica_mixes_temperatures"],
        slow=SLOW,
    ),
    Fault(
        "replicas_get_unequal_shares",
        BATCHES,
        "heapreplace(loads, (load + lengths[s], lightest))",
        "heapreplace(loads, (load + 1, lightest))",
        [T_PARITY + "replicas_share_the_tokens_evenly_and_completely"],
        slow=SLOW,
    ),
    Fault(
        "context_parallel_ranks_take_a_chunk_twice",
        BATCHES,
        "chunks[2 * size - 1 - rank]",
        "chunks[rank]",
        [T_PARITY + "context_parallel_ranks_hold_each_loss_token_once"],
        slow=SLOW,
    ),
    Fault(
        "selections_in_the_order_of_the_micro_batch",
        BATCHES,
        "return selection.at(numbers[self.rows])",
        "return selection.at(slice(len(self.rows)))",
        [T_PARITY + "context_parallel_ranks_hold_each_loss_token_once"],
        slow=SLOW,
    ),
    Fault(
        "the_actor_waits_for_the_device_with_every_statistic",
        "megatron_integration/actor.py",
        "value.flatten()[micro.places]",
        "value[micro.target != -100]",
        ["tests/megatron/test_no_waits.py::test_the_loss_of_a_micro_batch"],
        slow=SLOW,
    ),
    Fault(
        "selections_wait_for_the_device",
        BATCHES,
        "numbers = self.sequences.loss_mask.cumsum(0) - 1",
        "numbers = self.sequences.loss_mask.cumsum(0) - int(self.sequences.loss_mask.sum() > 0)",
        ["tests/megatron/test_no_waits.py::test_the_loss_of_a_micro_batch"],
        slow=SLOW,
    ),
    Fault(
        "selections_are_numbered_from_one",
        BATCHES,
        "numbers = self.sequences.loss_mask.cumsum(0) - 1",
        "numbers = (self.sequences.loss_mask.cumsum(0)).clamp(max=self.sequences.num_loss_tokens - 1)",
        ["tests/megatron/test_no_waits.py::test_places_and_rows_are_the_same_tokens"],
        slow=SLOW,
    ),
    Fault(
        "a_dummy_micro_batch_has_a_loss",
        BATCHES,
        "torch.zeros_like(micro.loss_mask)",
        "micro.loss_mask",
        [T_PARITY + "a_replica_without_a_sequence_runs_one_without_a_loss"],
        slow=SLOW,
    ),
)
