"""TrainingArguments of this job: the defaults it changes, each with its reason, and the few fields it adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class CreatureTrainingArguments(TrainingArguments):
    """
    TrainingArguments with the defaults of training a small creature from scratch.

    The batch is counted in tokens: `tokens_per_step` is what one optimizer step sees, `per_device_train_batch_size`
    is what fits the machine, and `gradient_accumulation_steps` follows from the two and the number of processes.
    """

    output_dir: str | None = field(
        default="checkpoints/text_only", metadata={"help": "Folder of the run: checkpoints, logs, the final model."}
    )
    tokens_per_step: int = field(
        default=65_536, metadata={"help": "Tokens that one optimizer step sees, over all processes (32 x 2048)."}
    )
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; or give num_train_epochs."})
    learning_rate: float = field(
        default=8e-3,
        metadata={
            "help": "Peak rate of the token table, which norms and scales follow. Left out, hidden_size gives it."
        },
    )
    matrix_learning_rate: float = field(
        default=0.03,
        metadata={"help": "Peak learning rate of Muon, for all matrices but the tables; 0 leaves them to --optim."},
    )
    # A finished run can be extended from where the decay began (Hu et al. 2024, "MiniCPM").
    lr_scheduler_type: str = field(
        default="warmup_stable_decay",
        metadata={"help": "Schedule of the learning rate; warmup_stable_decay can be extended later."},
    )
    warmup_steps: float = field(
        default=0.01, metadata={"help": "Steps of linear warm-up, or below 1 the share of all steps."}
    )
    decay_steps: float = field(
        default=0.6, metadata={"help": "Last steps of falling rate, or below 1 their share (warmup_stable_decay)."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of these matrices, of nothing else."})
    adam_beta1: float = field(default=0.8, metadata={"help": "Decay of the first moment."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of the second moment."})
    # Early on, twice as many steps are worth more than gradients of half the noise (docs/experiments.md).
    batch_warmup_steps: float = field(
        default=0.25,
        metadata={
            "help": "First steps, or below 1 the share of all, in which each half of the batch is an update of its own "
            "and text is also learned 2 and 3 tokens ahead."
        },
    )
    fp8_head: bool = field(
        default=True,
        metadata={"help": "On a Hopper GPU under bf16, compute the text head in float8 while training."},
    )
    adam_epsilon: float = field(default=1e-10, metadata={"help": "Smallest divisor; rare rows of the table are small."})
    logging_steps: float = field(default=100, metadata={"help": "Log every so many steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    # True would log a NaN loss as 0.0.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Never: a NaN loss stops the run."})
    save_steps: float = field(default=5000, metadata={"help": "Write a checkpoint every so many steps."})
    save_total_limit: int | None = field(
        default=3, metadata={"help": "Checkpoints kept, beside the one at which the decay begins."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no (never), steps or epoch."})
    eval_steps: float | None = field(default=1000, metadata={"help": "Evaluate every so many steps."})
    # Moves predictions off the GPU before they fill its memory.
    eval_accumulation_steps: int | None = field(
        default=16, metadata={"help": "Evaluation batches whose predictions stay on the device."}
    )
    # If None, a resumed run would shuffle by torch's current seed.
    data_seed: int | None = field(default=42, metadata={"help": "Seed of the order of the samples."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Trackers to report to, such as tensorboard or wandb."}
    )
    # The Trainer takes every forward parameter with "label" in its name for required otherwise.
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Never: fixed."})
    # Earlier pushes of the Trainer have no model card, and contain its arguments as a pickle.
    hub_strategy: str = field(default="end", metadata={"help": "When --push_to_hub pushes: end, the whole folder."})
    sample_steps: int = field(
        default=0, metadata={"help": "Print a continuation of --prompt every so many steps; 0 for none."}
    )
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of a process on a CPU; all cores, shared among the processes."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.adam_beta1, self.adam_beta2 = float(self.adam_beta1), float(self.adam_beta2)  # torch refuses 0 beside 0.98
