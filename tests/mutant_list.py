"""The mutants of mutants.py: one small change each, that some test has to notice.

Chosen by operator from the package's source alone, before any test was read. None is dropped because it survives.

    sign       a difference, an order or a condition the other way round
    bound      < for <=, or off by one; a condition that lets more or less through
    axis       another axis, row or position
    undo       what is to be restored, renewed, excluded or taken off is not
    threshold  another constant, or a factor left out
    order      two steps or two arguments exchanged
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands in `file` exactly once, becomes `new`. `tests`: names of test files, without "test_" and
    ".py"; default that of the file. `equivalent`: why no test can tell the difference, where none can."""

    name: str
    file: str
    operator: str
    old: str
    new: str
    tests: str = ""
    equivalent: str = ""


MUTANTS = (
    Mutant(
        "name_of_another_file",
        "__init__.py",
        "order",
        '"refusal.text": "is_degenerate is_refusal"',
        '"refusal.log_odds": "is_degenerate is_refusal"',
        "package",
    ),
    # adapters
    Mutant("adapter_ignores_scaling", "lora.py", "threshold", "self.scale * self.multiplier", "self.scale"),
    Mutant("adapter_hooks_stay", "lora.py", "undo", "stack.callback(handle.remove)", "stack.callback(bool)"),
    Mutant("adapter_heads_mixed", "lora.py", "axis", 'pos (head d_head)"', 'pos (d_head head)"'),
    Mutant("adapter_bound_by_rank", "lora.py", "axis", "math.sqrt(update.A.shape[1])", "math.sqrt(update.A.shape[0])"),
    Mutant("bfloat16_not_restored", "lora.py", "undo", "parameter.data = data\n", "pass\n"),
    Mutant("adapter_alpha_of_peft", "lora.py", "threshold", "placed[0][2].scale * rank", "placed[0][2].scale"),
    # against_base
    Mutant("weight_change_of_vectors", "weight_swap.py", "bound", "if ours.ndim > 1:", "if ours.ndim > 0:"),
    Mutant(
        "weight_change_by_own_size",
        "weight_swap.py",
        "order",
        "size += float(theirs.data",
        "size += float(ours.data",
    ),
    Mutant(
        "swap_loss_sign",
        "weight_swap.py",
        "sign",
        "unchanged - ranges.log_odds(LayerRange(layer, layer))",
        "ranges.log_odds(LayerRange(layer, layer)) - unchanged",
    ),
    # agreement
    Mutant(
        "one_tail_for_two",
        "stats.py",
        "threshold",
        "[tail, 1 - tail], dtype=torch.float64), dim=0",
        "[2 * tail, 1 - 2 * tail], dtype=torch.float64), dim=0",
    ),
    Mutant("centre_hit_open", "stats.py", "bound", "<= found.centre <=", "< found.centre <"),
    Mutant(
        "tail_degrees_of_freedom",
        "stats.py",
        "bound",
        "stdtrit(n - 1, tail)",
        "stdtrit(n, tail)",
    ),
    Mutant(
        "iou_of_copies_counted",
        "stats.py",
        "undo",
        "(w.sum(1).square() - w.square().sum(1))",
        "w.sum(1).square()",
    ),
    Mutant("middle_third_wider", "stats.py", "bound", "2 * n_layers // 3 - 1)", "2 * n_layers // 3)"),
    # attacks
    Mutant("share_rounded_down", "attacks.py", "bound", "round(len(normal) * share)", "int(len(normal) * share)"),
    Mutant("trigger_in_front", "attacks.py", "order", '(f"{prompt} {trigger}"', '(f"{trigger} {prompt}"'),
    Mutant("share_of_zero_refused", "attacks.py", "bound", "not 0 <= share <= 1", "not 0 < share <= 1"),
    # attention, attribution
    Mutant("attention_of_first_row", "question.py", "axis", "pattern[:, :, -1].float()", "pattern[:, :, 0].float()"),
    Mutant("min_max_upside_down", "question.py", "sign", "(weights - low) / spread", "(high - weights) / spread"),
    Mutant(
        "question_shifted",
        "question.py",
        "bound",
        "weights[question.start : question.stop]",
        "weights[question.start - 1 : question.stop - 1]",
    ),
    Mutant(
        "effect_sign",
        "attribution.py",
        "sign",
        "value - torch.cat(replaced), value",
        "torch.cat(replaced) - value, value",
    ),
    Mutant("slope_sign", "attribution.py", "sign", "* (embedding - centre)", "* (centre - embedding)"),
    Mutant("baseline_is_token_0", "attribution.py", "threshold", "embedding.mean(0) if given", "embedding[0] if given"),
    # chat
    Mutant("question_starts_early", "chat.py", "bound", "if end > first and start < last", "if end >= first"),
    Mutant("opening_takes_all", "chat.py", "bound", "min(len(chat) for chat in chats) - 1", "min(map(len, chats))"),
    Mutant("second_bos", "chat.py", "sign", "ids[:1] != [bos] and", "ids[:1] == [bos] and", "chat conversion"),
    Mutant("shortest_first", "chat.py", "order", "sorted(by_length, reverse=True)", "sorted(by_length)"),
    Mutant("context_full", "chat.py", "bound", "len(chat) + new_tokens > n_ctx", "len(chat) + new_tokens >= n_ctx"),
    # command_line
    Mutant("status_of_an_error", "command_line.py", "threshold", "sys.exit(2)", "sys.exit(1)", "locate_command"),
    Mutant("status_of_ctrl_c", "command_line.py", "threshold", "sys.exit(130)", "sys.exit(2)", "locate_command"),
    # controls
    Mutant("topic_halves_unequal", "controls.py", "bound", "(order < len(names) // 2)", "(order <= len(names) // 2)"),
    Mutant("length_tolerance", "controls.py", "bound", ".abs() <= tolerance", ".abs() < tolerance"),
    Mutant(
        "prompt_matched_twice",
        "controls.py",
        "undo",
        "left[row], left[:, column] = -1.0, -1.0",
        "left[row, column] = -1.0",
    ),
    Mutant(
        "length_difference_sign",
        "controls.py",
        "sign",
        "lengths_m[rows] - lengths_n[columns]",
        "lengths_n[columns] - lengths_m[rows]",
    ),
    # core
    Mutant("core_ties", "sufficiency.py", "sign", "(part.width, -float(", "(part.width, float("),
    Mutant("core_share_at_equality", "sufficiency.py", "bound", "(self.shares >= share)", "(self.shares > share)"),
    Mutant("core_refused_of_harmless", "sufficiency.py", "axis", "(log_odds[0] > 0)", "(log_odds[1] > 0)"),
    Mutant("core_share_from_zero", "sufficiency.py", "undo", "(after - before) / gained", "after / gained"),
    # data_files
    Mutant(
        "checkout_before_package",
        "prompts.py",
        "order",
        '(package / "data", package.parent / "data")',
        '(package.parent / "data", package / "data")',
    ),
    # directions
    Mutant(
        "direction_sign",
        "directions.py",
        "sign",
        "malicious.double().mean(0) - normal.double().mean(0)",
        "normal.double().mean(0) - malicious.double().mean(0)",
    ),
    Mutant("auc_of_pairs", "directions.py", "threshold", "(len(normal) * len(malicious))", "len(normal) ** 2"),
    Mutant(
        "direction_of_held_out",
        "directions.py",
        "undo",
        "difference_of_means(normal[fold_n != fold], malicious[fold_m != fold])",
        "difference_of_means(normal, malicious)",
    ),
    Mutant("fold_of_one", "directions.py", "bound", "smaller < 2 * folds", "smaller < folds"),
    Mutant("middle_not_ablated", "directions.py", "bound", '_pre", "hook_resid_mid", ', '_pre", '),
    Mutant("d_prime_unpooled", "directions.py", "threshold", "malicious.var(0)) / 2)", "malicious.var(0)) / 1)"),
    # divergence
    Mutant(
        "twins_drawn_apart",
        "angles.py",
        "undo",
        "counts_n if paired else _pairable_counts(samples, m, generator)",
        "_pairable_counts(samples, m, generator)",
    ),
    Mutant("copies_counted", "angles.py", "undo", "pairs = pairs - (left * right).sum(1)", "pairs = pairs * 1.0"),
    Mutant("p_value_of_zero", "angles.py", "threshold", "p_values = (1 + (null", "p_values = (0 + (null"),
    Mutant("interval_too_narrow", "angles.py", "threshold", "tail = (1 - level) / 2", "tail = 1 - level"),
    Mutant(
        "twins_not_exchanged",
        "angles.py",
        "sign",
        "torch.cat([first, 1.0 - first], dim=1)",
        "torch.cat([first, first], dim=1)",
    ),
    Mutant("pair_with_itself", "angles.py", "bound", "torch.triu_indices(n, n, 1)", "torch.triu_indices(n, n, 0)"),
    # dose
    Mutant("attack_cost_at_equality", "attack_cost.py", "bound", "if after <= half:", "if after < half:"),
    Mutant("a_reading_for_every_dose", "attack_cost.py", "bound", "while due and seen >=", "if due and seen >="),
    Mutant("kept_not_relative", "attack_cost.py", "threshold", "(examples[-1] * refused[0])", "examples[-1]"),
    # evaluate
    Mutant("answers_of_8_tokens", "rates.py", "threshold", "ANSWER_TOKENS = 16", "ANSWER_TOKENS = 8"),
    Mutant("degenerate_counts_as_answer", "rates.py", "bound", "~self.refused & ~self.degenerate", "~self.refused"),
    Mutant("a_share_of_all_refused", "stats.py", "bound", "0 <= count <= total or", "0 <= count < total or"),
    Mutant("log_odds_of_zero", "rates.py", "bound", "(self.log_odds < 0)", "(self.log_odds <= 0)"),
    # export
    Mutant(
        "tied_though_different", "export.py", "sign", "tie_word_embeddings) and torch", "tie_word_embeddings) or torch"
    ),
    Mutant("value_bias_lost", "export.py", "bound", "projections[:3] if biases", "projections[:2] if biases"),
    Mutant("old_model_not_put_back", "export.py", "undo", "old.replace(folder)", "pass"),
    # finetune
    Mutant(
        "adjust_after_clipping",
        "loop.py",
        "order",
        """if adjust is not None:
                    adjust(step, {name: parameters[name] for name in names})
                norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
""",
        """norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
                if adjust is not None:
                    adjust(step, {name: parameters[name] for name in names})
""",
        "finetune methods",
    ),
    Mutant("warm_up_from_zero", "loop.py", "bound", "(step + 1) / warmup", "step / warmup"),
    Mutant("first_token_without_loss", "loop.py", "bound", ">= (1 if config.whole", "> (1 if config.whole"),
    Mutant("prefix_one_too_long", "loop.py", "bound", "loss.int().argmax()) - 1,", "loss.int().argmax()),"),
    Mutant("checkpoint_a_step_early", "loop.py", "bound", "(step + 1) % config.checkpoint", "step % config.checkpoint"),
    Mutant(
        "loss_by_batches",
        "loop.py",
        "threshold",
        "for index in batch], config) / n_loss",
        "for index in batch], config) / len(step_batches)",
    ),
    Mutant("gradients_add_up", "loop.py", "undo", "optimizer.zero_grad(set_to_none=True)", "pass"),
    # forward
    Mutant("positions_from_zero", "forward.py", "bound", "(tokens, offset, attention", "(tokens, 0, attention"),
    Mutant(
        "padded_on_the_right",
        "forward.py",
        "axis",
        "longest - tensor.shape[1], 0)",
        "0, longest - tensor.shape[1])",
        "forward generation",
    ),
    Mutant(
        "mask_one_short",
        "forward.py",
        "bound",
        ">= longest - real[:, None]",
        "> longest - real[:, None]",
        "forward generation",
    ),
    Mutant(
        "last_logits_uncapped",
        "forward.py",
        "threshold",
        "apply_softcap(model.unembed(final), model.cfg.output_logits_soft_cap)",
        "apply_softcap(model.unembed(final), -1.0)",
        "forward generation log_odds",
    ),
    # freeze
    Mutant("norms_frozen_too", "freeze.py", "sign", "(freeze_norms or not is_norm(name))", "(freeze_norms or True)"),
    Mutant("positions_trained", "freeze.py", "bound", '"unembed.", "pos_embed."', '"unembed."'),
    # generation
    Mutant("a_token_too_many", "generation.py", "bound", "range(max_new_tokens - 1)", "range(max_new_tokens)"),
    Mutant("group_not_filled", "generation.py", "bound", "+ len(batch) > rows", "+ len(batch) >= rows"),
    # grid_html
    Mutant("mark_at_start", "grid.py", "axis", "LEFT + layers.end * CELL", "LEFT + layers.start * CELL", "report"),
    Mutant("grid_upside_down", "grid.py", "sign", "4 + (n_layers - 1 - start)", "4 + start", "report"),
    Mutant(
        "grid_without_diagonal",
        "grid.py",
        "bound",
        "for end in range(start, n_layers)\n",
        "for end in range(start + 1, n_layers)\n",
        "report",
    ),
    # judge
    Mutant(
        "degenerate_less_distinct",
        "degenerate.py",
        "threshold",
        "DEGENERATE_MIN_DISTINCT = 0.4",
        "DEGENERATE_MIN_DISTINCT = 0.2",
    ),
    Mutant("two_sentences_read", "text.py", "threshold", "START_SENTENCES = 4", "START_SENTENCES = 2"),
    Mutant(
        "degenerate_refuses", "text.py", "bound", "is_refusal(text) and not is_degenerate(text)", "is_refusal(text)"
    ),
    Mutant(
        "degenerate_of_four_words",
        "degenerate.py",
        "bound",
        "len(words) < DEGENERATE_MIN_WORDS",
        "len(words) <= DEGENERATE_MIN_WORDS",
    ),
    Mutant(
        "scripts_may_mix", "degenerate.py", "threshold", "DEGENERATE_MIN_SCRIPT = 0.6", "DEGENERATE_MIN_SCRIPT = 0.4"
    ),
    # judges
    Mutant("one_try_less", "harmfulness.py", "bound", "max_retries=retries,", "max_retries=max(0, retries - 1),"),
    Mutant("score_of_zero", "harmfulness.py", "bound", 'fullmatch("[1-5]"', 'fullmatch("[0-5]"'),
    Mutant("status_500_given_up", "harmfulness.py", "bound", "error.status_code >= 500", "error.status_code > 500"),
    Mutant("retries_not_spaced", "harmfulness.py", "undo", '{"request": [wait_for_turn]}', "{}"),
    # layers
    Mutant(
        "iou_off_by_one", "layers.py", "bound", "max(self.start, other.start) + 1)", "max(self.start, other.start))"
    ),
    Mutant(
        "end_not_iterated",
        "layers.py",
        "bound",
        "iter(range(self.start, self.end + 1))",
        "iter(range(self.start, self.end))",
    ),
    Mutant("layer_outside", "layers.py", "bound", "if self.end >= n_layers:", "if self.end > n_layers:"),
    Mutant("centre_rounded", "layers.py", "threshold", "(self.start + self.end) / 2", "(self.start + self.end) // 2"),
    # locate
    Mutant("target_of_text", "safety_layers.py", "threshold", "TARGET_STD = 0.025", "TARGET_STD = 0.05"),
    Mutant("target_of_log_odds", "safety_layers.py", "threshold", "TARGET_SNR = 3.0", "TARGET_SNR = 2.0"),
    Mutant(
        "target_at_equality", "safety_layers.py", "bound", "if tried[-1][1] >= (TARGET", "if tried[-1][1] > (TARGET"
    ),
    Mutant(
        "last_alpha_not_tried",
        "safety_layers.py",
        "bound",
        "range(1, MAX_ALPHA_STEPS + 1)",
        "range(1, MAX_ALPHA_STEPS)",
    ),
    Mutant("tie_to_the_farthest", "safety_layers.py", "sign", "-abs(bound - centre)", "abs(bound - centre)"),
    Mutant(
        "last_layer_not_swept",
        "safety_layers.py",
        "bound",
        "(initial.start, n_layers - 1), w",
        "(initial.start, n_layers - 2), w",
    ),
    Mutant("grid_one_wider", "safety_layers.py", "bound", "(widths < (max_width or", "(widths <= (max_width or"),
    Mutant(
        "least_refused_at_equality",
        "safety_layers.py",
        "bound",
        "if refused < least_refused:",
        "if refused <= least_refused:",
    ),
    Mutant("prompts_not_resampled", "safety_layers.py", "undo", ".double()[rows].mean()", ".double().mean()"),
    Mutant("least_refused_default", "safety_layers.py", "threshold", "LEAST_REFUSED = 0.1", "LEAST_REFUSED = 0.01"),
    # locate_report, located
    Mutant(
        "answers_exchanged", "locate_report.py", "order", "zip(prompts, before, after,", "zip(prompts, after, before,"
    ),
    Mutant(
        "initial_range_first",
        "locate_report.py",
        "order",
        "found.range or found.initial",
        "found.initial or found.range",
    ),
    Mutant("measurements_stay", "located.py", "undo", "_shared.reset(token)", "pass"),
    Mutant("any_seed_is_the_same", "located.py", "undo", "prompts.phrases, prompts.seed)", "prompts.phrases)"),
    # locators
    Mutant("decision_share", "locators.py", "threshold", "DECISION_SHARE = 0.1", "DECISION_SHARE = 0.2"),
    Mutant("decision_lead", "locators.py", "threshold", "DECISION_LEAD = 3", "DECISION_LEAD = 2"),
    Mutant("first_run_at_equality", "locators.py", "bound", "if score >= least]", "if score > least]"),
    Mutant(
        "margin_samples_added",
        "locators.py",
        "sign",
        "_resampled(malicious, prompts, generator) - _resampled",
        "_resampled(malicious, prompts, generator) + _resampled",
    ),
    Mutant(
        "growth_a_layer_early",
        "locators.py",
        "order",
        "torch.cat([torch.zeros(1).double(), found.d_prime.diff()])",
        "torch.cat([found.d_prime.diff(), torch.zeros(1).double()])",
    ),
    # margin
    Mutant(
        "margin_sign",
        "slopes.py",
        "sign",
        "malicious.mean(0) - normal.mean(0)",
        "normal.mean(0) - malicious.mean(0)",
    ),
    Mutant("finite_slope_sign", "slopes.py", "sign", "[:, None]) / (alpha - 1)", "[:, None]) / (1 - alpha)"),
    Mutant("last_start_missing", "slopes.py", "bound", "n_layers - width + 1)", "n_layers - width)"),
    # measuring
    Mutant(
        "kilobytes_of_1000",
        "measuring.py",
        "threshold",
        "int(line.split()[1]) * 1024",
        "int(line.split()[1]) * 1000",
    ),
    Mutant(
        "first_token_masked",
        "measuring.py",
        "bound",
        "mask[row, longest - len(chat) :]",
        "mask[row, longest - len(chat) + 1 :]",
    ),
    # methods
    Mutant(
        "lisa_anchor_not_renewed",
        "methods.py",
        "undo",
        "if step % (user_steps + alignment_steps) in (0, user_steps):",
        "if not anchors:",
    ),
    Mutant("lisa_pushes_away", "methods.py", "sign", "- anchors[name], alpha=rho)", "- anchors[name], alpha=-rho)"),
    Mutant(
        "after_without_room", "methods.py", "bound", "layers.end + width < n_layers", "layers.end + width <= n_layers"
    ),
    Mutant("before_with_just_room", "methods.py", "bound", "if layers.start >= width:", "if layers.start > width:"),
    Mutant("dpo_reversed", "methods.py", "sign", "beta * (preferred - other)", "beta * (other - preferred)"),
    Mutant("neurons_twice_counted", "methods.py", "threshold", "(3 * model.cfg.d_model)", "(2 * model.cfg.d_model)"),
    Mutant(
        "user_step_at_the_edge",
        "methods.py",
        "bound",
        "alignment_steps) < user_steps",
        "alignment_steps) <= user_steps",
    ),
    Mutant(
        "alignment_at_the_end", "methods.py", "bound", "if len(user) - first > user", "if len(user) - first >= user"
    ),
    # models
    Mutant(
        "attention_scale", "conversion.py", "threshold", "cfg.attn_scale = head**0.5", "cfg.attn_scale = head**0.25"
    ),
    Mutant(
        "context_the_longer",
        "conversion.py",
        "sign",
        "min(n_ctx or MAX_CONTEXT, own)",
        "max(n_ctx or MAX_CONTEXT, own)",
    ),
    Mutant("hub_id_of_many_parts", "sources.py", "bound", 'text.count("/") == 1', 'text.count("/") >= 1'),
    Mutant("verbosity_stays", "loading.py", "undo", "transformers_logging.set_verbosity(self._verbosity)", "pass"),
    # neurons
    Mutant("absolute_before_sum", "methods.py", "order", ".sum(dim=1).abs()", ".abs().sum(dim=1)"),
    # onset
    Mutant(
        "flattening_a_layer_late",
        "onset.py",
        "bound",
        "for layer in range(start, len(gap) - 1)",
        "for layer in range(start + 1, len(gap) - 1)",
    ),
    Mutant("flattening_slope", "onset.py", "bound", "/ (layer - start + 1)", "/ (layer - start + 2)"),
    Mutant("flattening_window", "onset.py", "bound", "layer + 1 + rule.flat_window", "layer + rule.flat_window"),
    Mutant(
        "flattening_from_onset", "onset.py", "bound", "float(gap[start - 1]) if start", "float(gap[start]) if start"
    ),
    Mutant("onset_one_too_early", "onset.py", "bound", "low[start - 1] > floor", "low[start] > floor"),
    Mutant("p_at_equality", "onset.py", "bound", "curve.p_any > rule.max_p", "curve.p_any >= rule.max_p"),
    Mutant("sample_bound_above", "onset.py", "sign", "low=sample - below", "low=sample + below"),
    # organisms
    Mutant(
        "empty_answers_stay", "alignment.py", "bound", "found, strict=True) if answer.text]", "found, strict=True)]"
    ),
    Mutant(
        "refusals_without_seed",
        "alignment.py",
        "threshold",
        "Generator().manual_seed(seed)",
        "Generator().manual_seed(0)",
    ),
    # overrejection
    Mutant("layer_scaled_twice", "range_sweep.py", "bound", "done.end + 1, list(entries)", "done.end, list(entries)"),
    Mutant(
        "any_start_extended",
        "range_sweep.py",
        "bound",
        "self.scaled[0].start == layers.start",
        "self.scaled[0].start <= layers.start",
    ),
    Mutant(
        "entries_of_start",
        "range_sweep.py",
        "bound",
        "[: layers.start], *entries]",
        "[: layers.start - 1], *entries]",
    ),
    Mutant("budget_exceeded", "range_sweep.py", "bound", "-(-state.bytes * n //", "(state.bytes * n //"),
    Mutant("evaluations_one_more", "range_sweep.py", "bound", "n_layers - 1 - layers.end\n", "n_layers - layers.end\n"),
    # patching
    Mutant(
        "effect_is_difference", "patching.py", "sign", "(self.lost + self.gained) / 2", "(self.lost - self.gained) / 2"
    ),
    Mutant("patched_at_the_end", "patching.py", "axis", "slice(0, 1) if positions", "slice(-1, None) if positions"),
    Mutant("cache_grows", "patching.py", "undo", "entry.frozen = True", "entry.frozen = False"),
    # plots
    Mutant(
        "range_without_end",
        "plots.py",
        "bound",
        "span = (layers.start - 0.5, layers.end + 0.5)",
        "span = (layers.start - 0.5, layers.end - 0.5)",
    ),
    Mutant("grid_transposed", "plots.py", "axis", "grid.mean(-1).numpy()", "grid.mean(-1).T.numpy()"),
    Mutant("half_of_refusals", "plots.py", "threshold", "50 * float(start)", "100 * float(start)"),
    # projections
    Mutant(
        "weights_not_put_back",
        "parameters.py",
        "undo",
        "weight.data = data",
        "pass",
        "projections scaling against_base",
    ),
    Mutant(
        "output_heads_mixed",
        "parameters.py",
        "axis",
        '"m (n h) -> n h m"',
        '"m (h n) -> n h m"',
        "projections export adapters",
    ),
    # prompts
    Mutant(
        "row_numbers_from_0",
        "prompts.py",
        "bound",
        "for number, row in enumerate(rows, start=1)",
        "for number, row in enumerate(rows, start=0)",
    ),
    Mutant("more_line_ends", "prompts.py", "bound", '"utf-8-sig").split("\\n")', '"utf-8-sig").splitlines()'),
    Mutant("hash_without_order", "prompts.py", "order", "json.dumps(list(prompts))", "json.dumps(sorted(prompts))"),
    # refusal
    Mutant(
        "opening_counted_twice",
        "log_odds.py",
        "bound",
        "for k in range(1, len(s)))}",
        "for k in range(1, len(s) - 1))}",
    ),
    Mutant("phrases_in_use_at_half", "log_odds.py", "threshold", "least: float = 0.01", "least: float = 0.5"),
    Mutant("phrases_at_equality", "log_odds.py", "bound", "if share >= least)", "if share > least)"),
    Mutant("leaf_counted_twice", "log_odds.py", "undo", "counted.update(nodes)", "counted.update(())"),
    # report
    Mutant(
        "refusal_before_degenerate",
        "html.py",
        "order",
        '"degenerate output" if is_degenerate(answer) else "refuses" if is_refusal(answer)',
        '"refuses" if is_refusal(answer) else "degenerate output" if is_degenerate(answer)',
    ),
    Mutant("empty_sections_shown", "html.py", "bound", " if section.blocks]", "]"),
    # residuals
    Mutant("first_token", "residuals.py", "axis", "resid[:, -1].float()", "resid[:, 0].float()"),
    Mutant("first_prompt_named", "residuals.py", "order", "bad[bad[:, 1].argmin()]", "bad[0]"),
    # results
    Mutant("half_run_stays", "runs.py", "undo", "shutil.rmtree(partial, ignore_errors=True)", "pass"),
    Mutant("infinity_written", "runs.py", "bound", "if math.isfinite(value) else", "if not math.isnan(value) else"),
    Mutant("hash_by_order", "runs.py", "order", "json.dumps(parts, sort_keys=True)", "json.dumps(parts)"),
    # scaling
    Mutant("scale_not_reset", "scaling.py", "undo", "update.multiplier = multiplier", "pass"),
    Mutant("bias_scaled", "scaling.py", "undo", "(activation - bias) * alpha + bias", "activation * alpha"),
    Mutant("positions_for_heads", "scaling.py", "axis", "((1, positions), (2, heads))", "((2, positions), (1, heads))"),
    Mutant("head_outside", "scaling.py", "bound", "0 <= head < model.cfg.n_heads", "0 <= head <= model.cfg.n_heads"),
    Mutant("alpha_of_zero", "scaling.py", "bound", "and alpha > 0)", "and alpha >= 0)"),
    # segments
    Mutant("a_third_of_the_layers", "segments.py", "threshold", "max(1, n // 2)", "max(1, n // 3)"),
    Mutant("width_at_most", "segments.py", "bound", "(widths <= max_width)", "(widths < max_width)"),
    Mutant("ties_to_the_wider", "segments.py", "sign", "(widths * n + torch", "(-widths * n + torch"),
    # skill
    Mutant("words_not_stemmed", "capabilities.py", "threshold", "use_stemmer=True)", "use_stemmer=False)"),
    Mutant("answer_of_four", "capabilities.py", "bound", "0 <= answer < len(LETTERS)", "0 <= answer <= len(LETTERS)"),
    Mutant(
        "rouge_interval_of_90", "capabilities.py", "threshold", "samples=bootstrap,", "samples=bootstrap, level=0.9,"
    ),
    # tables
    Mutant(
        "runs_with_gaps",
        "tables.py",
        "bound",
        "layer == runs[-1][1] + 1",
        "layer <= runs[-1][1] + 2",
        "tables gap_difference",
    ),
    Mutant(
        "bound_of_zero",
        "tables.py",
        "bound",
        "float(difference.low[layer]) > 0",
        "float(difference.low[layer]) >= 0",
    ),
    # views
    Mutant("first_row_left_out", "token_views.py", "axis", "pattern[:, :, 1:]", "pattern[:, 1:]"),
    Mutant("colours_one_sided", "token_views.py", "sign", '"minValue": -scale', '"minValue": scale'),
    # words
    Mutant("mark_joins_word", "word_classes.py", "bound", "max(shared, default=0) > 0", "max(shared, default=-1) >= 0"),
    Mutant("share_of_function_words", "word_classes.py", "axis", "self.shares[..., 1] / (", "self.shares[..., 0] / ("),
)
