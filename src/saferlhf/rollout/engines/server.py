"""A policy behind an OpenAI-compatible server: `completions` with the prompt's token ids, one request per response.

Servers of the vLLM family tell the tokens they wrote (`return_token_ids`, or `token_id:N` as the words of `logprobs`).
Others tell a text alone: it is encoded again, which need not give the tokens that were written, so that their
log-probabilities are NaN. They are NaN too at another temperature than 1 or with a cut-off, because servers tell those
of the unchanged distribution. A server's weights stand still: this is for policies that are looked at, not trained.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from saferlhf.config.rollout_schema import RolloutConfig
from saferlhf.data.templates import encode_texts, end_id, pad_id
from saferlhf.errors import UserError
from saferlhf.rollout.engines.base import request_seed
from saferlhf.rollout.experience import Response, Rollout, assemble
from saferlhf.rollout.generate import decoded_by
from saferlhf.rollout.prompts import PromptTokens, first_samples
from saferlhf.rollout.remote.client import Client, ServerError

TOKEN = "token_id:"


class ServerEngine:
    """Samples from a server.

    Args:
        config: temperature, lengths, and `server`.
        tokenizer: of the policy that the server runs.
    """

    def __init__(self, config: RolloutConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.client = Client(config.server, "rollout.server")
        self._end = end_id(tokenizer)

    @property
    def name(self) -> str:
        """Of the engine."""
        return "openai"

    def follow(self, policy: Any) -> None:
        """A server keeps the weights it was started with.

        Raises:
            UserError: always.
        """
        mend = "use rollout=native or rollout=vllm"
        raise UserError("a server's weights cannot follow a policy in training", "rollout.engine", mend)

    def generate(
        self,
        prompts: Sequence[PromptTokens],
        *,
        samples: int = 1,
        seed: int,
        rollout: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        """See `Engine`.

        Raises:
            UserError: a response that could not be had; what the server wrote so far is lost.
        """
        first = first_samples(prompts, samples)
        payloads = [
            self._payload(prompt, request_seed(seed, rollout, prompt.row_id, first[i] + j))
            for i, prompt in enumerate(prompts)
            for j in range(samples)
        ]
        done = 0
        lock = threading.Lock()

        def read(place: int, answer: dict[str, Any]) -> Response:
            nonlocal done
            response = self._response(answer)
            with lock:
                done += 1
                if progress is not None:
                    progress(done)
            return response

        found: list[Response] = []
        for place, result in enumerate(self.client.map("completions", payloads, read)):
            if isinstance(result, ServerError):
                row = prompts[place // samples].row_id
                what = f"no response to row {row}: {result.reason}"
                raise UserError(what, self.config.server.base_url, "is the server running, and patient enough?")
            found.append(result)
        return assemble(
            prompts,
            [found[i * samples : (i + 1) * samples] for i in range(len(prompts))],
            pad_token_id=pad_id(self.tokenizer),
            decode=decoded_by(self.tokenizer),
            first_samples=first,
        )

    def _payload(self, prompt: PromptTokens, seed: int) -> dict[str, Any]:
        config = self.config
        payload: dict[str, Any] = {
            "model": config.server.model,
            "prompt": [int(token) for token in prompt.token_ids],
            "max_tokens": config.new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": seed,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        return payload | ({"top_k": config.top_k} if config.top_k > 0 else {})

    def _response(self, answer: dict[str, Any]) -> Response:
        """A choice as tokens.

        Raises:
            ServerError: there is none, or its parts do not fit together.
        """
        try:
            choice = answer["choices"][0]
            text, reason = choice["text"], choice.get("finish_reason")
            logprobs = choice.get("logprobs") or {}
            words, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ServerError("unparsable", "the server's answer has no text", again=True) from None
        truncated = reason == "length"
        ids = _token_ids(choice.get("token_ids"), words)
        if ids is None:
            if not isinstance(text, str):
                raise ServerError("unparsable", "the server's answer has no text", again=True)
            (ids,) = encode_texts([text], self.tokenizer)
            values = None
        known = self.config.temperature == 1 and self.config.top_k == 0 and self.config.top_p == 1
        found = list(values) if isinstance(values, list) and len(values) == len(ids) and known else [None] * len(ids)
        if not truncated and (not ids or ids[-1] != self._end):
            ids, found = [*ids, self._end], [*found, None]  # servers may leave the end token out
        if not ids:
            raise ServerError("unparsable", "the server cut a response off before its first token", again=True)
        return Response(ids, [math.nan if value is None else float(value) for value in found], truncated)


def _token_ids(told: Any, words: Any) -> list[int] | None:
    """The tokens as the server tells them; None: it does not."""
    if isinstance(told, list) and all(isinstance(token, int) for token in told):
        return list(told)
    if isinstance(words, list) and words and all(isinstance(word, str) and word.startswith(TOKEN) for word in words):
        return [int(word.removeprefix(TOKEN)) for word in words]
    return None
