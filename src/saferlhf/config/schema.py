"""The structured configuration: one dataclass per config group, one field per key of `conf/`.

The YAML files under `conf/` hold the values and a comment above each key; these classes hold names and types. Whatever
Hydra composed is checked against them (`validate.py`), so a misspelt key fails before anything loads, `+key` too.

A field marked `identity=False` does not enter the run's hash: paths, devices, tracking and display change where or how
a run is computed, not what it is (`identity.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from saferlhf.config.marks import CONTENT, IF_GIVEN, OUTSIDE_IDENTITY
from saferlhf.config.roles_schema import RolesConfig
from saferlhf.config.rollout_schema import RolloutConfig


# ------------------------------------------------------------------------------------------------ model
@dataclass
class BackboneConfig:
    """Which language model stands under the heads, and how it is loaded."""

    name: str
    # Hugging Face name, folder or any Locator; null: build `architecture` from scratch
    model: Optional[str] = field(default=None, metadata=CONTENT)
    revision: Optional[str] = None
    # from-scratch architecture: keys of a transformers config, `model_type` among them
    architecture: Optional[dict[str, Any]] = None
    # an importable package that ships the weights as GGUF, used when the hub is out of reach
    gguf_package: Optional[str] = None
    gguf_file: Optional[str] = None
    tokenizer: Optional[str] = None  # null: the model's own; "toyworld": built from the toy world's words
    template: str = "native"  # native | paper
    max_length: int = 512  # tokens of prompt + response
    dtype: str = "float32"  # float32 | bfloat16: dtype of the loaded weights
    attention: str = "sdpa"  # sdpa | eager | flash_attention_2
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass
class QuantizationConfig:
    """How the frozen base is stored: `none` or bitsandbytes `nf4`."""

    name: str
    double_quant: bool = True
    compute_dtype: str = "bfloat16"


@dataclass
class AdapterConfig:
    """What is trained: `none` = all weights, `lora` = low-rank adapters on a frozen base."""

    name: str
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Any = "all-linear"  # "all-linear" or a list of module names
    blocks: Optional[list[int]] = None  # numbers of the transformer blocks that get one; null: all that are read
    cache_frozen: bool = False  # keep the states below the first adapted block on disk
    merge_on_export: bool = False


# ------------------------------------------------------------------------------------------------ data
@dataclass
class DataPolicyConfig:
    """What to do with a bad row, kind by kind: drop | keep | flip | error (as far as each kind allows)."""

    unreadable: str = "error"  # a line that is no JSON or no UTF-8
    non_text: str = "drop"
    bad_label: str = "drop"
    severity_range: str = "drop"
    unknown_category: str = "drop"  # keep: the unknown names are left out
    wrong_hash: str = "drop"
    unlabelled: str = "drop"
    empty: str = "drop"
    identical: str = "drop"
    contradictory: str = "drop"
    duplicate: str = "drop"
    overlap: str = "drop"
    near_overlap: str = "keep"  # off: not looked for
    overlong: str = "keep"  # keep: truncate (prompt from the left), drop, or error


@dataclass
class AnnotatorsConfig:
    """Who labels the toy world; see `data/toyworld/annotators.py`."""

    single_safety: float = 0.5  # weight of harmlessness in the single label, 0..1
    sharpness: float = 1.0  # factor of what annotators see of truth; smaller is noisier
    safety_error: float = 0.0  # chance that a response's safety is labelled wrong


@dataclass
class DataConfig:
    """Where the rows come from and how they are split and checked."""

    name: str
    source: str  # toyworld | file | mix
    # one file or folder; null: the folder below `root`, else the hub
    path: Optional[str] = field(default=None, metadata=CONTENT)
    test_path: Optional[str] = field(default=None, metadata=CONTENT)
    root: Optional[str] = field(default=None, metadata=OUTSIDE_IDENTITY)
    folder: list[str] = field(default_factory=list, metadata=OUTSIDE_IDENTITY)  # usual names of the folder below `root`
    hub: Optional[str] = field(default=None, metadata=OUTSIDE_IDENTITY)  # files enter by their content
    revision: Optional[str] = None
    subset: Optional[str] = None  # a key of `subsets`; null: all files
    subsets: dict[str, list[str]] = field(default_factory=dict)  # name -> patterns of files
    split: Optional[str] = None  # train | val | test: only these rows; null: all splits
    # false: `train` or `test` in a file's name is no split, all rows are of `split`; null: it is
    named_splits: Optional[bool] = field(default=None, metadata=IF_GIVEN)
    # auto | columns | dialogue | safe_unsafe | guard | openai_moderation | do_not_answer | xsafety
    layout: str = "auto"
    join: Optional[dict[str, str]] = None  # row-aligned files: pattern -> their column that repeats the prompt
    # canonical column -> column of the file, several of which the first that is there counts, or null: left out
    columns: Optional[dict[str, Any]] = None
    # canonical label column -> {value in the file: canonical value}
    values: Optional[dict[str, Any]] = field(default=None, metadata=IF_GIVEN)
    # responses of a pair that become answers: all | better | safer | safe | best | response_0 | response_1
    answers: Optional[str] = None
    taxonomy: str = "auto"  # harm categories: auto | open | pku | beavertails
    check_hashes: bool = True
    # of a mixture: data set -> changed keys, rows, share; enters the identity with the fingerprint
    parts: Optional[dict[str, Any]] = field(default=None, metadata=CONTENT)
    seed: int = 0  # toy world and splits
    annotators: Optional[AnnotatorsConfig] = field(default=None, metadata=IF_GIVEN)  # of the toy world
    train_rows: Optional[int] = None  # null: all
    val_rows: Optional[int] = None
    test_rows: Optional[int] = None
    val_fraction: float = 0.05
    test_fraction: float = 0.1
    shuffle_sides: bool = True
    policy: DataPolicyConfig = field(default_factory=DataPolicyConfig)
    # label that orders pairs -> share of pairs on which two annotators agree, where it was published
    agreement: Optional[dict[str, float]] = field(default=None, metadata=IF_GIVEN)
    licence: Optional[str] = None

    def __post_init__(self) -> None:
        # 0 and true are a number and a flag in YAML and texts in a CSV file: one spelling for both
        for name, listed in (self.values or {}).items():
            if isinstance(listed, dict) and self.values:
                self.values = {**self.values, name: {str(key): value for key, value in listed.items()}}


# ------------------------------------------------------------------------------------------------ training
@dataclass
class OptimizerConfig:
    """adamw | sgd | adamw_8bit | paged_adamw_8bit; `lr: null` takes the default of (backbone, adapter, task)."""

    name: str
    lr: Optional[float] = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0  # never on 1-D parameters


@dataclass
class ScheduleConfig:
    """Learning rate over steps: cosine | linear | constant, after a linear warm-up."""

    name: str
    warmup_ratio: float = 0.03
    final_ratio: float = 0.0


@dataclass
class TrainerConfig:
    """How long and on what."""

    # cpu, gpu: what the choice says of the device enters by its keys
    name: str = field(metadata=OUTSIDE_IDENTITY)
    epochs: float = 1.0
    max_steps: Optional[int] = None
    batch_size: int = 32  # rows per optimizer step, over all processes
    micro_batch_size: Optional[int] = None  # rows per forward; null: fill_defaults decides
    eval_batch_size: int = 64
    gradient_clip: Optional[float] = 1.0
    val_every_steps: Optional[int] = None  # null: four times per run
    val_max_rows: Optional[int] = None
    precision: Optional[str] = "32-true"  # 32-true | bf16-mixed | bf16-true; null: to evaluate, as it was trained
    accelerator: str = field(default="auto", metadata=OUTSIDE_IDENTITY)
    devices: int = field(default=1, metadata=OUTSIDE_IDENTITY)
    threads: Optional[int] = field(default=None, metadata=OUTSIDE_IDENTITY)  # null: torch's default
    log_every_steps: int = field(default=10, metadata=OUTSIDE_IDENTITY)
    progress: str = field(default="auto", metadata=OUTSIDE_IDENTITY)  # auto | bar | lines | none


@dataclass
class CheckpointConfig:
    """When the training state is written; never changes the result."""

    every_steps: Optional[int] = field(default=None, metadata=OUTSIDE_IDENTITY)
    every_minutes: Optional[float] = field(default=5.0, metadata=OUTSIDE_IDENTITY)
    keep: int = field(default=1, metadata=OUTSIDE_IDENTITY)
    # after a finished run the last checkpoint is only of use for longer training
    keep_when_finished: bool = field(default=False, metadata=OUTSIDE_IDENTITY)
    # under SLURM: ask for the job to be started again once SIGUSR1 or SIGTERM has ended it and the state is saved
    requeue: bool = field(default=False, metadata=OUTSIDE_IDENTITY)


@dataclass
class StrategyConfig:
    """How the work is spread over devices: single | ddp | fsdp | hsdp; none changes what is computed."""

    name: str
    find_unused_parameters: Optional[bool] = None  # ddp; null: where the heads read lower layers
    # fsdp, hsdp
    reshard_after_forward: bool = True
    replicas: int = 1  # hsdp
    cpu_offload: bool = False
    activation_checkpointing: bool = False
    gather_bf16: bool = False
    reduce_dtype: str = "float32"
    shard_packed: bool = False

    @property
    def sharded(self) -> bool:
        """Whether each device holds a share of the weights."""
        return self.name in ("fsdp", "hsdp")


@dataclass
class TrackingConfig:
    """mlflow | none."""

    name: str
    uri: Optional[str] = None  # null: sqlite under the output root
    experiment: str = "saferlhf"
    run_name: Optional[str] = None
    tags: dict[str, str] = field(default_factory=dict)
    system_metrics: bool = True
    register_model: Optional[str] = None  # name in the model registry; null: not registered
    parent_run_id: Optional[str] = None


@dataclass
class PlanConfig:
    """`plan=on`: print the plan and stop."""

    name: str
    only: bool = False
    gpu: Optional[float] = None  # GiB of the GPU that the run is to fit; null: not asked


@dataclass
class EvaluationConfig:
    """What is measured on the test split at the end of a run."""

    bootstrap_draws: int = 10_000
    confidence: float = 0.95
    max_rows: Optional[int] = None


@dataclass
class StageConfig:
    """One stage of a pipeline: a normal run."""

    # overrides of train.yaml; what the user types on the command line comes after and wins
    overrides: list[str] = field(default_factory=list)
    # config key -> stage whose finished run is its value; the stage waits for it
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass
class CompareConfig:
    """Policies of finished stages side by side, on the same prompts."""

    policies: dict[str, str] = field(default_factory=dict)  # heading -> stage that trained the policy
    baseline: Optional[str] = None  # heading of the policy that they all began as; null: not shown
    # "A - B" of headings: A held against B, prompt by prompt
    differences: list[str] = field(default_factory=list)
    # headings of policies with fixed weights: those of `learned` are held against the front that these span
    fixed: list[str] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)


@dataclass
class PipelineConfig:
    """Stages in order, each a normal run."""

    name: str
    # which of `definitions` to run; a stage left out is taken from an earlier run if another needs it
    stages: list[str]
    definitions: dict[str, StageConfig]
    parallel: int = 2  # stages at once, as far as their inputs allow; each gets an equal share of the cores
    # what is shown beside the stages' own numbers when all of them are finished
    compare: CompareConfig = field(default_factory=CompareConfig)


@dataclass
class TrainConfig:
    """Everything `train.py` composes for one run."""

    task: Any  # one of TASKS
    data: DataConfig
    backbone: BackboneConfig
    quantization: QuantizationConfig
    adapter: AdapterConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig = field(metadata=OUTSIDE_IDENTITY)
    strategy: StrategyConfig = field(metadata=OUTSIDE_IDENTITY)
    tracking: TrackingConfig = field(metadata=OUTSIDE_IDENTITY)
    plan: PlanConfig = field(metadata=OUTSIDE_IDENTITY)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    # online tasks alone; null for all others
    constraint: Any = field(default=None, metadata=IF_GIVEN)  # one of CONSTRAINTS
    advantage: Any = field(default=None, metadata=IF_GIVEN)  # one of ADVANTAGES
    roles: Optional[RolesConfig] = field(default=None, metadata=IF_GIVEN)
    rollout: Optional[RolloutConfig] = field(default=None, metadata=IF_GIVEN)
    # "reward" or a cost -> who scores it where no role does: a SignalConfig, or the mapping it is made from
    scorers: Any = field(default=None, metadata=IF_GIVEN)
    # the run folder's name; null: task name
    name: Optional[str] = field(default=None, metadata=OUTSIDE_IDENTITY)
    # any Locator to start the weights from; null: the backbone's own
    init: Optional[str] = field(default=None, metadata=CONTENT)
    seed: int = 0
    resume: str = field(default="auto", metadata=OUTSIDE_IDENTITY)
    output_root: str = field(default="outputs", metadata=OUTSIDE_IDENTITY)
    cache_dir: Optional[str] = field(default=None, metadata=OUTSIDE_IDENTITY)
    verbose_errors: bool = field(default=False, metadata=OUTSIDE_IDENTITY)
    # targets of `_target_` must start with one of these
    allowed_targets: list[str] = field(
        default_factory=lambda: ["saferlhf.", "torch.", "lightning."], metadata=OUTSIDE_IDENTITY
    )
