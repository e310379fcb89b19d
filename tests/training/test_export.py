"""What was trained is what transformers reads again, with equal logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import GPT2_STYLE, build_tokenizer, randomise
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from safety_mech import load_model
from safety_mech.training.export import export_transformers
from safety_mech.training.loop import TrainConfig, fine_tune
from safety_mech.training.lora import low_rank_adapters

PAIRS = [("How do I bake a cake?", "I'm sorry."), ("Name a fruit", "Sure, a pear."), ("Why?", "No.")]
FAMILIES = ["Llama", "Mistral", "Qwen2"]


def write_model(folder: Path, family: str = "Llama", tied: bool = False, **changes: Any) -> Path:
    """A random model of two layers with the tests' tokenizer, every weight random, norms and biases too."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings: dict[str, Any] = {"vocab_size": len(tokenizer), "tie_word_embeddings": tied, **sizes, **heads, **changes}
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomise(model, seed=1)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(model: HookedTransformer, embeddings: bool) -> None:
    config = TrainConfig(epochs=3, batch_size=3, learning_rate=1e-2, warmup_steps=1, train_embeddings=embeddings)
    fine_tune(model, PAIRS, config, progress=False)


def some_tokens() -> Tensor:
    return torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(4))


def hooked_logits(model: HookedTransformer) -> Tensor:
    return model(some_tokens()).detach()


def read(folder: Path) -> Any:
    """As a user would, with nothing of ours, and no weight left over or made up."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def read_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return read(folder)(some_tokens()).logits


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def state(model: HookedTransformer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def base(tmp_path) -> Path:
    return write_model(tmp_path / "base")


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", [False, True], ids=["embeddings frozen", "embeddings trained"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped queries", "no grouped queries"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_logits_of_the_trained_model(tmp_path, family, kv_heads, tied, embeddings):
    base = write_model(tmp_path / "base", family, tied, num_key_value_heads=kv_heads)
    model = load_model(base)
    untrained = hooked_logits(model)
    train(model, embeddings)
    trained = hooked_logits(model)
    assert difference(trained, untrained) > 0.05, "control: training moved the logits"
    folder = export_transformers(model, base, tmp_path / "new" / "out")
    assert difference(read_logits(folder), trained) < 1e-5
    assert difference(hooked_logits(load_model(folder)), trained) < 1e-5
    assert difference(read_logits(base), untrained) < 1e-5, "the base's folder is as it was"
    stays_tied = tied and not embeddings
    assert read(folder).config.tie_word_embeddings is stays_tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not stays_tied
    assert [path.name for path in folder.parent.iterdir()] == ["out"], "nothing temporary is left"


def test_an_untrained_export_holds_the_checkpoints_own_weights(base, tmp_path):
    folder = export_transformers(load_model(base), base, tmp_path / "out")
    assert same(load_file(folder / "model.safetensors"), load_file(base / "model.safetensors"))


@pytest.mark.slow
def test_the_shared_llama_folder(llama_folder, tmp_path):
    model = load_model(llama_folder)
    train(model, embeddings=True)
    folder = export_transformers(model, llama_folder, tmp_path / "out")
    assert difference(read_logits(folder), hooked_logits(model)) < 1e-5


def test_heads_wider_than_width_by_heads(tmp_path):
    base = write_model(tmp_path / "base", head_dim=8)
    model = load_model(base)
    train(model, embeddings=False)
    assert difference(read_logits(export_transformers(model, base, tmp_path / "out")), hooked_logits(model)) < 1e-5


def test_the_number_format_is_the_models(base, tmp_path):
    model = load_model(base, dtype="bfloat16")
    folder = export_transformers(model, base, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
    ],
)
def test_control_with_one_weight_of_the_base_the_logits_differ(base, tmp_path, module):
    """The comparison above would see a weight that was not exported."""
    model = load_model(base)
    train(model, embeddings=False)
    file = export_transformers(model, base, tmp_path / "out") / "model.safetensors"
    name = f"model.layers.1.{module}.weight"
    save_file({**load_file(file), name: load_file(base / file.name)[name]}, file, metadata={"format": "pt"})
    assert difference(read_logits(file.parent), hooked_logits(model)) > 1e-3


def test_the_tokenizer_and_its_template_come_from_the_base(base, tmp_path):
    folder = export_transformers(load_model(base), base, tmp_path / "out")
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, base))
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours("How do I bake a cake?").input_ids == theirs("How do I bake a cake?").input_ids


@pytest.mark.long_run
@pytest.mark.real_model
def test_the_built_in_model_out_of_a_gguf(real_model, tmp_path):
    """The aligned weights with the base's config and tokenizer, which come out of a GGUF file."""
    aligned = load_model("smollm2-135m-aligned")
    tokens = aligned.to_tokens("How do I pick the lock of my neighbour's house?")
    folder = export_transformers(aligned, "smollm2-135m-instruct", tmp_path / "out")
    exported = read(folder)
    with torch.no_grad():
        assert difference(exported(tokens).logits, aligned(tokens)) < 1e-3
        assert difference(real_model(tokens), aligned(tokens)) > 0.1, "control: the base's logits are others"
    assert exported.config.tie_word_embeddings
    assert not hasattr(exported.config, "quantization_config")
    chat = [{"role": "user", "content": "Why?"}]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=True)
    assert ids == aligned.tokenizer.apply_chat_template(chat, tokenize=True)
    shutil.rmtree(folder)  # half a gigabyte, which pytest would keep


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(message: str, model: HookedTransformer, base: Path, folder: Path, **options: Any) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        export_transformers(model, base, folder, **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.rglob("*")) == before, "nothing is written"


