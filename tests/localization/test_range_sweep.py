"""What ranges share changes no number: every cell of the grid is that of the full forward, scaled."""

import random
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from test_text import KINDS
from tiny import GPT2_STYLE, build_talkative_model
from tokenizers import AddedToken
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech import LayerRange
from safety_mech.interventions.scaling import Recipe, scaled
from safety_mech.localization import range_sweep
from safety_mech.localization.range_sweep import ScaledRanges, layer_evaluations
from safety_mech.models import generation
from safety_mech.models.chat import encode_chat
from safety_mech.models.generation import generate
from safety_mech.refusal.degenerate import is_degenerate
from safety_mech.refusal.log_odds import REFUSAL_PHRASES, phrase_chains, refusal_log_odds
from safety_mech.refusal.rates import refusal_rate, responses
from safety_mech.refusal.text import JUDGED_TOKENS, cannot_refuse, is_refusal, refuses

PHRASES = ("I'm sorry", "I can't", "Sorry")
CLOSE = {"rtol": 0, "atol": 1e-5}
N = 4
CELLS = [LayerRange(start, end) for start in range(N) for end in range(start, N)]
SOME = [LayerRange(0, 0), LayerRange(0, 3), LayerRange(1, 2), LayerRange(3, 3)]


@pytest.fixture
def some_prompts(prompts) -> list[str]:
    """Two lengths, one of them twice; the second is refused."""
    return [prompts[2], prompts[3], prompts[5]]


def measure(
    model: HookedTransformer, prompts: Sequence[str], alpha: float | None = 1.3, *arguments, **options
) -> ScaledRanges:
    return ScaledRanges(model, prompts, alpha, *arguments, **{"phrases": PHRASES, **options})


def in_full(model: HookedTransformer, prompts: Sequence[str], layers: LayerRange, alpha: float, recipe) -> Tensor:
    """The oracle: everything from the start, with the range scaled."""
    with scaled(model, layers, alpha, recipe):
        return refusal_log_odds(model, prompts, phrases=PHRASES)


def hooks_on(model: HookedTransformer) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


# --- log-odds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "alpha"), [("attn_out", 1.3), pytest.param("weights", 0.8, marks=pytest.mark.slow)])
def test_every_cell_equals_the_full_forward(refusing_model, some_prompts, recipe, alpha):
    ranges = measure(refusing_model, some_prompts, alpha, recipe)
    for layers in CELLS:
        expected = in_full(refusing_model, some_prompts, layers, alpha, recipe)
        torch.testing.assert_close(ranges.log_odds(layers), expected, **CLOSE)


@pytest.mark.slow
def test_the_cells_compared_differ(refusing_model, some_prompts):
    """Control: no two are as near to each other as every cell is to its full forward."""
    ranges = measure(refusing_model, some_prompts)
    cells = torch.stack([ranges.log_odds(layers) for layers in (None, *CELLS)])
    distances = (cells[:, None] - cells[None]).abs().amax(-1)
    assert distances[~torch.eye(len(cells), dtype=torch.bool)].min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("style", [{}, GPT2_STYLE], ids=["rotary", "gpt-2"])
@pytest.mark.parametrize("recipe", ["mlp_out", "weights_no_o", Recipe(("attn.hook_k",))], ids=str)
def test_some_cells_in_other_models_and_recipes(style, recipe, some_prompts):
    model = build_talkative_model(**style)
    ranges = measure(model, some_prompts, 1.3, recipe)
    for layers in SOME[1:3]:
        expected = in_full(model, some_prompts, layers, 1.3, recipe)
        torch.testing.assert_close(ranges.log_odds(layers), expected, **CLOSE)


def test_unscaled_is_the_plain_measure(refusing_model, some_prompts):
    expected = refusal_log_odds(refusing_model, some_prompts, phrases=PHRASES)
    torch.testing.assert_close(measure(refusing_model, some_prompts).log_odds(None), expected, **CLOSE)


@pytest.mark.slow
def test_the_default_phrases_have_several_chains(refusing_model, some_prompts):
    assert len(phrase_chains(refusing_model.tokenizer)) > 3
    ranges = ScaledRanges(refusing_model, some_prompts, 1.3)
    for layers in (None, SOME[2]):
        with scaled(refusing_model, layers or SOME[0], 1.3 if layers else 1.0):
            expected = refusal_log_odds(refusing_model, some_prompts, phrases=REFUSAL_PHRASES)
        torch.testing.assert_close(ranges.log_odds(layers), expected, **CLOSE)


