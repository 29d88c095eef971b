"""How the images of a run with links go out: what its backend can open, and what it is told for that."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from batchkit import s3
from batchkit.backends import vllm_install
from batchkit.errors import UsageError
from batchkit.feeds import Feed
from batchkit.limits import LIMITS, Limits
from batchkit.links import Links, common_folder
from batchkit.manifests import Seal
from batchkit.presigning import UNITS, Presigner, Signer
from batchkit.references import is_address
from batchkit.resolving import Resolver, Ways
from batchkit.runs import Run
from batchkit.wording import counted

ALLOWED = "--allowed-local-media-path"

START_SECONDS = 1800
"""What an engine's start with all of its requests is believed to take, where URLs are signed for it."""
CALL_SECONDS = 900
UPLOAD_SECONDS = 3600
"""A batch is created some time after its requests are signed: its window counts from then."""
USUAL_WINDOW = "24h"


def links_of(seals: Sequence[Seal]) -> Links:
    total = Links()
    for seal in seals:
        if seal.links is not None:
            total = total.together(seal.links)
    return total


def refuse_presign(run: Run, presign: bool) -> None:
    """Raise `UsageError` where there is nothing to sign."""
    if presign and not run.manifest.has_links:
        raise UsageError(
            "--presign is for runs that name their images: this one has them in its requests",
            hint="batchkit prepare … --images link",
        )


# -- engines of our own ------------------------------------------------------------------------------------------------


def media_args(run: Run, feed: Feed, args: Sequence[str]) -> list[str]:
    """What vLLM is to be told, so that it opens the run's files; nothing where the user has told it. Files elsewhere go
    as base64."""
    if not run.manifest.has_links or ALLOWED in vllm_install.given(args):
        return []
    folder, root = links_of(feed.chosen).folder, _root(run)
    if root is not None and (folder == "/" or (feed.is_open and common_folder(folder, root) == root)):
        folder = root  # never all of the disk; and what is sealed later is likely there
    return [ALLOWED, folder] if folder is not None and folder != "/" and Path(folder).is_dir() else []


def _root(run: Run) -> str | None:
    """Where the run's relative paths begin on this disk."""
    root = str(run.manifest.options.get("image_root") or "")
    return None if not root or is_address(root) else os.path.realpath(root)


def for_engine(run: Run, args: Sequence[str], *, presign: bool) -> contextlib.AbstractContextManager[Resolver | None]:
    """For vLLM with these arguments, which begin with what `media_args` gives."""
    if not run.manifest.has_links:
        return contextlib.nullcontext()
    folder = vllm_install.given(args).get(ALLOWED)
    return Resolver(
        run,
        Ways(
            limits=LIMITS["vllm"],
            folder=os.path.realpath(folder) if folder else None,
            presigner=Presigner(run.name, START_SECONDS, what="a start of the engine") if presign else None,
            near=True,
            private_hosts=_private_hosts(run),
        ),
    )


# -- others ------------------------------------------------------------------------------------------------------------


def for_servers(run: Run, *, presign: bool) -> contextlib.AbstractContextManager[Resolver | None]:
    """For live servers."""
    if not run.manifest.has_links:
        return contextlib.nullcontext()
    return Resolver(
        run,
        Ways(
            limits=LIMITS["server"],
            presigner=Presigner(run.name, CALL_SECONDS, what="an answer") if presign else None,
            near=True,
            private_hosts=_private_hosts(run),
        ),
    )


def for_service(
    run: Run, seals: Sequence[Seal], limits: Limits, *, name: str, base_url: str, window: str | None, presign: bool
) -> contextlib.AbstractContextManager[Resolver | None]:
    """For a batch service. Raises `UsageError` where it cannot fetch what it would have to."""
    if not run.manifest.has_links:
        return contextlib.nullcontext()
    if not limits.fetches and (presign or links_of(seals).web):
        if presign:
            raise UsageError(f"--presign: {name} fetches no images", hint="leave it out: they go as base64 then")
        raise UsageError(
            f"{name} fetches no images, and the run names some by https:// addresses",
            hint="prepare them without --images link: prepare then puts them into the requests",
        )
    presigner = None
    if presign:
        _refuse_unreachable(name, base_url)
        presigner = Presigner(run.name, window_seconds(window), what="a batch", slack=UPLOAD_SECONDS)
    return Resolver(run, Ways(limits=limits, presigner=presigner, private_hosts=_private_hosts(run)))


def for_elsewhere(
    run: Run, seals: Sequence[Seal], signer: Signer
) -> contextlib.AbstractContextManager[Resolver | None]:
    """For machines without credentials, which can open what has an address. Raises `UsageError` where images are files
    of this machine."""
    if not run.manifest.has_links:
        return contextlib.nullcontext()
    if files := links_of(seals).files:
        raise UsageError(
            f"{run.name}: names {counted(files, 'image')} in files, which machines elsewhere cannot open",
            hint="put the images into a bucket, or prepare without --images link: requests then have them",
        )
    ways = Ways(limits=LIMITS["vllm"], presigner=signer, near=True, private_hosts=_private_hosts(run))
    return Resolver(run, ways)


def window_seconds(window: str | None) -> int:
    """Of a completion window, as providers write it: 24h, 7d."""
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", window or USUAL_WINDOW)
    return int(found[1]) * UNITS[found[2]] if found else window_seconds(USUAL_WINDOW)


def _refuse_unreachable(name: str, base_url: str) -> None:
    """Raise `UsageError` where the bucket is in the own network and the provider is not."""
    server = str(s3.client().meta.endpoint_url)
    if _is_private(server) and not _is_private(base_url):
        raise UsageError(
            f"--presign: {name} cannot reach {server}, where the images are",
            hint="leave --presign out: the images go as base64 then",
        )


def _is_private(url: str) -> bool:
    """Whether only machines nearby know the host: by a number that is not public, or by a name that no one else has."""
    from batchkit.addresses import PrivateAddressError, check_literal

    host = urlsplit(url).hostname or ""
    try:
        check_literal(host)
    except PrivateAddressError:
        return True
    return ("." not in host and ":" not in host) or host.endswith((".local", ".internal", ".localhost"))


def _private_hosts(run: Run) -> bool:
    return bool(run.manifest.options.get("allow_private_hosts", False))
