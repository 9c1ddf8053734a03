"""The model card of a run: README.md in the folder of the final model."""

import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from configuration_creature import STREAMS
from creature.callbacks import TIMINGS, format_seconds
from creature.checkpoints import read_metrics
from creature.data.text.sources import is_hub_name
from creature.files import replace_file

# name in metrics.jsonl, name on the Hub, name for people, form
EVALUATED = (
    ("eval_loss", "loss", "loss, nats per token", "{:.4f}"),
    ("eval_perplexity", "perplexity", "perplexity", "{:.2f}"),
    ("eval_bits_per_byte", "bits_per_byte", "bits per byte", "{:.4f}"),
    ("eval_accuracy", "accuracy", "accuracy of the next token", "{:.2%}"),
)


def write_card(folder: str | Path, run: dict, tokenizer=None) -> Path:
    """
    Write README.md from run.json's content and the metrics and plots in the folder; returns its path.

    With a `tokenizer` that has a chat template, the card says how to chat. Numbers that were not measured are left out,
    never guessed.
    """
    path = Path(folder) / "README.md"
    with replace_file(path, "w") as file:
        file.write(card_text(folder, run, chat=bool(getattr(tokenizer, "chat_template", None))))
    return path


def card_text(folder: str | Path, run: dict, chat: bool = False) -> str:
    """The card as Markdown with the metadata block of the Hub."""
    folder = Path(folder).resolve()
    metrics = read_metrics(folder)
    evaluated = next((entry for entry in reversed(metrics) if "eval_loss" in entry), {})
    sections = [
        f"---\n{_metadata(folder.name, run, evaluated)}\n---",
        f"# {folder.name}",
        _about(run),
        "## Results",
        *(_results(run, evaluated) if evaluated else ["Nothing was evaluated."]),
        _plot(folder),
        *_samples(run),
        "## How to load it",
        _usage(folder.name, run, chat),
        "## Training",
        _table(_training_rows(run, metrics)),
        "## Limits",
        "It repeats what is in its data, errors and prejudices too. Do not rely on what it says: a model of this size "
        "knows\nvery little. It was not trained to be safe in conversation.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _about(run: dict) -> str:
    """What the creature is, and what of it was trained."""
    what = "A MultiModalCreature: a small decoder-only transformer with six senses and four output streams."
    if not run.get("on_recordings"):
        return (
            f"{what} Only its internal voice\nwas trained, on text{'' if run.get('init_from') else ', from scratch'}; "
            "the other senses and streams are untrained. It continues text and was not trained to\nanswer people."
        )
    trained = run["must_match"]["trained"]
    start = f"from `{Path(run['init_from']).name}`" if run.get("init_from") else "from scratch"
    senses, streams = (", ".join(name.replace("_", " ") for name in trained[kind]) for kind in ("senses", "streams"))
    return (
        f"{what} This round, {start},\ntrained on recordings: of the senses {senses}, of the streams {streams}"
        f"{'' if trained['backbone'] else '; the backbone stayed as it was'}."
    )


def _results(run: dict, evaluated: dict) -> list[str]:
    """The last evaluation as tables: of text one, of recordings one of the streams and one of the senses."""
    found = {name: value for name, value in evaluated.items() if name.startswith("eval_") and math.isfinite(value)}
    if not run.get("on_recordings"):
        rows = [(label, form.format(found[name])) for name, _, label, form in EVALUATED if name in found]
        return [
            f"{_table(rows)}\n\nOn {run['data'].get('validation_tokens') or 0:,} tokens of validation text, after "
            f"{evaluated['step']:,} steps; every token weighs the same."
        ]
    values = {name.removeprefix("eval_"): f"{value:.4f}" for name, value in found.items() if name not in TIMINGS}
    senses = [name.removeprefix("drop_") for name in values if name.startswith("drop_")]
    several = [stream for stream in STREAMS if any(name.startswith(f"{stream}_drop_") for name in values)]
    head = ["sense", "loss without it", "loss with another clip's"]
    head += [f"{stream.replace('_', ' ')} without it" for stream in several]
    rows = [head, ["---"] * len(head)]
    for sense in senses:
        names = [f"drop_{sense}", f"wrong_{sense}", *(f"{stream}_drop_{sense}" for stream in several)]
        rows.append([sense.replace("_", " "), *(values.get(name, "") for name in names)])
    streams = [item for item in values.items() if not re.search(r"(^|_)(drop|wrong)_", item[0])]
    return [
        _table(streams),
        f"On {run['data'].get('validation_tokens') or 0:,} ticks of recordings that were held out, after "
        f"{evaluated['step']:,} steps. docs/rounds.md says what each number is.",
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
        "![the loss without each sense and with that of another clip](senses.png)",
    ]


def _metadata(name: str, run: dict, evaluated: dict) -> str:
    """The YAML that the Hub reads, results as a model-index in it."""
    source = _source(run)
    on_hub = is_hub_name(source)
    data = {
        "task_type": "text-generation",
        "dataset_type": source.split(":")[0] if on_hub else re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-"),
        "dataset_name": f"{source}, validation split",
    }
    results = [
        EvalResult(**data, metric_type=metric, metric_name=label, metric_value=round(evaluated[entry], 6))
        for entry, metric, label, _ in EVALUATED
        if math.isfinite(evaluated.get(entry, math.nan))
    ]
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["multimodal-creature"],
        datasets=[source.split(":")[0]] if on_hub else None,
        eval_results=results or None,
    ).to_yaml()