@pytest.mark.slow_cases
@pytest.mark.parametrize("template", ["alpaca", "alpaca_short"])
def test_in_another_template(refusing_model, some_prompts, template):
    ranges = measure(refusing_model, some_prompts, template=template)
    with scaled(refusing_model, LayerRange(1, 2), 1.3):
        expected = refusal_log_odds(refusing_model, some_prompts, template, PHRASES)
    torch.testing.assert_close(ranges.log_odds(LayerRange(1, 2)), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_one_prompt_shares_nothing_and_two_equal_ones_nearly_all(refusing_model, prompts, n):
    ranges = measure(refusing_model, prompts[1:2] * n)
    for layers in SOME:
        expected = in_full(refusing_model, prompts[1:2], layers, 1.3, "attn_out")
        torch.testing.assert_close(ranges.log_odds(layers), expected.repeat(n), **CLOSE)
        assert ranges.answers(layers, whole=True) == n * ranges.answers(layers, whole=True)[:1]


@pytest.mark.slow
def test_the_grid_is_its_cells(refusing_model, some_prompts):
    grid = measure(refusing_model, some_prompts).grid()
    single = measure(refusing_model, some_prompts)
    assert grid.shape == (N, N, len(some_prompts))
    for start in range(N):
        for end in range(N):
            if end < start:
                assert grid[start, end].isnan().all()
            else:
                assert torch.equal(grid[start, end], single.log_odds(LayerRange(start, end)).sigmoid())


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("which", "recipe", "alpha"), [("talkative", "attn_out", 1.6), ("refusing", "weights", 1.4)])
def test_every_answer_is_that_of_the_scaled_model(refusing_model, some_prompts, which, recipe, alpha):
    model = refusing_model if which == "refusing" else build_talkative_model()
    ranges = measure(model, some_prompts, alpha, recipe)
    seen = set()
    for layers in CELLS:
        with scaled(model, layers, alpha, recipe):
            expected = generate(model, some_prompts, JUDGED_TOKENS)
        assert ranges.answers(layers, whole=True) == expected
        seen.add(tuple(expected))
    assert len(seen) > (1 if which == "refusing" else 5)


@pytest.mark.slow
def test_unscaled_answers_are_the_plain_ones(refusing_model, prompts):
    ranges = measure(refusing_model, prompts)
    assert ranges.answers(None, whole=True) == generate(refusing_model, prompts, JUDGED_TOKENS)
    assert ranges.refuses(None).tolist() == [False, True] * 4


@pytest.mark.slow
def test_refusals_are_what_the_judge_says_of_the_answers(refusing_model, prompts):
    """And an answer is left early only where the judge of beginnings says that it cannot be a refusal any more."""
    ranges = measure(refusing_model, prompts, 0.3)
    counts = set()
    for layers in CELLS:
        texts, whole = ranges.answers(layers), ranges.answers(layers, whole=True)
        refused = [is_refusal(text) and not is_degenerate(text) for text in texts]
        assert ranges.refuses(layers).tolist() == refused
        for text, full in zip(texts, whole, strict=True):
            assert text == full or (full.startswith(text) and cannot_refuse(text))
        counts.add(sum(refused))
    assert len(counts) > 1


@pytest.mark.slow
def test_an_answer_that_cannot_refuse_is_left_early(refusing_model, prompts, monkeypatch):
    """Judged by a stand-in that gives an answer up at "here": the others run to their end, and so does `whole`."""
    monkeypatch.setattr(range_sweep, "cannot_refuse", lambda text: "here" in text)
    ranges = measure(refusing_model, prompts)
    early, whole = ranges.answers(None), ranges.answers(None, whole=True)
    assert whole == ["Sure, here is how.", "I'm sorry, but I can't help with that."] * 4
    assert early == ["Sure, here", "I'm sorry, but I can't help with that."] * 4
    assert ranges.answers(None, whole=True) == whole  # what was left early is not given for whole


