"""What the commands say, on stderr but for what was asked for."""

from __future__ import annotations

import shlex
from typing import Any

import click

from batchkit.errors import BatchkitError
from batchkit.wording import counted


def tell_error(exc: BatchkitError) -> None:
    from batchkit.storage import show

    click.echo(f"Error: {show(exc.message)}", err=True)
    if exc.detail:
        click.echo("\n" + exc.detail, err=True)
    if exc.hint:
        click.echo(f"\nhint: {show(exc.hint)}", err=True)


def tell_prepared(report: Any, *, plan_only: bool = False) -> None:
    already = "already prepared: " if report.already else "would make " if plan_only else "prepared "
    click.echo(
        f"{already}{counted(report.requests, 'request')} of {counted(report.rows, 'row')}, "
        f"in {counted(report.shards, 'shard')}, {_bytes(report.requests_bytes)} "
        f"(largest shard {_bytes(report.largest_shard_bytes)})",
        err=not plan_only,
    )
    if report.repeated:
        click.echo(f"{report.repeated:,} of these rows share the request of another one", err=not plan_only)
    for name, count in report.reused.items():
        click.echo(
            f"{'would reuse' if plan_only else 'reused'} {counted(count, 'answer')} of {name}", err=not plan_only
        )
    if report.reused:
        click.echo(f"{counted(report.to_send, 'request')} to send", err=not plan_only)
    if report.rejected:
        reasons = ", ".join(f"{code} {count:,}" for code, count in report.reasons.items())
        click.echo(f"rejected {counted(report.rejected, 'row')} ({reasons}):", err=True)
        for message in report.first_rejections:
            click.echo(f"  {message}", err=True)
        if report.rejected > len(report.first_rejections):
            click.echo(f"  … and {report.rejected - len(report.first_rejections):,} more", err=True)
    if plan_only and report.estimate is not None:
        from batchkit.pricing import describe

        click.echo(describe(report.estimate))
    if plan_only and report.resolutions:
        click.echo("\n" + _resolutions(report.resolutions, input_alone=report.tokens and report.tokens.output is None))
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    if report.names_in_use:
        names = ", ".join(report.names_in_use)
        click.echo(f"warning: rows use names that results use: {names}; merge will need --prefix", err=True)


def _resolutions(resolutions: Any, *, input_alone: bool | None) -> str:
    """The resolutions of a plan as a table, and how far it can be trusted."""
    from batchkit.pricing import dollars

    asked = resolutions[0]
    priced = any(one.usd is not None for one in resolutions)
    lines = [("images", "shrunk", "image tokens", "requests", "shards", *(["price, batch"] if priced else []))]
    for one in resolutions:
        tokens = f"{one.image_tokens:,}" if one.image_tokens is not None else "unknown"
        size = ("~" if one.sampled is not None else "") + _bytes(one.requests_bytes)
        shards = ("~" if one.requests_bytes != asked.requests_bytes else "") + f"{one.shards:,}"
        price = [dollars(one.usd) if one.usd is not None else "unknown"] if priced else []
        lines.append((one.name, f"{one.shrunk:,}", tokens, size, shards, *price))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in ([*zip(line, widths, strict=True)] for line in lines)
    ]
    if sampled := max((one.sampled or 0 for one in resolutions), default=0):
        table.append(f"~: estimated, by making {counted(sampled, 'image')} smaller, spread over the rows")
    elif any(one.sampled is not None for one in resolutions):
        table.append("~: estimated by the pixels alone; the images could not be read from here")
    if priced and input_alone:
        table.append("prices are of the input alone: no --max-tokens")
    return "\n".join(table)


def tell_submitted(report: Any) -> None:
    sent, got = counted(report.sent, "request"), counted(report.responses, "response")
    errors = f", {counted(report.errors, 'error')} among them" if report.errors else ""
    rate = f" ({report.responses / report.seconds:,.1f}/s)" if report.seconds and report.responses else ""
    click.echo(f"sent {sent}, got {got}{errors} in {report.seconds:,.0f} s{rate}", err=True)
    if report.in_flight:
        click.echo(_under_way(report), err=True)
    if report.remaining > report.in_flight:
        click.echo(f"{counted(report.remaining - report.in_flight, 'request')} still to do", err=True)


def _under_way(report: Any) -> str:
    there = report.in_flight - report.elsewhere
    parts = [f"{counted(there, 'request')} under way at the provider"] if there else []
    if report.elsewhere:
        parts.append(f"{counted(report.elsewhere, 'request')} on machines elsewhere, which presign gave out")
    return "; ".join(parts)


def tell_doubtful(report: Any, run: str) -> None:
    for name in report.doubtful:
        click.echo(
            f"\nattempt {name} is doubtful: it is not known whether its batch was created, and the provider does not "
            "list it.\nLook for it on the provider's pages (its metadata name run, shard and attempt), then\n"
            f"  batchkit submit {shlex.quote(run)} --adopt {name}=BATCH_ID   if it is there, or\n"
            f"  batchkit submit {shlex.quote(run)} --resend {name}          if it is not, to send its requests again",
            err=True,
        )


