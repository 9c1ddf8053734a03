"""The model card of a run: README.md in the folder of the final model."""

from pathlib import Path

from creature.callbacks import format_seconds
from creature.checkpoints import read_metrics
from creature.files import replace_file


def write_card(folder: str | Path, run: dict, sample: str = "") -> Path:
    """
    Write README.md from run.json's content, the run's metrics and a sample; returns its path.

    Numbers that were not measured are left out, never guessed.
    """
    path = Path(folder) / "README.md"
    with replace_file(path, "w") as file:
        file.write(card_text(folder, run, sample))
    return path


def card_text(folder: str | Path, run: dict, sample: str) -> str:
    """The card as Markdown with the metadata block of the Hub."""
    metrics = read_metrics(folder)
    trained = [entry for entry in metrics if "loss" in entry]
    evaluated = [entry for entry in metrics if "eval_loss" in entry]
    own, data, parameters = run["identity"], run["data"], run["parameters"]
    name = Path(folder).resolve().name
    steps = run.get("steps_done", run["steps"])
    rows = [
        ("parameters", f"{parameters['total']:,} ({parameters['trainable']:,} trained)"),
        ("steps", f"{steps:,} of {own['tokens_per_step']:,} tokens"),
        ("data", f"{Path(str(data['path'])).name}, {data['tokens']:,} tokens, sha256 {data['data_hash'][:16]}"),
        ("tokenizer", f"sha256 {data['tokenizer_hash'][:16]}"),
        ("hardware", f"{own['world_size']} x {run['device']}, {run['precision']}"),
        ("schedule", f"{own['schedule']}, peak learning rate {own['learning_rate']:g}, {own['optimizer']}"),
    ]
    if trained:
        rows.append(("tokens seen", f"{trained[-1]['tokens']:,}"))
        rows.append(("training loss", f"{trained[-1]['loss']:.4f} nats per token"))
        rows.append(("time", format_seconds(max(entry["time"] for entry in metrics))))
        if "tokens_per_second" in trained[-1]:
            rows.append(("speed", f"{trained[-1]['tokens_per_second']:,.0f} tokens/s"))
    if "peak_memory_bytes" in run:
        rows.append(("peak memory of a device", f"{run['peak_memory_bytes'] / 1e9:.2f} GB"))
    if evaluated:
        last = evaluated[-1]
        rows.append(("validation loss", f"{last['eval_loss']:.4f} nats per token (token-weighted)"))
        rows.append(("validation perplexity", f"{last['eval_perplexity']:.2f}"))
        rows.append(("validation bits per byte", f"{last['eval_bits_per_byte']:.4f}"))
        rows.append(("validation accuracy", f"{last['eval_accuracy']:.2%} of next tokens"))
    table = "\n".join(f"| {left} | {right} |" for left, right in rows)
    shown = "\n".join(f"> {line}" for line in sample.splitlines()) if sample else "> (none)"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- multimodal-creature
---

# {name}

A MultiModalCreature: a small decoder-only transformer with six senses and four output streams. This round trained its
internal voice on text; the other senses and streams are there, connected and silent.

| | |
|---|---|
{table}

A sample:

{shown}

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# trust_remote_code runs the model files of this folder; leave it out where the project is installed.
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

It was trained from scratch and repeats what is in its data, errors and prejudices too; it is not made to answer people.
"""
