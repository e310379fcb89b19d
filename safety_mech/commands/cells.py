"""What experiments over locators share: models that are loaded when first needed, and cached answers.

A killed run goes on where it was: every finished answer is a file in OUT/EXPERIMENT/MODEL/cells.
"""

from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.divergence import onset
from safety_mech.localization import alpha, locators, safety_layers, sufficiency
from safety_mech.localization.locators import BASE_METHODS, LOCATORS, base_locators
from safety_mech.localization.measurements import Located, Measurements, PromptSets, attempt
from safety_mech.models.sources import BASE_OF, model_fingerprint
from safety_mech.prompts import draw, draw_pairs
from safety_mech.refusal import log_odds, text
from safety_mech.reporting.runs import cached_json, cell_path, content_hash, plain

LOCATOR_MODULES = (alpha, locators, log_odds, onset, safety_layers, sufficiency, text)
"""Answers of locators depend on the constants of these."""


def base_of(model: str, base: str | None) -> str | None:
    """The name of the model before alignment; "auto": known for built-in models, None for others."""
    return BASE_OF.get(model) if base == "auto" else base


def draw_sets(
    normal: str, malicious: str, over_rejection: str, n_prompts: int, n_over_rejection: int, template: str, seed: int
) -> tuple[PromptSets, dict[str, list[int]]]:
    """What locators look at, with pairs of the test split, and by source the rows that were drawn."""
    counts = {normal: n_prompts, malicious: n_prompts, over_rejection: n_over_rejection}
    drawn = {source: draw(source, count, seed) for source, count in counts.items()}
    pairs, rows = draw_pairs("test", n_prompts, seed)
    texts, clusters = {source: part.prompts for source, part in drawn.items()}, drawn[over_rejection].clusters
    prompts = PromptSets(texts[normal], texts[malicious], texts[over_rejection], pairs, clusters, template, seed=seed)
    return prompts, {source: part.ids for source, part in drawn.items()} | {"pairs": rows}


@dataclass(frozen=True, eq=False)
class Models:
    """A model and its base, loaded when first asked for; measurements of the model, shared by all that ask."""

    name: str
    adapter: str | Path | None = None
    base_name: str | None = None
    _measured: dict[str, Measurements] = field(default_factory=dict, init=False)

    @cached_property
    def model(self) -> HookedTransformer:
        return sm.load_model(self.name, adapter=self.adapter)

    @cached_property
    def base(self) -> HookedTransformer:
        assert self.base_name is not None
        return sm.load_model(self.base_name)

    def measurements(self, prompts: PromptSets) -> Measurements:
        """Those on these prompts, begun when first asked for."""
        key = content_hash(plain(prompts.key()))
        if key not in self._measured:
            self._measured[key] = Measurements(self.model, prompts)
        return self._measured[key]

    def fingerprints(self, with_base: bool) -> tuple[str, str | None]:
        """The model by content, and its base where the answer depends on it."""
        base = model_fingerprint(self.base_name) if with_base and self.base_name else None
        return model_fingerprint(self.name, self.adapter), base


@dataclass(frozen=True)
class Answer:
    """A locator's answer; `found` is None where the method could not be run, and `detail` says why."""

    found: Located | None
    detail: str
    seconds: float
    n_layers: int

    @property
    def range(self) -> sm.LayerRange | None:
        return self.found.range if self.found else None


def cached_answer(method: str, models: Models, prompts: PromptSets, out: str, experiment: str, label: str) -> Answer:
    """One locator's answer, from its file if it is there."""
    key = (method, models.fingerprints(method in BASE_METHODS), prompts.key())
    path = cell_path(out, experiment, models.name, label, *key, modules=LOCATOR_MODULES)
    record = cached_json(path, partial(_locate, method, models, prompts))
    found = Located.from_plain(record["found"]) if record["found"] else None
    return Answer(**{**record, "found": found})


def _locate(method: str, models: Models, prompts: PromptSets) -> dict[str, Any]:
    locator = base_locators(models.base)[method] if method in BASE_METHODS else LOCATORS[method]
    measured, started = models.measurements(prompts), perf_counter()
    found, detail = attempt(locator, measured)
    timed = {"seconds": perf_counter() - started, "n_layers": measured.n_layers}
    return {"found": found.to_plain() if found else None, "detail": detail, **timed}


def load(name: str, adapter: str | None, config: Any) -> HookedTransformer:
    """A model on the device and in the dtype of a run's config, announced: it takes a while."""
    print(f"loading {name} ...", flush=True)
    return sm.load_model(name, config.device, config.dtype, adapter=adapter)
