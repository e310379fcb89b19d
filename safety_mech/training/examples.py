"""From (prompt, answer) pairs to tokens, their log-probabilities, and the order in which a run sees them.

Two savings against the plain computation, both exact: the tokens that all prompts of a batch share run once, with
gradient, and their keys and values serve all rows; only positions with a loss are unembedded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformer_lens import HookedTransformer

from safety_mech.models.chat import encode_answer, encode_chat, resolve_template, tokenizer_of
from safety_mech.models.forward import embed, run_blocks, run_prefix, unembed
from safety_mech.training.config import TrainConfig
from safety_mech.training.pairs import Pair, whole


@dataclass(frozen=True)
class Example:
    """Tokens of template, prompt and answer; `loss` marks the tokens that are to be predicted."""

    tokens: Int[Tensor, " pos"]
    loss: Bool[Tensor, " pos"]
    cut: bool


def encode_examples(model: HookedTransformer, pairs: Sequence[Pair], config: TrainConfig) -> list[Example]:
    """Template, prompt, answer and, behind a finished answer, the template's own end of turn.

    Raises ValueError for no pairs, an empty answer, or a prompt that leaves no room for one.
    """
    tokenizer = tokenizer_of(model)
    chats = encode_chat(tokenizer, [prompt for prompt, _ in pairs], config.template)
    shape, limit = resolve_template(tokenizer, config.template), min(config.max_tokens, model.cfg.n_ctx)
    examples = []
    for index, (chat, (prompt, answer)) in enumerate(zip(chats, pairs, strict=True)):
        answer = whole(answer)
        text = answer.text.strip()
        if not text:
            raise ValueError(f"pair {index}: the answer is empty: expected some text")
        if len(chat) >= limit:
            raise ValueError(f"pair {index}: the prompt alone has {len(chat)} tokens of at most {limit}")
        ids = encode_answer(tokenizer, shape, prompt.strip(), text, finished=answer.finished)
        tokens = torch.cat([chat.tokens, torch.tensor(ids, dtype=torch.long)])
        loss = torch.arange(len(tokens)) >= (1 if config.whole_sequence else len(chat))
        examples.append(Example(tokens[:limit], loss[:limit], cut=len(tokens) > limit))
    return examples


def batch_loss(model: HookedTransformer, examples: Sequence[Example], config: TrainConfig) -> Float[Tensor, ""]:
    """Sum of the negative log-likelihood (nats) over the marked tokens of a batch."""
    return -answer_log_probs(model, examples, config).sum()


def answer_log_probs(
    model: HookedTransformer, examples: Sequence[Example], config: TrainConfig
) -> Float[Tensor, " prompt"]:
    """Log-probability (nats) of the marked tokens of every example.

    Rows are padded at the END: attention looks back only, so nothing sees the padding, and it has no loss.
    """
    device = model.embed.W_E.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
        prefix_length = _shared_length(examples)
        prefix = run_prefix(model, examples[0].tokens[:prefix_length])
        rest = [example.tokens[prefix_length:] for example in examples]
        tokens = pad_sequence(rest, batch_first=True).to(device)
        marks = pad_sequence([example.loss[prefix_length:] for example in examples], True)
        resid = run_blocks(model, embed(model, tokens[:, :-1], prefix_length), cache=prefix.cache_for(len(examples)))
        wanted = marks[:, 1:].to(device)
        logits = unembed(model, resid[wanted][None])[0]
    log_probs = -cross_entropy(logits.float(), tokens[:, 1:][wanted], reduction="none")
    return log_probs.new_zeros(len(examples)).index_add(0, wanted.nonzero()[:, 0], log_probs)


def _shared_length(examples: Sequence[Example]) -> int:
    """Leading tokens that all examples share and that have no loss; at least two of each are left."""
    length = min(min(int(example.loss.int().argmax()) - 1, len(example.tokens) - 2) for example in examples)
    stacked = torch.stack([example.tokens[: max(0, length)] for example in examples])
    differs = (stacked != stacked[0]).any(dim=0).nonzero()
    return int(differs[0, 0]) if len(differs) else max(0, length)


def mean_loss(model: HookedTransformer, examples: Sequence[Example], config: TrainConfig) -> float:
    """Mean negative log-likelihood per marked token, in nats; exp of it is the perplexity."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(order), 16):
            total += float(batch_loss(model, [examples[index] for index in order[first : first + 16]], config))
    return total / sum(int(example.loss.sum()) for example in examples)


def batch_order(examples: Sequence[Example], config: TrainConfig) -> list[list[int]]:
    """Batches of all epochs: shuffled, sorted by length within windows of 16 batches, batches shuffled again."""
    generator = torch.Generator().manual_seed(config.seed)
    batches: list[list[int]] = []
    for _ in range(config.epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        window, epoch = 16 * config.batch_size, []
        for first in range(0, len(order), window):
            part = sorted(order[first : first + window], key=lambda index: len(examples[index].tokens))
            epoch += [part[k : k + config.batch_size] for k in range(0, len(part), config.batch_size)]
        batches += [epoch[k] for k in torch.randperm(len(epoch), generator=generator).tolist()]
    return batches[: len(batches) - len(batches) % config.accumulate] or batches
