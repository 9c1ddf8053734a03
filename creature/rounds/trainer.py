"""RoundTrainer: the trainer of rounds on recordings, with sense dropout and an evaluation of every stream and sense."""

import numpy as np
import torch
from torch.utils.data import DataLoader

from creature.data import collate_blocks, spread_pictures
from creature.data.recordings.rows import ARGUMENTS, ClipPairs, PackedClips
from creature.errors import UserError
from creature.rounds.evaluation import code_habits, collate_pairs, evaluate_clips, variant_sums, variants_of
from creature.trainer import CreatureTrainer
from losses_creature import IGNORE_INDEX
from processing_creature import ABSENT


class RoundTrainer(CreatureTrainer):
    """
    A CreatureTrainer for rows of clips, see `creature.data.recordings.rows`.

    What differs:
        - `sense_dropout`: the chance that a clip is learned from without a sense, by name, or one for all but the
          internal voice, without which the layers of a fresh creature begin at nothing; efference copies go by the
          names of `SENSE_TABLE` (own_text, own_voice, own_command, own_action). The random numbers
          follow from seed, step and process alone, so that a resumed run draws the same;
        - the evaluation reads one clip a row and gives the loss of every stream, its parts, and what each sense is
          worth: `eval_drop_<sense>` is the loss without it, `eval_wrong_<sense>` that with another clip's;
        - beside the loss of codes stands what they cost by their frequencies in the training clips, and by repeating;
        - `text_dataset`: blocks of text whose loss is `eval_text_loss`, so that forgetting shows.
    """

    def __init__(self, *args, text_dataset=None, sense_dropout: float | dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.text_dataset = text_dataset
        chances = sense_dropout
        if not isinstance(chances, dict):
            chances = dict.fromkeys(ARGUMENTS.keys() - {"internal_voice"}, sense_dropout or 0.0)
        if unknown := chances.keys() - ARGUMENTS.keys():
            raise UserError(
                f"sense_dropout names {', '.join(sorted(unknown))}: senses and efference copies are "
                f"{', '.join(ARGUMENTS)}"
            )
        self.sense_dropout = {name: chance for name, chance in chances.items() if chance}
        self.compute_metrics = None
        self._variants = []  # of the clips that are evaluated
        self._code_habits = None  # computed once, before the first evaluation

    def training_step(self, model, inputs, num_items_in_batch=None, **kwargs) -> torch.Tensor:
        inputs = spread_pictures(inputs)  # they are on the device already, where it costs little
        if self.sense_dropout:
            place = (self.args.seed, self.state.global_step, self._micro_batch, self.args.process_index)
            inputs = drop_senses(inputs, self.sense_dropout, np.random.default_rng(place))
        return super().training_step(model, inputs, num_items_in_batch, **kwargs)

    # ---- Evaluation ----

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's, once for the clips, as they are and without or with the wrong senses, then for the text."""
        if self._code_habits is None:
            parts = [part.clips for part in self.train_dataset.parts if isinstance(part, PackedClips)]
            self._code_habits = code_habits(self.model_config, parts)
        clips = dataloader.dataset
        self._variants = variants_of(clips)
        output = self._loop(ClipPairs(clips), collate_pairs, description)
        metrics = evaluate_clips(self.model_config, clips, output.predictions, self._code_habits)
        if self.text_dataset is not None:
            found = self._loop(self.text_dataset, collate_blocks, f"{description}: text")
            nats, targets = found.predictions.sum(axis=0)
            metrics["text_loss"] = float(nats / targets)
        return output._replace(metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})

    def _loop(self, rows, collate, description: str):
        """The Trainer's loop over some rows, with what `prediction_step` gives as `predictions`."""
        loader = self.accelerator.prepare(DataLoader(rows, self.args.per_device_eval_batch_size, collate_fn=collate))
        return super().evaluation_loop(loader, description, prediction_loss_only=False, metric_key_prefix="")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        (None, the `variant_sums` [B, variants, K] of clips, None); of text the sums of its losses and targets [B, 2].
        """
        inputs = self._prepare_inputs(inputs)
        # Not the compiled model, which would compile every length of a clip anew.
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with torch.no_grad(), self.compute_loss_context_manager():
            if inputs.keys() == {"input_ids", "labels"}:
                losses = model(**inputs, return_logits=False).token_losses.float()
                return None, torch.stack((losses.sum(1), (inputs["labels"][:, 1:] != IGNORE_INDEX).sum(1)), 1), None
            return None, variant_sums(model, inputs, self._variants), None


def drop_senses(batch: dict[str, torch.Tensor], chances: dict[str, float], rng: np.random.Generator) -> dict:
    """
    A batch of `collate_rows` in which each clip lacks each sense with its chance: half of these clips at every tick,
    the other half from a random tick on, as when a camera fails.

    chances: by the names of `ARGUMENTS`.
    """
    position = batch["position_ids"]  # [B, T], of a tick in its clip
    clip = (position == 0).cumsum(dim=1) - 1  # which clip of its row a tick belongs to
    lengths = torch.zeros_like(clip).scatter_reduce(1, clip, position + 1, "amax").gather(1, clip)
    batch = dict(batch)
    for sense, chance in chances.items():
        chosen, since = (
            torch.from_numpy(rng.random(tuple(clip.shape))).to(clip.device).gather(1, clip) for _ in range(2)
        )
        gone = (chosen < chance) & (position >= (2 * since - 1) * lengths)
        for name in ARGUMENTS[sense]:
            if name in batch and (name.endswith("mask") or ABSENT[name] == IGNORE_INDEX):
                absent = False if name.endswith("mask") else IGNORE_INDEX
                where = gone.view(*gone.shape, *[1] * (batch[name].dim() - 2))
                batch[name] = batch[name].masked_fill(where, absent)
    return batch
