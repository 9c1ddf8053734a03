"""The round section of the settings: what a run starts from, and which parts of the creature it trains."""

from dataclasses import dataclass, field

from creature.files import user_path


@dataclass(frozen=True)
class RoundArguments:
    """What a round starts from and trains. Without recordings, a round trains the internal voice on text."""

    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a creature whose weights the run begins with: of a run, a checkpoint or a saved model."
        },
    )
    train_senses: list[str] | None = field(
        default=None,
        metadata={
            "help": "Senses that learn from recordings, such as internal_voice audio; those they feed by default."
        },
    )
    train_streams: list[str] | None = field(
        default=None,
        metadata={"help": "Streams that learn from recordings, such as internal_text; those they feed by default."},
    )
    train_backbone: bool = field(
        default=True, metadata={"help": "Whether the token table and the layers between senses and streams learn too."}
    )
    backbone_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rates of the token table and the layers, as a share of those of senses and streams: what "
            "was learned before stays where it is small. By default 0.03 from --init_from on recordings, else 1."
        },
    )
    sense_dropout: None | float | dict = field(
        default=None,
        metadata={
            "help": "Chance that a clip is learned from without a sense, or without it from some tick on: one for all, "
            "or by name as in {audio: 0.1, own_action: 0.5}."
        },
    )

    def __post_init__(self):
        object.__setattr__(self, "init_from", user_path(self.init_from))
