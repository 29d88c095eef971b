"""Golden response lines of every shape known, each with its source, the verdict and the answer it has.

[ran] copied from a run, shortened; [source] as the package's code writes it; [docs] from the provider's pages;
[users] from issue threads. `ID` stands for the custom_id.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Shape(NamedTuple):
    name: str
    line: str
    verdict: str
    answer: Any = None
    message: str | None = None
    passing: bool = False
    engine_died: bool = False

    def of(self, custom_id: str) -> bytes:
        return self.line.replace("ID", custom_id).encode()


def _chat(choice: str, extra: str = "") -> str:
    return (
        '{"id":"batch_req_1","custom_id":"ID","response":{"status_code":200,"request_id":"r","body":{"id":"chatcmpl-1",'
        f'"object":"chat.completion","created":1,"model":"m","choices":[{choice}],'
        f'"usage":{{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12}}{extra}}}}},"error":null}}'
    )


def _body(body: str) -> str:
    return f'{{"id":"1","custom_id":"ID","response":{{"status_code":200,"request_id":"r","body":{body}}},"error":null}}'


SHAPES = [
    # vLLM 0.32 run_batch, a chat completion [ran]
    Shape(
        "vllm_success",
        '{"id":"vllm-9f","custom_id":"ID","response":{"status_code":200,"request_id":"vllm-batch-8c","body":{"id":'
        '"chatcmpl-1","object":"chat.completion","created":1763700000,"model":"tiny","choices":[{"index":0,"message":'
        '{"role":"assistant","content":"red","refusal":null,"annotations":null,"audio":null,"function_call":null,'
        '"tool_calls":[],"reasoning":null},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}]'
        ',"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":24,"total_tokens":26,'
        '"completion_tokens":2,"prompt_tokens_details":null},"prompt_logprobs":null}},"error":null}',
        "answered",
        "red",
    ),
    # vLLM 0.32, a request longer than the context [ran]
    Shape(
        "vllm_failure",
        '{"id":"vllm-1","custom_id":"ID","response":{"status_code":400,"request_id":"vllm-batch-1","body":null},"error":'
        '{"error":{"message":"This model\'s maximum context length is 256 tokens.","type":"BadRequestError","param":'
        '"input_tokens","code":400}}}',
        "failed",
        message="This model's maximum context length is 256 tokens.",
    ),
    # vLLM 0.32, `stream` or an unknown url: a plain string [ran]
    Shape(
        "vllm_plain_error",
        '{"id":"vllm-1","custom_id":"ID","response":{"status_code":400,"request_id":"vllm-batch-1","body":null},"error":'
        '"Request must not be sent in stream mode"}',
        "failed",
        message="Request must not be sent in stream mode",
    ),
    # vLLM 0.32, EngineCore killed [ran]; the text is EngineDeadError's (vllm/v1/engine/exceptions.py)
    Shape(
        "vllm_engine_died",
        '{"id":"vllm-1","custom_id":"ID","response":{"status_code":500,"request_id":"vllm-batch-1","body":null},"error":'
        '{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root cause.","type":'
        '"InternalServerError","param":null,"code":500}}}',
        "failed",
        message="EngineCore encountered an issue. See stack trace (above) for the root cause.",
        passing=True,
        engine_died=True,
    ),
    # vLLM 0.6 with its v0 engine: AsyncEngineDeadError [users: vllm #7356]
    Shape(
        "vllm_v0_engine_died",
        '{"id":"vllm-1","custom_id":"ID","response":{"status_code":500,"request_id":"vllm-batch-1","body":null},"error":'
        '{"object":"error","message":"Background loop has errored already.","type":"InternalServerError","param":null,'
        '"code":500}}',
        "failed",
        message="Background loop has errored already.",
        passing=True,
        engine_died=True,
    ),
    # vLLM 0.32, EngineGenerateError: no text, and no death of the engine [source]
    Shape(
        "vllm_generate_error",
        '{"id":"vllm-1","custom_id":"ID","response":{"status_code":500,"request_id":"vllm-batch-1","body":null},"error":'
        '{"error":{"message":"","type":"InternalServerError","param":null,"code":500}}}',
        "failed",
        message="error 500",
        passing=True,
    ),
    # vLLM 0.4 wrote the completion itself [source]
    Shape(
        "vllm_0_4",
        '{"id":"vllm-1","custom_id":"ID","response":{"id":"cmpl-1","object":"chat.completion","created":1,"model":"m",'
        '"choices":[{"index":0,"message":{"role":"assistant","content":"red"},"logprobs":null,"finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1}},"error":null}',
        "answered",
        "red",
    ),
    # OpenAI: an HTTP failure has no error outside the body [docs, users]
    Shape(
        "openai_http_failure",
        '{"id":"batch_req_1","custom_id":"ID","response":{"status_code":400,"request_id":"r","body":{"error":{"message":'
        '"Invalid image.","type":"invalid_request_error","param":null,"code":"invalid_image"}}},"error":null}',
        "failed",
        message="Invalid image.",
    ),
    Shape(
        "openai_rate_limited",
        '{"id":"batch_req_1","custom_id":"ID","response":{"status_code":429,"request_id":"r","body":{"error":{"message":'
        '"Rate limit reached","type":"requests","param":null,"code":"rate_limit_exceeded"}}},"error":null}',
        "failed",
        message="Rate limit reached",
        passing=True,
    ),
    Shape(
        "openai_expired",
        '{"id":"batch_req_1","custom_id":"ID","response":null,"error":{"code":"batch_expired","message":"This request '
        'could not be executed before the completion window expired."}}',
        "expired",
        message="This request could not be executed before the completion window expired.",
        passing=True,
    ),
    Shape(
        "openai_cancelled",
        '{"id":"batch_req_1","custom_id":"ID","response":null,"error":{"code":"batch_cancelled","message":"cancelled"}}',
        "expired",
        message="cancelled",
        passing=True,
    ),
    # OpenAI: the call to the model timed out [docs: error.code]
    Shape(
        "openai_request_timeout",
        '{"id":"batch_req_1","custom_id":"ID","response":null,"error":{"code":"request_timeout","message":"late"}}',
        "failed",
        message="late",
        passing=True,
    ),
    # OpenAI: status 0 [users]
    Shape(
        "openai_status_0",
        '{"id":"batch_req_1","custom_id":"ID","response":{"status_code":0,"request_id":"","body":{}},"error":null}',
        "failed",
        message="status 0 without a message",
        passing=True,
    ),
    # AIBrix 0.8 [ran]
    Shape(
        "aibrix_failure",
        '{"error":{"code":"inference_failed","message":"bad image"},"response":null,"custom_id":"ID"}',
        "failed",
        message="bad image",
    ),
    # Refusals [docs: structured outputs]
    Shape(
        "refusal",
        _chat('{"index":0,"message":{"role":"assistant","content":null,"refusal":"I cannot."},"finish_reason":"stop"}'),
        "refused",
        message="I cannot.",
    ),
    Shape(
        "content_filter",
        _chat('{"index":0,"message":{"role":"assistant","content":"He"},"finish_reason":"content_filter"}'),
        "refused",
        "He",
        "declined: content_filter",
    ),
    # Gemini's OpenAI endpoint hands its own reasons on [users]
    Shape(
        "gemini_safety",
        _chat('{"index":0,"message":{"role":"assistant"},"finish_reason":"content_filter: PROHIBITED_CONTENT"}'),
        "refused",
        message="declined: content_filter: PROHIBITED_CONTENT",
    ),
    Shape(
        "gemini_safety_word",
        _chat('{"index":0,"message":{"role":"assistant","content":null},"finish_reason":"SAFETY"}'),
        "refused",
        message="declined: SAFETY",
    ),
    Shape(
        "truncated",
        _chat('{"index":0,"message":{"role":"assistant","content":"a long"},"finish_reason":"length"}'),
        "truncated",
        "a long",
    ),
    # A reasoning model that spent all tokens on thinking
    Shape(
        "truncated_without_content",
        _chat('{"index":0,"message":{"role":"assistant","content":null,"reasoning":"hm"},"finish_reason":"length"}'),
        "truncated",
    ),
    Shape(
        "empty_text",
        _chat('{"index":0,"message":{"role":"assistant","content":""},"finish_reason":"stop"}'),
        "answered",
        "",
    ),
    # vLLM with a reasoning parser that takes everything for reasoning [users]
    Shape(
        "reasoning_only",
        _chat(
            '{"index":0,"message":{"role":"assistant","content":null,"reasoning_content":"hm"},"finish_reason":"stop"}'
        ),
        "failed",
        message="the message has no content, only reasoning (finish reason 'stop')",
    ),
    Shape(
        "tool_call",
        _chat(
            '{"index":0,"message":{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function",'
            '"function":{"name":"f","arguments":"{}"}}]},"finish_reason":"tool_calls"}'
        ),
        "answered",
        [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    ),
    Shape(
        "parts",
        _chat(
            '{"index":0,"message":{"role":"assistant","content":[{"type":"text","text":"re"},{"type":"text",'
            '"text":"d"}]},"finish_reason":"stop"}'
        ),
        "answered",
        "red",
    ),
    # vLLM: the engine let go of the request [source: FinishReason]
    Shape(
        "aborted",
        _chat('{"index":0,"message":{"role":"assistant","content":"r"},"finish_reason":"abort"}'),
        "failed",
        message="finished with 'abort'",
        passing=True,
    ),
    # Some hosts fill `error` in a success: only the status counts [users]
    Shape(
        "success_with_error_object",
        _chat('{"index":0,"message":{"role":"assistant","content":"red"},"finish_reason":"stop"}').replace(
            '"error":null', '"error":{"code":"","message":""}'
        ),
        "answered",
        "red",
    ),
    Shape(
        "answer_cut_in_a_surrogate_pair",
        _chat('{"index":0,"message":{"role":"assistant","content":"ok \\ud83d"},"finish_reason":"stop"}'),
        "answered",
        "ok \ufffd",
    ),
    Shape("no_choices", _body('{"choices":[],"model":"m"}'), "failed", message="the response has no choices"),
    Shape("no_body", _body("null"), "failed", message="the response has no body"),
    Shape("unknown_shape", _body('{"hello":1}'), "failed", message="a response of unknown shape"),
    Shape(
        "error_with_status_200",
        _body('{"error":{"message":"overloaded","code":503}}'),
        "failed",
        message="overloaded",
        passing=True,
    ),
    Shape(
        "neither_response_nor_error",
        '{"custom_id":"ID","response":null,"error":null}',
        "failed",
        message="a response of unknown shape",
    ),
    Shape(
        "completion",
        _body('{"object":"text_completion","choices":[{"index":0,"text":"red","finish_reason":"stop"}]}'),
        "answered",
        "red",
    ),
    Shape(
        "responses_endpoint",
        _body(
            '{"object":"response","status":"completed","output":[{"type":"reasoning","summary":[]},{"type":"message",'
            '"content":[{"type":"output_text","text":"red","annotations":[]}]}]}'
        ),
        "answered",
        "red",
    ),
    Shape(
        "responses_endpoint_incomplete",
        _body(
            '{"object":"response","status":"incomplete","incomplete_details":{"reason":"max_output_tokens"},"output":'
            '[{"type":"message","content":[{"type":"output_text","text":"re"}]}]}'
        ),
        "truncated",
        "re",
    ),
    Shape(
        "responses_endpoint_refusal",
        _body(
            '{"object":"response","status":"completed","output":[{"type":"message","content":[{"type":"refusal",'
            '"refusal":"No."}]}]}'
        ),
        "refused",
        message="No.",
    ),
    # vLLM 0.32, pooling models [source]
    Shape(
        "embedding",
        _body('{"object":"list","data":[{"index":0,"object":"embedding","embedding":[0.5,-1.0]}]}'),
        "answered",
        [0.5, -1.0],
    ),
    Shape(
        "embeddings",
        _body('{"object":"list","data":[{"index":1,"embedding":[2.0]},{"index":0,"embedding":[1.0]}]}'),
        "answered",
        [[1.0], [2.0]],
    ),
    Shape("score", _body('{"object":"list","data":[{"index":0,"object":"score","score":0.25}]}'), "answered", 0.25),
    Shape(
        "rerank",
        _body('{"results":[{"index":1,"document":{"text":"b"},"relevance_score":0.9}]}'),
        "answered",
        [{"index": 1, "score": 0.9}],
    ),
    Shape("transcription", _body('{"text":"hello","usage":{"type":"duration","seconds":1}}'), "answered", "hello"),
    # Gemini's own output, untranslated [docs: ai.google.dev/gemini-api/docs/batch-api]
    Shape(
        "gemini_success",
        '{"key":"ID","response":{"candidates":[{"content":{"parts":[{"text":"hm","thought":true},{"text":"red"}],"role":'
        '"model"},"finishReason":"STOP","index":0}],"usageMetadata":{"promptTokenCount":5,"candidatesTokenCount":1,'
        '"totalTokenCount":6},"modelVersion":"gemini-2.5-flash"}}',
        "answered",
        "red",
    ),
    Shape(
        "gemini_cut",
        '{"key":"ID","response":{"candidates":[{"content":{"role":"model"},"finishReason":"MAX_TOKENS"}]}}',
        "truncated",
    ),
    Shape(
        "gemini_blocked_prompt",
        '{"key":"ID","response":{"promptFeedback":{"blockReason":"PROHIBITED_CONTENT"},"usageMetadata":{}}}',
        "refused",
        message="the prompt was blocked: PROHIBITED_CONTENT",
    ),
    Shape(
        "gemini_recitation",
        '{"key":"ID","response":{"candidates":[{"finishReason":"RECITATION"}]}}',
        "refused",
        message="declined: RECITATION",
    ),
    Shape(
        "gemini_error",
        '{"key":"ID","error":{"code":8,"message":"Resource exhausted"}}',
        "failed",
        message="Resource exhausted",
        passing=True,
    ),
    Shape(
        "gemini_status",
        '{"key":"ID","status":{"code":3,"message":"Invalid argument"}}',
        "failed",
        message="Invalid argument",
    ),
]
