"""Let a trained creature continue a prompt.

examples:
  python scripts/generate_text.py --checkpoint checkpoints/text_only --prompt "Once upon a time"
  python scripts/generate_text.py --checkpoint checkpoints/text_only/checkpoint-5000 --prompt "The sea" --greedy
  python scripts/generate_text.py --checkpoint checkpoints/text_only --prompt "Why" --num_samples 3 --seed 1 > out.txt

The text goes to standard output token by token, everything else to standard error. Of a run that is still training, the
newest complete checkpoint is used.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, require_unicode, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, help="folder of a run, of a checkpoint or of a saved model"
    )
    parser.add_argument("--prompt", required=True, help="text to continue; may be empty")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="length of the continuation (default 100)")
    parser.add_argument("--temperature", type=float, help="below 1 is more predictable (default 0.8)")
    parser.add_argument("--top_p", type=float, help="keep the likeliest tokens up to this probability (default 1: all)")
    parser.add_argument("--top_k", type=int, help="keep so many of the likeliest tokens (default 50; 0: all)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 avoids repetition (default 1)")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations to write (default 1)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: a GPU if there is one")
    arguments = parser.parse_args()
    if arguments.greedy and any(v is not None for v in (arguments.temperature, arguments.top_p, arguments.top_k)):
        parser.error("--greedy takes the likeliest token: leave out --temperature, --top_p and --top_k")
    if arguments.greedy and arguments.num_samples > 1:
        parser.error("--greedy gives one text only: leave out --num_samples")
    for name, good, words in (
        ("max_new_tokens", lambda v: v >= 1, "at least 1"),
        ("num_samples", lambda v: v >= 1, "at least 1"),
        ("temperature", lambda v: 0 < v < float("inf"), "greater than 0 (--greedy for the likeliest text)"),
        ("top_p", lambda v: 0 < v <= 1, "greater than 0 and at most 1"),
        ("top_k", lambda v: v >= 0, "at least 0"),
        ("repetition_penalty", lambda v: 0 < v < float("inf"), "greater than 0"),
    ):
        value = getattr(arguments, name)
        if value is not None and not good(value):
            parser.error(f"--{name} must be {words}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    require_unicode("--prompt", arguments.prompt)
    from creature.loading import find_model, ids_without_text, load_saved_tokenizer, load_to_generate

    folder = find_model(arguments.checkpoint)
    import torch
    import transformers

    model, device = load_to_generate(folder, arguments.device)
    tokenizer = load_saved_tokenizer(folder)
    ids = tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"] or [model.config.bos_token_id]
    context = model.config.max_position_embeddings
    if len(ids) >= context:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and the creature's context {context:,}: shorten the prompt"
        )
    new_tokens = min(arguments.max_new_tokens, context - len(ids))
    print(f"{folder}: {model.num_parameters():,} parameters on {device.name}", file=sys.stderr)
    if new_tokens < arguments.max_new_tokens:
        print(f"the context of {context:,} tokens leaves room for {new_tokens:,} new ones", file=sys.stderr)

    if hasattr(sys.stdout, "reconfigure"):  # a Windows console may know fewer characters than the creature
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    inputs = torch.tensor([ids], device=device.kind)
    started, generated = time.perf_counter(), 0
    for sample in range(arguments.num_samples):
        if sample:
            print("---")
        # A streamer takes one text at a time, so samples come one after the other.
        streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
        with torch.inference_mode():
            text = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new_tokens,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id,
                suppress_tokens=ids_without_text(model.config, tokenizer) or None,
                repetition_penalty=arguments.repetition_penalty,
                **_sampling(arguments),
            )
        generated += text.shape[1] - inputs.shape[1]
    seconds = time.perf_counter() - started
    print(f"{generated:,} tokens in {seconds:.1f} s, {generated / seconds:,.0f} tokens/s", file=sys.stderr)


def _sampling(arguments: argparse.Namespace) -> dict:
    if arguments.greedy:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": 0.8 if arguments.temperature is None else arguments.temperature,
        "top_p": 1.0 if arguments.top_p is None else arguments.top_p,
        "top_k": 50 if arguments.top_k is None else arguments.top_k,
    }


if __name__ == "__main__":
    run_main(main)
