"""Rewards of another process: a reward served over HTTP, a package of its own, a language model as a judge.

    python -m scorers.remote serve imagereward --port 8000 --host 0.0.0.0   # there, in the repository's root
    python guard.py --task ocr --gold http://that-machine:8000              # here

The protocol is JSON: GET answers {"reward": NAME}; POST of {"images": [base64 PNG], "prompts": [...],
"metadata": [...]} answers {"scores": [...]}, one number per image. Any status but 200 is a failure. Nothing
is pickled. There is no authentication: keep it on a trusted network.

`unifiedreward` reads three environment variables: GRPO_GUARD_UNIFIEDREWARD_API, the base URL of an
OpenAI-compatible server, like http://127.0.0.1:8000/v1; _MODEL, the first that the server lists unless given;
_KEY, if it wants one.
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

from rewards import BadInput, RewardError, load

GET_TIMEOUT = 30  # seconds without a byte from the other side
POST_TIMEOUT = 540  # the same while a server scores; guard.py gives a reward 600 s
TRIES, WAIT = 4, 1  # attempts, with waits of 1, 3, 7 times WAIT seconds in between


# ------------------------------------------------------------------------------------------------------------
# The client


def server_url(url, given_as):
    """The URL without a slash at its end. Raises BadInput."""
    url = url.strip().rstrip("/")
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):  # not quoted: it may hold a password
        raise BadInput(f"{given_as}: expected a URL like http://127.0.0.1:8000 without user or query")
    return url


def opener(url):
    """Opens the URL: by no proxy if it is this machine, and by no redirect, which would take a key away."""
    here = re.match(r"https?://(localhost|127\.[\d.]+|\[::1\])(:|/|$)", url)
    director = urllib.request.OpenerDirector()
    director.add_handler(urllib.request.ProxyHandler({} if here else None))  # None: those of the environment
    director.add_handler(urllib.request.HTTPHandler())
    director.add_handler(urllib.request.HTTPSHandler())
    return director


def ask(url, *path, data=None, key=None, error=RewardError):
    """What lies at `path` in the JSON that the URL answers to a GET, or with data to a POST of it as JSON.

    5xx and connections that fail are tried again, anything else never. Nor is a request that was sent and not
    answered in time, since the server may be at work on it. Raises `error` with the URL and what came.
    """
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    for attempt in range(TRIES):
        time.sleep(WAIT * (2**attempt - 1))
        try:
            with opener(url).open(request, timeout=POST_TIMEOUT if body else GET_TIMEOUT) as answer:
                status, text = answer.status, answer.read().decode(errors="replace")
            if status < 500 or status == 504:  # 504: a gateway in between gave up waiting
                break
        except TimeoutError:  # while waiting for the answer: before that, it comes as an URLError
            status, text = "no answer", "timed out"
            break
        except (OSError, HTTPException) as failure:
            status, text = "no answer", f"{type(failure).__name__}: {failure}"
    if status == 200:
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            found = json.loads(text)
            for step in path:
                found = found[step]
            return found
    if key:
        text = text.replace(key, "***")
    raise error(f"{url}: expected JSON with {path}, got {status}, {text[:300]}")


def png(image):
    """An image as PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def image_of(text):
    """The image of a PNG in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]).convert("RGB")


def load_http(url):
    """The reward that is served at the URL, by the name that its server gives. Raises BadInput."""
    url = server_url(url, "--reward or --gold")
    served = ask(url, "reward", error=BadInput)

    def reward(images, prompts, metadata):
        data = dict(images=[png(image) for image in images], prompts=prompts, metadata=metadata)
        return ask(url, "scores", data=data)

    reward.name = str(served).rpartition(":")[2]  # of module:function, the function
    return reward


# ------------------------------------------------------------------------------------------------------------
# The server


def make_server(name, reward, host, port):
    """An HTTP server of a reward; it scores one request at a time."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, content):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            self.answer(200, {"reward": name})

        def do_POST(self):
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                images = [image_of(text) for text in request["images"]]
                with lock:
                    scores = reward(images, request["prompts"], request["metadata"])
                status, content = 200, {"scores": scores}
            except Exception as error:  # whatever it is, the one who asked is told
                status, content = 500, {"error": f"{type(error).__name__}: {error}"}
            self.answer(status, content)

    return ThreadingHTTPServer((host, port), Handler)


def main():
    parser = argparse.ArgumentParser(prog="python -m scorers.remote", description="Serve a reward.")
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("name", help="of a reward in rewards.py, or module:function")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every one")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    args = parser.parse_args()
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
        how = "serve it from an environment of its own (scorers/README.md), and give its URL"
        raise BadInput(f"imagereward: {error}; {how}") from None
    model = ImageReward.load("ImageReward-v1.0").requires_grad_(False)
    return lambda images, prompts, metadata: list(map(model.score, prompts, images))


QUESTION = """This image was generated from a caption. Judge how well its objects, their attributes and their
relations match the caption, and how good it looks: clarity, detail, colours, composition. Give one mark from
1 (worst) to 5 (best), written after the words "Final Score:".
Caption: {}"""


def load_unifiedreward():
    """UnifiedReward by a server of OpenAI's chat completions, such as vLLM: its mark / 5, as in Flow-GRPO."""
    variable = "GRPO_GUARD_UNIFIEDREWARD_API"
    api = server_url(os.environ.get(variable, ""), variable)
    key = os.environ.get("GRPO_GUARD_UNIFIEDREWARD_KEY")
    first = ask(f"{api}/models", "data", 0, "id", key=key, error=BadInput)  # this also finds a server missing
    model = os.environ.get("GRPO_GUARD_UNIFIEDREWARD_MODEL", first)
    pool = ThreadPoolExecutor(8)

    def score(image, prompt):
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}}
        question = {"type": "text", "text": QUESTION.format(prompt)}
        messages = [{"role": "user", "content": [picture, question]}]
        data = dict(model=model, messages=messages, temperature=0, max_tokens=1024)
        text = str(ask(f"{api}/chat/completions", "choices", 0, "message", "content", data=data, key=key))
        marks = re.findall(r"Final Score:[\s*]*(-?\d+(?:\.\d+)?)", text)
        if not marks or not 1 <= float(marks[-1]) <= 5:
            raise RewardError(f'{api}: expected "Final Score:" and 1 to 5, got {text[-200:]!r}')
        return float(marks[-1]) / 5

    return lambda images, prompts, metadata: list(pool.map(score, images, prompts))


if __name__ == "__main__":
    main()
