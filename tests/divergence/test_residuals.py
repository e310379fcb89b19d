"""last_token_residuals against TransformerLens' own cache, prompt by prompt."""

import gc

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from safety_mech import encode_chat, last_token_residuals, load_prompts


def tokenizer_of(model: HookedTransformer) -> PreTrainedTokenizerBase:
    assert model.tokenizer is not None
    return model.tokenizer


def from_the_cache(model: HookedTransformer, prompts: list[str], template: str = "own") -> Tensor:
    """The oracle: every prompt alone, everything cached, the last position of resid_post picked out."""
    rows = []
    for chat in encode_chat(tokenizer_of(model), prompts, template):
        _, cache = model.run_with_cache(chat.tokens[None], names_filter=lambda name: name.endswith("hook_resid_post"))
        rows.append(torch.stack([cache["resid_post", layer][0, -1] for layer in range(model.cfg.n_layers)]))
    return torch.stack(rows)


def assert_same_streams(acts: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    """Every prompt's stream at every layer, up to a distance relative to its own length."""
    assert acts.shape == expected.shape
    assert ((acts - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < relative


def hooks_on(model: HookedTransformer) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.has_hooks()]


def lengths(model: HookedTransformer, prompts: list[str]) -> list[int]:
    return [len(chat) for chat in encode_chat(tokenizer_of(model), prompts)]


def test_prompts_are_of_mixed_length_and_some_share_a_batch(tiny_model, prompts):
    found = lengths(tiny_model, prompts)
    assert 1 < len(set(found)) < len(found)


@pytest.mark.parametrize("share_prefix", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "batch_tokens", [pytest.param(1, marks=pytest.mark.slow), 100, pytest.param(4096, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("template", ["own", "alpaca"])
def test_equals_the_cache_of_every_prompt_alone(tiny_model, prompts, template, batch_tokens, share_prefix):
    acts = last_token_residuals(tiny_model, prompts, template, batch_tokens=batch_tokens, share_prefix=share_prefix)
    assert_same_streams(acts, from_the_cache(tiny_model, prompts, template))


def test_equals_the_cache_with_learnt_positions(make_tiny_model, prompts):
    model = make_tiny_model(seed=5, positions="standard", n_key_value_heads=None)
    acts = last_token_residuals(model, prompts)
    assert_same_streams(acts, from_the_cache(model, prompts))


def test_it_is_resid_post_and_not_resid_pre(tiny_model, prompts):
    acts = last_token_residuals(tiny_model, prompts[:1])
    tokens = encode_chat(tokenizer_of(tiny_model), prompts[:1])[0].tokens[None]
    _, cache = tiny_model.run_with_cache(tokens)
    torch.testing.assert_close(acts[0, 2], cache["blocks.2.hook_resid_post"][0, -1], rtol=0, atol=1e-6)
    torch.testing.assert_close(acts[0, 2], cache["blocks.3.hook_resid_pre"][0, -1], rtol=0, atol=1e-6)
    assert not torch.allclose(acts[0, 2], cache["blocks.2.hook_resid_pre"][0, -1], atol=1e-3)
    assert not torch.allclose(acts[0, 2], cache["blocks.2.hook_resid_post"][0, -2], atol=1e-3)


def test_order_of_prompts_is_last(tiny_model, prompts):
    order = [5, 0, 7, 2, 1, 6, 4, 3]
    acts = last_token_residuals(tiny_model, prompts)
    shuffled = last_token_residuals(tiny_model, [prompts[index] for index in order])
    assert_same_streams(shuffled, acts[order])
    assert not torch.allclose(acts, acts[order], atol=1e-2)


def test_one_prompt_alone_and_a_prompt_given_twice(tiny_model, prompts):
    acts = last_token_residuals(tiny_model, prompts)
    assert_same_streams(last_token_residuals(tiny_model, prompts[3:4]), acts[3:4])
    twice = last_token_residuals(tiny_model, [prompts[3], prompts[3]])
    assert_same_streams(twice, acts[[3, 3]])


def test_result_is_float32_on_the_cpu_without_gradient(make_tiny_model, prompts):
    model = make_tiny_model(dtype=torch.bfloat16).to(torch.bfloat16).requires_grad_(True)
    acts = last_token_residuals(model, prompts)
    assert acts.dtype == torch.float32
    assert acts.device.type == "cpu"
    assert not acts.requires_grad
    assert torch.equal(acts, acts.bfloat16().float())


# --- hooks -------------------------------------------------------------------------------------------------------


def double(resid: Tensor, hook) -> Tensor:
    return 2 * resid


def test_hooks_are_removed_afterwards(fresh_tiny_model, prompts):
    last_token_residuals(fresh_tiny_model, prompts)
    assert hooks_on(fresh_tiny_model) == []
    assert fresh_tiny_model.context_level == 0


@pytest.mark.slow
@pytest.mark.parametrize("at_call", [1, 3, 5])
def test_hooks_are_removed_after_an_exception_in_the_middle(fresh_tiny_model, prompts, at_call):
    calls = []

    def fail(resid: Tensor, hook) -> None:
        calls.append(hook.name)
        if len(calls) == at_call:
            raise RuntimeError("stop here")

    model = fresh_tiny_model
    model.add_hook("blocks.3.hook_mlp_out", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        last_token_residuals(model, prompts)
    assert len(calls) == at_call
    assert hooks_on(model) == ["blocks.3.hook_mlp_out"]  # the user's own is the user's to remove
    assert len(model.hook_dict["blocks.3.hook_mlp_out"].fwd_hooks) == 1
    assert model.context_level == 0
    model.reset_hooks()
    assert_same_streams(last_token_residuals(model, prompts), from_the_cache(model, prompts))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["blocks.2.hook_attn_out", "blocks.2.hook_resid_post", "hook_embed"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_hook_of_the_users_own_is_active(tiny_model, prompts, point, share_prefix):
    plain = last_token_residuals(tiny_model, prompts, share_prefix=share_prefix)
    with tiny_model.hooks([(point, double)]):
        hooked = last_token_residuals(tiny_model, prompts, share_prefix=share_prefix)
        expected = from_the_cache_with_hooks_on(tiny_model, prompts)
        assert hooks_on(tiny_model) == [point]
    assert_same_streams(hooked, expected)
    first = 0 if point == "hook_embed" else 2
    assert torch.equal(hooked[:, :first], plain[:, :first])
    assert ((hooked - plain)[:, first:].abs().amax(dim=-1) > 1e-3).all()


def from_the_cache_with_hooks_on(model: HookedTransformer, prompts: list[str]) -> Tensor:
    """run_with_cache would take the active hooks off at its end; one caching hook a layer, in a context, does not."""
    rows = []
    for chat in encode_chat(tokenizer_of(model), prompts):
        last: dict[int, Tensor] = {}

        def keep(resid: Tensor, hook, last: dict[int, Tensor] = last) -> None:
            last[hook.layer()] = resid[0, -1].clone()

        with model.hooks([(f"blocks.{layer}.hook_resid_post", keep) for layer in range(model.cfg.n_layers)]):
            model(chat.tokens[None])
        rows.append(torch.stack([last[layer] for layer in range(model.cfg.n_layers)]))
    return torch.stack(rows)


def test_a_permanent_hook_survives(fresh_tiny_model, prompts):
    fresh_tiny_model.add_perma_hook("blocks.1.hook_mlp_out", double)
    last_token_residuals(fresh_tiny_model, prompts)
    assert hooks_on(fresh_tiny_model) == ["blocks.1.hook_mlp_out"]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_hooks_see_all_positions_only_without_a_shared_prefix(tiny_model, prompts, share_prefix):
    seen = []
    with tiny_model.hooks([("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x.shape[1]))]):
        last_token_residuals(tiny_model, prompts, share_prefix=share_prefix, batch_tokens=1)
    whole = sorted(lengths(tiny_model, prompts), reverse=True)
    if share_prefix:
        prefix, *rest = seen
        assert rest == [length - prefix for length in whole]
    else:
        assert seen == whole


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_reported_with_layer_and_prompt(tiny_model, prompts, value):
    longest = max(range(len(prompts)), key=lengths(tiny_model, prompts).__getitem__)
    pos = lengths(tiny_model, prompts)[longest]

    def spoil(resid: Tensor, hook) -> Tensor | None:
        return resid + value if resid.shape[1] == pos else None

    with (
        tiny_model.hooks([("blocks.3.hook_resid_post", spoil)]),
        pytest.raises(ValueError, match=rf"not finite at layer 3 for prompt {longest}: try dtype float32"),
    ):
        last_token_residuals(tiny_model, prompts, share_prefix=False)
    assert hooks_on(tiny_model) == []


def test_a_bad_weight_is_reported_at_its_layer(fresh_tiny_model, prompts):
    fresh_tiny_model.blocks[4].mlp.W_out.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite at layer 4 for prompt 0"):
        last_token_residuals(fresh_tiny_model, prompts)


def test_the_first_layer_is_named_and_not_the_first_prompt(tiny_model, prompts):
    """One prompt goes wrong at layer 1, a shorter one, which stands before it, not until layer 3."""
    of_length = lengths(tiny_model, prompts)
    early = max(range(len(prompts)), key=of_length.__getitem__)
    late = next(index for index in range(len(prompts)) if of_length[index] != of_length[early])
    assert late < early

    def spoil(resid: Tensor, hook) -> Tensor | None:
        wrong = {1: of_length[early], 3: of_length[late]}[hook.layer()]
        return resid * torch.nan if resid.shape[1] == wrong else None

    with (
        tiny_model.hooks([(f"blocks.{layer}.hook_resid_post", spoil) for layer in (1, 3)]),
        pytest.raises(ValueError, match=f"not finite at layer 1 for prompt {early}:"),
    ):
        last_token_residuals(tiny_model, prompts, share_prefix=False)


def test_a_prompt_of_just_the_context_runs_and_a_longer_one_is_refused(make_tiny_model, prompts):
    longest = max(lengths(make_tiny_model(), prompts))
    last_token_residuals(make_tiny_model(n_ctx=longest), prompts)
    index = lengths(make_tiny_model(), prompts).index(longest)
    with pytest.raises(ValueError, match=f"prompt {index} has {longest} tokens: the context holds {longest - 1}"):
        last_token_residuals(make_tiny_model(n_ctx=longest - 1), prompts)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ([], "no prompts were given"),
        (["fine", "  "], "prompt 1 is empty"),
        (["fine", "not <|im_end|> fine"], "prompt 1 holds the special token '<|im_end|>'"),
    ],
)
def test_bad_prompts_are_refused(tiny_model, bad, expected):
    with pytest.raises(ValueError, match=expected.replace("|", r"\|")):
        last_token_residuals(tiny_model, bad)


def test_types_are_checked(tiny_model):
    with pytest.raises(TypeCheckError):
        last_token_residuals(tiny_model, [1, 2])  # pyright: ignore[reportArgumentType]


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_but_the_last_position_outlives_its_layer(tiny_model, prompts):
    born, alive_at_once = [], []

    def watch(resid: Tensor, hook) -> None:
        born.append(StorageWeakRef(resid.untyped_storage()))
        alive_at_once.append(sum(not storage.expired() for storage in born))

    with tiny_model.hooks([(lambda name: name.endswith("hook_resid_post"), watch)]):
        acts = last_token_residuals(tiny_model, prompts)
    gc.collect()
    assert len(born) == 6 * (1 + len(set(lengths(tiny_model, prompts))))  # the prefix, then the batches
    assert all(storage.expired() for storage in born)
    assert max(alive_at_once) == 2  # a block's input and its output
    assert acts.untyped_storage().nbytes() == acts.numel() * 4 == len(prompts) * 6 * 16 * 4


@pytest.mark.slow
def test_a_view_that_is_last_is_seen_by_that_check(tiny_model, prompts):
    born, last = [], []

    def watch(resid: Tensor, hook) -> None:
        born.append(StorageWeakRef(resid.untyped_storage()))
        last.append(resid[:, -1])  # a view: it keeps all positions alive

    with tiny_model.hooks([("blocks.2.hook_resid_post", watch)]):
        last_token_residuals(tiny_model, prompts)
    gc.collect()
    assert not any(storage.expired() for storage in born)


def test_what_is_last_does_not_grow_with_the_prompts_length(tiny_model):
    short = last_token_residuals(tiny_model, ["Why?", "How?"])
    long = last_token_residuals(tiny_model, ["Why? " * 12, "How? " * 15])
    assert short.untyped_storage().nbytes() == long.untyped_storage().nbytes() == 2 * 6 * 16 * 4


# --- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_real_model_equals_the_cache_of_every_prompt_alone(real_model):
    prompts = load_prompts("normal")[:20]
    expected = from_the_cache(real_model, prompts)
    for share_prefix in (True, False):
        acts = last_token_residuals(real_model, prompts, share_prefix=share_prefix)
        assert acts.shape == (20, 30, 576)
        assert_same_streams(acts, expected, relative=1e-5)
