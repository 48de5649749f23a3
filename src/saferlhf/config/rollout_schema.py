"""The structured configuration of sampling (`rollout=`) and of scorers (`judge=`); see `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from saferlhf.config.marks import CONTENT, OUTSIDE_IDENTITY
from saferlhf.errors import UserError


# ------------------------------------------------------------------------------------------------ rollout
@dataclass
class ServerConfig:
    """An OpenAI-compatible server, and how patient to be with it."""

    base_url: str = "http://localhost:8000/v1"
    model: str = ""
    # environment variable with the key; null: none is sent. Its value is never logged or stored
    api_key_env: Optional[str] = field(default=None, metadata=OUTSIDE_IDENTITY)
    concurrency: int = field(default=8, metadata=OUTSIDE_IDENTITY)  # requests at once
    timeout_s: float = field(default=60.0, metadata=OUTSIDE_IDENTITY)  # of one request, from its start to its last byte
    retries: int = field(default=4, metadata=OUTSIDE_IDENTITY)  # after the first try
    backoff_s: float = field(default=1.0, metadata=OUTSIDE_IDENTITY)  # before the first retry; doubles each time
    max_backoff_s: float = field(default=60.0, metadata=OUTSIDE_IDENTITY)


@dataclass
class VllmConfig:
    """vLLM in this process."""

    gpu_memory_utilization: float = field(default=0.5, metadata=OUTSIDE_IDENTITY)
    dtype: str = "bfloat16"
    tensor_parallel_size: int = field(default=1, metadata=OUTSIDE_IDENTITY)


@dataclass
class RolloutConfig:
    """How a policy is sampled for training."""

    name: str
    engine: str = "native"  # native | vllm | openai
    prompts: int = 64  # prompts per rollout
    samples: int = 1  # responses to each
    temperature: float = 1.0
    top_k: int = 0  # anything else is refused in training
    top_p: float = 1.0
    max_new_tokens: Optional[int] = None  # null: half of backbone.max_length, 128 at most
    max_prompt_tokens: Optional[int] = None  # null: what max_new_tokens leaves of backbone.max_length
    batch_size: Optional[int] = field(default=None, metadata=OUTSIDE_IDENTITY)  # responses at once; null: batch_tokens
    batch_tokens: Optional[int] = field(default=None, metadata=OUTSIDE_IDENTITY)  # of the cache at once
    max_logprob_mismatch: float = 0.05  # mean |difference| in nats between engine and policy that is still believed
    vllm: VllmConfig = field(default_factory=VllmConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    @property
    def new_tokens(self) -> int:
        """Where a response is cut off; `fill_defaults` gives `max_new_tokens` its value."""
        return self.max_new_tokens or 128


ENGINES = ("native", "vllm", "openai")
TRAINING_ENGINES = ("native", "vllm")
"""Engines that can follow a policy whose weights change."""


def check_rollout(config: RolloutConfig, where: str = "rollout") -> None:
    """Refuse what cannot be trained on.

    Raises:
        UserError: a cut-off distribution, a temperature of 0, numbers below one, an engine that cannot follow training.
    """
    if config.engine not in TRAINING_ENGINES:
        mend = f"use {' or '.join(TRAINING_ENGINES)}; a server's weights stand still"
        raise UserError(f"engine '{config.engine}' cannot sample a policy in training", f"{where}.engine", mend)
    if config.top_k > 0 or config.top_p < 1:
        what = "a cut-off distribution is not the policy that is trained"
        raise UserError(what, f"{where}.top_k, {where}.top_p", "leave top_k=0 and top_p=1 and set the temperature")
    if config.temperature <= 0:
        what = f"temperature {config.temperature} leaves nothing to explore"
        raise UserError(what, f"{where}.temperature", "use a number above 0, 1 as a rule")
    for key in ("prompts", "samples", "max_new_tokens", "max_prompt_tokens", "batch_size", "batch_tokens"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"{key} is {value}", f"{where}.{key}", "use a number above 0")


# ------------------------------------------------------------------------------------------------ judges
@dataclass
class JudgeConfig:
    """What every scorer has: its name, and what becomes of responses without a score."""

    name: str
    kind: str
    on_empty: str = "skip"  # skip | score | error: a response without a word
    on_failure: str = "retry"  # skip | retry (then skip) | error: a response that the scorer gave no number
    attempts: int = field(default=2, metadata=OUTSIDE_IDENTITY)  # of on_failure=retry, the first one included
    max_failed_share: float = 0.2  # of the responses handed to the scorer; more ends the run


@dataclass
class TruthJudgeConfig(JudgeConfig):
    """The toy world's ground truth."""

    kind: str = "truth"
    on_empty: str = "score"
    categories: bool = False  # one output per harm category as well


