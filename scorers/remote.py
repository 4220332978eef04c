"""Rewards of another process: a reward served over HTTP, a package of its own, a language model as a judge.

    python -m scorers.remote serve imagereward --port 8000 --host 0.0.0.0   # there, in the repository's root
    export GRPO_GUARD_IMAGEREWARD_URL=http://that-machine:8000              # here

The protocol is JSON: GET answers {"reward": NAME}; POST of {"images": [base64 PNG], "prompts": [...],
"metadata": [...]} answers {"scores": [...]}, one number per image. Any status but 200 is a failure. Nothing
is pickled. There is no authentication: keep it on a trusted network.

Environment variables:

- GRPO_GUARD_<NAME>_URL: where to read the reward of that name instead of building it. The name is in upper
  case, with `_` for whatever is neither a letter nor a digit
- GRPO_GUARD_HTTP_URL: where the reward `http` reads, whatever is served there
- GRPO_GUARD_UNIFIEDREWARD_API, _MODEL, _KEY: for `unifiedreward`, the base URL of an OpenAI-compatible
  server, like http://127.0.0.1:8000/v1; its model, the first that it lists unless given; its key if any
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from rewards import BadInput, RewardError, load, url_variable

GET_TIMEOUT = 30  # seconds without a byte from the other side
POST_TIMEOUT = 540  # the same while a server scores; guard.py gives a reward 600 s
TRIES, WAIT = 4, 1  # attempts, with waits of 1, 3, 7 times WAIT seconds in between


# ------------------------------------------------------------------------------------------------------------
# The client


def server_url(variable):
    """The URL in an environment variable, without a slash at its end. Raises BadInput."""
    url = os.environ.get(variable, "").strip().rstrip("/")
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):  # not quoted: it may hold a password
        raise BadInput(f"{variable}: expected a URL like http://127.0.0.1:8000 without user or query")
    return url


def opener(url):
    """Opens the URL: by no proxy if it is this machine, and by no redirect, which would take a key away."""
    here = re.match(r"https?://(localhost|127\.[\d.]+|\[::1\])(:|/|$)", url)
    director = urllib.request.OpenerDirector()
    director.add_handler(urllib.request.ProxyHandler({} if here else None))  # None: those of the environment
    director.add_handler(urllib.request.HTTPHandler())
    director.add_handler(urllib.request.HTTPSHandler())
    return director


def ask(url, *path, data=None, key=None):
    """What lies at `path` in the JSON that the URL answers to a GET, or with data to a POST of it as JSON.

    5xx and connections that fail are tried again, anything else never. Nor is a request that was sent and not
    answered in time, since the server may be at work on it. Raises RewardError with the URL and what came.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, headers)
    for attempt in range(TRIES):
        time.sleep(WAIT * (2**attempt - 1))
        try:
            with opener(url).open(request, timeout=POST_TIMEOUT if body else GET_TIMEOUT) as answer:
                status, text = answer.status, answer.read().decode(errors="replace")
        except TimeoutError:  # while waiting for the answer: before that, it comes as an URLError
            status, text = None, "timed out"
            break
        except (OSError, HTTPException) as error:
            status, text = None, f"{type(error).__name__}: {error}"
            continue
        if status < 500 or status == 504:  # 504: a gateway in between gave up waiting
            break
    if status == 200:
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            found = json.loads(text)
            for step in path:
                found = found[step]
            return found
    if key:
        text = text.replace(key, "***")
    raise RewardError(f"{url}: expected JSON with {path}, got {status or 'no answer'}, {text[:300]}")


def first_answer(*args, **options):
    """`ask`, at the start: what fails there is the user's to mend, so it raises BadInput."""
    try:
        return ask(*args, **options)
    except RewardError as error:
        raise BadInput(str(error)) from None


