"""The command line: options, messages and exit codes; everything else is in the stages.

Results go to stdout or files, all else to stderr. Only click is imported here: the stages are imported when they run.
"""

from __future__ import annotations

import gc
import shlex
import sys
from typing import Any

import click

from batchkit import __version__, cli_messages, ownership
from batchkit.cli_options import (
    BACKENDS,
    HOST_NAMES,
    evaluate_options,
    merge_options,
    pilot_option,
    prepare_options,
    presign_options,
    ray_option,
    server_options,
    service_options,
    settle_options,
    submit_options,
    work_dir_option,
)
from batchkit.errors import BatchkitError, UsageError
from batchkit.limits import SERVED
from batchkit.wording import counted

INTERRUPTED = 130
"""The shell's code for a process ended by SIGINT (128 + 2)."""


class Commands(click.Group):
    """Prints our errors as DESIGN says, keeps the commands in the order of the work, and exits with the right code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BatchkitError as exc:
            cli_messages.tell_error(exc)
            ctx.exit(exc.exit_code)
        except KeyboardInterrupt:
            click.echo("\nInterrupted. What is finished is kept: the same command goes on from there.", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # `batchkit … | head`: the reader has seen enough. Point stdout away, or its flush at exit fails, too.
            sys.stdout = open("/dev/null", "w", encoding="utf-8")  # noqa: SIM115
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchkit")
def main() -> None:
    """Ask a vision-language model one question about every row of a dataset, as a batch job.

    \b
    batchkit prepare tasks.jsonl my-run --model MODEL
    batchkit submit my-run
    batchkit merge my-run

    Every row is accounted for: N rows in, N results out. Whatever is stopped or killed goes on when the same command is
    typed again.

    Exit codes: 0 done, every row has an answer; 1 error; 2 usage; 3 finished, but some rows have no answer; 4 no
    valid key; 8 rows are still pending; 130 interrupted.
    """
    ownership.claim()


@main.command("prepare")
@click.argument("tasks")
@click.argument("run")
@prepare_options
@ray_option
@click.option("--limit", type=click.IntRange(0), help="At most so many rows.")
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be made (exactly), write nothing.")
@work_dir_option
def prepare_command(tasks: str, run: str, *, plan_only: bool, strict: bool, **options: Any) -> None:
    """Make requests of the rows in TASKS, in the run directory RUN.

    TASKS is a file of rows (JSONL, CSV, TSV, Parquet) or a Hugging Face dataset. Again with the
    same options, it goes on where it stopped.

    \b
    batchkit prepare tasks.jsonl my-run --model Qwen/Qwen3-VL-8B-Instruct --max-side 1024
    """
    from batchkit import preparation
    from batchkit.progress import Console

    gc.freeze()  # what is imported stays: to look through it again and again takes a twentieth of the time
    hands = {name: options.pop(name) for name in ("workers", "ray")}
    with Console("prepare") as progress:
        keywords = _prepare_keywords(options)
        if plan_only:
            report = preparation.plan(tasks, progress=progress, **hands, **keywords)
        else:
            report = preparation.prepare(tasks, run, strict=strict, progress=progress, **hands, **keywords)
    cli_messages.tell_prepared(report, plan_only=plan_only)
    if not plan_only:
        served = " --engine serve" if options["backend"] == "vllm" and options["url"] in SERVED else ""
        command = f"submit {run}{served}" if report.to_send else f"merge {run}"
        click.echo(f"\nnext: batchkit {command}" if report.requests else "\nnothing to submit", err=True)


def _prepare_keywords(options: dict[str, Any]) -> Any:
    from batchkit.options import parse_extra_body

    keywords = {name: value for name, value in options.items() if name not in {"image_field", "id_fields"}}
    keywords["image_field"] = options["image_field"] or None
    for name in ("max_tokens", "temperature"):  # not given is not None: each backend has a default
        if keywords[name] is None:
            del keywords[name]
    ids = options["id_fields"]
    keywords["id_fields"] = tuple(name.strip() for name in ids.split(",")) if ids else None
    keywords["extra_body"] = parse_extra_body(options["extra_body"])
    return keywords


@main.command("submit")
@click.argument("run")
@click.option("--backend", type=click.Choice(BACKENDS), help="Who answers. [default: the one it was prepared for]")
@click.option(
    "--host", type=click.Choice(HOST_NAMES), help="Of --backend openai. [default: the one it was prepared for]"
)
@pilot_option
@submit_options
@ray_option
@server_options
@service_options
@settle_options
@click.option("--resume/--no-resume", default=True, help="--no-resume throws away all responses so far, after asking.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED)
@work_dir_option
def submit_command(run: str, backend: str | None, resume: bool, yes: bool, **options: Any) -> None:
    """Send the requests of RUN that have no response yet.

    With vLLM, arguments behind -- go to the engine as they are. Batch services (openai, gemini) are paid; what was
    handed over goes on there whatever happens here. Whatever was finished when it was stopped or killed is kept; the
    same command sends the rest.

    \b
    batchkit submit my-run -- --max-model-len 8192 --limit-mm-per-prompt '{"image": 2}'
    batchkit submit my-run --backend openai --no-wait
    """
    from batchkit import submission
    from batchkit.progress import Console

    if not resume:
        _discard(run, yes=yes)
    with Console("submit", unit="requests") as progress:
        report = submission.submit(run, backend=backend, progress=progress, **_submit_keywords(options))
    cli_messages.tell_submitted(report)
    cli_messages.tell_doubtful(report, run)
    cli_messages.tell_troubled(report, run)
    click.echo(f"\nnext: batchkit {'submit' if report.remaining else 'merge'} {shlex.quote(run)}", err=True)
    sys.exit(report.exit_code)


def _discard(run: str, *, yes: bool) -> None:
    from batchkit import submission

    lost, reused = submission.responses_count(run), submission.reused_count(run)
    if lost and not yes:
        of_others = f" ({reused:,} of them taken over from other runs)" if reused else ""
        click.confirm(
            f"throw away {counted(lost, 'response')} of {run}{of_others} and begin anew?",
            abort=True,
            err=True,
        )
    submission.discard(run)


def _submit_keywords(options: dict[str, Any]) -> dict[str, Any]:
    keywords = dict(options)
    keywords["limit"] = keywords.pop("pilot")
    keywords["retry"] = _verdicts(keywords["retry"])
    keywords["endpoints"] = _endpoints(keywords["endpoints"])
    return keywords


def _endpoints(text: str | None) -> tuple[str, ...]:
    return tuple(url.strip() for url in text.split(",") if url.strip()) if text else ()


def _verdicts(text: str | None) -> frozenset[Any]:
    from batchkit.responses import Verdict

    try:
        return frozenset(Verdict(word.strip()) for word in text.split(",")) if text else frozenset()
    except ValueError as exc:
        known = ", ".join(Verdict)
        raise UsageError(f"--retry: {exc}", hint=f"the verdicts are {known}") from exc


@main.command("merge")
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@merge_options
@click.option("--tasks", metavar="FILE", help="Merge files that no run knows: the task file.")
@click.option("--responses", multiple=True, metavar="GLOB", help="Output and error files for --tasks. Repeatable.")
@click.option(
    "--id-fields",
    metavar="A,B",
    help="For --tasks: the fields whose values are the custom_id. [default: id; VLMEvalKit: index]",
)
@click.option("--id-separator", default="|", show_default=True, help="Joins the values of several id fields.")
@click.option("--workers", type=click.IntRange(1), help="Processes. Changes no result. [default: the cores, up to 16]")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
@work_dir_option
def merge_command(
    *,
    runs: tuple[str, ...],
    tasks: str | None,
    responses: tuple[str, ...],
    id_fields: str | None,
    id_separator: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Join the responses of RUN to its rows: one result per row, in the order of the task file.

    Works at any time, also while submit is running. Several runs, parts of one task file, become one result. Without
    RUN, --tasks and --responses merge any pile of batch output.

    \b
    batchkit merge my-run --parse choice
    batchkit merge part1 part2 part3 -o results.jsonl
    batchkit merge --tasks tasks.jsonl --responses 'out/*.jsonl' -o results.jsonl
    """
    from batchkit.progress import Console

    with Console("merge") as progress:
        if runs:
            if tasks or responses or id_fields:
                raise UsageError("RUN goes without --tasks, --responses and --id-fields", hint="batchkit merge --help")
            from batchkit import merging

            summary = merging.merge(runs, progress=progress, **options)
        else:
            if not tasks or not responses:
                raise UsageError("name a RUN, or --tasks and --responses", hint="batchkit merge --help")
            from batchkit import piles

            summary = piles.merge_pile(
                tasks,
                list(responses),
                id_fields=tuple(name.strip() for name in id_fields.split(",")) if id_fields else None,
                id_separator=id_separator,
                progress=progress,
                **options,
            )
    cli_messages.tell_merged(summary, as_json=as_json)
    sys.exit(summary.exit_code)


