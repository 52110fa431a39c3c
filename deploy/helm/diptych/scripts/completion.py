"""What `helm test` runs: one real completion through the Service, with nothing but Python.

Tries until DEADLINE_S is over, for a release whose workers are still loading.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

ENDPOINT = os.environ["ENDPOINT"]
GIVE_UP_AT = time.monotonic() + float(os.environ["DEADLINE_S"])
# The certificate is the clients' to check: what is tested here is the way through the Service.
UNCHECKED = ssl.create_default_context()
UNCHECKED.check_hostname = False
UNCHECKED.verify_mode = ssl.CERT_NONE


def ask(path, body=None):
    """The JSON that the router answers to GET, or to POST of `body`."""
    request = urllib.request.Request(
        ENDPOINT + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    if "API_KEY" in os.environ:
        request.add_header("authorization", "Bearer " + os.environ["API_KEY"])
    with urllib.request.urlopen(request, timeout=60, context=UNCHECKED) as answer:
        return json.load(answer)


def complete():
    """Generate a few tokens; returns their text and how many there were."""
    model = ask("/v1/models")["data"][0]["id"]
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 8}
    answer = ask("/v1/completions", body)
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


while True:
    try:
        text, count = complete()
        break
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