def png(image):
    """An image as PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def load_http(name="http"):
    """The reward that is served at GRPO_GUARD_<NAME>_URL. Raises BadInput if there is none of that name."""
    url = server_url(url_variable(name))
    served = first_answer(url, "reward")
    if name not in ("http", served):
        how = f"python -m scorers.remote serve {name}"
        raise BadInput(f"{url}: serves {served!r}; expected {name!r}, by `{how}`")

    def reward(images, prompts, metadata):
        data = dict(images=[png(image) for image in images], prompts=prompts, metadata=metadata)
        scores = ask(url, "scores", data=data)
        if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
            raise RewardError(f"{url}: expected {len(images)} numbers, got {str(scores)[:200]}")
        return scores

    return reward


# ------------------------------------------------------------------------------------------------------------
# The server


def read_request(body):
    """(images, prompts, metadata) of a POST's JSON. Raises an exception for whatever is not as it must be."""
    request = json.loads(body)
    files = [io.BytesIO(base64.b64decode(text, validate=True)) for text in request["images"]]
    images = [Image.open(file, formats=["PNG"]).convert("RGB") for file in files]
    if not len(images) == len(request["prompts"]) == len(request["metadata"]):
        raise ValueError("expected as many prompts and metadata as images")
    return images, request["prompts"], request["metadata"]


def make_server(name, reward, host, port):
    """An HTTP server of a reward; it scores one request at a time."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = GET_TIMEOUT  # seconds that a client may stall while it sends its request

        def answer(self, status, content):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            self.answer(200, {"reward": name})

        def do_POST(self):
            status = 400
            try:
                request = read_request(self.rfile.read(int(self.headers["Content-Length"])))
                status = 500
                with lock:
                    content = {"scores": reward(*request)}
                status = 200
            except Exception as error:  # whatever it is, the one who asked is told
                content = {"error": f"{type(error).__name__}: {error}"}
            self.answer(status, content)

    return ThreadingHTTPServer((host, port), Handler)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m scorers.remote", description="Serve a reward for GRPO_GUARD_<NAME>_URL to read."
    )
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("name", help="of a reward in rewards.py, or module:function")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every one")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    args = parser.parse_args()
    os.environ.pop(url_variable(args.name), None)  # this is where it is built
    try:
        server = make_server(args.name, load(args.name), args.host, args.port)
    except (BadInput, OSError) as error:
        parser.error(str(error))
    print(f"{args.name} at http://{args.host}:{server.server_port}", flush=True)
    server.serve_forever()


# ------------------------------------------------------------------------------------------------------------
# ImageReward and UnifiedReward


def load_imagereward():
    """ImageReward-v1.0 by its own package, about -2 to 2.

    The package needs a transformers of 2023 and loads a pickle, which can run code: it lives in an
    environment of its own and is served from there.
    """
    try:
        import ImageReward
    except ImportError as error:
        how = "serve it from an environment with the image-reward package (scorers/README.md)"
        raise BadInput(f"imagereward: {error}; {how} and set {url_variable('imagereward')}") from None
    model = ImageReward.load("ImageReward-v1.0").requires_grad_(False)
    return lambda images, prompts, metadata: list(map(model.score, prompts, images))


QUESTION = """This image was generated from a caption. Judge how well its objects, their attributes and their
relations match the caption, and how good it looks: clarity, detail, colours, composition. Give one mark from
1 (worst) to 5 (best), written after the words "Final Score:".
Caption: {}"""


def final_score(text):
    """The mark from 1 to 5 after the last "Final Score:". Raises RewardError if there is none."""
    marks = re.findall(r"Final Score:[\s*]*(-?\d+(?:\.\d+)?)", str(text))
    if not marks or not 1 <= float(marks[-1]) <= 5:
        raise RewardError(f'expected "Final Score:" and 1 to 5, got {str(text)[-200:]!r}')
    return float(marks[-1])


def load_unifiedreward():
    """UnifiedReward by a server of OpenAI's chat completions, such as vLLM: its mark / 5, as in Flow-GRPO."""
    api, key = server_url("GRPO_GUARD_UNIFIEDREWARD_API"), os.environ.get("GRPO_GUARD_UNIFIEDREWARD_KEY")
    first = first_answer(f"{api}/models", "data", 0, "id", key=key)  # it also shows that the server is there
    model = os.environ.get("GRPO_GUARD_UNIFIEDREWARD_MODEL", first)
    pool = ThreadPoolExecutor(8)

    def score(image, prompt):
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}}
        question = {"type": "text", "text": QUESTION.format(prompt)}
        messages = [{"role": "user", "content": [picture, question]}]
        data = dict(model=model, messages=messages, temperature=0, max_tokens=1024)
        path = "choices", 0, "message", "content"
        return final_score(ask(f"{api}/chat/completions", *path, data=data, key=key)) / 5

    return lambda images, prompts, metadata: list(pool.map(score, images, prompts))


if __name__ == "__main__":
    main()
