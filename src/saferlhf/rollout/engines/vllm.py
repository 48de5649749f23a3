"""vLLM in this process, its weights following the policy.

The engine is asked for the log-probabilities of the processed distribution (temperature included); those it computes
differ from the policy's own by its kernels and dtype, which `mismatch.py` measures. Weights go over by
`LLM.apply_model(model.load_weights)`, which needs the engine in this process on one device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saferlhf.config.rollout_schema import RolloutConfig
from saferlhf.data.templates import end_id, pad_id
from saferlhf.errors import UserError
from saferlhf.rollout.engines.base import request_seed
from saferlhf.rollout.engines.weights import merged_weights
from saferlhf.rollout.experience import Response, Rollout, assemble
from saferlhf.rollout.generate import decoded_by
from saferlhf.rollout.prompts import PromptTokens, first_samples


class VllmEngine:
    """Samples with vLLM.

    Args:
        config: temperature, lengths, and `vllm`.
        tokenizer: of the policy.
        folder: a Hugging Face folder with the policy's architecture and weights to begin with.
        max_length: tokens of prompt + response.

    Raises:
        UserError: vLLM is not installed, or several devices are asked for.
    """

    def __init__(self, config: RolloutConfig, tokenizer: Any, folder: Path | str, max_length: int) -> None:
        if config.vllm.tensor_parallel_size != 1:
            what = f"vllm.tensor_parallel_size {config.vllm.tensor_parallel_size}: weights follow on one device only"
            raise UserError(what, "rollout.vllm.tensor_parallel_size", "use 1")
        # before the import: the engine's worker stays in this process, where its weights can be reached
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            import vllm
        except ImportError:
            raise UserError(
                "vLLM is not installed", "rollout.engine=vllm", "pip install vllm, or rollout=native"
            ) from None
        self.config, self.tokenizer, self._vllm = config, tokenizer, vllm
        self._end = end_id(tokenizer)
        self._llm = vllm.LLM(
            model=str(folder),
            dtype=config.vllm.dtype,
            gpu_memory_utilization=config.vllm.gpu_memory_utilization,
            max_model_len=max_length,
            logprobs_mode="processed_logprobs",
            skip_tokenizer_init=True,
            trust_remote_code=False,
        )

    @property
    def name(self) -> str:
        """Of the engine."""
        return "vllm"

    def follow(self, policy: Any) -> None:
        """Take over the policy's weights, adapters added in."""
        self._llm.apply_model(lambda model: model.load_weights(merged_weights(policy)))
        self._llm.reset_prefix_cache()  # it was filled by other weights

    def generate(
        self,
        prompts: Sequence[PromptTokens],
        *,
        samples: int = 1,
        seed: int,
        rollout: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        """See `Engine`."""
        first = first_samples(prompts, samples)
        wanted, options = [], []
        for i, prompt in enumerate(prompts):
            for j in range(samples):
                wanted.append({"prompt_token_ids": [int(token) for token in prompt.token_ids]})
                options.append(self._sampling(request_seed(seed, rollout, prompt.row_id, first[i] + j)))
        outputs = self._llm.generate(wanted, options, use_tqdm=False) if wanted else []
        found = [self._response(output.outputs[0]) for output in outputs]
        if progress is not None:
            progress(len(found))
        return assemble(
            prompts,
            [found[i * samples : (i + 1) * samples] for i in range(len(prompts))],
            pad_token_id=pad_id(self.tokenizer),
            decode=decoded_by(self.tokenizer),
            first_samples=first,
        )

    def _sampling(self, seed: int) -> Any:
        config = self.config
        return self._vllm.SamplingParams(
            n=1,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            max_tokens=config.new_tokens,
            logprobs=0,  # of the token that was drawn, and of no other
            stop_token_ids=[self._end],
            detokenize=False,
            seed=seed,
        )

    def _response(self, output: Any) -> Response:
        ids = [int(token) for token in output.token_ids]
        logprobs = [float(step[token].logprob) for step, token in zip(output.logprobs, ids, strict=True)]
        return Response(ids, logprobs, output.finish_reason == "length")