@dataclass
class FunctionJudgeConfig(JudgeConfig):
    """A plain Python function."""

    kind: str = "function"
    function: str = "???"  # module:function
    outputs: list[str] = field(default_factory=lambda: ["reward"])
    batched: bool = False  # called with all rows at once


@dataclass
class ModelJudgeConfig(JudgeConfig):
    """A trained model by its Locator: reward, cost or moderator."""

    kind: str = "model"
    model: str = field(default="???", metadata=CONTENT)
    output: Optional[str] = None  # name of the score; null: reward, or cost
    how: str = "unsafe"  # a moderator as cost: unsafe | mean | max (of the category probabilities)
    zero: Optional[float] = None  # probability at which a moderator's cost is 0; null: see rollout/model_scorer.py
    categories: bool = False  # a moderator's probability of each category as further outputs
    batch_tokens: int = field(default=16384, metadata=OUTSIDE_IDENTITY)


@dataclass
class ScaleConfig:
    """One score that a remote judge gives."""

    low: float
    high: float
    question: str  # what the number says, in the words of the judge's prompt


@dataclass
class RemoteJudgeConfig(JudgeConfig):
    """A remote judge behind the OpenAI chat protocol."""

    kind: str = "remote"
    server: ServerConfig = field(default_factory=ServerConfig)
    max_tokens: int = 256  # of its answer
    instructions: str = ""  # the system turn; the scales are added to it
    scales: dict[str, ScaleConfig] = field(default_factory=dict)  # output name -> scale
    # folder of answers that were given before; null: <cache>/judge; "none": nothing is kept
    cache: Optional[str] = field(default=None, metadata=OUTSIDE_IDENTITY)


@dataclass
class GuardJudgeConfig(JudgeConfig):
    """A guard model of somebody else's: a chat model that answers with a verdict, or a sequence classifier."""

    kind: str = "guard"
    on_failure: str = "skip"  # the same question to the same weights gets the same answer
    model: str = field(default="???", metadata=CONTENT)
    format: str = "llama_guard"  # of its answers: see GUARD_FORMATS and rollout/guard_templates.py
    template: str = "native"  # the tokenizer's own chat template, or a text with {prompt} and {response}
    # file with that text, read into `template`, so that its content counts and not its place
    template_file: Optional[str] = field(default=None, metadata=OUTSIDE_IDENTITY)
    generation_prompt: bool = False  # whether the chat template is asked for the words after which the assistant speaks
    lead: Optional[str] = None  # what stands between the question and the verdict; null: see the format
    unsafe_words: list[str] = field(default_factory=list)  # verdicts; empty: those of the format
    safe_words: list[str] = field(default_factory=list)
    min_word_probability: float = 0.5  # of all verdict words together; with less the guard was about to say otherwise
    max_new_tokens: Optional[int] = None  # of its written answer; null: as many as the format needs, 0: none is written
    categories: list[str] = field(default_factory=list)  # names or codes that get an output category/<name>
    unsafe_labels: list[str] = field(default_factory=list)  # of a classifier; empty: found by their names
    reads: str = "both"  # a classifier: both | response
    zero: float = 0.5  # probability of unsafe at which the cost is 0 and above which the verdict is unsafe
    max_length: int = 4096  # tokens of a question; longer ones lose the beginning of the prompt
    dtype: str = "float32"  # float32 | bfloat16
    batch_tokens: int = field(default=16384, metadata=OUTSIDE_IDENTITY)


GUARD_FORMATS = ("llama_guard", "wildguard", "qwen3guard", "words", "classifier")
"""How a guard model answers; `words`: the first word is one of `unsafe_words` or `safe_words`."""

JUDGES: dict[str, type[JudgeConfig]] = {
    "truth": TruthJudgeConfig,
    "function": FunctionJudgeConfig,
    "model": ModelJudgeConfig,
    "remote": RemoteJudgeConfig,
    "guard": GuardJudgeConfig,
}


def judge_config(node: Any, where: str = "judge") -> JudgeConfig:
    """The typed configuration of one scorer.

    Args:
        node: a mapping with `kind`, as in conf/judge.
        where: its key, for messages.

    Raises:
        UserError: no kind or an unknown one, an unknown key, a wrong or missing value.
    """
    from saferlhf.config.validate import suggestion, typed  # which imports the schemas

    kind = node.get("kind") if hasattr(node, "get") else None
    if kind not in JUDGES:
        what = "no kind of judge is named" if kind is None else f"unknown kind of judge '{kind}'"
        raise UserError(what, f"{where}.kind", suggestion(str(kind or ""), JUDGES))
    config = typed(JUDGES[str(kind)], node, where)
    for key, known in (("on_empty", ON_EMPTY), ("on_failure", ON_FAILURE)):
        value = getattr(config, key)
        if value not in known:
            raise UserError(f"unknown choice '{value}'", f"{where}.{key}", f"use {' | '.join(known)}")
    if not 0 <= config.max_failed_share <= 1:
        what = f"max_failed_share {config.max_failed_share} is no share"
        raise UserError(what, f"{where}.max_failed_share", "use a number from 0 to 1")
    if isinstance(config, GuardJudgeConfig):
        _check_guard(config, where)
    return config