def _source(run: dict) -> str:
    return run["data"].get("source") or Path(str(run["data"]["path"])).name


def _plot(folder: Path) -> str:
    return "![training and validation loss over the steps](loss.png)" if (folder / "loss.png").is_file() else ""


def _samples(run: dict) -> list[str]:
    samples = run.get("samples")
    if not samples:
        return []
    quoted = ["\n".join(f"> {line}" for line in text.splitlines()) for text in samples]
    how = "Not selected: seeds 0, 1, ..., temperature 0.8, top_k 50."
    return ["## Samples", how, "\n\n---\n\n".join(quoted)]


def _training_rows(run: dict, metrics: list[dict]) -> list[tuple[str, str]]:
    own, data, parameters, model = run["must_match"], run["data"], run["parameters"], run["must_match"]["model"]
    trained = next((entry for entry in reversed(metrics) if "loss" in entry), {})
    unit = "ticks" if run.get("on_recordings") else "tokens"
    rows = [
        ("parameters", f"{parameters['total']:,}, of which {parameters['trainable']:,} were trained"),
        (
            "shape",
            f"{model['num_hidden_layers']} layers x {model['hidden_size']}, {model['num_attention_heads']} heads, "
            f"context {model['max_position_embeddings']:,}",
        ),
        ("data", f"{_source(run)}, {data['tokens']:,} {unit}, sha256 {data['data_hash'][:16]}"),
        ("tokenizer", f"{model['vocab_size']:,} rows, sha256 {data['tokenizer_hash'][:16]}"),
        ("steps", f"{run.get('steps_done', run['steps']):,} of {own['tokens_per_step']:,} {unit}"),
    ]
    if "tokens" in trained:
        seen = trained["tokens"]
        rows.append((f"{unit} seen", f"{seen:,}, {run['epochs']:.3g} times the data"))
    if "loss" in trained:
        rows.append(
            ("training loss", f"{trained['loss']:.4f}" + ("" if run.get("on_recordings") else " nats per token"))
        )
    rows += [
        ("optimizer", f"{own['optimizer']}, {own['schedule']}, peak learning rate {own['learning_rate']:.3g}"),
        ("hardware", f"{own['world_size']} x {run['device']}, {run['precision']}"),
    ]
    if metrics:
        rows.append(("time", format_seconds(max(entry.get("time", 0.0) for entry in metrics))))
    if "tokens_per_second" in trained:
        rows.append(("speed", f"{trained['tokens_per_second']:,.0f} {unit}/s"))
    if "peak_memory_bytes" in run:
        rows.append(("peak memory of a device", f"{run['peak_memory_bytes'] / 1e9:.2f} GB"))
    versions = run.get("versions", {})
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _usage(name: str, run: dict, chat: bool) -> str:
    talk = (
        '\nprint(pipe([{"role": "user", "content": "Hello!"}], max_new_tokens=50)[0]["generated_text"][-1]["content"])'
        if chat
        else ""
    )
    prompt = "Once upon a time"
    return f"""`{name}` is the folder, or the name of its repository on the Hub. It has its own code:
`trust_remote_code=True` runs the `*_creature.py` files in it, so look at them first.

```python
from transformers import pipeline

pipe = pipeline("text-generation", "{name}", trust_remote_code=True, device_map="auto")
print(pipe("{prompt}", max_new_tokens=50)[0]["generated_text"]){talk}
```

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

It samples by default (`generation_config.json`); `do_sample=False` takes the likeliest token."""
