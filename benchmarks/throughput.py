"""Training speed and memory of the creature in CreatureTrainer beside GPT-2 of the same shape in the stock Trainer.

examples:
  python benchmarks/throughput.py --data data/corpus.bin
  python benchmarks/throughput.py --micro_batch 1 --block_size 256 --steps 4 --warmup 1      # a laptop

Without --data it trains on generated stories. All rows train on the same blocks in the same order. The figure is the
median of the timed steps; compiling happens in the warm-up steps before them. A row that runs out of memory says so.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from creature.files import user_path  # noqa: E402

# Name: model, columns of the vocabulary, compiled, documents of a block kept apart.
ROWS = {
    "creature": ("creature", 50304, True, False),
    "creature, documents apart": ("creature", 50304, True, True),
    "creature, eager": ("creature", 50304, False, False),
    "GPT-2, 50304 columns": ("gpt2", 50304, True, False),
    "GPT-2, 50304 columns, eager": ("gpt2", 50304, False, False),
    "GPT-2, 50257 columns, eager": ("gpt2", 50257, False, False),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=user_path, help="token stream or text (default: generated stories)")
    parser.add_argument("--micro_batch", type=int, default=32, help="blocks a micro-batch (default 32)")
    parser.add_argument("--block_size", type=int, default=2048, help="tokens a block (default 2048)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step (default 1)")
    parser.add_argument("--steps", type=int, default=40, help="timed steps (default 40)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them (default 10)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="(default: all)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compiled rows (default: on a GPU)")
    options = parser.parse_args()
    if options.warmup < 1 or options.steps < 2:
        parser.error("give at least --warmup 1 and --steps 2: a step is timed from the end of the one before")
    return options


def configuration(name: str = "text_only", **changes):
    """The CreatureConfig of one of the project's configurations, with changes."""
    from configuration_creature import CreatureConfig
    from creature.settings import CONFIGS, parse_settings

    return CreatureConfig(**parse_settings(["--config", str(CONFIGS / f"{name}_config.yaml")]).model | changes)


def build(kind: str, columns: int):
    """The model of a row: 6 layers x 512, 8 heads, 2048 positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from modeling_creature import MultiModalCreature

    if kind == "creature":
        model = MultiModalCreature(configuration(vocab_size=columns))
        model.train_only()
        return model
    config = GPT2Config(n_embd=512, n_layer=6, n_head=8, n_positions=2048, vocab_size=columns)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0  # the creature has no dropout either
    config.use_cache = False
    return GPT2LMHeadModel(config)


def clear_device() -> None:
    """Free the models and graphs of the row before, and reset the peak of memory."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed_steps(
    model,
    blocks,
    *,
    micro_batch: int,
    steps: int,
    warmup: int,
    compiled: bool,
    accumulation: int = 1,
    separate_documents: bool = False,
) -> tuple[float, float]:
    """
    (median seconds of an optimizer step, peak GiB or NaN on a CPU) of `model` training on `blocks`: a creature in
    CreatureTrainer, recorded as CUDA graphs where a run would be; any other model in the stock Trainer. bf16 on a GPU.

    A step is timed from the end of the one before; the first `warmup` steps, in which the model is compiled, are not
    timed. Raises torch.OutOfMemoryError where the batch does not fit.
    """
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

    from creature import fast
    from creature.data import block_collator
    from creature.data.text.tokenizer import load_tokenizer
    from creature.hardware import device_info
    from creature.plan import graphs_pay
    from creature.trainer import CreatureTrainer
    from creature.training_arguments import CreatureTrainingArguments

    cuda = torch.cuda.is_available()
    own = model.config.model_type == "creature"
    if own:
        fast.apply(model)
    ends: list = []  # seconds; on a GPU events, so that the host runs ahead as in a real run

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record()
            else:
                ends.append(time.perf_counter())

    set_seed(0)
    clear_device()
    batch = micro_batch, len(blocks[0]["input_ids"]), accumulation
    records = own and compiled and graphs_pay(model.config, device_info(), "bf16", *batch, separate_documents)
    with tempfile.TemporaryDirectory() as folder:
        args = (CreatureTrainingArguments if own else TrainingArguments)(
            **({"batch_warmup_steps": 0} if own else {}),  # whole batches, as in most steps of a run
            output_dir=folder,
            max_steps=warmup + steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            bf16=cuda,
            torch_compile=compiled,
            torch_compile_mode="reduce-overhead" if records else None,
            use_cpu=not cuda,
            eval_strategy="no",
            save_strategy="no",
            logging_steps=1000,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=cuda,
            accelerator_config={"non_blocking": cuda},  # as in the job: copies from pinned memory need not wait
            dataloader_drop_last=True,  # a shorter batch would be compiled again
        )
        trainer = (CreatureTrainer if own else Trainer)(
            model=model,
            args=args,
            train_dataset=blocks,
            data_collator=block_collator(load_tokenizer(), separate_documents),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    timed = ends[warmup - 1 :]
    if cuda:
        torch.cuda.synchronize()
        timed = [timed[0].elapsed_time(end) / 1000 for end in timed]
    seconds = statistics.median(after - before for before, after in zip(timed, timed[1:], strict=False))
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")


def measure(name: str, blocks, options: argparse.Namespace) -> str:
    """Train one row; returns its line of the table."""
    import torch

    kind, columns, compiled, apart = ROWS[name]
    model = build(kind, columns)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    try:
        seconds, memory = timed_steps(
            model,
            blocks,
            micro_batch=options.micro_batch,
            steps=options.steps,
            warmup=options.warmup,
            compiled=compiled,
            accumulation=options.accumulation,
            separate_documents=apart,
        )
    except torch.OutOfMemoryError:
        return f"{name:32}  {trained:12,}  out of memory"
    speed = options.micro_batch * options.accumulation * options.block_size / seconds
    return f"{name:32}  {trained:12,}  {1000 * seconds:10.2f}  {speed:12,.0f}  {memory:9.2f}"


def main() -> None:
    options = parse_arguments()
    import torch

    from creature.data import DataArguments, load_data
    from creature.data.text.stories import write_story_corpus

    with tempfile.TemporaryDirectory() as folder:
        source = options.data
        if source is None:
            source = str(Path(folder, "stories.txt"))
            needed = options.accumulation * options.micro_batch * options.block_size
            needed *= min(options.warmup + options.steps, 20)
            write_story_corpus(source, max(needed, 4 * options.block_size), seed=0)
        data = DataArguments(source, cache_dir=folder)
        blocks = load_data(data, options.block_size, vocab_size=50304)[0]["train"]
        compiles = torch.cuda.is_available() if options.compile is None else options.compile
        tokens = f"{options.accumulation} x {options.micro_batch} x {options.block_size} tokens a step"
        print(f"{tokens}, 6 x 512, median of {options.steps} steps")
        print(f"{'':32}  {'parameters':>12}  {'ms a step':>10}  {'tokens/s':>12}  {'peak GiB':>9}")
        for name in options.rows:
            if compiles or not ROWS[name][2]:
                print(measure(name, blocks, options), flush=True)


if __name__ == "__main__":
    main()
