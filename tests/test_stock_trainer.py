"""A Trainer of transformers trains, evaluates and resumes the model as any other."""

import pytest
import torch
from creatures import micro_model, randomize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def test_a_stock_trainer_divides_by_the_shifted_targets_of_all_micro_batches(tmp_path):
    model, ids = (
        micro_model(loss_weights=None),
        torch.randint(0, 100, (4, 8), generator=torch.Generator().manual_seed(0)),
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    rows[0]["labels"] = rows[0]["labels"].clone().index_fill(0, torch.arange(1, 7), -100)
    batch = torch.utils.data.default_collate(rows)
    with torch.no_grad():
        expected = model(**batch).loss.item()
    arguments = TrainingArguments(
        tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


class Perturb(TrainerCallback):
    """Changes every weight after each step, as training with all senses would; keeps those of each checkpoint."""

    def __init__(self):
        self.saved = []

    def on_save(self, args, state, control, model=None, **kwargs):
        self.saved.append({name: value.detach().clone() for name, value in model.named_parameters()})
        randomize(model, seed=state.global_step)


def test_a_stock_trainer_evaluates_predicts_stops_early_and_keeps_the_best_weights(tmp_path):
    model = micro_model(loss_weights=None)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({str(token): token for token in range(128)})), pad_token="127"
    )
    rows = [{"input_ids": torch.arange(length) + length} for length in (8, 8, 5)]
    padded = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=-100)
    shapes = []

    def score(predictions):
        logits, labels = predictions
        shapes.append((logits.shape, labels.shape))
        return {"score": -len(shapes)}  # the first is the best

    arguments = TrainingArguments(
        tmp_path, max_steps=9, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", per_device_eval_batch_size=3, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, DataCollatorForLanguageModeling(tokenizer, mlm=False), rows, rows,
        compute_metrics=score, callbacks=[perturb := Perturb(), EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_score"] for entry in evaluations] == [-1, -2, -3]
    assert shapes == [((3, 8, 128), (3, 8))] * 3
    assert len(perturb.saved) == 3 and trainer.state.best_global_step == 1
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, perturb.saved[0][name]), name

    predicted = trainer.predict(rows)
    assert torch.equal(torch.as_tensor(predicted.label_ids), padded)
    with torch.no_grad():
        expected = model(padded.clamp(min=0), attention_mask=(padded >= 0).long(), labels=padded)
    torch.testing.assert_close(torch.as_tensor(predicted.predictions)[padded >= 0], expected.logits[padded >= 0])
    assert predicted.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)


def test_a_stock_trainer_resumes_a_checkpoint_bit_for_bit(tmp_path):
    rows = [{"input_ids": torch.arange(8) + start, "labels": torch.arange(8) + start} for start in range(30)]
    models = [micro_model(seed=seed, loss_weights=None) for seed in (0, 9)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(models[0], arguments, train_dataset=rows).train()
    Trainer(models[1], arguments, train_dataset=rows).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    whole, resumed = (model.state_dict() for model in models)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