@main.command("evaluate")
@click.argument("run", required=False)
@evaluate_options
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON on stdout, instead of a table.")
@work_dir_option
def evaluate_command(run: str | None, as_json: bool, **options: Any) -> None:
    """Compare the results of RUN with the right answers, and count.

    Writes evaluation_data.json, statistics.json and summary.json to RUN/evaluation. A RUN that was not merged yet is
    merged first.

    \b
    batchkit evaluate my-run --answer-field truth --by category
    """
    from batchkit import evaluation, evaluation_text
    from batchkit.progress import Console

    with Console("evaluate") as progress:
        found = evaluation.evaluate(run, progress=progress, **options)
    cli_messages.tell_evaluated(found)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(found.statistics), indent=2))
    else:
        click.echo(evaluation_text.as_text(found))


@main.command("run")
@click.argument("tasks")
@click.argument("run")
@prepare_options
@pilot_option
@submit_options
@ray_option
@server_options
@service_options
@merge_options
@click.option(
    "--delete-sent",
    is_flag=True,
    help="Delete the requests of shards that have their answers, and keep few ahead: for disks that are too small.",
)
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED)
@work_dir_option
def run_command(tasks: str, run: str, **options: Any) -> None:
    """Prepare, submit and merge in one. Again, it goes on where it stopped.

    The first shard is sent while the others are prepared.

    \b
    batchkit run tasks.jsonl my-run --model Qwen/Qwen3-VL-8B-Instruct -- --max-model-len 8192
    batchkit run tasks.jsonl my-run --model gpt-5-mini --backend openai --no-wait

    With --no-wait each call moves forward what can be moved, and says in one line where the run stands: for cron.
    """
    from batchkit import pipeline
    from batchkit.progress import Console

    options["retry"] = _verdicts(options["retry"])
    options["endpoints"] = _endpoints(options["endpoints"])
    quiet = not options["wait"]
    reports: list[Any] = []
    summary = pipeline.run(
        tasks,
        run,
        show=lambda stage: Console(stage, unit="requests" if stage == "submit" else "rows", quiet=quiet),
        prepared=(lambda report: None) if quiet else cli_messages.tell_prepared,  # noqa: ARG005  # cron mails what is printed
        submitted=reports.append if quiet else cli_messages.tell_submitted,
        **_prepare_keywords(options),
    )
    if quiet:
        cli_messages.tell_standing(run, summary, reports[0])
    else:
        cli_messages.tell_merged(summary)
    for report in reports:
        cli_messages.tell_doubtful(report, run)
        cli_messages.tell_troubled(report, run)
    sys.exit(summary.exit_code)


