"""The body of a successful response → its answer and how it finished. Serves `responses` alone.

Each endpoint has its own shape; which one a body is shows by its keys, since a line does not name its endpoint.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from batchkit import generated
from batchkit.generated import Inline, Said

Kind = Literal["answered", "truncated", "refused", "none"]


class Found(NamedTuple):
    """`kind` "none": there is no answer in it, and `message` says why. `passing`: it may succeed if sent again.

    `images` are those that the model made; they are not in `answer`. `segments` as in `generated.Said`.
    """

    kind: Kind
    answer: Any = None
    finish_reason: str | None = None
    message: str | None = None
    usage: dict[str, Any] | None = None
    model: str | None = None
    passing: bool = False
    images: tuple[Inline, ...] = ()
    segments: int | None = None


# Finish reasons, lower case. `max_tokens` and `max_output_tokens` are what Gemini's and other OpenAI-compatible hosts
# say for OpenAI's `length`; vLLM has `repetition` for output that it cut off because it went round in circles.
_CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length", "repetition"})
# Gemini's block reasons (ai.google.dev/api/generate-content#FinishReason), which its OpenAI endpoint hands on as they
# are or behind `content_filter: `; `refusal` is Anthropic's.
_DECLINED = frozenset({
    "content_filter", "safety", "recitation", "blocklist", "prohibited_content", "spii", "language", "image_safety",
    "image_prohibited_content", "image_recitation", "refusal", "sensitive",
})  # fmt: skip
# The engine or the host gave up (vLLM: abort, error): what text there is, is no answer.
_BROKEN = frozenset({"abort", "error", "cancelled", "insufficient_system_resource", "network_error"})


def read(body: Any) -> Found:
    """Read a body of any endpoint. Never raises."""
    if not isinstance(body, dict):
        return Found("none", message="the response has no body")
    if ("candidates" in body or "promptFeedback" in body) and "choices" not in body:
        return _gemini(body)
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else None
    model = body.get("model") if isinstance(body.get("model"), str) else None
    return _read(body)._replace(usage=usage, model=model)


def _read(body: dict[str, Any]) -> Found:
    if "choices" in body:
        choices = body["choices"]
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            return _choice(choices[0])
        return Found("none", message="the response has no choices")
    if isinstance(body.get("output"), list):
        return _responses_endpoint(body)
    for key in ("data", "results"):
        if isinstance(body.get(key), list):
            return _values(body[key])
    if isinstance(body.get("text"), str):
        return Found("answered", body["text"])  # transcriptions, translations
    return Found("none", message="a response of unknown shape")


def _choice(choice: dict[str, Any]) -> Found:
    finish = choice.get("finish_reason")
    finish = finish if isinstance(finish, str) else None
    message = choice.get("message")
    if not isinstance(message, dict):
        said = generated.read(choice.get("text"))
        return _illustrated(said, said.text, finish, None, "the first choice has no message")
    content = message.get("content")
    refusal = message.get("refusal") or _refusal_in(content)
    said = _with_listed(generated.read(content), message.get("images"))
    answer: Any = said.text
    if not answer and (calls := message.get("tool_calls") or message.get("function_call")):
        answer = calls
    lack = "the message has no content"
    if message.get("reasoning_content") or message.get("reasoning"):
        lack += ", only reasoning"
    return _illustrated(said, answer, finish, refusal if isinstance(refusal, str) else None, lack)


def _with_listed(said: Said, entries: Any) -> Said:
    """Add the images that a message lists beside its content; some servers give them in both places."""
    known = {image.text for image in said.images}
    more = tuple(image for image in generated.listed(entries) if image.text not in known)
    return said._replace(images=said.images + more) if more else said


def _illustrated(said: Said, answer: Any, finish: str | None, refusal: str | None, lack: str) -> Found:
    """As `_finished`, of an answer that may have images: images alone are an answer, with an empty text."""
    if answer is None and said.images:
        answer = ""
    found = _finished(answer, finish, refusal, lack)
    return found if found.kind == "none" else found._replace(images=said.images, segments=said.segments)


def _finished(answer: Any, finish: str | None, refusal: str | None, lack: str) -> Found:
    """Judge by the finish reason. `lack` says what is wrong where there is no answer."""
    word = (finish or "").lower()
    head, _, detail = word.partition(": ")  # Gemini's OpenAI endpoint: `content_filter: SAFETY`
    if refusal:
        return Found("refused", answer, finish, refusal)
    if head in _DECLINED or detail in _DECLINED:
        return Found("refused", answer, finish, f"declined: {finish}")
    if head in _CUT:
        return Found("truncated", answer, finish)
    if head in _BROKEN:
        return Found("none", None, finish, f"finished with {finish!r}", passing=True)
    if answer is None:
        return Found("none", None, finish, f"{lack} (finish reason {finish!r})")
    return Found("answered", answer, finish)


def _refusal_in(content: Any) -> str | None:
    if not isinstance(content, list):
        return None
    refusals = [part["refusal"] for part in content if isinstance(part, dict) and isinstance(part.get("refusal"), str)]
    return "".join(refusals) or None


def _responses_endpoint(body: dict[str, Any]) -> Found:
    """`/v1/responses`: output items, of which the messages hold text; `status` says how it ended."""
    items = [item for item in body["output"] if isinstance(item, dict)]
    messages = [item for item in items if item.get("type", "message") == "message"]
    said = generated.read([part for item in items for part in _spoken_parts(item)])
    answer: Any = said.text
    if answer is None and not said.images:
        answer = [item for item in items if item.get("type") in ("function_call", "custom_tool_call")] or None
    refusal = next((found for item in messages if (found := _refusal_in(item.get("content")))), None)
    status = body.get("status")
    if status == "incomplete":
        details = body.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        return _illustrated(said, answer, reason if isinstance(reason, str) else "length", refusal, "")
    if status in (None, "completed"):
        return _illustrated(said, answer, "stop", refusal, "the output has no text")
    return Found("none", None, None, f"the response ended as {status!r}", passing=status != "failed")


def _spoken_parts(item: dict[str, Any]) -> list[Any]:
    """What an output item adds to the answer: the parts of a message, or the image that a tool made."""
    if item.get("type") == "image_generation_call":
        return [item]
    content = item.get("content") if item.get("type", "message") == "message" else None
    return content if isinstance(content, list) else [content]


def _values(entries: list[Any]) -> Found:
    """Embeddings, scores, pooling: the values in the order of their index, a single one by itself. Rerank: the indices
    with their scores, the best first. Else as it is."""
    if not entries:
        return Found("none", message="the response has no values")
    if all(isinstance(entry, dict) and "relevance_score" in entry for entry in entries):
        # rerank: the documents themselves are in the row
        return Found(
            "answered", [{"index": entry.get("index"), "score": entry["relevance_score"]} for entry in entries]
        )
    for key in ("embedding", "score"):
        if all(isinstance(entry, dict) and key in entry for entry in entries):
            ordered = sorted(entries, key=_index)
            values = [entry[key] for entry in ordered]
            return Found("answered", values[0] if len(values) == 1 else values)
    if any(isinstance(entry, dict) and entry.get("b64_json") for entry in entries):
        return _images(entries)
    return Found("answered", entries)


def _images(entries: list[Any]) -> Found:
    """`/v1/images/generations`: the images, and as the answer what else is said of them (`revised_prompt`)."""
    found = [image for entry in entries if isinstance(entry, dict) for image in generated.listed([entry])]
    rest = [{name: entry[name] for name in entry if name != "b64_json"} for entry in entries if isinstance(entry, dict)]
    return Found("answered", rest if any(rest) else "", images=tuple(found))


def _index(entry: dict[str, Any]) -> int:
    index = entry.get("index")
    return index if isinstance(index, int) else 0


def _gemini(body: dict[str, Any]) -> Found:
    """GenerateContentResponse (ai.google.dev/api/generate-content): text in the parts of the first candidate."""
    counts = body.get("usageMetadata")
    usage = None
    if isinstance(counts, dict):
        prompt, answer, thoughts, total = (
            counts.get(f"{name}TokenCount") or 0 for name in ("prompt", "candidates", "thoughts", "total")
        )
        if all(isinstance(count, int) for count in (prompt, answer, thoughts, total)):
            usage = {"prompt_tokens": prompt, "completion_tokens": answer + thoughts, "total_tokens": total}
    model = body.get("modelVersion")
    found = _gemini_candidate(body)
    return found._replace(usage=usage, model=model if isinstance(model, str) else None)


def _gemini_candidate(body: dict[str, Any]) -> Found:
    candidates = body.get("candidates")
    if not isinstance(candidates, list) or not candidates or not isinstance(candidates[0], dict):
        feedback = body.get("promptFeedback")
        reason = feedback.get("blockReason") if isinstance(feedback, dict) else None
        if isinstance(reason, str):
            return Found("refused", message=f"the prompt was blocked: {reason}", finish_reason=reason)
        return Found("none", message="the response has no candidates")
    content, finish = candidates[0].get("content"), candidates[0].get("finishReason")
    parts = content.get("parts") if isinstance(content, dict) else None
    spoken = (
        [part for part in parts if isinstance(part, dict) and not part.get("thought")]
        if isinstance(parts, list)
        else []
    )
    said = generated.read(spoken)
    return _illustrated(
        said, said.text, finish if isinstance(finish, str) else None, None, "the first candidate has no text"
    )