def test_folded_weights_are_refused(base, tmp_path):
    refused("'RMSPre'.*process_weights=False", load_model(base, process_weights=True), base, tmp_path / "out")


def test_gpt2_is_refused(make_tiny_model, base, tmp_path):
    refused("normalization 'LN'", make_tiny_model(**GPT2_STYLE), base, tmp_path / "out")


def test_a_base_of_another_family_is_refused(base, tmp_path):
    gemma = write_model(tmp_path / "gemma", "Gemma", head_dim=4)
    refused("is a GemmaForCausalLM: export knows Llama", load_model(base), gemma, tmp_path / "out")
    mistral = write_model(tmp_path / "mistral", "Mistral")
    refused("has architecture MistralForCausalLM, the model Llama", load_model(base), mistral, tmp_path / "out")


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "has layers 3, the model 2"),
        ({"num_attention_heads": 8, "head_dim": 2}, "has heads 8, the model 4"),
        ({"intermediate_size": 32}, "has MLP width 32, the model 24"),
        ({"rms_norm_eps": 1e-3}, "has norm eps 0.001"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "has rotary base 500.0"),
        ({"head_dim": 8}, r"q_proj\.weight has shape \(32, 16\), expected \(16, 16\) as in the model"),
        ({"attention_bias": True}, r"has 8 weights that the model lacks, the first is .*bias"),
    ],
    ids=["layers", "heads", "mlp", "eps", "rotary", "head width", "biases"],
)
def test_a_base_of_another_shape_is_refused(base, tmp_path, changes, message):
    refused(message, load_model(base), write_model(tmp_path / "other", **changes), tmp_path / "out")


def test_a_weight_without_a_place_is_refused(base, tmp_path):
    model = load_model(base)
    model.blocks[1].mlp.b_in.data[3] = 0.1
    refused(r"blocks\.1\.mlp\.b_in is not zero", model, base, tmp_path / "out")


def test_low_rank_updates_are_refused(base, tmp_path):
    model = load_model(base)
    with low_rank_adapters(model, rank=1):
        refused("low-rank updates are still on the model", model, base, tmp_path / "out")
    export_transformers(model, base, tmp_path / "out")


def test_a_base_that_leads_nowhere(base, tmp_path):
    refused("no such folder", load_model(base), tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.slow
def test_a_model_is_replaced_only_if_asked(base, tmp_path):
    model = load_model(base)
    folder = export_transformers(model, base, tmp_path / "out")
    first = read_logits(folder)
    (folder / "stale.bin").write_text("of the old model")
    train(model, embeddings=False)
    refused("is not empty: name another, or pass overwrite=True", model, base, folder)
    assert torch.equal(read_logits(folder), first)
    export_transformers(model, base, folder, overwrite=True)
    assert difference(read_logits(folder), hooked_logits(model)) < 1e-5
    assert not (folder / "stale.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_what_is_no_model_is_never_replaced(base, tmp_path):
    model = load_model(base)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        refused("is not", model, base, tmp_path / "notes", overwrite=overwrite)
    (tmp_path / "notes" / "config.json").write_text("{}")
    (tmp_path / "notes" / "photos").mkdir()
    refused("holds other things than a model", model, base, tmp_path / "notes", overwrite=True)
    (tmp_path / "file").write_text("")
    refused("is a file", model, base, tmp_path / "file")


def test_an_empty_folder_is_filled(base, tmp_path):
    (tmp_path / "out").mkdir()
    export_transformers(load_model(base), base, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_failed_export_leaves_the_old_model(base, tmp_path, monkeypatch):
    model = load_model(base)
    folder = export_transformers(model, base, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safety_mech.training.export.save_file", full)
    with pytest.raises(OSError, match="no space"):
        export_transformers(model, base, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_failed_rename_puts_the_old_model_back(base, tmp_path, monkeypatch):
    """The old model is set aside already when the new one cannot take its place."""
    model = load_model(base)
    folder = export_transformers(model, base, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    renamed, own = [], Path.replace

    def replace(path: Path, target: Path) -> Path:
        renamed.append(path.name.split("-")[0])
        if path.name.startswith(".partial-"):
            raise OSError("busy")
        return own(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="busy"):
        export_transformers(model, base, folder, overwrite=True)
    assert renamed == ["out", ".partial", ".old"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
