"""Rewards over HTTP: both ends on this machine, and servers that are slow, broken or wrong."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rewards
from rewards import BadInput, RewardError
from scorers import remote

HERE = Path(__file__).resolve().parent.parent
IMAGES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 6, 3), np.uint8)) for i in range(3)]
ASKED = IMAGES, ("a", "b", "c"), ({"n": 1}, {}, {})


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Short waits, and a proxy that is not there: this machine is asked without it."""
    monkeypatch.setattr(remote, "POST_TIMEOUT", 0.3)
    monkeypatch.setattr(remote, "WAIT", 0.001)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


def start(server):
    """The URL of a server that now answers on a thread."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def fake(*answers):
    """A server that gives the i-th request the i-th (status, JSON), then always the last.

    In place of JSON a function of the handler may answer. Returns the URL and a list: what was asked.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append((self.path, json.loads(body or "null")))
            status, content = answers[min(len(asked), len(answers)) - 1]
            if callable(content):
                content(self)
                return
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        do_GET = do_POST

        def log_message(self, *args):
            pass

    return start(ThreadingHTTPServer(("127.0.0.1", 0), Handler)), asked


def means(images, prompts, metadata):
    assert prompts == ["a", "b", "c"] and metadata == [{"n": 1}, {}, {}]
    return [np.asarray(image).mean() for image in images]


def test_a_served_reward_is_the_reward_itself():
    reward = rewards.load(start(remote.make_server("geneval-strict", means, "127.0.0.1", 0)))
    assert reward.name == "geneval-strict"
    assert reward(*ASKED) == means(IMAGES, ["a", "b", "c"], [{"n": 1}, {}, {}])


def test_a_server_that_cannot_be_asked_is_noticed_at_the_start():
    with pytest.raises(BadInput, match="^--reward or --gold: expected a URL like [^@]*$"):
        rewards.load("http://user:password@a:1")
    with pytest.raises(BadInput, match="^http://127.0.0.1:9: .*no answer, .*refused"):
        rewards.load("http://127.0.0.1:9")


def test_a_reward_that_fails_on_the_server_fails_here():
    url = start(remote.make_server("x", lambda *asked: 1 / 0, "127.0.0.1", 0))
    with pytest.raises(RewardError, match="127.0.0.1.*500, .*ZeroDivisionError"):
        rewards.load(url)(*ASKED)


HELLO, GOOD = (200, {"reward": "x"}), (200, {"scores": [1, 2, 3]})


@pytest.mark.parametrize("first", [(503, "busy"), (0, lambda handler: handler.connection.shutdown(2))])
def test_5xx_and_broken_connections_are_tried_again(first):
    url, asked = fake(HELLO, first, first, GOOD)
    assert rewards.load(url)(*ASKED) == [1, 2, 3] and len(asked) == 4


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"])
def test_a_request_that_was_sent_is_not_sent_again_after_a_timeout(begun):
    """The server may still be scoring it."""
    done = threading.Event()
    url, asked = fake(HELLO, (0, lambda handler: (handler.wfile.write(begun), done.wait(10))), GOOD)
    with pytest.raises(RewardError, match="http://127.0.0.1:.*no answer, timed out"):
        rewards.load(url)(*ASKED)
    done.set()
    assert len(asked) == 2  # the one at the start, and one


@pytest.mark.parametrize("status", [401, 307, 504])
def test_other_answers_are_final_and_no_redirect_is_followed(status):
    url, asked = fake(HELLO, (status, "no"), GOOD)
    with pytest.raises(RewardError, match=f"http://127.0.0.1:.*got {status},"):
        rewards.load(url)(*ASKED)
    assert len(asked) == 2


@pytest.mark.parametrize("answer", [[1, 2, 3], {"score": [1, 2, 3]}, {"scores": 5}, {"scores": [1, 2, None]}])
def test_a_wrong_answer_is_not_a_score(answer):
    url, _ = fake(HELLO, (200, answer))
    with pytest.raises(RewardError, match=f"{url}: expected"):
        rewards.load(url)(*ASKED)


def unifiedreward(monkeypatch, status, text):
    """The reward of a judge who always says this, and what it was asked."""
    completion = status, {"choices": [{"message": {"content": text}}]}
    url, asked = fake((200, {"data": [{"id": "unified-7b"}]}), completion)
    monkeypatch.setenv("GRPO_GUARD_UNIFIEDREWARD_API", f"{url}/v1/")
    monkeypatch.setenv("GRPO_GUARD_UNIFIEDREWARD_KEY", "sk-secret")
    return rewards.load("unifiedreward"), asked


def test_unifiedreward_is_the_last_mark_of_each_picture_by_5(monkeypatch):
    reward, asked = unifiedreward(monkeypatch, 200, "**Final Score:** 1 ... **Final Score:** 3.5/5")
    assert reward(*ASKED) == [0.7] * 3
    assert [path for path, _ in asked] == ["/v1/models"] + ["/v1/chat/completions"] * 3
    shown = [data["messages"][0]["content"] for _, data in asked[1:]]
    shown = {question["text"][-1]: picture["image_url"]["url"] for picture, question in shown}
    assert shown["b"] == "data:image/png;base64," + remote.png(IMAGES[1])


ANSWERS = [(200, "good", "1 to 5"), (200, "Final Score: 7", "1 to 5"), (401, "sk-secret", "401, .*[*]{3}")]


@pytest.mark.parametrize("status, text, message", ANSWERS)
def test_no_mark_is_no_score_and_the_key_is_never_shown(monkeypatch, status, text, message):
    with pytest.raises(RewardError, match=message) as error:
        unifiedreward(monkeypatch, status, text)[0](*ASKED)
    assert "sk-secret" not in str(error.value)


def test_the_command_serves_a_reward_by_module_and_function(tmp_path):
    """The module can be imported there, and not here."""
    source = "def load():\n    return lambda images, *others: [image.width / 10 for image in images]\n"
    (tmp_path / "served.py").write_text(source)
    command = [sys.executable, "-m", "scorers.remote", "serve", "served:load", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, cwd=HERE, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            reward = rewards.load(server.stdout.readline().split()[-1])
            assert reward.name == "load" and reward(*ASKED) == [0.6] * 3
        finally:
            server.kill()
