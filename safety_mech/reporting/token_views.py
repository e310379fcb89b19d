"""CircuitsVis pictures that need no network: attention heads of a layer, tokens coloured by refusal attribution.

The package's own HTML asks the network whether it is there and then loads its code from a CDN. Here the code that came
with the package is put into the page, once a page, however many views the page has.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.models.chat import Template, check_context, encode_chat, tokenizer_of
from safety_mech.refusal.attribution import refusal_attribution, replacement_effects
from safety_mech.reporting.plots import BLUE, ORANGE
from safety_mech.reporting.templates import render

DECIMALS = 4
"""Of every number in a view: more cannot be seen, and a page has thousands of them."""


@dataclass(frozen=True)
class View:
    """One CircuitsVis component with its properties. Jupyter shows it; a page of your own takes `views_html`."""

    component: str
    properties: dict[str, Any] = field(repr=False)
    caption: str

    def _repr_html_(self) -> str:
        return views_html([self])


def attention_heads_view(model: HookedTransformer, prompt: str, layer: int, template: str | Template = "own") -> View:
    """What every head of `layer` attends to, over the prompt in its template: small maps, the chosen one large.

    Raises ValueError for a layer outside the model.
    """
    pattern, tokens = attention_pattern(model, prompt, layer, template)
    caption = (
        f"What the heads of layer {layer} (0 = first block) attend to. Full colour: the most that any token but the "
        f"first gets. Prompt: {prompt}"
    )
    return heads_view(pattern, tokens, caption)


def refusal_attribution_view(
    model: HookedTransformer, prompt: str, template: str | Template = "own", *, gradient: bool = False
) -> View:
    """The prompt's tokens, coloured by what they do to the refusal log-odds (attribution.py).

    The measured effect of replacing a token; or, with `gradient`, its slope, gradient times input: cheaper for a long
    prompt, and at times of the wrong sign.
    """
    if gradient:
        found = refusal_attribution(model, prompt, template)
        what = "gradient times input: a slope, not the effect of taking the token out"
    else:
        found = replacement_effects(model, prompt, template)
        what = "with the token, minus with its embedding replaced by the vocabulary's mean"
    caption = (
        f"Refusal log-odds {found.log_odds:.2f} nats. Orange: the token raises them, blue: it lowers them "
        f"({what}; nats, shown under the pointer). Full colour: the question's strongest token, or more."
    )
    question = found.values[found.question.start : found.question.stop]
    return tokens_view(found.tokens, found.values, caption, scale=float(question.abs().max()))


def heads_view(pattern: Float[Tensor, "head pos pos"], tokens: Sequence[str], caption: str) -> View:
    """Attention maps (destination, source) as CircuitsVis' `AttentionHeads`.

    Full colour is the most that any token but the first gets: the first is most heads' resting place, and on its scale
    nothing else would be seen.
    """
    others = pattern[:, :, 1:]
    strongest = float(others.max()) if others.numel() else 1.0
    return View(
        "AttentionHeads",
        {
            "attention": rounded(pattern),
            "tokens": list(tokens),
            "attentionHeadNames": [f"H{head}" for head in range(len(pattern))],
            "positiveColor": BLUE,
            "maxValue": max(strongest, 10**-DECIMALS),
            "minValue": -1,
        },
        caption,
    )


def tokens_view(
    tokens: Sequence[str], values: Float[Tensor, " pos"], caption: str, *, scale: float | None = None
) -> View:
    """CircuitsVis' `ColoredTokens`: orange above 0, blue below, white at 0, full colour at +-`scale` and beyond.

    `scale`: default the largest absolute value.
    """
    scale = max(float(values.abs().max()) if scale is None else scale, 10**-DECIMALS)
    return View(
        "ColoredTokens",
        {
            "tokens": [html.escape(token, quote=False) for token in tokens],  # the component takes tokens as HTML
            "values": rounded(values),
            "maxValue": scale,
            "minValue": -scale,
            "positiveColor": ORANGE,
            "negativeColor": BLUE,
        },
        caption,
    )


def attention_pattern(
    model: HookedTransformer, prompt: str, layer: int, template: str | Template = "own"
) -> tuple[Float[Tensor, "head pos pos"], tuple[str, ...]]:
    """All heads' attention (destination, source) in one layer, and the tokens; later layers are not run."""
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"layer {layer}: the model has layers 0 to {model.cfg.n_layers - 1}")
    tokenizer = tokenizer_of(model)
    (chat,) = encode_chat(tokenizer, [prompt], template)
    check_context([chat], model.cfg.n_ctx)
    tokens = chat.tokens[None].to(model.embed.W_E.device)
    name = f"blocks.{layer}.attn.hook_pattern"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=name, stop_at_layer=layer + 1)
    return cache[name][0].float().cpu(), tuple(str(tokenizer.decode([token])) for token in chat.tokens.tolist())


def views_html(views: Sequence[View]) -> str:
    """Views one after the other, as a piece of HTML that fetches nothing; CircuitsVis' code is in it once."""
    # A new id each time: a view may be shown twice.
    places = [(f"circuitsvis-{uuid4()}", view, Markup(script_json(view.properties))) for view in views]
    return str(render("views.html", bundle=Markup(bundle()), places=places))


def script_json(value: Any) -> str:
    """JSON that can stand inside <script>: no text in it can end the script or open a comment."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


@cache
def bundle() -> str:
    """The JavaScript that came with the circuitsvis package, fit to stand inside <script>."""
    code = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    code = code.replace("</script", "<\\/script")  # inside strings, where both are the same
    return code.replace("//# sourceMappingURL=iife.js.map", "")  # a debugger would fetch it


def rounded(values: Float[Tensor, "..."]) -> Any:
    return torch.round(values.double(), decimals=DECIMALS).tolist()
