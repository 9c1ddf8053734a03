"""Speed of `model.generate`: the creature, default and compiled, beside transformers' own loop and GPT-2.

examples:
  python benchmarks/generation.py                                          # a GPU: batches of 1, 8 and 64, bfloat16
  python benchmarks/generation.py --device cpu --batch 1 --new_tokens 64   # a laptop, float32

All models are untrained and have one shape (6 layers x 512, 8 heads, 50304 columns). End-of-text is switched off, so
that every row generates the same number of tokens. The first call, which records or compiles, is timed alone; the speed
is the median of the later calls, everything in `generate` included. Compiled rows run at the smallest and the largest
batch only, and slow ones get fewer calls. The last line compares the default's tokens with those of transformers' loop.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

ENOUGH = 2.0  # s of timed calls, after which no further call is made

# Name, model, arguments of `generate`, whether it is compiled, which only a GPU runs. "dynamic" selects transformers'
# loop; the dict of `compile_config` becomes a CompileConfig.
ROWS = (
    ("creature", "creature", {}, False),
    ("creature, compiled", "creature", {"compile_config": {}}, True),
    ("creature, sampled, top_k 50", "creature", {"do_sample": True, "top_k": 50, "temperature": 0.8}, False),
    ("creature, loop of transformers", "creature", {"cache_implementation": "dynamic"}, False),
    ("GPT-2", "gpt2", {}, False),
    ("GPT-2, static cache, compiled", "gpt2", {"cache_implementation": "static"}, True),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="rows at once (default 1 8 64)")
    parser.add_argument("--prompt_tokens", type=int, default=16, help="length of the prompt (default 16)")
    parser.add_argument("--new_tokens", type=int, default=256, help="length of the continuation (default 256)")
    parser.add_argument("--runs", type=int, default=5, help="timed calls a row, at most (default 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    options = parser.parse_args()
    if min(*options.batch, options.prompt_tokens, options.new_tokens, options.runs) < 1:
        parser.error("--batch, --prompt_tokens, --new_tokens and --runs must be at least 1")
    return options


def build(kind: str, device: str, **changes):
    """An untrained model in evaluation mode: bfloat16 on a GPU, else float32."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from benchmarks.throughput import configuration
    from modeling_creature import MultiModalCreature

    torch.manual_seed(0)
    if kind == "creature":
        model = MultiModalCreature(configuration(**changes))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=512, n_layer=6, n_head=8, n_positions=2048, vocab_size=50304))
    return model.eval().to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def prompt_of(rows: int, options: argparse.Namespace):
    import torch

    torch.manual_seed(1)
    return torch.randint(0, 50000, (rows, options.prompt_tokens)).to(options.device)


def seconds(model, prompt, options: argparse.Namespace, **settings) -> float:
    """Seconds of one call, until its tokens are on the device."""
    import torch

    if options.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.new_tokens, **settings)
    if options.device == "cuda":
        torch.cuda.synchronize()
    assert out.shape[1] == options.prompt_tokens + options.new_tokens
    return time.perf_counter() - started


def measure(row: tuple, options: argparse.Namespace) -> list[str]:
    """The lines of a row, one for each batch size."""
    import torch
    from transformers import CompileConfig

    name, kind, settings, compiled = row
    if "compile_config" in settings:
        settings = {"compile_config": CompileConfig(**settings["compile_config"])}
    torch._dynamo.reset()
    model = build(kind, options.device)
    lines = []
    for rows in sorted({min(options.batch), max(options.batch)}) if compiled else options.batch:
        prompt = prompt_of(rows, options)
        first = seconds(model, prompt, options, **settings)
        times = [seconds(model, prompt, options, **settings)]
        while len(times) < options.runs and sum(times) < ENOUGH:
            times.append(seconds(model, prompt, options, **settings))
        median = statistics.median(times)
        per_token = 1000 * median / options.new_tokens
        speed = rows * options.new_tokens / median
        lines.append(f"{name:32}  {rows:5}  {speed:10,.0f}  {per_token:10.3f}  {len(times):4}  {first:12.2f}")
    return lines


def equal_tokens(options: argparse.Namespace) -> str:
    """A line that says in how many rows the default gives the tokens of transformers' loop, in float32."""
    import torch

    # Untrained and tied, a model repeats one token, and any two loops would agree.
    model = build("creature", options.device, tie_word_embeddings=False).float()
    prompt = prompt_of(min(8, max(options.batch)), options)
    settings = {"max_new_tokens": options.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    ours = model.generate(prompt, attention_mask=mask, **settings)
    theirs = model.generate(prompt, attention_mask=mask, cache_implementation="dynamic", **settings)
    same = int((ours == theirs).all(dim=1).sum())
    kinds = len(ours[:, options.prompt_tokens :].unique())
    return f"float32, default against the loop of transformers: {same} of {len(prompt)} rows equal, {kinds} tokens"


def main() -> None:
    options = parse_arguments()
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    name += f", torch {torch.__version__}, transformers {transformers.__version__}, {options.new_tokens} new tokens"
    print(name)
    print(f"{'':32}  {'batch':>5}  {'tokens/s':>10}  {'ms a token':>10}  {'runs':>4}  {'first call s':>12}")
    for row in ROWS:
        if options.device == "cuda" or not row[3]:
            print("\n".join(measure(row, options)), flush=True)
    print(equal_tokens(options))


if __name__ == "__main__":
    main()
