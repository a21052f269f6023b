"""Faults of the loop, the actors, the sampler, the batch, the evaluation and the run around them."""

from tests.planted_faults.fault import Fault

LOOP, ROLLOUTS, ACTOR, BATCH, SAMPLER, RUN, EVALUATION, WARM_START, ENGINE = (
    f"entcov/rl/{name}.py"
    for name in ("loop", "rollouts", "actor", "batch", "sampler", "run", "evaluation", "warm_start", "engine")
)
T_ACTOR, T_RUN, T_LOOP, T_SAMPLER, T_BATCH, T_EVALUATION, T_STALENESS = (
    f"tests/test_{name}.py" for name in ("actor", "run", "loop", "sampler", "batch", "evaluation", "staleness")
)
WHOLE = [T_RUN, T_ACTOR, T_STALENESS]

FAULTS = (
    # ---- the loop ----------------------------------------------------------------------------------------------------
    Fault("sampled_entropy_has_the_wrong_sign", LOOP, 'means["sampled_entropy"] = -float(', 'means["sampled_entropy"] = float(', WHOLE),
    Fault("controls_adapt_after_every_update", LOOP, "metrics |= control.after_step(step_means)",
          "metrics |= [control.after_step(step_means) for _ in range(self.config.actor.updates_per_rollout)][-1]", WHOLE),
    Fault("old_logprob_is_the_samplers", LOOP, 'batch.old_logprob, batch.ref_logprob = scored["logprob"],',
          'batch.old_logprob, batch.ref_logprob = batch.rollout_logprob,', WHOLE),
    Fault("mismatch_cancels", LOOP, "batch.rollout_logprob)[at].abs()", "batch.rollout_logprob)[at]", WHOLE),
    Fault("mean_mismatch_is_the_largest", LOOP, 'float(gap.mean()), float(gap.max())', 'float(gap.max()), float(gap.max())', WHOLE),
    Fault("entropy_drift_without_the_advantage", LOOP, '(scored["entropy_drift"] * batch.advantage)[at]', 'scored["entropy_drift"][at]', WHOLE),
    Fault("means_over_prompt_tokens_too", LOOP, "float(scored[name][at].mean())", "float(scored[name].mean())", WHOLE),
    Fault("groups_by_sample_instead_of_prompt", LOOP, "torch.tensor([r.prompt.uid for r in rollouts])", "torch.tensor([r.sample for r in rollouts])", WHOLE),
    Fault("response_length_with_the_prompt", LOOP, "torch.tensor([len(r.tokens) for r in rollouts])", "torch.tensor([len(r.tokens) + len(r.prompt.tokens) for r in rollouts])", WHOLE),
    Fault("weight_version_not_checked", LOOP, "if rollout.weight_version not in lags:", "if False:", WHOLE),
    Fault("sampler_gets_no_new_weights", LOOP, "            self.sync_weights()\n        self._versions", "            pass\n        self._versions", WHOLE),
    Fault("prompts_of_the_first_step_again", LOOP, "        self.position = collected.position\n", "", WHOLE),
    Fault("prompt_position_not_restored", LOOP, 'self.steps_done, self.position = state["steps_done"], state["position"]', 'self.steps_done = state["steps_done"]', WHOLE),
    Fault("actor_not_restored", LOOP, 'self.actor.load_state_dict(state["actor"])', "pass", WHOLE),
    Fault("controls_not_restored", LOOP, "control.load_state_dict(saved)", "pass", WHOLE),
    Fault("torch_rng_not_restored", LOOP, 'torch.set_rng_state(state["torch_rng"])', "pass", WHOLE),
    Fault("rollouts_sampled_ahead_not_restored", LOOP, 'if state["next"] is not None:', "if False:", WHOLE),
    Fault("mini_batches_in_the_same_order_in_every_step", LOOP, "derived_seed(self.config.seed, step, epoch, 1)", "derived_seed(self.config.seed, 0, epoch, 1)", WHOLE),
    Fault("one_mini_batch_for_all_updates", LOOP, "batch.subset(groups[g])", "batch.subset(groups[0])", WHOLE),
    Fault("rollout_seed_without_the_step", ROLLOUTS, "derived_seed(self.config.seed, step, draw)", "derived_seed(self.config.seed, draw)", WHOLE),
    Fault("rollout_seed_without_the_run_seed", ROLLOUTS, "derived_seed(self.config.seed, step, draw)", "derived_seed(0, step, draw)", WHOLE),
    Fault("further_draws_repeat_the_noise", ROLLOUTS, "derived_seed(self.config.seed, step, draw)", "derived_seed(self.config.seed, step, 0)", WHOLE),
    Fault("further_draws_repeat_the_prompts", ROLLOUTS, "            position += config.prompts_per_step\n", "            position += config.prompts_per_step * (draw == 0)\n", WHOLE),
    Fault("dynamic_sampling_keeps_groups_without_difference", ROLLOUTS, "groups = [g for g in groups if any(r.reward != g[0].reward for r in g)]", "pass", WHOLE),
    Fault("truncated_responses_counted_the_wrong_way", ROLLOUTS, "mean(not r.finished for r in drawn)", "mean(r.finished for r in drawn)", WHOLE),
    Fault("stored_rollouts_lose_that_they_were_cut", ROLLOUTS, "logprob[at], finished, version,", "logprob[at], True, version,", WHOLE),
    # ---- the actor ---------------------------------------------------------------------------------------------------
    Fault("learning_rate_warm_up_is_not_applied", ACTOR, 'group["lr"] = lr\n', 'pass\n', WHOLE),
    Fault("learning_rate_does_not_warm_up", ACTOR, "lr = self.config.lr * min(1.0, ", "lr = self.config.lr * max(1.0, 0 * ", WHOLE),
    Fault("learning_rate_warm_up_starts_at_0", ACTOR, "(self.weight_version + 1) / max(1,", "self.weight_version / max(1,", WHOLE),
    Fault("totals_of_the_micro_batch", ACTOR, "totals=totals, controls", "totals=None, controls", WHOLE),
    Fault("prompt_tokens_count_in_the_totals", ACTOR, "num_tokens=batch.num_loss_tokens", "num_tokens=len(batch.tokens)", WHOLE),
    Fault("gradients_of_the_last_update_stay", ACTOR, "        self.optimizer.zero_grad(set_to_none=True)\n", "", WHOLE),
    Fault("gradient_is_not_clipped", ACTOR, "self.config.max_grad_norm))", "math.inf))", WHOLE),
    Fault("infinite_gradients_update", ACTOR, "if not math.isfinite(grad_norm):", "if False:", WHOLE),
    Fault("selections_of_the_first_update_for_all", ACTOR, "fresh = batch.scored_version == self.weight_version", "fresh = True", WHOLE),
    Fault("all_updates_draw_alike", ACTOR, "step=self.weight_version, config=self.loss", "step=0, config=self.loss", WHOLE),
    Fault("scores_in_micro_batch_order", ACTOR, "where = index[part.loss_mask]", "where = index.sort().values[part.loss_mask]", WHOLE),
    Fault("reference_scores_are_the_policys", ACTOR, "self._stats(self.reference, part).logprob", "self._stats(self.model, part).logprob", WHOLE),
    Fault("trainer_ignores_the_temperature", ACTOR, "temperature=self.temperature, **options", "temperature=1.0, **options", WHOLE),
    Fault("optimizer_state_not_restored", ACTOR, 'self.optimizer.load_state_dict(state["optimizer"])', "pass", WHOLE),
    Fault("weight_version_not_restored", ACTOR, 'self.weight_version = state["weight_version"]', "pass", WHOLE),
    Fault("weight_decay_ignored", ACTOR, "weight_decay=config.weight_decay", "weight_decay=0.0", WHOLE),
    Fault("betas_ignored", ACTOR, "betas=config.betas, ", "", WHOLE),
    Fault("reference_follows_the_policy", ENGINE, "reference = copy.deepcopy(model)", "reference = model", WHOLE),
    # ---- the batch ---------------------------------------------------------------------------------------------------
    Fault("sequence_length_with_the_prompt", BATCH, "[len(response)] * n", "[n] * n", [T_BATCH, *WHOLE]),
    Fault("token_ids_start_again_in_each_sequence", BATCH, "range(s * _POSITIONS_PER_SEQUENCE, s * _POSITIONS_PER_SEQUENCE + n)", "range(n)", [T_BATCH, T_ACTOR]),
    Fault("logprob_one_token_late", BATCH, "[0.0] * silent + rollout.logprob + [0.0]", "[0.0] * (silent + 1) + rollout.logprob", [T_BATCH]),
    Fault("padded_micro_batches_over_budget", BATCH, "cost = lengths[groups[-1][0]] if padded and groups else lengths[s]", "cost = lengths[s]", [T_BATCH]),
    Fault("mini_batches_split_groups", BATCH, "return [[s for g in keys[a:b] for s in members[g]] for a, b in zip(bounds, bounds[1:], strict=False)]",
          "return [list(range(len(groups)))[i::count] for i in range(count)]", [T_BATCH]),
    # ---- the sampler -------------------------------------------------------------------------------------------------
    Fault("sampler_ignores_the_temperature", SAMPLER, "(logits / temperature).log_softmax(-1)", "logits.log_softmax(-1)", [T_SAMPLER]),
    Fault("logprob_without_the_temperature", SAMPLER, "return token[:, 0], logp.gather(1, token)[:, 0]", "return token[:, 0], logits.log_softmax(-1).gather(1, token)[:, 0]", [T_SAMPLER]),
    Fault("generation_goes_past_the_end", SAMPLER, "done = torch.isin(token, eos_ids)", "done = torch.isin(token, eos_ids) & False", [T_SAMPLER]),
    Fault("end_token_is_left_out", SAMPLER, "length[rows[done]] = t + 1", "length[rows[done]] = max(t, 1)", [T_SAMPLER]),
    Fault("finished_by_length", SAMPLER, "finished = bool(tokens) and tokens[-1] in self.eos_ids", "finished = len(tokens) < max_response_length", [T_SAMPLER]),
    Fault("text_ends_in_the_end_token", SAMPLER, "tokens[:-1] if finished else tokens", "tokens", [T_SAMPLER]),
    Fault("sampling_ignores_its_seed", SAMPLER, "manual_seed(seed)", "manual_seed(0)", [T_SAMPLER]),
    Fault("noise_depends_on_the_batch", SAMPLER, "noise[rows]\n", "noise[: len(rows)]\n", [T_SAMPLER]),
    Fault("padding_shifts_positions", SAMPLER, "mask.cumsum(1).sub(1).clamp(min=0), cache", "torch.arange(width, device=device).expand_as(mask), cache", [T_SAMPLER]),
    Fault("rollouts_say_another_weight_version", SAMPLER, "weight_version=self.weight_version,", "weight_version=0,", WHOLE),
    # ---- evaluation, warm start, the run -----------------------------------------------------------------------------
    Fault("evaluation_sets_share_their_noise", EVALUATION, "seed=seed + number", "seed=seed", [T_EVALUATION]),
    Fault("best_of_k_is_the_mean", EVALUATION, "best=sum(map(max, rewards)) / len(rewards)", "best=sum(map(sum, rewards)) / len(everything)", [T_EVALUATION]),
    Fault("evaluation_counts_the_finished_as_cut", EVALUATION, "sum(not rollout.finished for", "sum(rollout.finished for", [T_EVALUATION]),
    Fault("interval_over_responses", EVALUATION, "mean_interval([sum(group) / len(group) for group in rewards])", "mean_interval([r for group in rewards for r in group])", [T_EVALUATION]),
    Fault("evaluation_ignores_its_temperature", EVALUATION, "temperature=temperature,", "temperature=1.0,", [T_EVALUATION]),
    Fault("evaluation_draws_differ_from_step_to_step", RUN, "seed=derived_seed(self.config.seed, _EVAL_SEED),  # the same", "seed=derived_seed(self.config.seed, _EVAL_SEED, step),  # the same", WHOLE),
    Fault("evaluation_draws_are_those_of_training", RUN, "seed=derived_seed(self.config.seed, _EVAL_SEED),  # the same", "seed=derived_seed(self.config.seed, step, 0),  # the same", WHOLE),
    Fault("reinforcement_starts_with_the_warm_start_prompts", RUN, "config.warm_start.steps * config.warm_start.batch_size", "0", WHOLE),
    Fault("resumed_run_may_have_another_recipe", RUN, "before.get(key) != now.get(key) and not", "False and not", WHOLE),
    Fault("last_step_is_not_stored", RUN, "if last or (self.config.checkpoint.every and", "if (self.config.checkpoint.every and", WHOLE),
    Fault("warm_start_rate_is_constant", WARM_START, "* 0.5 * (1 + math.cos(math.pi * step / config.steps))", "* 1.0", WHOLE),
    Fault("warm_start_divides_by_the_micro_batch", WARM_START, "/ batch.num_loss_tokens", "/ part.num_loss_tokens", WHOLE),
    Fault("warm_start_leaves_out_the_end_token", WARM_START, "+ [tokenizer.eos_token_id]", "", WHOLE),
)  # fmt: skip
