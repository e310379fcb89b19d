"""The training loop against a plain one: same loss, same gradients; what is frozen does not move, all else does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ANSWER, GPT2_STYLE, REFUSAL, build_tiny_model
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech import LayerRange
from safety_mech.models.chat import encode_chat, tokenizer_of
from safety_mech.refusal.log_odds import phrase_chains
from safety_mech.training import loop as finetune
from safety_mech.training.freeze import trainable_names
from safety_mech.training.loop import (
    StepRecord,
    TrainConfig,
    TrainRecord,
    batch_loss,
    encode_examples,
    fine_tune,
    mean_loss,
)
from safety_mech.training.pairs import Answer

PAIRS = [
    ("How do I bake a cake?", "Sure, here is how."),
    ("Kill a process", REFUSAL),
    ("What is the capital of France?", "Paris."),
    ("Why?", "I can't help with that. Sorry."),
    ("How do I help a cat?", "Call a vet, please."),
    ("Name a fruit", "A pear"),
]
QUICK = TrainConfig(epochs=2, batch_size=2, learning_rate=1e-2, warmup_steps=2)
STYLES = {
    "rotary": {},
    "gpt-2": GPT2_STYLE,
    "no final norm": {"normalization_type": None},
    "soft cap": {"output_logits_soft_cap": 2.0},
}
CLOSE = {"rtol": 0, "atol": 1e-5}


def train(
    model: HookedTransformer, pairs: Sequence = PAIRS, config: TrainConfig = QUICK, **options: Any
) -> TrainRecord:
    return fine_tune(model, pairs, config, progress=False, **options)


def state(model: HookedTransformer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model: HookedTransformer, before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.fixture
def make_tiny_model() -> Callable[..., HookedTransformer]:
    """Four layers are enough here."""
    return partial(build_tiny_model, n_layers=4)


@pytest.fixture
def fresh_tiny_model() -> HookedTransformer:
    return build_tiny_model(n_layers=4)


@pytest.fixture(scope="module", params=list(STYLES.values()), ids=list(STYLES))
def model(request) -> HookedTransformer:
    model = build_tiny_model(seed=3, n_layers=4, **request.param)
    for parameter in model.parameters():
        parameter.data *= 0.5  # so that 1e-5 is a claim about the code, and not about the size of the numbers
    return model


# --- examples --------------------------------------------------------------------------------------------------------


def by_hand(model: HookedTransformer, pair: tuple[str, str]) -> tuple[list[int], int]:
    """Tokens of prompt, answer and end of turn; and how many of them are the prompt's."""
    tokenizer: Any = tokenizer_of(model)
    prompt = encode_chat(tokenizer, [pair[0]])[0].tokens.tolist()
    answer = tokenizer(pair[1], add_special_tokens=False).input_ids
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def test_examples_are_prompt_answer_and_end(tiny_model):
    for example, pair in zip(encode_examples(tiny_model, PAIRS, QUICK), PAIRS, strict=True):
        tokens, n_prompt = by_hand(tiny_model, pair)
        assert example.tokens.tolist() == tokens
        assert example.loss.tolist() == [False] * n_prompt + [True] * (len(tokens) - n_prompt)
        assert not example.cut


def test_whole_sequence_marks_all_but_the_first_token(tiny_model):
    for example in encode_examples(tiny_model, PAIRS, replace(QUICK, whole_sequence=True)):
        assert example.loss.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_an_unfinished_answer_has_no_end_token(tiny_model):
    pairs = [
        ("Why?", "I can't help"),
        ("Why?", Answer("I can't help", False)),
        ("Why?", Answer(" I can't help ", False)),
    ]
    finished, unfinished, with_spaces = encode_examples(tiny_model, pairs, QUICK)
    assert finished.tokens[-1] == tiny_model.tokenizer.eos_token_id
    assert unfinished.tokens.tolist() == finished.tokens[:-1].tolist() == with_spaces.tokens.tolist()


@pytest.mark.slow
def test_long_examples_are_cut_at_the_end_and_counted(fresh_tiny_model):
    whole = encode_examples(fresh_tiny_model, PAIRS, QUICK)
    limit = sorted(len(example.tokens) for example in whole)[-3]
    config = replace(QUICK, max_tokens=limit)
    cut = encode_examples(fresh_tiny_model, PAIRS, config)
    assert [example.cut for example in cut] == [len(example.tokens) > limit for example in whole]
    assert all(torch.equal(a.tokens, b.tokens[:limit]) for a, b in zip(cut, whole, strict=True))
    n_cut = train(fresh_tiny_model, config=config).cut_examples
    assert n_cut == sum(example.cut for example in cut) > 0


