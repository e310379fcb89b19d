"""Memory in bytes, as the kernel says it in kB; and batches padded on the left."""

import sys
from pathlib import Path

import pytest
import torch
from measuring import pad_left

from safety_mech.commands.memory import resident
from safety_mech.models.chat import ChatTokens


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux'")
def test_resident_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    status = "Name:\tpython\nVmHWM:\t    3000 kB\nVmRSS:\t    2000 kB\n"
    assert resident("VmRSS") > 2**20, "control: this process has some"
    monkeypatch.setattr(Path, "read_text", lambda path: status if str(path) == "/proc/self/status" else "")
    assert (resident("VmRSS"), resident("VmHWM")) == (2000 * 1024, 3000 * 1024)


def test_padding_is_on_the_left_and_masked() -> None:
    chats = [ChatTokens(torch.tensor(tokens), range(1)) for tokens in ([7, 8, 9], [5])]
    tokens, mask = pad_left(chats)
    assert tokens.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
