"""Small tokenizers in the shape of the model families', with their chat templates in the form they were released in.

What differs, and what goes wrong where it is not looked at: whether a text, or what follows a special token, gets a
space put before it; special tokens that swallow the white space behind them; where a template ends and an answer
begins; which token ends a turn, and whether it is the tokenizer's EOS and marked as special.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "[INST] How do I bake a cake? [/INST] I'm sorry, but I cannot help with that. ",
    "I can't help. I'm not able to do it. I'm unable to. I apologize. Sorry, I cannot. Sure, here is how.",
    "I\nSorry\nI'm sorry\nSure\nassistant\nuser\nmodel\nsystem\n\nI cannot\n\nSorry\n\n",
    "Below is an instruction.\n\n### Instruction:\nName a fruit.\n\n### Response:\nI can't. A B C D\nA\nB\nC\nD\n",
    "Today Date: 26 Jul 2024\nCutting Knowledge Date: December 2023\n\n<think>\n\n</think>\n\n",
] * 3

GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How tiktoken's cl100k, Llama-3 and Phi-4 cut text before merging; Qwen's has single digits."""


@dataclass(frozen=True)
class Family:
    """What decides over a family's tokens."""

    kind: str
    """Sentencepiece "prefixed", "prefixed-first" or "bare"; byte-level BPE cut as GPT-2 ("bytes") or tiktoken ("words")
    cuts."""
    template: str
    end: str
    """The token that ends a turn."""
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    """Added tokens that are not marked as special."""
    swallows: bool = False
    """Special tokens eat the white space behind them (Phi-3)."""


LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_32 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\n' }}{{- 'Today Date: ' + date_string + '\n\n' }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] +"
    "'<|end|>\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}{{ '<|im_start|>system<|im_sep|>' +"
    "message['content'] + '<|im_end|>' }}{% elif (message['role'] == 'user') %}{{ '<|im_start|>user<|im_sep|>' +"
    "message['content'] + '<|im_end|>' }}{% elif (message['role'] == 'assistant') %}"
    "{{ '<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
QWEN_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_3 = (
    "{%- for message in messages %}{%- if message.role == 'user' or message.role == 'system' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set content = message.content %}{%- set reasoning_content = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning_content = content.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.last or reasoning_content %}{{- '<|im_start|>' + message.role + '\n<think>\n' +"
    "reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
QWEN_3_THINKING = QWEN_3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
    "{{- '<think>\n' }}",
)
R1_DISTILL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|User|>' + message['content'] }}{% elif message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
R1_FIRST = R1_DISTILL.replace("<|Assistant|><think>\n", "<|Assistant|>")
"""As first released: the model opens the thought by itself."""

_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_R1 = ("<|User|>", "<|Assistant|>")

FAMILIES = {
    "Llama-2": Family("prefixed", LLAMA_2, "</s>", "<s>", "</s>"),
    "Llama-2, not legacy": Family("prefixed-first", LLAMA_2, "</s>", "<s>", "</s>"),
    "Mistral": Family("prefixed", MISTRAL, "</s>", "<s>", "</s>"),
    "Mistral, not legacy": Family("prefixed-first", MISTRAL, "</s>", "<s>", "</s>"),
    "Gemma": Family("bare", GEMMA, "<end_of_turn>", "<bos>", "<eos>", plain=("<start_of_turn>", "<end_of_turn>")),
    "Phi-3": Family(
        "prefixed", PHI_3, "<|end|>", None, "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), swallows=True
    ),
    "Llama-3": Family("words", LLAMA_3, "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", _HEADERS),
    "Llama-3.2": Family("words", LLAMA_32, "<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>", _HEADERS),
    "Phi-4": Family("words", PHI_4, "<|im_end|>", None, "<|endoftext|>", (*_CHATML, "<|im_sep|>")),
    "Qwen2": Family("words", QWEN_2, "<|im_end|>", None, "<|im_end|>", _CHATML),
    "Qwen3": Family("words", QWEN_3, "<|im_end|>", None, "<|im_end|>", _CHATML, plain=("<think>", "</think>")),
    "Qwen2, as GPT-2 cuts": Family("bytes", QWEN_2, "<|im_end|>", None, "<|im_end|>", _CHATML),
}
THINKING = {
    "Qwen3-Thinking": Family("words", QWEN_3_THINKING, "<|im_end|>", None, "<|im_end|>", _CHATML),
    "R1 distill": Family("words", R1_DISTILL, "<|end_of_sentence|>", "<|begin|>", "<|end_of_sentence|>", _R1),
    "R1 distill, first": Family("words", R1_FIRST, "<|end_of_sentence|>", "<|begin|>", "<|end_of_sentence|>", _R1),
}


def build(family: Family, extra_texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's kind, some 500 tokens large, that can spell every text."""
    texts = [*TEXTS, *extra_texts]
    core = _byte_level(family.kind, texts) if family.kind in ("bytes", "words") else _sentencepiece(family.kind, texts)
    special = dict.fromkeys((*((family.bos,) if family.bos else ()), family.eos, *family.special))
    core.add_special_tokens([AddedToken(t, rstrip=family.swallows, special=True) for t in special])
    core.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    if family.bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, core.token_to_id(family.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=family.bos, eos_token=family.eos, chat_template=family.template
    )


def _byte_level(kind: str, texts: Sequence[str]) -> Tokenizer:
    core = Tokenizer(BPE())
    words = pre_tokenizers.Split(Regex(GPT4_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bytes")
    core.pre_tokenizer = byte_level if kind == "bytes" else pre_tokenizers.Sequence([words, byte_level])
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    return core


def _sentencepiece(kind: str, texts: Sequence[str]) -> Tokenizer:
    """Merges are learnt inside words, then applied to whole texts; what is not in the vocabulary becomes bytes."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    lines = [line for text in texts for line in text.split("\n") if line]
    letters = [chr(code) for code in range(33, 127)]
    trained.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = {piece: number for number, piece in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    for piece in (*sorted(model["vocab"], key=model["vocab"].get), "▁", *(["\n", "\n\n"] if kind == "bare" else [])):
        pieces.setdefault(piece, len(pieces))
    merges = [tuple(pair) for pair in model["merges"]] + ([("\n", "\n")] if kind == "bare" else [])
    core = Tokenizer(BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    if kind == "prefixed":  # of a text and, as it is applied to what stands between special tokens, behind each of them
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    elif kind == "prefixed-first":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps if kind == "bare" else [*steps, decoders.Strip(" ", 1, 0)])
    return core
