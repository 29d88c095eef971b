"""Stands in for a Python that has vLLM, where input and output are URLs: `… -m MODULE -i URL -o URL ARGS`.

It reads and writes over HTTP as vLLM's batch runner does, the output without a line feed at its end. FAKE_ENGINE in the
environment is a JSON object, as for `fake_engine`: `fail` names ids of rows whose batch ends with 1 and no output,
`half` says how much of the output is put, `journal` gets the ids that were asked and the arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.request

from tests.fake_engine import good


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="module", required=True)
    parser.add_argument("-i", dest="source", required=True)
    parser.add_argument("-o", dest="target", required=True)
    options, rest = parser.parse_known_args()
    faults = json.loads(os.environ["FAKE_ENGINE"])
    with urllib.request.urlopen(options.source) as answer:  # noqa: S310  # http, of a test's server
        requests = [json.loads(line) for line in answer.read().splitlines()]
    ids = [request["custom_id"] for request in requests]
    with open(faults["journal"], "a") as stream:
        stream.write(json.dumps({"ids": ids, "args": [options.module, *rest]}) + "\n")
    if any(custom_id.startswith(f"{faults.get('fail')}-") for custom_id in ids):
        sys.exit("the engine is in a bad mood")
    body = "\n".join(json.dumps(good(request)) for request in requests).encode()
    body = body[: int(len(body) * faults.get("half", 1))]
    put = urllib.request.Request(options.target, data=body, method="PUT")  # noqa: S310  # the same
    put.add_header("content-type", "application/octet-stream")
    with urllib.request.urlopen(put) as answer:  # noqa: S310  # the same
        assert answer.status == 200


if __name__ == "__main__":
    main()
