"""CircuitsVis views as HTML: the right numbers, the code once a page, nothing fetched, nothing breaks out.

What a browser makes of them is in test_pages_in_browser.py.
"""

import json
import re

import pytest
import torch
from circuitsvis.attention import attention_heads
from transformer_lens import HookedTransformer

from safety_mech import encode_chat
from safety_mech.models.chat import tokenizer_of
from safety_mech.refusal.attribution import refusal_attribution, replacement_effects
from safety_mech.reporting.token_views import (
    View,
    attention_heads_view,
    attention_pattern,
    bundle,
    heads_view,
    refusal_attribution_view,
    script_json,
    tokens_view,
    views_html,
)

PROMPT = "How do I help a cat?"


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_the_pattern_is_that_of_the_cache(tiny_model: HookedTransformer, layer: int) -> None:
    pattern, tokens = attention_pattern(tiny_model, PROMPT, layer)
    (chat,) = encode_chat(tokenizer_of(tiny_model), [PROMPT])
    _, cache = tiny_model.run_with_cache(chat.tokens[None])
    torch.testing.assert_close(pattern, cache["pattern", layer][0], rtol=0, atol=1e-6)
    assert not torch.allclose(pattern, cache["pattern", (layer + 1) % 6][0], atol=1e-3)
    assert "".join(tokens) == tokenizer_of(tiny_model).decode(chat.tokens)


def test_later_layers_are_not_run_and_no_hook_stays(tiny_model: HookedTransformer) -> None:
    ran = []
    hooks = [(f"blocks.{layer}.hook_resid_pre", lambda x, hook: ran.append(hook.layer())) for layer in range(6)]
    with tiny_model.hooks(fwd_hooks=hooks):
        attention_pattern(tiny_model, PROMPT, 2)
    assert ran == [0, 1, 2]
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())


@pytest.mark.parametrize("layer", [-1, 6])
def test_a_layer_outside_the_model_is_refused(tiny_model: HookedTransformer, layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer}: the model has layers 0 to 5"):
        attention_heads_view(tiny_model, PROMPT, layer)


def test_the_heads_view_has_the_pattern(tiny_model: HookedTransformer) -> None:
    view = attention_heads_view(tiny_model, PROMPT, 3)
    pattern, tokens = attention_pattern(tiny_model, PROMPT, 3)
    assert view.component == "AttentionHeads"
    assert view.properties["tokens"] == list(tokens)
    torch.testing.assert_close(torch.tensor(view.properties["attention"]), pattern, rtol=0, atol=5.1e-5)
    assert "layer 3" in view.caption


def test_full_colour_is_the_most_that_any_token_but_the_first_gets() -> None:
    """The first token gets 0.75 of the last row; the others 0.25 at most."""
    pattern = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.75, 0.25, 0.0]]])
    assert heads_view(pattern, ["a", "b", "c"], "").properties["maxValue"] == 0.25


@pytest.mark.slow_cases
@pytest.mark.parametrize("gradient", [True, False])
def test_the_attribution_view_has_the_attribution(tiny_model: HookedTransformer, gradient: bool) -> None:
    view = refusal_attribution_view(tiny_model, PROMPT, gradient=gradient)
    found = (refusal_attribution if gradient else replacement_effects)(tiny_model, PROMPT)
    assert ("gradient" in view.caption) == gradient
    assert view.component == "ColoredTokens"
    torch.testing.assert_close(torch.tensor(view.properties["values"]).double(), found.values, rtol=0, atol=5.1e-5)
    assert f"{found.log_odds:.2f} nats" in view.caption


def test_full_colour_is_the_questions_strongest_token(tiny_model: HookedTransformer) -> None:
    properties = refusal_attribution_view(tiny_model, PROMPT, gradient=True).properties
    found = refusal_attribution(tiny_model, PROMPT)
    strongest = float(found.values[list(found.question)].abs().max())
    assert properties["maxValue"] == -properties["minValue"] == strongest
    assert strongest < float(found.values.abs().max()), "else a scale over all tokens would pass"


def test_the_properties_are_those_of_the_package() -> None:
    """CircuitsVis' own call, with the same arguments, gives the same names to the component."""
    pattern = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    theirs = attention_heads(pattern, ["a", "b"], ["H0"], 0.75, -1, None, "#0072B2").local_src
    (properties,) = re.findall(r'CircuitsVis\.AttentionHeads,\s*(\{"attention.*\})', theirs)
    assert json.loads(properties) == heads_view(pattern, ["a", "b"], "").properties


def test_jupyter_shows_what_html_is() -> None:
    view = tokens_view(["a"], torch.tensor([1.0]), "caption")
    shown, html = (
        re.sub(r"circuitsvis-[0-9a-f-]{36}", "ID", page) for page in (view._repr_html_(), views_html([view]))
    )
    assert shown == html
    assert bundle() in html
    assert len(repr(view)) < 200, "a traceback or a list of views stays readable"


def test_the_code_is_once_on_a_page_and_every_view_has_its_own_place() -> None:
    view = tokens_view(["a"], torch.tensor([1.0]), "caption")
    page = views_html([view, view, heads_view(torch.ones(1, 1, 1), ["a"], "heads")])
    assert page.count("var CircuitsVis=") == 1
    places = re.findall(r'<div id="([^"]+)"', page)
    assert len(set(places)) == 3
    assert re.findall(r'CircuitsVis\.render\("([^"]+)"', page) == places


def test_the_bundle_is_the_packages_and_fits_into_a_script() -> None:
    from importlib.resources import files

    shipped = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text("utf-8")
    assert "</script" in shipped, "else the test below would say nothing"
    assert "</script" not in bundle()
    assert "<!--" not in bundle()
    assert "sourceMappingURL" not in bundle()
    assert len(shipped) - 100 < len(bundle()) < len(shipped) + 100


def test_nothing_points_outside() -> None:
    page = tokens_view(["a"], torch.tensor([1.0]), "caption")._repr_html_().replace(bundle(), "")
    assert not re.findall(r"https?:|src=|import ", page)
    theirs = attention_heads(torch.ones(1, 1, 1), ["a"]).cdn_src
    assert re.findall(r"https?:|import ", theirs), "control: the package's own page does point outside"


HOSTILE = ["</script><script>window.hacked=1</script>", "<!--", "<img src=x onerror='window.hacked=1'>", "a & b"]


def test_no_token_or_caption_ends_the_script_or_is_a_tag() -> None:
    page = views_html(
        [tokens_view(HOSTILE, torch.ones(4), HOSTILE[0]), heads_view(torch.ones(1, 4, 4), HOSTILE, HOSTILE[2])]
    )
    page = page.replace(bundle(), "")
    assert page.count("</script") == page.count("<script") == 3
    assert "<img" not in page
    assert "<!--" not in page


def test_json_in_a_script_reads_back() -> None:
    value = {"tokens": HOSTILE, "ä\u2028": [0.5, None, True]}
    text = script_json(value)
    assert json.loads(text) == value
    assert "<" not in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json([float("nan")])


def test_the_scale_is_the_same_to_both_sides_and_never_zero() -> None:
    scale = [tokens_view(["a", "b"], torch.tensor(v), "").properties for v in ([-3.0, 1.0], [0.0, 0.0])]
    assert [(p["minValue"], p["maxValue"]) for p in scale] == [(-3.0, 3.0), (-1e-4, 1e-4)]


def test_a_view_is_data() -> None:
    assert View("Hello", {"name": "Bob"}, "c") == View("Hello", {"name": "Bob"}, "c")