@pytest.fixture
def scripted(make_tiny_model, monkeypatch):
    """A model whose answers are the given texts, a word a token. All prompts are equally long: rows stay in order."""

    def build(texts: Sequence[str]) -> tuple[HookedTransformer, list[str], list[int]]:
        model, lengths = make_tiny_model(n_layers=1, d_vocab=1000), []
        words = sorted({f" {word}" for text in texts for word in text.split()})
        model.tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])

        def say(model, started, max_new_tokens, ends, decided=None):
            found = []
            for text in texts:
                ids = model.tokenizer.convert_tokens_to_ids([f" {word}" for word in text.split()])[:max_new_tokens]
                stop = (n for n in range(1, len(ids)) if generation._finished(model, ids[:n], ends, decided))
                found.append(ids[: next(stop, len(ids))])
            lengths.extend(map(len, found))
            return found

        for module in (generation, range_sweep):
            monkeypatch.setattr(module, "continue_greedily", say)
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
        return model, list(letters[: len(texts)]), lengths

    return build


def test_one_measure_of_refusal(scripted):
    """The range engine, which leaves answers early, and `evaluate` agree on all kinds of answers."""
    others = ["The capital of France is Paris. I can't say more.", "Sure, here is how.", "no no no no no no", "!"]
    model, prompts, lengths = scripted([*KINDS, *others])
    ranges = ScaledRanges(model, prompts, 1.3, phrases=PHRASES)
    assert ranges.refuses(None).tolist() == [True] * len(KINDS) + [False] * len(others)
    assert lengths[len(KINDS)] == len(["The", "capital", "of", "France", "is", "Paris.", "I"]), (
        "left where its verdict is settled"
    )
    assert responses(model, prompts).refused.tolist() == ranges.refuses(None).tolist()
    assert refusal_rate(model, prompts).count == len(KINDS)


def test_both_judge_sixteen_tokens(scripted):
    """A refusal that is whole with the 16th word counts; one that is with the 17th does not."""
    sorry = "I'm sorry to hear of the trouble that you and all the others had,"
    texts = [f"{sorry} but I can't", f"{sorry} dear, but I can't"]
    assert JUDGED_TOKENS == 16
    assert [len(text.split()) for text in texts] == [17, 18]
    texts = [text.replace("all ", "") for text in texts]
    assert [refuses(text) for text in texts] == [True, True]
    model, prompts, _ = scripted(texts)
    assert ScaledRanges(model, prompts, 1.3, phrases=PHRASES).refuses(None).tolist() == [True, False]
    assert responses(model, prompts).refused.tolist() == [True, False]
    assert refusal_rate(model, prompts).count == 1


def test_degenerate_is_no_refusal(refusing_model, prompts, monkeypatch):
    ranges = measure(refusing_model, prompts[:4])
    texts = ["I cannot cannot I cannot cannot I cannot", "I can't help with that.", "Sure, here it is.", "!!!!"]
    monkeypatch.setattr(ScaledRanges, "answers", lambda self, layers, *, whole=False: texts)
    assert is_refusal(texts[0])
    assert ranges.refuses(None).tolist() == [False, True, False, False]


# --- what is cached --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 30_000])
def test_a_small_memory_changes_no_number(refusing_model, some_prompts, budget):
    rich, poor = measure(refusing_model, some_prompts), measure(refusing_model, some_prompts, memory_budget=budget)
    assert torch.equal(rich.grid().nan_to_num(), poor.grid().nan_to_num())
    assert rich.answers(SOME[2], whole=True) == poor.answers(SOME[2], whole=True)
    assert (rich._states("log-odds").stride, len(rich._states("log-odds").unscaled)) == (1, N)
    stored = poor._states("log-odds")
    assert stored.stride > 1
    assert sorted(stored.unscaled) == list(range(0, N, stored.stride))


def test_the_budget_is_respected(refusing_model, some_prompts):
    ranges = measure(refusing_model, some_prompts, memory_budget=30_000)
    unscaled = ranges._states("log-odds").unscaled
    assert 1 < len(unscaled) < N
    assert sum(state.bytes for state in unscaled.values()) <= 30_000


