"""Fixtures that all tests share: tiny seeded HookedTransformers (tiny.py), and the real small model.

Torch is imported inside the fixtures: xdist's controller, which runs no test, then starts without it.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import PreTrainedTokenizerFast

# A tiny model gains nothing from threads; two workers of two threads each slow one another down tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def make_tiny_model() -> "Callable[..., HookedTransformer]":
    """The factory: `make_tiny_model(seed=1, positions="standard", n_layers=3, ...)`."""
    from tiny import build_tiny_model

    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_model() -> "HookedTransformer":
    """Shared by the session: only for tests that leave weights and hooks as they are."""
    from tiny import build_tiny_model

    return build_tiny_model()


@pytest.fixture
def fresh_tiny_model() -> "HookedTransformer":
    """Equal to `tiny_model`, for the test alone: change it at will."""
    from tiny import build_tiny_model

    return build_tiny_model()


@pytest.fixture(scope="session")
def refusing_model() -> "HookedTransformer":
    """Shared by the session, as `tiny_model` is. Prompts 1, 3, 5 and 7 are refused."""
    from tiny import build_refusing_model

    return build_refusing_model()


@pytest.fixture(scope="session")
def make_tokenizer() -> "Callable[[], PreTrainedTokenizerFast]":
    from tiny import build_tokenizer

    return build_tokenizer


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    from tiny import PROMPTS

    return list(PROMPTS)


@pytest.fixture(scope="session")
def real_model() -> "HookedTransformer":
    """SmolLM2-135M-Instruct as it is shipped: only for tests marked `real_model` that leave it as it is."""
    from safety_mech import load_model

    return load_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def short_alpha_curve() -> Iterator[None]:
    """Two alphas on each side instead of ten, for tests of what stands on the curve and not of the curve itself."""
    from safety_mech.localization import safety_layers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safety_layers, "ALPHAS_ABOVE", (1.05, 1.5))
        patch.setattr(safety_layers, "ALPHAS_BELOW", (0.95, 0.5))
        yield


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """A script of experiments/ as a module, as a notebook would load it."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).resolve().parent.parent / "experiments" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def llama_folder(
    tmp_path_factory: pytest.TempPathFactory, make_tokenizer: "Callable[[], PreTrainedTokenizerFast]"
) -> Path:
    """A random Llama of four layers in Hugging Face format, with the tests' tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "random-llama"
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_adapter(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """Random updates of layers 1 and 2 of that Llama."""
    from tiny import save_random_adapter

    from safety_mech import LayerRange, load_model

    folder = tmp_path_factory.mktemp("adapters") / "random"
    save_random_adapter(load_model(str(llama_folder)), folder, str(llama_folder), LayerRange(1, 2))
    return folder


@pytest.fixture(scope="session")
def _chromium() -> Iterator[Any]:
    from browser import chromium  # only where a test needs a browser

    with chromium() as driver:
        yield driver


@pytest.fixture
def open_file(_chromium: Any) -> Callable[[Path], Any]:
    """Open a file in headless Chromium without a network: gives a `browser.Page`. One browser serves the session."""
    from browser import open_in

    return lambda path: open_in(_chromium, path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`slow_cases`: of a parametrized test's cases, all but the first are slow."""
    seen = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in seen and item.get_closest_marker("slow_cases"):
            item.add_marker(pytest.mark.slow)
        seen.add(name)