def _check_guard(config: GuardJudgeConfig, where: str) -> None:
    """Refuse what no guard can be asked, and read the file of its template.

    Raises:
        UserError: one line each.
    """
    for key, value, known in (("format", config.format, GUARD_FORMATS), ("reads", config.reads, ("both", "response"))):
        if value not in known:
            raise UserError(f"unknown choice '{value}'", f"{where}.{key}", f"use {' | '.join(known)}")
    if config.template_file is not None:
        config.template = _template_text(config, f"{where}.template_file")
    if config.template != "native":
        for mark in ("{prompt}", "{response}"):
            if config.template.count(mark) != 1:
                what = f"the template holds {mark} {config.template.count(mark)} times"
                raise UserError(what, f"{where}.template", "each of {prompt} and {response} once, or template=native")
    elif config.format == "wildguard":
        what = "a guard of format=wildguard was trained on a question of its own, and none is given"
        mend = f"{where}.template_file=FILE with the text of its model card, {{prompt}} and {{response}} in it"
        raise UserError(what, f"{where}.template", mend)
    if config.reads == "response" and (config.format != "classifier" or config.template != "native"):
        what = "only a classifier without a template reads the response alone"
        raise UserError(what, f"{where}.reads=response", "use reads=both")
    if config.format == "words" and not (config.unsafe_words and config.safe_words):
        mend = f"as {where}.unsafe_words=[yes] {where}.safe_words=[no]"
        raise UserError("format=words needs the words of both verdicts", f"{where}.unsafe_words", mend)
    if not 0 < config.zero < 1:
        raise UserError(f"{config.zero} is no threshold", f"{where}.zero", "use a number between 0 and 1")
    if not 0 <= config.min_word_probability <= 1:
        what = f"{config.min_word_probability} is no probability"
        raise UserError(what, f"{where}.min_word_probability", "use a number from 0 to 1")
    for key, count, least in (
        ("max_length", config.max_length, 1),
        ("batch_tokens", config.batch_tokens, 1),
        ("max_new_tokens", config.max_new_tokens, 0),
    ):
        if count is not None and count < least:
            raise UserError(f"{key} is {count}", f"{where}.{key}", f"use a whole number from {least} up")


def _template_text(config: GuardJudgeConfig, where: str) -> str:
    """The template that a file holds; a run's stored config holds its text already."""
    from pathlib import Path

    try:
        text = Path(str(config.template_file)).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"no template in '{config.template_file}': {type(error).__name__}"
        raise UserError(what, where, "name a text file with {prompt} and {response} in it") from None
    if config.template not in ("native", text):
        raise UserError("a template and a file with another one", where, "give one of them")
    return text


@dataclass
class SignalConfig:
    """The reward or a cost of online training, given by a scorer instead of a role."""

    judge: JudgeConfig
    take: Optional[str] = None  # which of its scores; null: the one of the signal's name, else the only one
    scale: float = 1.0  # the score is multiplied by it; -1 turns a sign


def scorers_config(node: Any, where: str = "scorers") -> dict[str, SignalConfig]:
    """Who scores which signal.

    Args:
        node: signal -> keys of conf/judge, and `take` and `scale`.
        where: its key, for messages.

    Raises:
        UserError: no mapping, or what `judge_config` refuses.
    """
    if not isinstance(node, dict) or not all(isinstance(keys, dict) for keys in node.values()):
        mend = "as 'scorers={reward: {kind: function, function: my_module:my_function}}'"
        raise UserError("no mapping from a signal to its scorer", where, mend)
    found = {}
    for name, keys in node.items():
        own = {key: keys[key] for key in ("take", "scale") if key in keys}
        rest = {key: value for key, value in keys.items() if key not in own}
        judge = judge_config({"name": str(name), **rest}, f"{where}.{name}")
        try:
            scale = float(own.get("scale", 1.0))
        except (TypeError, ValueError):
            raise UserError(f"{own['scale']!r} is not a number", f"{where}.{name}.scale") from None
        take = own.get("take")
        found[str(name)] = SignalConfig(judge, None if take is None else str(take), scale)
    return found


ON_EMPTY = ("skip", "score", "error")
ON_FAILURE = ("skip", "retry", "error")