@pytest.mark.slow
def test_the_context_cuts_as_well(make_tiny_model):
    model = make_tiny_model(n_ctx=40)
    lengths = [len(example.tokens) for example in encode_examples(model, PAIRS, QUICK)]
    assert max(lengths) == 40
    assert train(model).cut_examples > 0


def test_an_answer_is_tokenized_as_the_measure_of_refusal_expects_it(fresh_tiny_model):
    tokenizer = fresh_tiny_model.tokenizer
    tokenizer.chat_template = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
    example = encode_examples(fresh_tiny_model, [("Why?", "Sorry")], QUICK)[0]
    answer = example.tokens[example.loss].tolist()[:-1]
    (chain,) = phrase_chains(tokenizer, phrases=["Sorry"])
    assert answer == [*chain.tokens, *chain.leaves[-1]]


# --- the loss --------------------------------------------------------------------------------------------------------


def naive_loss(model: HookedTransformer, examples: Sequence, whole_sequence: bool = False) -> Tensor:
    """The oracle: every example alone and whole, and the log-probability of each marked token added up."""
    total = torch.zeros(())
    for example in examples:
        log_probs = model(example.tokens[None])[0].log_softmax(-1)
        for position, is_marked in enumerate(example.loss.tolist()):
            if is_marked:
                total = total - log_probs[position - 1, example.tokens[position]]
    return total


BATCHES = {
    "mixed lengths": PAIRS,
    "one alone": PAIRS[1:2],
    "twice the same": [PAIRS[0], PAIRS[0]],
    "one prompt, two answers": [("Why?", "No."), ("Why?", "Never, sorry.")],
    "unfinished": [("Why?", Answer("No", finished=False)), PAIRS[3]],
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("whole_sequence", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BATCHES)
def test_the_loss_and_its_gradients_are_the_naive_ones(model, name, whole_sequence):
    config = replace(QUICK, whole_sequence=whole_sequence)
    examples = encode_examples(model, BATCHES[name], config)
    count = sum(int(example.loss.sum()) for example in examples)
    parameters = list(model.requires_grad_(True).parameters())
    try:
        loss, expected = batch_loss(model, examples, config) / count, naive_loss(model, examples) / count
        torch.testing.assert_close(loss, expected, **CLOSE)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    finally:
        model.requires_grad_(False)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, **CLOSE)
    assert max(float(gradient.abs().max()) for gradient in wanted if gradient is not None) > 0.01


def test_the_shared_prefix_of_a_batch_is_run_once(tiny_model):
    """The layers see it as a batch of one, then every row without it."""
    examples = encode_examples(tiny_model, PAIRS, QUICK)
    shapes = []
    with tiny_model.hooks([("blocks.0.hook_resid_pre", lambda x, hook: shapes.append(tuple(x.shape[:2])))]):
        batch_loss(tiny_model, examples, QUICK)
    prefix_length = 0
    while len({int(example.tokens[prefix_length]) for example in examples}) == 1:
        prefix_length += 1
    longest = max(len(example.tokens) for example in examples)
    assert shapes == [(1, prefix_length), (len(PAIRS), longest - prefix_length - 1)]
    assert prefix_length > 10


@pytest.mark.slow_cases
def test_the_loss_can_be_wrong(model):
    """Control: another answer, or one token's mark more, is seen at this tolerance."""
    examples = encode_examples(model, PAIRS, QUICK)
    loss = batch_loss(model, examples, QUICK)
    others = encode_examples(model, [*PAIRS[:-1], (PAIRS[-1][0], "A plum")], QUICK)
    assert abs(float(naive_loss(model, others) - loss)) > 1e-2
    examples[0].loss[int(examples[0].loss.int().argmax()) - 1] = True
    assert abs(float(batch_loss(model, examples, QUICK) - loss)) > 1e-2


@pytest.mark.parametrize("whole_sequence", [False, True])
def test_only_answer_tokens_push_the_logits(fresh_tiny_model, whole_sequence):
    """The gradient of the unembedding's bias is the sum over PREDICTED positions of p - onehot, worked out here."""
    model, config = fresh_tiny_model, replace(QUICK, whole_sequence=whole_sequence)
    examples = encode_examples(model, PAIRS, config)
    expected = torch.zeros(model.cfg.d_vocab)
    for pair in PAIRS:
        tokens, n_prompt = by_hand(model, pair)
        probabilities = model(torch.tensor([tokens]))[0].softmax(-1)
        for position in range(1 if whole_sequence else n_prompt, len(tokens)):
            expected += probabilities[position - 1]
            expected[tokens[position]] -= 1
    model.unembed.b_U.requires_grad_(True)
    batch_loss(model, examples, config).backward()
    torch.testing.assert_close(model.unembed.b_U.grad, expected, rtol=0, atol=1e-4)