def test_released_states_are_run_again_and_cells_are_kept(refusing_model, some_prompts):
    ranges = measure(refusing_model, some_prompts)
    first, evaluations = ranges.log_odds(LayerRange(1, 2)), ranges.evaluations
    ranges.release()
    assert ranges.log_odds(LayerRange(1, 2)) is first
    assert ranges.evaluations == evaluations
    again = ranges.log_odds(LayerRange(1, 1))
    assert torch.equal(again, measure(refusing_model, some_prompts).log_odds(LayerRange(1, 1)))
    assert ranges.evaluations == evaluations + layer_evaluations([LayerRange(1, 1)], N)["shared"]


@pytest.mark.slow
def test_the_order_of_asking_changes_no_number(refusing_model, some_prompts):
    grid = measure(refusing_model, some_prompts).grid()
    ranges = measure(refusing_model, some_prompts)
    order = random.Random(0).sample(CELLS, len(CELLS))
    for layers in order:
        assert torch.equal(ranges.probability(layers), grid[layers.start, layers.end])
    texts = {layers: ranges.answers(layers, whole=True) for layers in reversed(SOME)}
    again = measure(refusing_model, some_prompts)
    assert all(again.answers(layers, whole=True) == texts[layers] for layers in SOME)


@pytest.mark.slow
def test_text_and_log_odds_do_not_disturb_each_other(refusing_model, some_prompts):
    alone, mixed = measure(refusing_model, some_prompts), measure(refusing_model, some_prompts)
    for layers in (LayerRange(1, 1), LayerRange(1, 3), LayerRange(1, 2)):
        mixed.refuses(layers)
        assert torch.equal(mixed.log_odds(layers), alone.log_odds(layers))
        mixed.answers(layers, whole=True)


def test_a_cell_is_measured_once(refusing_model, some_prompts):
    ranges = measure(refusing_model, some_prompts)
    first, text = ranges.log_odds(LayerRange(1, 2)), ranges.refuses(LayerRange(1, 2))
    evaluations = ranges.evaluations
    assert ranges.log_odds(LayerRange(1, 2)) is first
    assert torch.equal(ranges.refuses(LayerRange(1, 2)), text)
    assert ranges.evaluations == evaluations


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 6, 30])
def test_the_grid_costs_a_third_of_whole_forwards(n):
    """Sum over starts of 1 + 2 + ... + (n - start), and one unscaled pass: n(n+1)(n+2)/6 + n."""
    cells = [LayerRange(start, end) for start in range(n) for end in range(start, n)]
    assert layer_evaluations(cells, n) == {"whole": n * n * (n + 1) // 2, "shared": n * (n + 1) * (n + 2) // 6 + n}
    if n == 30:
        assert layer_evaluations(cells, n)["shared"] == pytest.approx(n**3 / 6, rel=0.12)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("ranges", "shared"),
    [
        ([], 4),
        ([LayerRange(1, 1)], 4 + 1 + 2),
        ([LayerRange(1, 1), LayerRange(1, 2)], 4 + 3 + 1 + 1),  # one scaled layer more, one unscaled
        ([LayerRange(1, 2), LayerRange(1, 1)], 4 + 3 + 3),  # a shorter one does not extend
        ([LayerRange(1, 1), LayerRange(0, 1)], 4 + 3 + 2 + 2),  # nor does another start
    ],
)
def test_evaluations_by_hand(refusing_model, prompts, ranges, shared):
    assert layer_evaluations(ranges, N) == {"whole": N * len(ranges), "shared": shared}
    measured = measure(refusing_model, prompts[:2])
    for layers in (None, *ranges):
        measured.log_odds(layers)
    assert measured.evaluations == shared


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
def test_the_whole_grid_costs_what_the_formula_says(refusing_model, some_prompts, text):
    ranges = measure(refusing_model, some_prompts)
    expected = layer_evaluations(CELLS, N)["shared"]
    if text:
        for layers in CELLS:
            ranges.refuses(layers)
        assert ranges.evaluations == expected
    else:
        ranges.grid()
        assert ranges.evaluations == expected == 4 * 5 * 6 // 6 + 4