@main.command("cancel")
@click.argument("run")
@click.option("--backend", type=click.Choice(BACKENDS[2:]), help="Whose batches. [default: the last one's]")
@click.option("--base-url", metavar="URL", help="Where the provider is. [default: the last one]")
@click.option("--api-key-env", metavar="NAME", help="The variable that holds the key. [default: the last one]")
@click.option("--wait/--no-wait", default=True, help="--no-wait: do not wait for the provider to end them.")
@click.option("--poll-interval", type=click.FloatRange(0.01), metavar="SECONDS", help="[default: 30]")
@work_dir_option
def cancel_command(run: str, wait: bool, **options: Any) -> None:
    """Cancel the batches of RUN at the provider, and keep what they have finished.

    What was not run becomes `expired`; submit again sends it. A submit that waits elsewhere sends nothing more. What
    presign gave to machines elsewhere is due again; they cannot be stopped from here.

    \b
    batchkit cancel my-run
    """
    from batchkit import cancelling
    from batchkit.progress import Console

    with Console("cancel", unit="requests") as progress:
        report = cancelling.cancel(run, wait=wait, progress=progress, **options)
    cli_messages.tell_cancelled(report, run)
    sys.exit(8 if report.in_flight else 0)


@main.command("presign")
@click.argument("target", metavar="URI|RUN")
@presign_options
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED)
@work_dir_option
def presign_command(
    target: str, *, put: bool, expires: str | None, as_format: str, output: str | None, **options: Any
) -> None:
    """Sign URLs of objects in S3, for machines without credentials.

    Of a RUN in a bucket: the commands of vLLM's batch runner for all that is due, as a shell script. Where they run
    there need be nothing but vLLM; merge takes their outputs from the bucket. Arguments behind -- go to vLLM.

    \b
    batchkit presign s3://bucket/tasks.jsonl --expires 7d
    batchkit presign s3://bucket/my-run -o run.sh -- --max-model-len 8192
    """
    from batchkit import handouts, scripts
    from batchkit.progress import Console

    of_run = options["shards"] is not None or options["again"] or options["engine_args"] or output is not None
    if put and of_run:
        raise UsageError("--put is for one object; the commands of a run write by themselves", hint="leave --put out")
    if put or not (of_run or handouts.is_run(target)):
        url, signer = handouts.sign_object(target, expires=expires, put=put)
        cli_messages.tell_signed(target, signer, put=put)
        click.echo(url)
        return
    with Console("presign") as progress, handouts.opened(output) as stream:
        handout = handouts.hand_out(target, expires=expires, progress=progress, **options)
        text = (
            scripts.as_json(handout.commands)
            if as_format == "json"
            else scripts.as_shell(handout.run, handout.commands)
        )
        stream.write(text.encode())
    cli_messages.tell_handed_out(handout, target, output)


@main.command("status")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON on stdout.")
@click.option("--ask/--no-ask", default=True, help="Ask the provider how batches under way stand. [default: --ask]")
@work_dir_option
def status_command(run: str, as_json: bool, ask: bool) -> None:
    """Say where RUN stands: shards, requests, what has come back, and the batches at a provider.

    \b
    batchkit status my-run
    """
    from batchkit import reporting

    status = reporting.status(run, ask=ask)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(status), indent=2))
    else:
        click.echo(reporting.as_text(status))
    sys.exit(status.exit_code)