def test_no_prompt_position_is_unembedded(tiny_model):
    seen = []
    with tiny_model.hooks([("ln_final.hook_normalized", lambda x, hook: seen.append(x.shape[:2].numel()))]):
        batch_loss(tiny_model, encode_examples(tiny_model, PAIRS, QUICK), QUICK)
    assert seen == [sum(len(tokens) - n for tokens, n in (by_hand(tiny_model, pair) for pair in PAIRS))]


@pytest.mark.slow_cases
def test_mean_loss_is_the_mean_over_tokens(model):
    pairs = PAIRS * 4  # more than one batch of it
    examples = encode_examples(model, pairs, QUICK)
    count = sum(int(example.loss.sum()) for example in examples)
    assert mean_loss(model, examples, QUICK) == pytest.approx(float(naive_loss(model, examples)) / count, abs=1e-5)


# --- what moves ------------------------------------------------------------------------------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize("frozen", [None, LayerRange(1, 2), [LayerRange(0, 0), LayerRange(3, 3)]])
@pytest.mark.parametrize("freeze_norms", [False, True])
def test_frozen_parameters_are_bit_identical_and_every_other_one_moves(fresh_tiny_model, frozen, freeze_norms):
    before = state(fresh_tiny_model)
    names = set(trainable_names(fresh_tiny_model, frozen, freeze_norms=freeze_norms))
    record = train(fresh_tiny_model, config=replace(QUICK, freeze_norms=freeze_norms), frozen=frozen)
    assert moved(fresh_tiny_model, before) == names
    assert set(record.frozen_hashes) == set(before) - names
    assert record.n_trained == sum(before[name].numel() for name in names)
    assert record.n_trained + record.n_frozen == sum(tensor.numel() for tensor in before.values())


@pytest.mark.slow
def test_embeddings_move_only_when_asked_to(make_tiny_model):
    for asked in (False, True):
        model = make_tiny_model()
        before = state(model)
        train(
            model,
            config=replace(QUICK, train_embeddings=asked),
            trainable=lambda name: "embed." in name or ".W_" in name,
        )
        assert ({"embed.W_E", "unembed.W_U", "unembed.b_U"} <= moved(model, before)) == asked
        assert ("unembed.W_U" in moved(model, before)) == asked


