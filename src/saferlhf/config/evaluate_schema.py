"""The structured configuration of `evaluate.py`: suites, protocols with the numbers of others, and the whole.

As in `schema.py`, the YAML files under `conf/` hold the values and a comment above each key; these classes hold names
and types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from saferlhf.config.schema import DataConfig, EvaluationConfig, TrackingConfig, TrainerConfig


@dataclass
class PeerConfig:
    """A published number that a protocol's result is printed beside."""

    model: str
    value: float
    ran_by: str  # own: its authors; else who ran it
    source: str  # where it was published
    mark: str = "published"  # published: seen in the source | second-hand: in somebody's summary | measured: by us
    metric: Optional[str] = None  # null: the protocol's
    note: Optional[str] = None


@dataclass
class ProtocolConfig:
    """A named test: which rows, what they are held against, and what others reached."""

    name: str
    about: str  # one sentence: what the rows are
    rule: str  # how a row's label follows from the file
    # what is done with it, by kind of model: moderation | preference | policy
    measures: list[str]
    # metric by which it is told and compared, below the protocol's name
    metric: str
    data: DataConfig
    # response: answers are judged; prompt: texts alone, off-protocol for a moderator of answers; pair
    unit: str = "response"
    # rows of the published test; beside ours where these are fewer
    published_rows: Optional[int] = None
    max_rows: Optional[int] = None  # null: all
    per_group: bool = False  # `max_rows` of each group
    # what the groups of rows are, from the coarsest: [language, topic] of groups like "en/drugs"
    groups: list[str] = field(default_factory=list)
    # label that orders pairs: better | safer | single; null: the model's own
    preference: Optional[str] = None
    # policies: all prompts ask for harm, or none does; null: by their labels
    harmful: Optional[bool] = None
    # names of data sets whose models are in-domain here
    at_home: list[str] = field(default_factory=list)
    peers: list[PeerConfig] = field(default_factory=list)
    note: Optional[str] = None  # what a reader of its numbers must know


@dataclass
class SuiteConfig:
    """What is measured: on the rows of `data=`, and by protocols that bring their own."""

    name: str
    measures: list[str] = field(default_factory=list)  # preference | moderation | policy, on the rows of `data=`
    protocols: dict[str, ProtocolConfig] = field(default_factory=dict)
    unfit: str = "refuse"  # refuse | skip: what is not for this kind of model, and protocols whose rows are not here


@dataclass
class EvaluateConfig:
    """Everything `evaluate.py` composes."""

    suite: SuiteConfig
    data: DataConfig
    trainer: TrainerConfig
    tracking: TrackingConfig
    evaluation: EvaluationConfig
    # one protocol in the place of the suite
    protocol: Optional[ProtocolConfig] = None
    # whose training rows the baselines of protocols learn from
    baseline_data: Optional[DataConfig] = None
    model: Optional[str] = None
    # mode=compare: a list of evaluations or models, or heading -> one or several (runs of one model)
    models: Any = None
    mode: str = "score"  # score | moderate | compare
    # mode=moderate: judge lines of a file, or of standard input (-), instead of data; where verdicts go, null: -
    input: Optional[str] = None
    output: Optional[str] = None
    name: str = "evaluate"
    split: Optional[str] = None  # train | val | test | all; null: test to score, all to moderate
    baselines: bool = True
    baseline_rows: Optional[int] = 20_000  # training rows of the baselines; null: all
    # suite=policy: the policy to win against, and the one that KL is measured to; null: none, and the baseline
    baseline: Optional[str] = None
    reference: Optional[str] = None
    # a choice of conf/judge, and more judges: locators or such mappings, in a list or by name
    judge: Any = None
    judges: Any = None
    harmful: Optional[bool] = None  # what all prompts are; null: what is known of each
    samples: int = 1  # responses per prompt
    temperature: float = 1.0
    max_new_tokens: Optional[int] = None  # null: half of the model's length
    seed: int = 0
    output_root: str = "outputs"
    cache_dir: Optional[str] = None
    kept_layers: str = "all"  # all | own: hidden states that are kept of the rows a probe judges
    verbose_errors: bool = False
