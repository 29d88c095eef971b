"""The options of the commands, in groups: `run` has those of three verbs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from batchkit.endpoints import URLS

# As in options and limits, which are not imported here: that would load pydantic for `--help`.
BACKENDS = ["vllm", "server", "openai", "gemini"]
HOST_NAMES = ["openai", "azure", "groq", "together", "dashscope"]
INPUT_FORMATS = ["auto", "jsonl", "batch", "csv", "tsv", "parquet", "hf", "vlmevalkit"]

WORK_DIR = "BATCHKIT_WORK_DIR"

F = TypeVar("F", bound=Callable[..., Any])


def add_options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order given."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _use_work_dir(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """For this command and the processes that it starts, as the variable says it."""
    if value is not None:
        before = os.environ.get(WORK_DIR)
        os.environ[WORK_DIR] = value
        ctx.call_on_close(lambda: _restore(before))


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(WORK_DIR, None)
    else:
        os.environ[WORK_DIR] = before


work_dir_option = click.option(
    "--work-dir",
    metavar="DIR",
    expose_value=False,
    callback=_use_work_dir,
    help=f"Where the local copies of runs in a bucket are kept. [default: {WORK_DIR}, else your cache]",
)

prepare_options = add_options(
    click.option("--model", help="The model, as the backend calls it: a name, or a directory for vLLM."),
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default="vllm",
        show_default=True,
        help="Who is to answer: shards keep to its limits.",
    ),
    click.option(
        "--host",
        type=click.Choice(HOST_NAMES),
        default="openai",
        show_default=True,
        help="For --backend openai: whose limits and names. Others that speak OpenAI's batch API: submit --base-url.",
    ),
    click.option(
        "--input-format",
        type=click.Choice(INPUT_FORMATS),
        default="auto",
        show_default=True,
        help="auto goes by name and content. batch: rows that are requests in OpenAI batch format, kept as they are; "
        "hf: hf://NAME:SPLIT or a folder of save_to_disk.",
    ),
    click.option(
        "--url",
        type=click.Choice(URLS),
        default=URLS[0],
        show_default=True,
        metavar="PATH",
        help=f"The endpoint: {', '.join(URLS[1:])}.",
    ),
    click.option(
        "--image-field",
        multiple=True,
        metavar="FIELD",
        help="Field with an image or its path, or a list of these. Repeatable: the images come in this order. "
        "[default: image, where a row has it]",
    ),
    click.option(
        "--question-field", default="question", show_default=True, metavar="FIELD", help="Field with the question."
    ),
    click.option("--id-fields", metavar="A,B", help="Fields that identify a row. [default: id, where a row has it]"),
    click.option(
        "--answer-field",
        metavar="FIELD",
        help="Field with the right answer, for evaluate; it is not sent. [default: answer]",
    ),
    click.option(
        "--prompt-template",
        metavar="TEXT|@FILE",
        help="Jinja2 over the row's fields, for example 'Is this a {{ kind }}? {{ question }}'.",
    ),
    click.option("--system-prompt", metavar="TEXT|@FILE", help="Goes before every question."),
    click.option(
        "--placeholders/--no-placeholders",
        default=True,
        help="--no-placeholders: <image> in a question is text, not the place of an image. [default: --placeholders]",
    ),
    click.option(
        "--image-root",
        metavar="DIR",
        help="Relative image paths start here; may be s3:// or https://. [default: beside TASKS]",
    ),
    click.option("--start", type=click.IntRange(0), default=0, help="Position of the first row, from 0."),
    click.option("--end", type=click.IntRange(0), help="Position behind the last row."),
    click.option(
        "--max-tokens", type=click.IntRange(1), help="Longest answer. [default: 100 for vllm, else the provider's]"
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0),
        help="0: the likeliest answer. [default: 0 for vllm, else the provider's]",
    ),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling."),
    click.option("--seed", type=int, help="For repeatable sampling, where the backend has it."),
    click.option("--reasoning-effort", metavar="LEVEL", help="For models that take it: low, medium, high."),
    click.option(
        "--thinking-budget",
        type=click.IntRange(-1),
        metavar="TOKENS",
        help="Gemini: tokens for thinking; -1: its choice.",
    ),
    click.option(
        "--response-schema",
        metavar="FILE|MODULE:MODEL",
        help="Answers are JSON that matches this JSON schema, or pydantic model; merge checks it.",
    ),
    click.option(
        "--documents-field",
        metavar="FIELD",
        help="For score and rerank: a text or a list of them. [default: documents]",
    ),
    click.option("--extra-body", metavar="JSON", help="More keys for the request body, for example '{\"top_k\": 20}'."),
    click.option(
        "--images",
        type=click.Choice(["inline", "link"]),
        default="inline",
        show_default=True,
        help="link: requests name images by their addresses, and submit resolves them: small shards.",
    ),
    click.option(
        "--fit",
        metavar="MODEL",
        help="Shrink images to the size that this model makes of them anyway: gpt-4o, gemini-2.5-flash, qwen2.5-vl, "
        "SmolVLM-256M …",
    ),
    click.option("--max-side", type=click.IntRange(1), metavar="PIXELS", help="Shrink images to this longer side."),
    click.option("--max-pixels", type=click.IntRange(1), metavar="N", help="Shrink images to this area."),
    click.option(
        "--image-format",
        type=click.Choice(["keep", "jpeg", "png", "webp"]),
        default="keep",
        show_default=True,
        help="Re-encode images that are of another format.",
    ),
    click.option(
        "--image-quality",
        type=click.IntRange(1, 100),
        default=90,
        show_default=True,
        help="Of images that are re-encoded as JPEG or WebP.",
    ),
    click.option("--image-detail", type=click.Choice(["auto", "low", "high"]), help="The detail key of image_url."),
    click.option(
        "--on-bad-image",
        type=click.Choice(["reject", "text-only"]),
        default="reject",
        show_default=True,
        help="What becomes of a row whose image is missing or broken.",
    ),
    click.option("--max-requests", type=click.IntRange(1), help="Per shard. [default: the backend's limit]"),
    click.option("--max-bytes", type=click.IntRange(1), help="Per shard. [default: the backend's limit]"),
    click.option(
        "--dedupe",
        is_flag=True,
        help="Send what several rows of a shard ask alike once; each of them gets the answer.",
    ),
    click.option(
        "--reuse",
        multiple=True,
        metavar="RUN",
        help="Take over answers that another run has to the same requests. Repeatable: the first named counts first.",
    ),
    click.option(
        "--allow-private-hosts",
        is_flag=True,
        help="Fetch http and https images from hosts in your own network, too, not from public ones alone.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Processes. Changes no result. [default: the cores, up to 16]",
    ),
    click.option("--strict", is_flag=True, help="Stop at the first row that cannot become a request."),
)

pilot_option = click.option(
    "--limit", "pilot", type=click.IntRange(1), metavar="N", help="A pilot: send only N requests now."
)

submit_options = add_options(
    click.option("--shards", metavar="I/N", help="Work on the I-th of N parts of the run only, for example 3/8."),
    click.option(
        "--attempts",
        type=click.IntRange(1),
        default=3,
        show_default=True,
        help="How often a request that fails in passing is sent in all.",
    ),
    click.option(
        "--retry",
        metavar="VERDICTS",
        help="Send rows with these verdicts again, too: failed,truncated,refused…",
    ),
    click.option(
        "--engine",
        type=click.Choice(["run-batch", "serve"]),
        default="run-batch",
        show_default=True,
        help="vLLM's batch runner, or its server: slower to start many small jobs, responses on the disk as they come.",
    ),
    click.option(
        "--presign",
        is_flag=True,
        help="Of a run with --images link: images in S3 go as signed URLs, not as base64.",
    ),
    click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Engines side by side."),
)

ray_option = click.option(
    "--ray",
    metavar="ADDRESS",
    help="Work on the machines of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Needs batchkit-vlm[ray].",
)

service_options = add_options(
    click.option(
        "--wait/--no-wait", default=True, help="--no-wait: hand over, collect what is done, return. [default: --wait]"
    ),
    click.option("--base-url", metavar="URL", help="Where the provider is. [default: that of --host, or the last one]"),
    click.option(
        "--api-key-env",
        metavar="NAME",
        help="The variable that holds the key, in the environment or .env. [default: OPENAI_API_KEY, GEMINI_API_KEY …]",
    ),
    click.option("--completion-window", metavar="TIME", help="How long a batch may take. [default: the host's, 24h]"),
    click.option("--max-active", type=click.IntRange(1), metavar="N", help="Batches under way at once. [default: 100]"),
    click.option(
        "--max-enqueued-tokens", type=click.IntRange(1), metavar="N", help="Input tokens (estimated) under way at once."
    ),
    click.option(
        "--max-cost", type=click.FloatRange(0, min_open=True), metavar="USD", help="Start nothing that may cost more."
    ),
    click.option(
        "--poll-interval",
        type=click.FloatRange(0.01),
        metavar="SECONDS",
        help="Between two looks at a batch. [default: 30]",
    ),
    click.option("--delete-remote", is_flag=True, help="Remove the provider's files once they are collected."),
)

server_options = add_options(
    click.option(
        "--endpoints",
        metavar="URL,URL",
        help="Live servers: their base URLs. [default: http://localhost:8000/v1]",
    ),
    click.option("--concurrency", type=click.IntRange(1), metavar="N", help="Requests at each server. [default: 6]"),
    click.option("--rate-limit-delay", type=click.FloatRange(0), metavar="SECONDS", help="Between two requests."),
    click.option("--requests-per-minute", type=click.IntRange(1), metavar="N", help="Of all servers together."),
    click.option("--tokens-per-minute", type=click.IntRange(1), metavar="N", help="The same, of estimated tokens."),
    click.option(
        "--timeout", type=click.FloatRange(0.1), metavar="SECONDS", help="For one request to a server. [default: 600]"
    ),
)

settle_options = add_options(
    click.option(
        "--adopt",
        multiple=True,
        metavar="ATTEMPT=BATCH",
        help="Settle a doubtful attempt: this batch of the provider's is its own. Repeatable.",
    ),
    click.option(
        "--resend",
        multiple=True,
        metavar="ATTEMPT",
        help="Settle a doubtful attempt: it was never created, and is sent again. Repeatable.",
    ),
)

merge_options = add_options(
    click.option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where the results go: .jsonl, .csv (both also compressed, .gz) or .parquet. [default: RUN/results.jsonl]",
    ),
    click.option(
        "--parse",
        metavar="HOW",
        help="parsed_answer: text, json, choice, number or regex:PATTERN. [default: text; json with a schema]",
    ),
    click.option("--prefix", default="", metavar="TEXT", help="Put before the names of the fields that a result adds."),
    click.option(
        "--flat",
        is_flag=True,
        help="Only these columns: id, question, has_image, response, status, error_message.",
    ),
    click.option("--retry-file", metavar="FILE", help="Rows without an answer. [default: RUN/retry.jsonl]"),
)

presign_options = add_options(
    click.option("--put", is_flag=True, help="A URL to write the object, not to read it."),
    click.option(
        "--expires",
        metavar="TIME",
        help="How long the URLs hold: 90s, 30m, 12h, 7d at most. [default: 12h, or as long as the credentials]",
    ),
    click.option("--shards", metavar="I/N", help="Of a run: the I-th of N parts only, for example 3/8."),
    click.option(
        "--again",
        "--resend",
        is_flag=True,
        help="Of a run: also new URLs for what was given out before and has not come. It may be run twice.",
    ),
    click.option(
        "--format",
        "as_format",
        type=click.Choice(["sh", "json"]),
        default="sh",
        show_default=True,
        help="Of a run: a shell script, or a JSON list for a scheduler.",
    ),
    click.option("-o", "--output", metavar="FILE", help="Of a run: where the commands go. [default: stdout]"),
)

evaluate_options = add_options(
    click.option(
        "--results", metavar="FILE", help="Results of merge, .jsonl or .jsonl.gz. [default: RUN/results.jsonl]"
    ),
    click.option("-o", "--output", metavar="DIR", help="Where the files go. [default: RUN/evaluation]"),
    click.option("--by", multiple=True, metavar="FIELD", help="Accuracy for each value of this field. Repeatable."),
    click.option(
        "--answer-field",
        metavar="FIELD",
        help="Field with the right answer, or a list of right ones. [default: prepare's, else answer or Final Answer]",
    ),
    click.option(
        "--reasoning-field",
        default="Text Reasoning Trace",
        show_default=True,
        metavar="FIELD",
        help="Field with the right reasoning.",
    ),
    click.option(
        "--truth-image-field",
        multiple=True,
        metavar="FIELD",
        help="Field with right images. Repeatable. [default: reasoning_image_1, reasoning_image_2 …]",
    ),
    click.option("--copy-images", is_flag=True, help="Copy the images asked about, and those made, beside the files."),
    click.option(
        "--image-root", metavar="DIR", help="For --copy-images: relative paths start here. [default: prepare's]"
    ),
    click.option(
        "--allow-private-hosts", is_flag=True, help="For --copy-images: fetch from hosts in your own network, too."
    ),
)