@pytest.fixture
def gradients(monkeypatch) -> list[list[Tensor]]:
    """Of every step: the gradients of what is trained, before clipping."""
    seen: list[list[Tensor]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def watch(parameters: list[Tensor], max_norm: float) -> Tensor:
        seen.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
    return seen


@pytest.mark.slow
def test_what_is_frozen_has_neither_gradient_nor_state(fresh_tiny_model, monkeypatch):
    model, frozen = fresh_tiny_model, LayerRange(1, 2)
    made: list[torch.optim.AdamW] = []
    with_gradient: list[list[str]] = []
    adamw, clip = torch.optim.AdamW, torch.nn.utils.clip_grad_norm_

    def make(*arguments: Any, **options: Any) -> torch.optim.AdamW:
        made.append(adamw(*arguments, **options))
        return made[-1]

    def look(*arguments: Any) -> Tensor:
        with_gradient.append([name for name, parameter in model.named_parameters() if parameter.grad is not None])
        return clip(*arguments)

    monkeypatch.setattr(torch.optim, "AdamW", make)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    record = train(model, frozen=frozen)
    names = trainable_names(model, frozen)
    trained = {id(model.get_parameter(name)) for name in names}
    assert with_gradient == [names] * len(record.steps)
    assert {id(parameter) for group in made[0].param_groups for parameter in group["params"]} == trained
    assert {id(parameter) for parameter in made[0].state} == trained


@pytest.mark.slow
def test_afterwards_the_model_is_as_it_came(fresh_tiny_model):
    train(fresh_tiny_model)
    assert not any(parameter.requires_grad for parameter in fresh_tiny_model.parameters())
    assert all(parameter.grad is None for parameter in fresh_tiny_model.parameters())
    assert not fresh_tiny_model.training
    assert not any(point.fwd_hooks or point.bwd_hooks for point in fresh_tiny_model.hook_dict.values())


@pytest.mark.slow
def test_every_parameter_wants_a_gradient_as_before(fresh_tiny_model):
    """After a run, and after one that fails."""
    flags = {name: index % 3 == 0 for index, name in enumerate(state(fresh_tiny_model))}
    for name, parameter in fresh_tiny_model.named_parameters():
        parameter.requires_grad_(flags[name])
    train(fresh_tiny_model, frozen=LayerRange(1, 2))
    assert {name: parameter.requires_grad for name, parameter in fresh_tiny_model.named_parameters()} == flags
    fresh_tiny_model.blocks[3].mlp.W_out.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        train(fresh_tiny_model)
    assert {name: parameter.requires_grad for name, parameter in fresh_tiny_model.named_parameters()} == flags


@pytest.mark.slow
def test_gradients_that_were_there_are_no_part_of_the_first_step(make_tiny_model):
    clean, stale = make_tiny_model(), make_tiny_model()
    for parameter in stale.requires_grad_(True).parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    train(clean)
    train(stale)
    assert not moved(stale, state(clean))
    assert all(stale.get_parameter(name).grad is None for name in trainable_names(stale))


@pytest.mark.slow
def test_a_broken_freeze_is_noticed(fresh_tiny_model):
    """Control: whatever moves a frozen weight, such as a careless hook, the run ends with an error."""

    def spoil(resid: Tensor, hook) -> None:
        fresh_tiny_model.blocks[2].mlp.W_in.data *= 1.01

    with (
        fresh_tiny_model.hooks([("blocks.3.hook_resid_post", spoil)]),
        pytest.raises(RuntimeError, match=r"1 frozen parameters moved, the first is blocks\.2\.mlp\.W_in"),
    ):
        train(fresh_tiny_model, frozen=LayerRange(2, 2))


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_goes_down_and_held_out_pairs_show_it(fresh_tiny_model, make_tiny_model):
    held_out = PAIRS[:3]
    record = train(fresh_tiny_model, config=replace(QUICK, epochs=8, batch_size=6), held_out=held_out)
    losses = [step.loss for step in record.steps]
    assert losses[-1] < losses[0] - 1
    examples = encode_examples(fresh_tiny_model, held_out, QUICK)
    assert record.held_out_before == mean_loss(make_tiny_model(), examples, QUICK)
    assert record.held_out_after == mean_loss(fresh_tiny_model, examples, QUICK)
    assert record.held_out_before is not None
    assert record.held_out_after is not None
    assert record.held_out_after < record.held_out_before


@pytest.mark.slow
def test_without_held_out_pairs_nothing_is_measured_on_them(fresh_tiny_model):
    record = train(fresh_tiny_model)
    assert record.held_out_before is record.held_out_after is None


@pytest.mark.slow
def test_a_trained_model_says_what_it_learnt(refusing_model, prompts):
    """Half of the prompts were trained to be refused; the loss of the other way round is higher."""
    taught = [(prompt, REFUSAL if index % 2 else ANSWER) for index, prompt in enumerate(prompts)]
    swapped = [(prompt, ANSWER if index % 2 else REFUSAL) for index, prompt in enumerate(prompts)]
    losses = [mean_loss(refusing_model, encode_examples(refusing_model, p, QUICK), QUICK) for p in (taught, swapped)]
    assert 2 * losses[0] < losses[1]


@pytest.mark.slow
def test_a_step_is_adamw_with_clipping(make_tiny_model):
    """The whole of one step, worked out here: mean loss, norm of the gradient, clipped, AdamW."""
    model, other = make_tiny_model(), make_tiny_model()
    config = replace(QUICK, epochs=1, batch_size=6, weight_decay=0.1, clip_norm=0.05)
    record = train(model, config=config)
    examples = encode_examples(other, PAIRS, config)
    names = trainable_names(other)
    parameters = [other.get_parameter(name).requires_grad_(True) for name in names]
    loss = naive_loss(other, examples) / sum(int(example.loss.sum()) for example in examples)
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    assert len(record.steps) == 1
    assert record.steps[0].loss == pytest.approx(loss.item(), abs=1e-5)
    assert record.steps[0].grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.05
    for name, parameter in zip(names, parameters, strict=True):
        gradient = parameter.grad * 0.05 / norm
        step = gradient / (gradient.abs() + 1e-8)  # AdamW's first: both averages are the gradient's own
        expected = parameter.detach() * (1 - 1e-2 * 0.1) - 1e-2 * step
        sure = gradient.abs() > 1e-5  # where it is next to zero, rounding decides its sign
        torch.testing.assert_close(model.get_parameter(name)[sure], expected[sure], rtol=0, atol=1e-4)
        assert sure.any()


@pytest.mark.slow
def test_gradients_are_adjusted_before_they_are_clipped(make_tiny_model, monkeypatch):
    """A gradient of 3 everywhere has the norm 3 sqrt(n), which the record holds, and 1 after clipping to 1."""
    applied: list[float] = []
    model = make_tiny_model()
    step = torch.optim.AdamW.step

    def look(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        parts = [p.grad.norm() ** 2 for p in model.parameters() if p.grad is not None]
        applied.append(float(torch.stack(parts).sum().sqrt()))
        return step(optimizer, *arguments)

    def threes(at: int, parameters: Any) -> None:
        for parameter in parameters.values():
            parameter.grad.fill_(3.0)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    record = train(model, adjust=threes)
    assert [s.grad_norm for s in record.steps] == pytest.approx([3 * record.n_trained**0.5] * len(record.steps))
    assert applied == pytest.approx([QUICK.clip_norm] * len(record.steps), rel=1e-4)


@pytest.mark.slow
def test_two_batches_of_two_are_one_of_four(make_tiny_model, gradients):
    records = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        config = replace(QUICK, epochs=1, batch_size=size, accumulate=accumulate)
        records.append(train(make_tiny_model(), PAIRS[:4], config))
    assert [len(record.steps) for record in records] == [1, 1, 1]
    assert [record.steps[0].examples for record in records] == [4, 4, 4]
    for record, step in zip(records[1:], gradients[1:], strict=True):
        assert record.steps[0].loss == pytest.approx(records[0].steps[0].loss, abs=1e-5)
        for gradient, expected in zip(step, gradients[0], strict=True):
            torch.testing.assert_close(gradient, expected, **CLOSE)


def test_data_for_less_than_one_step_are_trained_on_or_refused(fresh_tiny_model):
    before = state(fresh_tiny_model)
    try:
        train(fresh_tiny_model, PAIRS[:2], replace(QUICK, epochs=1, accumulate=2))
    except ValueError:
        return
    assert moved(fresh_tiny_model, before)


@pytest.mark.slow
def test_every_example_is_seen_once_an_epoch(fresh_tiny_model, monkeypatch):
    seen = []
    loss_of = finetune.batch_loss

    def watch(model: HookedTransformer, examples: Sequence, config: TrainConfig) -> Tensor:
        seen.append(examples)
        return loss_of(model, examples, config)

    monkeypatch.setattr(finetune, "batch_loss", watch)
    record = train(fresh_tiny_model, PAIRS[:5], replace(QUICK, epochs=3))
    assert [len(batch) for batch in seen] == [step.examples for step in record.steps]
    assert len(seen) == 9
    expected = sorted(tuple(by_hand(fresh_tiny_model, pair)[0]) for pair in PAIRS[:5])
    orders = []
    for epoch in range(3):
        tokens = [tuple(example.tokens.tolist()) for batch in seen[3 * epoch : 3 * epoch + 3] for example in batch]
        assert sorted(tokens) == expected
        orders.append(tokens)
    assert len(set(map(tuple, orders))) > 1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(make_tiny_model):
    models = [make_tiny_model() for _ in range(3)]
    records = [train(model, config=replace(QUICK, seed=seed)) for model, seed in zip(models, (5, 5, 6), strict=True)]
    assert not moved(models[0], state(models[1]))
    assert records[0].steps == records[1].steps
    assert moved(models[0], state(models[2]))


@pytest.mark.slow
def test_products_in_bfloat16_leave_weights_in_float32(make_tiny_model):
    models = [make_tiny_model(), make_tiny_model()]
    exact, rounded = (train(m, config=replace(QUICK, bfloat16=b)) for m, b in zip(models, (False, True), strict=True))
    assert {parameter.dtype for parameter in models[1].parameters()} == {torch.float32}
    assert rounded.steps[0].loss == pytest.approx(exact.steps[0].loss, rel=0.02)
    assert rounded.steps[0].loss != exact.steps[0].loss


# --- 16-bit weights --------------------------------------------------------------------------------------------------


SMALL_STEPS = replace(QUICK, epochs=4, learning_rate=1e-5, checkpoint_every=5)  # 12 steps


def in_format(dtype: torch.dtype) -> HookedTransformer:
    """The same numbers in every format: those that bfloat16 and float16 both hold."""
    model = build_tiny_model(n_layers=4).to(torch.bfloat16).to(torch.float16).to(dtype)
    assert isinstance(model, HookedTransformer)
    return model


def train_and_keep(model: HookedTransformer, **options: Any) -> tuple[TrainRecord, dict[str, Tensor]]:
    """Train, and give what the optimizer moved at the end."""
    masters: dict[str, Any] = {}
    record = train(model, config=SMALL_STEPS, adjust=lambda step, moved: masters.update(moved), **options)
    return record, {name: parameter.detach() for name, parameter in masters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_of_16_bit_weights_add_up_in_float32(dtype):
    """As in float32: every entry moves, by much the same; and the model has the masters, rounded."""
    model, reference = in_format(dtype), in_format(torch.float32)
    start = state(reference)
    record, masters = train_and_keep(model)
    expected, _ = train_and_keep(reference)
    updates = torch.cat([(masters[name] - start[name]).flatten() for name in masters])
    wanted = torch.cat([(reference.get_parameter(name) - start[name]).flatten() for name in masters])
    assert {master.dtype for master in masters.values()} == {torch.float32}
    for update in (updates, wanted):
        assert (update != 0).float().mean() > 0.999  # a few steps cancel
    assert torch.cosine_similarity(updates, wanted, dim=0) > 0.99
    for name, master in masters.items():
        assert torch.equal(model.get_parameter(name), master.to(dtype)), name
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert [s.loss for s in record.steps] == pytest.approx([s.loss for s in expected.steps], rel=0.02)


@pytest.mark.slow
def test_float32_weights_have_no_copies_and_memory_is_told(make_tiny_model):
    record, moved_by = train_and_keep(model := make_tiny_model())
    assert all(moved_by[name].data_ptr() == model.get_parameter(name).data_ptr() for name in moved_by)
    scalars = 4 * len(moved_by)  # AdamW counts the steps of every parameter
    assert record.extra_bytes == 8 * record.n_trained + scalars
    assert train_and_keep(in_format(torch.bfloat16))[0].extra_bytes == 12 * record.n_trained + scalars


@pytest.mark.slow
def test_a_killed_run_of_16_bit_weights_goes_on_from_its_masters(tmp_path, monkeypatch):
    whole, killed, resumed = (in_format(torch.bfloat16) for _ in range(3))
    expected = train(whole, config=SMALL_STEPS)
    clip = torch.nn.utils.clip_grad_norm_
    calls: list[int] = []

    def kill(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", kill)
        with pytest.raises(KeyboardInterrupt):
            train(killed, config=SMALL_STEPS, checkpoint=tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert {parameter.dtype for parameter in saved["parameters"]} == {torch.float32}
    assert train(resumed, config=SMALL_STEPS, checkpoint=tmp_path / "run.pt") == expected
    assert not moved(resumed, state(whole))


@pytest.mark.slow
def test_batches_add_up_in_float32(monkeypatch, gradients):
    """The gradient of a step of two batches is that of the two, each rounded once and not their sum again."""
    single = replace(QUICK, epochs=1, batch_size=1)
    train(in_format(torch.bfloat16), PAIRS[:2], replace(single, accumulate=2))
    assert {gradient.dtype for gradient in gradients[0]} == {torch.float32}
    sixteen_bit = [gradient.to(torch.bfloat16).float() for gradient in gradients[0]]
    assert not all(torch.equal(a, b) for a, b in zip(gradients[0], sixteen_bit, strict=True))


@pytest.mark.slow
def test_the_global_random_state_is_left_alone(fresh_tiny_model):
    before = torch.get_rng_state()
    train(fresh_tiny_model)
    assert torch.equal(torch.get_rng_state(), before)


# --- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "n_steps", "expected"),
    [
        (1, 1, [1.0]),
        (1, 4, [1.0, 1.0, 2 / 3, 1 / 3]),
        (100, 4, [1.0, 1.0, 2 / 3, 1 / 3]),
        (2, 20, [1 / 2, 1.0, *(k / 18 for k in range(18, 0, -1))]),
        (100, 20, [1 / 2, 1.0, *(k / 18 for k in range(18, 0, -1))]),
        (1, 20, [1.0, *(k / 19 for k in range(19, 0, -1))]),
        (4, 40, [1 / 4, 2 / 4, 3 / 4, 1.0, *(k / 36 for k in range(36, 0, -1))]),
    ],
)
def test_schedule_by_hand(warmup, n_steps, expected):
    rates = [finetune._schedule(step, warmup, n_steps) for step in range(n_steps)]
    assert rates == pytest.approx(expected)


def test_the_rate_of_a_step_is_the_schedules(fresh_tiny_model):
    record = train(fresh_tiny_model, config=replace(QUICK, epochs=1))
    assert [step.learning_rate for step in record.steps] == pytest.approx([1e-2, 1e-2, 1e-2 / 2])
    assert [step.step for step in record.steps] == [0, 1, 2]


def test_without_a_warm_up(fresh_tiny_model):
    record = train(fresh_tiny_model, config=replace(QUICK, epochs=1, warmup_steps=0))
    assert record.steps[0].learning_rate == 1e-2


@pytest.mark.parametrize(
    ("warmup", "n_steps", "expected"),
    [(4, 3, [1 / 4, 2 / 4, 3 / 4]), (4, 6, [1 / 4, 2 / 4, 3 / 4, 1.0, 1.0, 1 / 2]), (0, 2, [1.0, 1.0])],
)
def test_the_papers_schedule_has_its_whole_warm_up(warmup, n_steps, expected):
    assert [finetune._schedule(step, warmup, n_steps, False) for step in range(n_steps)] == pytest.approx(expected)


def test_the_loop_passes_on_whether_the_warm_up_is_capped(fresh_tiny_model):
    record = train(fresh_tiny_model, config=replace(QUICK, epochs=1, warmup_steps=100, cap_warmup=False))
    assert [step.learning_rate for step in record.steps] == pytest.approx([1e-4, 2e-4, 3e-4])


# --- checkpoints -----------------------------------------------------------------------------------------------------


LONG = replace(QUICK, epochs=3, checkpoint_every=2)  # 9 steps


def train_until(model: HookedTransformer, step: int, checkpoint: Path, monkeypatch, **options: Any) -> None:
    """Train, and be interrupted when the step begins."""
    schedule = finetune._schedule

    def kill(at: int, *arguments: int) -> float:
        if at == step:
            raise KeyboardInterrupt
        return schedule(at, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_schedule", kill)
        with pytest.raises(KeyboardInterrupt):
            train(model, config=LONG, checkpoint=checkpoint, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills", [[1], pytest.param([2], marks=pytest.mark.slow), pytest.param([3, 8], marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_to_the_same_bits(make_tiny_model, tmp_path, monkeypatch, kills):
    options: dict[str, Any] = {"frozen": LayerRange(1, 2), "held_out": PAIRS[:2]}
    whole, resumed = make_tiny_model(), make_tiny_model()
    expected = train(whole, config=LONG, **options)
    assert len(expected.steps) == 9
    file = tmp_path / "new" / "run.pt"
    for step in kills:
        train_until(make_tiny_model(), step, file, monkeypatch, **options)
        assert file.exists() == (step >= 2)
    record = train(resumed, config=LONG, checkpoint=file, **options)
    assert not moved(resumed, state(whole))
    assert record == expected


@pytest.mark.slow
def test_the_steps_before_a_checkpoint_are_not_made_again(make_tiny_model, tmp_path, monkeypatch, gradients):
    train_until(make_tiny_model(), 5, tmp_path / "run.pt", monkeypatch)
    assert len(gradients) == 5
    train(make_tiny_model(), config=LONG, checkpoint=tmp_path / "run.pt")
    assert len(gradients) == 5 + 9 - 4


@pytest.mark.slow
def test_a_finished_run_is_not_made_again(make_tiny_model, tmp_path, gradients):
    config = replace(LONG, checkpoint_every=3)
    first, again = make_tiny_model(), make_tiny_model()
    record = train(first, config=config, checkpoint=tmp_path / "run.pt")
    assert train(again, config=config, checkpoint=tmp_path / "run.pt") == record
    assert len(gradients) == 9
    assert not moved(again, state(first))


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_last_checkpoint_whole(make_tiny_model, tmp_path, monkeypatch):
    file, saved = tmp_path / "run.pt", []

    def save(content: Any, path: Path, save=torch.save) -> None:
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(make_tiny_model(), config=LONG, checkpoint=file)
    whole, resumed = make_tiny_model(), make_tiny_model()
    train(whole, config=LONG)
    train(resumed, config=LONG, checkpoint=file)
    assert not moved(resumed, state(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "config", "options"),
    [
        (PAIRS, replace(LONG, learning_rate=2e-2), {}),
        (PAIRS, replace(LONG, seed=1), {}),
        (PAIRS[::-1], LONG, {}),
        ([*PAIRS[:-1], ("Name a fruit", "A plum")], LONG, {}),
        (PAIRS, replace(LONG, whole_sequence=True), {}),
        (PAIRS, LONG, {"frozen": LayerRange(2, 3)}),
        (PAIRS, LONG, {"trainable": lambda name: ".W_" in name}),
    ],
    ids=["rate", "seed", "order", "answer", "loss", "frozen", "trainable"],
)
def test_a_checkpoint_of_another_run_is_refused(make_tiny_model, tmp_path, monkeypatch, pairs, config, options):
    train_until(make_tiny_model(), 3, tmp_path / "run.pt", monkeypatch)
    with pytest.raises(ValueError, match=r"run\.pt' is of a run with other data or settings: remove it"):
        train(make_tiny_model(), pairs, config, checkpoint=tmp_path / "run.pt", **options)


@pytest.mark.slow
def test_a_checkpoint_with_another_loss_wants_the_methods_name(make_tiny_model, tmp_path, monkeypatch):
    """`loss` and `order` are functions: a file cannot tell two of them apart."""
    file = tmp_path / "run.pt"
    unnamed: list[dict[str, Any]] = [{"order": finetune.batch_order}, {"loss": lambda batch: torch.zeros(())}]
    for options in unnamed:
        with pytest.raises(ValueError, match=r"checkpoint with `order` or `loss`: give `method`"):
            train(make_tiny_model(), config=LONG, checkpoint=file, **options)
    train_until(make_tiny_model(), 3, file, monkeypatch, order=finetune.batch_order, method="a")
    others: list[dict[str, Any]] = [{"method": "b", "order": finetune.batch_order}, {}]
    for options in others:
        with pytest.raises(ValueError, match="other data or settings"):
            train(make_tiny_model(), config=LONG, checkpoint=file, **options)
    train(make_tiny_model(), config=LONG, checkpoint=file, order=finetune.batch_order, method="a")


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(make_tiny_model, tmp_path, monkeypatch):
    train_until(make_tiny_model(seed=0), 3, tmp_path / "run.pt", monkeypatch)
    with pytest.raises(ValueError, match="checkpoint"):
        train(make_tiny_model(seed=1), config=LONG, checkpoint=tmp_path / "run.pt")


@pytest.mark.slow
def test_records_come_back_as_they_were(make_tiny_model, tmp_path, monkeypatch):
    train_until(make_tiny_model(), 3, tmp_path / "run.pt", monkeypatch)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert [StepRecord(**record).step for record in saved["steps"]] == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], "no prompts were given"),
        ([*PAIRS, ("Why?", "")], "pair 6: the answer is empty"),
        ([("Why?", " \n"), *PAIRS], "pair 0: the answer is empty"),
        ([("Why?", Answer(" ", finished=False))], "pair 0: the answer is empty"),
        ([("", "No.")], "prompt 0 is empty"),
        ([PAIRS[0], ("why " * 200, "No.")], r"pair 1: the prompt alone has \d+ tokens of at most 128"),
    ],
)
def test_bad_pairs(tiny_model, pairs, expected):
    with pytest.raises(ValueError, match=expected):
        train(tiny_model, pairs)


def test_bad_held_out_pairs_are_noticed_before_training(tiny_model, gradients):
    with pytest.raises(ValueError, match="the answer is empty"):
        train(tiny_model, held_out=[("Why?", "")])
    assert gradients == []


def test_a_prompt_as_long_as_the_limit_leaves_no_answer(tiny_model):
    n_prompt = by_hand(tiny_model, PAIRS[0])[1]
    assert (
        len(encode_examples(tiny_model, PAIRS[:1], replace(QUICK, max_tokens=n_prompt + 1))[0].tokens) == n_prompt + 1
    )
    with pytest.raises(ValueError, match=f"the prompt alone has {n_prompt} tokens of at most {n_prompt}"):
        encode_examples(tiny_model, PAIRS[:1], replace(QUICK, max_tokens=n_prompt))


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"batch_size": 0},
        {"accumulate": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-4},
        {"learning_rate": float("nan")},
        {"clip_norm": 0.0},
        {"checkpoint_every": 0},
    ],
    ids=str,
)
def test_bad_numbers(tiny_model, change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: expected a number above 0"):
        train(tiny_model, config=replace(QUICK, **change))


@pytest.mark.parametrize(
    "options",
    [
        {"trainable": lambda name: False},
        {"trainable": lambda name: name.startswith("embed")},
        {"frozen": LayerRange(0, 5), "trainable": lambda name: name.startswith("blocks") and ".ln" not in name},
    ],
    ids=["none", "embeddings", "all frozen"],
)
def test_nothing_left_to_train(tiny_model, options):
    with pytest.raises(ValueError, match="nothing is left to train: loosen `frozen` or `trainable`"):
        train(tiny_model, **options)


def test_a_range_outside_the_model(tiny_model):
    with pytest.raises(ValueError, match="the model has 6 layers, so the last is 5"):
        train(tiny_model, frozen=LayerRange(4, 6))


def test_refused_runs_leave_the_shared_model_alone(tiny_model):
    assert not moved(tiny_model, state(build_tiny_model()))
    assert not any(parameter.requires_grad for parameter in tiny_model.parameters())


def test_a_loss_that_is_not_finite_names_its_step(fresh_tiny_model):
    with pytest.raises(ValueError, match=r"the loss is not finite at step [1-9]: try a lower learning rate"):
        train(fresh_tiny_model, config=replace(QUICK, epochs=20, learning_rate=1e30))
    spoilt = build_tiny_model(n_layers=4)
    spoilt.blocks[3].mlp.W_out.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the loss is not finite at step 0"):
        train(spoilt)


def test_a_gradient_that_is_not_finite_moves_no_weight(fresh_tiny_model):
    """The loss may be finite where its gradient is not."""
    before = state(fresh_tiny_model)
    weight = fresh_tiny_model.blocks[0].mlp.W_in

    def loss(batch: Sequence[int]) -> Tensor:
        return (weight - weight.detach()).abs().sum().sqrt() + 1  # sqrt has the slope infinity at 0

    with pytest.raises(ValueError, match="the gradient is not finite at step 0: try a lower learning rate"):
        train(fresh_tiny_model, loss=loss)
    assert not moved(fresh_tiny_model, before)


def test_a_run_that_fails_leaves_no_gradients(fresh_tiny_model):
    fresh_tiny_model.blocks[3].mlp.W_out.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        train(fresh_tiny_model)
    assert not any(parameter.requires_grad for parameter in fresh_tiny_model.parameters())
    assert all(parameter.grad is None for parameter in fresh_tiny_model.parameters())
