"""One row → one request line, or the reason why not: what a worker of `prepare` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from batchkit import gemini_requests, links, references, tasks, vlmevalkit
from batchkit.errors import RowError, UsageError
from batchkit.images import Given, ImageOptions, Picture
from batchkit.limits import OWN
from batchkit.links import Link
from batchkit.manifests import OUR_NAMES
from batchkit.measures import RequestTokens, request_tokens
from batchkit.options import PrepareOptions
from batchkit.pictures import Pictures
from batchkit.placeholders import Place
from batchkit.prompts import MissingImageError, PromptMaker, arrange, text_only
from batchkit.requests import Documents, RequestMaker, fingerprint
from batchkit.tasks import DOCUMENTS_FIELD, Fields, ImageReference, Row, Task

OUR_NAMES_SET = frozenset(OUR_NAMES)


class Converted(NamedTuple):
    """What became of a row: its line `request` with the line feed, or `code` and `message` of a rejection.

    `names` are those of our result fields that the row already uses; `pixels` sums its images, of `links` as a guess.
    `tokens` are estimated where a provider bills them; `fingerprint` is that of the request, where it is compared with
    others. `same_as` is the position of an earlier row of the shard whose request this one shares: then there is none
    here. `images` are those of the request as they were given, with the bytes of each as it is sent: where they are
    `surveyed`.
    """

    custom_id: str
    request: bytes | memoryview | None
    code: str = ""
    message: str = ""
    pixels: int = 0
    names: frozenset[str] = frozenset()
    tokens: RequestTokens | None = None
    links: tuple[Link, ...] = ()
    fingerprint: bytes | None = None
    same_as: int | None = None
    images: tuple[tuple[Given, int], ...] = ()


class Converter:
    """Converts rows of one input with one set of options. Picklable by its arguments: workers make their own."""

    def __init__(self, options: PrepareOptions, *, image_root: str, batch_format: bool, surveyed: bool = False) -> None:
        self._options = options
        self._surveyed = surveyed
        self._limits = options.limits
        self.root = image_root
        self._folder = Path(image_root)
        self._root_is_remote = references.is_address(image_root)
        self._batch_format = batch_format
        self._links = options.images == "link"
        self._most_bytes = options.shard_bytes
        self._compares = bool(options.reuse or options.dedupe)
        self._estimates = options.backend not in OWN
        self._takes_images = options.endpoint.takes("image_field", options.backend)
        self._takes_documents = options.endpoint.takes("documents_field", options.backend)
        self._prompts = PromptMaker(options.prompt_template, placeholders=options.placeholders)
        self._fields = Fields(
            images=options.image_field,
            question=options.question_field,
            ids=options.id_fields or (vlmevalkit.ID_FIELDS if options.input_format == "vlmevalkit" else None),
            question_needed=options.prompt_template is None,
            compose=vlmevalkit.question_of if options.input_format == "vlmevalkit" else None,
        )
        wanted = ImageOptions(
            media_types=self._limits.media_types,
            max_side=options.max_side,
            max_pixels=options.max_pixels,
            format=options.image_format,
            quality=options.image_quality,
            fit=options.fit,
            detail=options.image_detail,
        )
        self._pictures = Pictures(Path(image_root), wanted)
        self._maker = RequestMaker(
            model=options.model,
            system=options.system_prompt,
            parameters=options.parameters,
            extra=options.extra_body,
            detail=options.image_detail,
            url=options.url,
        )

        # Rows in batch format bring their own bodies; ours are alike in all that the dialect depends on.
        self._checks_each = batch_format and options.backend == "gemini"
        if options.backend == "gemini" and not batch_format:
            self._refuse_unmapped()

    def _refuse_unmapped(self) -> None:
        body = tasks.parse_object(self._maker.line("0", ["?"]))["body"]
        try:
            gemini_requests.check(body)
        except RowError as exc:
            raise UsageError(exc.message, hint="leave the option out, or use a backend that has it") from exc

    def __call__(self, row: Row) -> Converted:
        try:
            done = self._kept(row) if self._batch_format else self._made(row)
            request = done.request
            if not isinstance(request, bytes):
                return done
            if self._checks_each:
                gemini_requests.check(tasks.parse_object(request)["body"])
            if len(request) > self._most_bytes:
                raise RowError("size", f"the request has {len(request):,} bytes, a shard at most {self._most_bytes:,}")
        except RowError as exc:
            # Not under the custom_id that a row in batch format brings: another row may have the same.
            custom_id = tasks.make_custom_id(row.position, tasks.whole(row))
            return Converted(custom_id, None, exc.code, exc.message, names=_names(row.raw))
        if self._compares:
            done = done._replace(fingerprint=fingerprint(request))
        if self._estimates:
            return done._replace(tokens=request_tokens(request, self._options.model))
        return done

    def _made(self, row: Row) -> Converted:
        task = tasks.to_task(row, self._fields)
        names = OUR_NAMES_SET & task.fields.keys()
        try:
            content = self._content(task, row.fetched or {})
            documents = self._documents(task) if self._takes_documents else None
        except RowError as exc:
            return Converted(task.custom_id, None, exc.code, exc.message, names=names)
        request = self._maker.line(task.custom_id, content, documents)
        pixels = 0
        linked: tuple[Link, ...] = ()
        for part in content:
            if not isinstance(part, str):
                pixels += part.pixels
                if isinstance(part, Link):
                    linked = (*linked, part)
        done = Converted(task.custom_id, request, "", "", pixels, names, None, linked)
        if not self._surveyed:
            return done
        found = (part for part in content if isinstance(part, Picture))
        return done._replace(images=tuple((part.given, len(part.data)) for part in found if part.given is not None))

    def pictures(self, row: Row) -> list[Picture]:
        """The images of the row's request, in order; none where there is no request."""
        try:
            task = tasks.to_task(row, self._fields)
            return [part for part in self._content(task, row.fetched or {}) if isinstance(part, Picture)]
        except RowError:
            return []

    def _documents(self, task: Task) -> Documents:
        return tasks.documents_of(task.fields, self._options.documents_field or DOCUMENTS_FIELD)

    def remote_images(self, row: Row) -> list[str]:
        """The addresses of the images that converting the row asks for: by the same steps, so that none is missing."""
        if self._batch_format or self._links or not self._takes_images or not self._may_be_remote(row):
            return []
        try:
            task = tasks.to_task(row, self._fields)
            arranged = arrange(self._prompts.write(task), task)
        except RowError:
            return []
        found = (references.remote(part.source, self.root) for part in arranged if isinstance(part, ImageReference))
        return list(dict.fromkeys(uri for uri in found if uri is not None))

    def _may_be_remote(self, row: Row) -> bool:
        if self._root_is_remote or references.may_be_remote(row.raw):
            return True
        if not row.attached:
            return False
        attached = (one for some in row.attached.values() for one in some)
        return any(isinstance(one, str) and references.is_address(one) for one in attached)

    def _content(self, task: Task, fetched: Mapping[str, bytes | str]) -> Sequence[str | Picture | Link]:
        """The texts and pictures of the question, in order."""
        prompt = self._prompts.write(task)
        try:
            arranged = arrange(prompt, task)
        except MissingImageError:
            if self._options.on_bad_image == "text-only":
                return text_only(prompt)
            raise
        try:
            if not any(isinstance(part, Place) for part in prompt):  # else these say which images there have to be
                self._refuse_missing(task)
            return [part if isinstance(part, str) else self._picture(part, fetched) for part in arranged]
        except RowError:
            if self._options.on_bad_image == "text-only":
                return text_only(prompt)  # without any: with one left out, «the second image» would mean another one
            raise

    def _refuse_missing(self, task: Task) -> None:
        """Raise `RowError` where an image field that was named has no image: with fewer than asked for, «the second
        image» would mean another one."""
        if not self._options.image_field:
            return
        found = {image.field for image in task.images}
        for name in self._options.image_field:
            if name not in found:
                raise RowError("image", f"no image in {name!r}")

    def _picture(self, image: ImageReference, fetched: Mapping[str, bytes | str]) -> Picture | Link:
        if not self._takes_images:
            where = f"{self._options.url} of {self._options.backend}"
            raise RowError("image", f"{where} takes no images; --on-bad-image text-only sends the texts alone")
        if self._links and isinstance(image.source, str) and not image.source.startswith("data:"):
            return self._link(image.source)
        uri = references.remote(image.source, self.root)
        if uri is None:
            return self._pictures.load(image.source, name=f"(field {image.field!r})")
        found = fetched.get(uri, f"a template asks for other images each time: {references.shown(uri)} was not fetched")
        if isinstance(found, str):
            raise RowError("image", found)
        return self._pictures.load(found, name=references.shown(uri))

    def _link(self, source: str) -> Link:
        link = links.link_to(source, self.root)
        if link.uri.startswith("http") and not self._limits.fetches:
            raise RowError(
                "image",
                f"{self._options.backend} fetches no images: {references.shown(link.uri)}; without --images link, "
                "prepare puts it into the request",
            )
        if link.uri.startswith("http") and not self._options.allow_private_hosts:
            links.refuse_private(link.uri)
        return link

    def _kept(self, row: Row) -> Converted:
        """A row that is a request in OpenAI batch format stays as it is."""
        fields = tasks.parse_object(row.raw)
        custom_id = tasks.check_batch_line(fields)
        url, model = fields["url"], fields["body"]["model"]
        if not self._limits.takes(url):
            taken = ", ".join(self._limits.endpoints)
            raise RowError("url", f"url {url!r} is none that {self._options.backend} runs ({taken})")
        if model != self._options.model:
            raise RowError("model", f"body.model is {model!r}, but the run's model is {self._options.model!r}")
        return Converted(custom_id, row.raw.strip() + b"\n", names=OUR_NAMES_SET & fields.keys())


def _names(raw: bytes) -> frozenset[str]:
    """Which of our names a rejected row uses: its result has its fields, too."""
    try:
        return OUR_NAMES_SET & tasks.parse_object(raw).keys()
    except RowError:
        return frozenset()