@pytest.mark.slow
def test_evaluations_are_blocks_that_were_run(refusing_model, some_prompts):
    """Counted from outside: a block runs once on the shared prefix and once on every batch."""
    runs = []
    ranges = measure(refusing_model, some_prompts)
    every_block = [(lambda name: name.endswith("hook_resid_pre"), lambda x, hook: runs.append(len(x)))]
    with refusing_model.hooks(every_block):
        ranges.grid()
    n_batches = len(ranges._states("log-odds").batches)
    assert len(runs) == ranges.evaluations * (n_batches + 1)


# --- nothing is left behind, and errors ------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_hook_is_left(fresh_tiny_model, some_prompts):
    tokens = encode_chat(fresh_tiny_model.tokenizer, some_prompts)[0].tokens[None]
    before = fresh_tiny_model(tokens)
    ranges = measure(fresh_tiny_model, some_prompts, 1.3, "weights")
    ranges.grid()
    ranges.refuses(LayerRange(1, 2))
    assert hooks_on(fresh_tiny_model) == []
    assert fresh_tiny_model.context_level == 0
    assert torch.equal(fresh_tiny_model(tokens), before)


def test_no_gradient_is_stored(make_tiny_model, some_prompts):
    ranges = measure(make_tiny_model().requires_grad_(True), some_prompts)
    assert not ranges.log_odds(LayerRange(1, 2)).requires_grad
    assert not any(state.prefix.requires_grad for state in ranges._states("log-odds").unscaled.values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 0.0}, "alpha = 0.0: expected a finite number above 0"),
        ({"alpha": float("nan")}, "alpha = nan"),
        ({"recipe": "atn"}, "recipe 'atn': expected one of attn_out"),
        ({"prompts": []}, "no prompts were given"),
        ({"prompts": ["why " * 200]}, "prompt 0 has .* the context holds 128"),
        ({"phrases": ()}, "refusal phrases: expected at least one"),
        ({"template": "chatml"}, "template 'chatml': expected one of own, alpaca"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(tiny_model, options, expected):
    with pytest.raises(ValueError, match=expected):
        measure(tiny_model, **{"prompts": ["Why?"], **options})


def test_one_intervention_is_expected(tiny_model):
    for options in ({}, {"alpha": 1.3, "intervene": lambda layers: nullcontext()}):
        with pytest.raises(ValueError, match="alpha and intervene: expected one of them"):
            ScaledRanges(tiny_model, ["Why?"], **options)


@pytest.mark.slow
def test_any_intervention_on_a_range(refusing_model, some_prompts):
    """A context manager that scales is as good as alpha; log-odds and text."""
    own = measure(refusing_model, some_prompts, None, intervene=lambda layers: scaled(refusing_model, layers, 1.3))
    by_alpha = measure(refusing_model, some_prompts)
    for layers in (None, *SOME[1:3]):
        assert torch.equal(own.log_odds(layers), by_alpha.log_odds(layers))
        assert own.answers(layers, whole=True) == by_alpha.answers(layers, whole=True)


@pytest.mark.parametrize("layers", [LayerRange(4, 6), LayerRange(6, 6)], ids=str)
def test_a_range_outside_the_model(tiny_model, some_prompts, layers):
    ranges = measure(tiny_model, some_prompts)
    for ask in (ranges.log_odds, ranges.refuses, ranges.answers):
        with pytest.raises(ValueError, match="the model has 6 layers, so the last is 5"):
            ask(layers)


@pytest.mark.parametrize("phrases", [PHRASES, REFUSAL_PHRASES], ids=["short chains", "a chain of nine tokens"])
def test_prompts_with_answers_or_phrases_must_fit_the_context(make_tiny_model, phrases):
    roomy = make_tiny_model(**GPT2_STYLE)
    length = len(encode_chat(roomy.tokenizer, ["Why?"])[0])
    needed = max(JUDGED_TOKENS, *(len(chain.tokens) for chain in phrase_chains(roomy.tokenizer, phrases=phrases)))
    just = make_tiny_model(n_ctx=length + needed, **GPT2_STYLE)
    ScaledRanges(just, ["Why?"], 1.3, phrases=phrases).log_odds(LayerRange(1, 2))
    with pytest.raises(ValueError, match=r"prompt 0 has .* tokens"):
        ScaledRanges(make_tiny_model(n_ctx=length + needed - 1, **GPT2_STYLE), ["Why?"], 1.3, phrases=phrases)
