"""Peak memory in bytes, which the kernel gives in kB; and batches padded on the left."""

import sys
from pathlib import Path

import pytest
import torch
from measuring import pad

from safety_mech.commands.memory import peak_since, start_of_peak
from safety_mech.models.chat import ChatTokens


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux'")
def test_the_peak_is_in_bytes_above_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start = start_of_peak()
    if start is not None:
        assert start > 2**20, "control: this process has some"
        held = torch.ones(2**22)
        assert held.nbytes // 2 < (peak_since(start) or 0) < 2 * held.nbytes
    status = "Name:\tpython\nVmHWM:\t    3000 kB\nVmRSS:\t    2000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: status if str(path) == "/proc/self/status" else "")
    assert peak_since(1000) == 3000 * 1024 - 1000
    assert peak_since(None) is None


def test_padding_is_on_the_left_and_masked() -> None:
    chats = [ChatTokens(torch.tensor(tokens), range(1)) for tokens in ([7, 8, 9], [5])]
    tokens, mask = pad(chats)
    assert tokens.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