def tell_troubled(report: Any, run: str) -> None:
    for name, why in report.troubled.items():
        click.echo(
            f"\nattempt {name} cannot be collected whole: {why}.\nWhat came is kept. The next submit looks again; to "
            "give the rest up, and pay for it again:\n"
            f"  batchkit submit {shlex.quote(run)} --resend {name}",
            err=True,
        )


def tell_merged(summary: Any, *, as_json: bool = False) -> None:
    counts = ", ".join(f"{verdict} {count:,}" for verdict, count in summary.verdicts.items() if count)
    runs = f" of {counted(len(summary.parts), 'run')}" if summary.parts else ""
    click.echo(f"merged {counted(summary.rows, 'row')}{runs}: {counts}", err=True)
    for gap in summary.gaps:
        click.echo(f"warning: {gap.rows} are in none of the runs", err=True)
    for difference in summary.differences:
        click.echo(f"the runs were not prepared alike: {difference}", err=True)
    if summary.reused:
        click.echo(f"{summary.reused:,} of these answers were taken over from other runs", err=True)
    if summary.repeated:
        click.echo(f"{summary.repeated:,} of these rows share the request of another one", err=True)
    for name in ("unexpected", "unreadable"):
        if count := getattr(summary, name):
            click.echo(f"{name} lines: {count:,}, kept in {summary.unexpected_file}", err=True)
    if summary.spent is not None and (summary.spent.usd is not None or summary.spent.unpriced):
        click.echo(_money(summary), err=True)
    click.echo(f"results: {summary.output}", err=True)
    if summary.send_rest is not None and summary.has_failures:
        click.echo(
            "the rows without an answer are no task file by themselves (their images or prompts are not in them); this "
            f"sends them again:\n  {summary.send_rest}",
            err=True,
        )
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(summary), indent=2))


def _money(summary: Any) -> str:
    spent, tokens = summary.spent, summary.tokens
    text = f"tokens: {tokens.prompt:,} in, {tokens.completion:,} out; price "
    if spent.usd is None:
        return text + "unknown"
    bound = "" if spent.batch_price_known else " at most (no price of batches is known)"
    rest = f", and {counted(spent.unpriced, 'response')} of unknown price" if spent.unpriced else ""
    return text + f"{spent.usd:,.4f} USD{bound}{rest}; live it had been {spent.live_usd:,.4f}"


def tell_evaluated(evaluation: Any) -> None:
    if evaluation.merged:
        click.echo(f"not merged yet: merged into {evaluation.results}", err=True)
    if evaluation.stale:
        click.echo(f"warning: responses have come since {evaluation.results} was merged; merge again", err=True)
    if evaluation.lost:
        click.echo(f"warning: {counted(evaluation.lost, 'image')} could not be copied:", err=True)
        for message in evaluation.first_lost:
            click.echo(f"  {message}", err=True)
    click.echo(f"evaluation: {evaluation.folder}", err=True)


def tell_standing(run: str, summary: Any, report: Any) -> None:
    counts = ", ".join(f"{verdict} {count:,}" for verdict, count in summary.verdicts.items() if count)
    flying = f"; {_under_way(report)}" if report.in_flight else ""
    click.echo(f"{run}: {counted(summary.rows, 'row')}: {counts}{flying}", err=True)


def _bytes(number: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def tell_cancelled(report: Any, run: str) -> None:
    if report.given_up:
        click.echo(
            f"gave up {counted(report.given_up, 'attempt')} on machines elsewhere. They cannot be stopped from here: "
            "what they still put into the bucket is collected, and until then submit sends their requests again",
            err=True,
        )
    batches = f"cancelled {counted(report.cancelled, 'batch')}, {counted(report.ended, 'batch')} had ended; "
    click.echo(f"{batches if report.remote else ''}collected {counted(report.collected, 'response')}", err=True)
    if report.in_flight:
        click.echo(f"{counted(report.in_flight, 'request')} not collected yet", err=True)
    click.echo(f"\nnext: batchkit {'cancel' if report.in_flight else 'merge'} {shlex.quote(run)}", err=True)


def tell_signed(uri: str, signer: Any, *, put: bool) -> None:
    note = f" ({signer.note})" if signer.note else ""
    click.echo(f"to {'write' if put else 'read'} {uri}, until {signer.until.isoformat()}{note}", err=True)


def tell_handed_out(handout: Any, run: str, target: str | None) -> None:
    if handout.commands:
        note = f" ({handout.note})" if handout.note else ""
        click.echo(
            f"gave out {counted(handout.requests, 'request')} in {counted(len(handout.commands), 'command')}, "
            f"until {handout.until}{note}" + (f": {target}" if target else ""),
            err=True,
        )
        click.echo("whoever has these URLs can use them until then", err=True)
    else:
        click.echo("nothing is due: no commands", err=True)
    if handout.in_flight:
        click.echo(
            f"{counted(handout.in_flight, 'request')} under way already; --again gives new URLs for those that were "
            "given out before",
            err=True,
        )
    if handout.busy is not None:
        click.echo(f"left out: {handout.busy.message}", err=True)
    click.echo(f"\nnext, when they have run: batchkit merge {shlex.quote(run)}", err=True)
