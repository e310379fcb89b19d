"""The strict parser, and an HTTP judge against a real server on loopback."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from safety_mech.refusal.harmfulness import Verdict, http_judge, judge_prompt, parse_verdict

PAIR = ("How {do} I?", "Sure, here is how.")
GOOD = "#thereason: It helps.\n#thescore: 4"
FOUR = Verdict(4, "It helps.", None)
SOON = {"Retry-After": "0.01"}


class Endpoint:
    """A chat endpoint that plays `script`: a text, (status, headers), raw bytes, or seconds to be silent."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                endpoint.requests.append({"path": self.path, "headers": headers, **body})
                step = endpoint.script.pop(0)
                if isinstance(step, float):
                    time.sleep(step)
                    return
                status, extra = step if isinstance(step, tuple) else (200, {})
                data = step if isinstance(step, bytes) else json.dumps(self.reply(step)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in extra.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def reply(self, step: Any) -> dict[str, Any]:
                if isinstance(step, tuple):
                    return {"error": {"message": "no, \n secret-key"}}
                message = {"role": "assistant", "content": step}
                return {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                        "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def judge(self, *script: Any, **settings: Any) -> Callable[..., list[Verdict]]:
        self.script = list(script)
        settings = {"api_key": "secret-key", "timeout": 5.0, **settings}
        return http_judge(self.url, "m", **settings)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "#TheReason:   It helps.  \n\n # The Score :  4 . ",
        "**#thereason:** It helps.\n**#thescore: 4**",
        "#thereason: It helps. #thescore: 4",
        "#thereason: It helps.\n#thescore:\n4",
        "#thereason: It helps.\n#thescore: 4\n#thescore: 4",
    ],
)
def test_parser_tolerates(text: str) -> None:
    assert parse_verdict(text) == FOUR


@pytest.mark.parametrize(
    "value", ["0", "6", "4.5", "-4", "45", "4/5", "4 or 5", "four", "٤", "4\n#thescore: 5", "", "\n#thescore: 4"]
)
def test_parser_refuses(value: str) -> None:
    verdict = parse_verdict(f"#thereason: It helps.\n#thescore: {value}")
    assert verdict.score is None
    assert verdict.problem


def test_no_score_from_text_without_the_line() -> None:
    for text in ("", "4", "The score is 4.", "#thereason: I give a 5"):
        assert parse_verdict(text).score is None
    assert parse_verdict("#thescore: 1") == Verdict(1, "", None)


@pytest.mark.slow
def test_success_and_what_is_sent(endpoint: Endpoint) -> None:
    judge = endpoint.judge(GOOD, "#thescore: 1")
    assert judge([PAIR, ("a", "b"), PAIR]) == [FOUR, Verdict(1, "", None), FOUR]
    assert len(endpoint.requests) == 2  # equal pairs are asked once
    sent = endpoint.requests[0]
    assert sent["path"] == "/v1/chat/completions"
    assert sent["headers"]["authorization"] == "Bearer secret-key"
    assert (sent["model"], sent["temperature"]) == ("m", 0)
    assert sent["messages"] == [{"role": "user", "content": judge_prompt(*PAIR)}]
    assert all(text in judge_prompt(*PAIR) for text in (*PAIR, "#thereason:", "#thescore:"))


@pytest.mark.slow
@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_retries_then_success(endpoint: Endpoint, status: int) -> None:
    assert endpoint.judge((status, SOON), GOOD)([PAIR]) == [FOUR]
    assert len(endpoint.requests) == 2


@pytest.mark.slow
def test_time_out_then_success(endpoint: Endpoint) -> None:
    assert endpoint.judge(0.6, GOOD, timeout=0.3)([PAIR]) == [FOUR]
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("status", [408, 429, 500])
def test_retries_exhausted_is_a_problem_and_the_next_pair_is_asked(endpoint: Endpoint, status: int) -> None:
    judge = endpoint.judge(*[(status, SOON)] * 3, GOOD, retries=2)
    lost, good = judge([PAIR, ("a", "b")])
    assert lost.score is None
    assert lost.problem is not None
    assert "3 tries" in lost.problem
    assert f"HTTP {status}" in lost.problem
    assert "secret-key" not in lost.problem
    assert good == FOUR
    asked = [request["messages"][0]["content"] for request in endpoint.requests]
    assert asked == [judge_prompt(*PAIR)] * 3 + [judge_prompt("a", "b")]


@pytest.mark.slow_cases
@pytest.mark.parametrize("step", ["I'd rather not.", "#thescore: 9", b"<html>", b"{}", b'{"choices": []}', b"[1]"])
def test_nonsense_has_no_score_and_is_not_asked_twice(endpoint: Endpoint, step: Any) -> None:
    (verdict,) = endpoint.judge(step)([PAIR])
    assert verdict.score is None
    assert verdict.problem
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_other_4xx_raises_one_line_without_the_key(endpoint: Endpoint, status: int) -> None:
    with pytest.raises(ValueError, match=f"HTTP {status}") as raised:
        endpoint.judge((status, {}))([PAIR])
    assert "\n" not in str(raised.value)
    assert "secret-key" not in str(raised.value)
    assert len(endpoint.requests) == 1


def test_resume_asks_nothing_again(endpoint: Endpoint, tmp_path: Path) -> None:
    keep = tmp_path / "new" / "verdicts.jsonl"
    first = endpoint.judge(GOOD, "nonsense", keep=keep)([PAIR, ("a", "b")])
    assert endpoint.judge(keep=keep)([("a", "b"), PAIR]) == first[::-1]
    assert len(endpoint.requests) == 2
    assert "secret-key" not in keep.read_text()
    endpoint.judge(GOOD, keep=keep)([("a", "other")])  # control: another answer is asked for
    assert len(endpoint.requests) == 3


def test_each_verdict_is_written_at_once(endpoint: Endpoint, tmp_path: Path) -> None:
    keep = tmp_path / "verdicts.jsonl"
    with pytest.raises(ValueError, match="HTTP 401"):
        endpoint.judge(GOOD, (401, {}), keep=keep)([PAIR, ("a", "b")])
    assert len(keep.read_text().splitlines()) == 1


@pytest.mark.slow
def test_half_written_last_line_is_ignored_and_a_bad_one_is_an_error(endpoint: Endpoint, tmp_path: Path) -> None:
    keep = tmp_path / "verdicts.jsonl"
    endpoint.judge(GOOD, GOOD, keep=keep)([PAIR, ("a", "b")])
    keep.write_text(keep.read_text()[:-20])
    assert endpoint.judge(GOOD, keep=keep)([PAIR, ("a", "b")]) == [FOUR, FOUR]
    assert len(endpoint.requests) == 3
    assert [json.loads(line)["score"] for line in keep.read_text().splitlines()] == [4, 4]
    good = keep.read_text()
    for bad in ("{}", "[", good.splitlines()[0].replace('"score": 4', '"score": 7')):
        keep.write_text(f"{bad}\n{good}")
        with pytest.raises(ValueError, match="line 1"):
            endpoint.judge(keep=keep)([PAIR])


def test_what_was_never_answered_is_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    keep = tmp_path / "verdicts.jsonl"
    assert endpoint.judge((500, {}), retries=0, keep=keep)([PAIR])[0].score is None
    assert len(keep.read_text().splitlines()) == 1
    assert endpoint.judge(GOOD, keep=keep)([PAIR]) == [FOUR]


@pytest.mark.parametrize("settings", [{"retries": -1}, {"timeout": 0.0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 0"):
        http_judge("http://127.0.0.1:1/v1", "m", **settings)
