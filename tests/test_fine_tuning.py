"""peft and trl as their users call them: adapters train, save, load and merge, and conversations are learned."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("trl")

from creatures import GPT2, micro_config, micro_model  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from creature.data.text.tokenizer import load_tokenizer  # noqa: E402
from modeling_creature import MultiModalCreature  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "fine_tuning.md").read_text(encoding="utf-8")
LAYERS = r"model\.layers\..*_proj"


def programs() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def micro_speaker(**changes) -> MultiModalCreature:
    """A micro creature with the GPT-2 vocabulary."""
    torch.manual_seed(0)
    return MultiModalCreature(micro_config(loss_weights=None, **GPT2, **changes))


def settings(folder: Path, **changes) -> dict:
    return {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, **changes}


def test_an_adapter_trains_saves_loads_and_merges(tmp_path):
    model = micro_model(loss_weights=None)
    own = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.randint(0, 120, (4, 16), generator=torch.Generator().manual_seed(0))
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LAYERS))
    trained = {name for name, weight in peft.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 6 * 2 and all("lora_" in name and ".model.layers." in name for name in trained)

    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(**settings(tmp_path), max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2)
    trainer = Trainer(peft, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    peft.eval()
    with torch.no_grad():
        expected = peft(ids).logits
    peft.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files

    loaded = PeftModel.from_pretrained(micro_model(loss_weights=None), tmp_path / "adapter").eval()
    merged = peft.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(again) is MultiModalCreature
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(ids).logits, merged(ids).logits, rtol=0, atol=0)
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, own[name])}
    assert changed == {name for name in own if re.fullmatch(rf"{LAYERS}\.weight", name)}


@pytest.mark.parametrize(
    "around_the_head",
    [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [3, 5]}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "tokens", "copy"],
)
def test_what_is_around_the_head_counts_in_the_loss(around_the_head):
    where = {"target_modules": LAYERS} | around_the_head
    peft = get_peft_model(micro_model(loss_weights=None), LoraConfig(task_type="CAUSAL_LM", r=4, **where))
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    ids = torch.randint(0, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    out = peft.train()(input_ids=ids, labels=ids, return_logits=True)
    expected = cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(peft(input_ids=ids, labels=ids).loss, expected)
    evaluated = peft.eval()(input_ids=ids, labels=ids, return_logits=False)
    torch.testing.assert_close(evaluated.token_losses.mean(), expected)
    out.loss.backward()
    trained = [weight for name, weight in peft.named_parameters() if "layers" not in name and weight.requires_grad]
    assert trained and all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer()
    tokenizer.chat_template = re.search(r'TEMPLATE = """(.*?)"""', PAGE, re.S).group(1)
    return tokenizer


def conversations() -> list[dict]:
    return [json.loads(line) for line in (DOCS / "conversations.jsonl").read_text(encoding="utf-8").splitlines()]


def sft_trainer(model, tokenizer, folder, peft_config=None, **changes) -> SFTTrainer:
    from datasets import Dataset

    changes = {"max_length": 64, "assistant_only_loss": True, "per_device_train_batch_size": 8} | changes
    data = Dataset.from_list(conversations())
    arguments = SFTConfig(**settings(folder, **changes))
    return SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


def test_only_the_creatures_turns_are_learned(tokenizer, tmp_path):
    model = micro_speaker()
    trainer = sft_trainer(model, tokenizer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = sorted(tokenizer.decode(row[row != -100]) for row in batch["labels"])
    assert learned[0] == " A red ball and a small dog.<|endoftext|>"
    assert " Good morning. Did you sleep well?<|endoftext|> I never sleep.<|endoftext|>" in learned
    # trl makes this loss by a head of its own, from the creature's hidden states.
    model.eval()
    with torch.no_grad():
        ours = model(**batch).loss
        theirs = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(theirs, ours)


def test_packed_conversations_are_kept_apart(tokenizer, tmp_path):
    model = micro_speaker()
    with torch.no_grad():  # so that what stands before a conversation would be noticed
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "embed_tokens.weight")):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    sums = []
    for packing in (False, True):
        trainer = sft_trainer(model, tokenizer, tmp_path, packing=packing)
        model.eval()
        batches = list(trainer.get_train_dataloader())
        assert packing == ("attention_mask" not in batches[0])
        with torch.no_grad():
            outputs = [model(**batch, fused_lm_head=True) for batch in batches]
        sums.append(sum(out.log_probs.sum() for out in outputs))
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-3)


def test_conversations_train_an_adapter(tokenizer, tmp_path):
    model = micro_speaker()
    own = {name: weight.clone() for name, weight in model.named_parameters()}
    lora = LoraConfig(r=4, target_modules=LAYERS)
    trainer = sft_trainer(model, tokenizer, tmp_path, lora, max_steps=2, packing=True, save_strategy="no")
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert weight.requires_grad == ("lora_" in name)
        assert "lora_B" not in name or weight.abs().sum() > 0
        if "lora_" not in name:
            before = own[name.removeprefix("base_model.model.").replace(".base_layer", "")]
            assert torch.equal(weight, before), name


def test_the_programs_of_the_page_run(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    micro_speaker(max_position_embeddings=256).save_pretrained("checkpoints/text_only")
    load_tokenizer().save_pretrained("checkpoints/text_only")
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "conversations.jsonl", tmp_path / "docs")
    Path("poems.txt").write_text("The sea is wide and the sea is old. " * 300, encoding="utf-8")
    lora, load, converse = programs()
    # What makes a tiny creature on a CPU learn as much in a second.
    shorter = {"max_steps=60": "max_steps=10", "block_size=256": "block_size=32"}
    quicker = {"learning_rate=1e-3": "learning_rate=3e-2", "max_steps=60": "max_steps=40"}
    spaces = []
    for program, changes in ((lora, shorter), (load, {}), (converse, quicker)):
        for old, new in changes.items():
            assert program.count(old) == 1
            program = program.replace(old, new)
        spaces.append({})
        exec(compile(program, "docs/fine_tuning.md", "exec"), spaces[-1])
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"validation loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert after < before
    ids = torch.arange(20)[None]
    with torch.no_grad():
        merged = MultiModalCreature.from_pretrained("checkpoints/lora_merged")
        torch.testing.assert_close(spaces[1]["model"].eval()(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
    assert out.rstrip().endswith("I am a creature.")
    assert Path("checkpoints/conversation/chat_template.jinja").is_file()
