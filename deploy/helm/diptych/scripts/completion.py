"""What `helm test` runs: real completions through the Service, with nothing but Python.

With HANDS_OVER, for a release that has pools of both roles, a long prompt must have its KV moved
from one to the other. Tries until DEADLINE_S is over: workers may still be loading.
"""

import json
import os
import random
import ssl
import sys
import time
import urllib.error
import urllib.request

ENDPOINT = os.environ["ENDPOINT"]
HANDS_OVER = os.environ.get("HANDS_OVER") == "true"
GIVE_UP_AT = time.monotonic() + float(os.environ["DEADLINE_S"])
LONG_WORDS = 60
"""Of several tokens each, and not so many that a small model can't take them."""
# The certificate is the clients' to check: what is tested here is the way through the Service.
UNCHECKED = ssl.create_default_context()
UNCHECKED.check_hostname = False
UNCHECKED.verify_mode = ssl.CERT_NONE


def ask(path, body=None):
    """The JSON that the router answers to GET, or to POST of `body`, and how it was served."""
    request = urllib.request.Request(
        ENDPOINT + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    if "API_KEY" in os.environ:
        request.add_header("authorization", "Bearer " + os.environ["API_KEY"])
    with urllib.request.urlopen(request, timeout=60, context=UNCHECKED) as answer:
        return json.load(answer), answer.headers.get("x-diptych-mode", "")


class NotMoved(Exception):
    """An answer came, but of one pool alone."""


def complete(prompt, max_tokens):
    """Generate a few tokens; returns their text, how many there were, and how it was served."""
    model = ask("/v1/models")[0]["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
    answer, mode = ask("/v1/completions", body)
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"], mode


def check_hand_over():
    """Send a prompt that nobody has cached; raises NotMoved if one pool did all the work."""
    words = " ".join(f"{word:05d}" for word in random.sample(range(100_000), LONG_WORDS))
    _, _, mode = complete(words, 2)
    if mode in ("decode_only", "prefill_only"):
        raise NotMoved(
            f"a long prompt was served {mode}: no KV moved from prefill to decode workers. "
            "See diptych doctor, and GET /v1/requests/{id}/explain"
        )


while True:
    try:
        text, count, _ = complete("The capital of France is", 8)
        if HANDS_OVER:
            check_hand_over()
        break
    except NotMoved as error:
        refusal = str(error)
    except urllib.error.HTTPError as error:
        refusal = f"{error.code} {error.read().decode(errors='replace')}"
        if error.code < 500 and error.code != 429:
            sys.exit(f"refused: {refusal}")
    except OSError as error:
        refusal = str(error)
    if time.monotonic() > GIVE_UP_AT:
        sys.exit(f"no answer in time; the last one was: {refusal}")
    time.sleep(2)

if count < 1:
    sys.exit("the answer has no tokens")
print(f"{count} tokens: {text!r}")
