"""Train the codec of a voice: from the sound of recordings to a few codes a tick, and back.

examples:
  python scripts/train_codec.py --output codecs/trial --max_steps 20
  python scripts/train_codec.py --data recordings/mine --output codecs/mine
  python scripts/train_codec.py --data recordings/speech --column audio --output codecs/speech --max_steps 2000

The first line is a dry run on made-up tones. The codec learns from the voices of the training split, and is judged on
those of the validation split. The output folder holds the codec, evaluation.json, and of some held-out voices the
original and what is decoded, as .wav and in samples.png. run_clm_creature.py takes the folder as --codec. Training
takes minutes, so it is not resumed: an interrupted one writes nothing. docs/recordings.md says more.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

SAMPLES = 3  # held-out voices to listen to
STEPS = 1000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=user_path, metavar="FOLDER", help="recordings with a voice (default: made-up tones)")
    add("--output", type=user_path, required=True, metavar="FOLDER", help="a new folder for the codec")
    add("--column", choices=("voice", "audio"), default="voice", help="what to learn from (default voice)")
    add("--max_steps", type=int, default=STEPS, metavar="N", help=f"steps of 20 s of voice (default {STEPS})")
    add("--hidden_size", type=int, default=192, metavar="N", help="width of the layers (default 192)")
    add("--learning_rate", type=float, default=1e-3, metavar="X", help="the highest one (default 1e-3)")
    add("--seed", type=int, default=0, help="of the weights and the order of the data (default 0)")
    add("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    arguments = parser.parse_args()
    for name in ("max_steps", "hidden_size", "learning_rate"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name} must be above 0")
    if arguments.seed < 0:
        parser.error("--seed must be at least 0")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists already: choose another folder, or remove it first")
    import torch
    import transformers

    from codec_creature import CreatureCodec, CreatureCodecConfig
    from creature.codec_training import evaluate_codec, train_codec, write_samples
    from creature.files import replace_file, require_writable

    transformers.utils.logging.disable_progress_bar()  # of writing the model
    require_writable(output.parent)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: leave out --device")
    torch.manual_seed(arguments.seed)
    codec = CreatureCodec(CreatureCodecConfig(hidden_size=arguments.hidden_size))
    voices = open_voices(arguments.data, arguments.column, codec.config.sampling_rate)
    train, held_out = voices["train"], voices.get("validation") or []
    minutes = sum(map(len, train)) / codec.config.sampling_rate / 60
    parameters = sum(parameter.numel() for parameter in codec.parameters())
    print(
        f"{minutes:.1f} min of {arguments.column} in {len(train):,} recordings; {parameters / 1e6:.1f} M parameters on "
        f"{device}"
    )
    began = time.perf_counter()
    losses = train_codec(codec, train, arguments.max_steps, arguments.learning_rate, device, arguments.seed)
    seconds = time.perf_counter() - began
    codec.to("cpu").save_pretrained(output)
    judged = held_out or train
    figures = evaluate_codec(codec, train, judged)
    figures |= {"held_out": bool(held_out), "steps": len(losses), "training_seconds": round(seconds, 1)}
    with replace_file(output / "evaluation.json", "w") as file:
        json.dump(figures | {"losses": [round(loss, 4) for loss in losses]}, file)
    paths = write_samples(codec, judged[:SAMPLES], output)
    print(format_figures(figures, sum(losses[-50:]) / len(losses[-50:])))
    print("\n".join(map(str, [output, *paths])))


def open_voices(folder: str | None, column: str, rate: int) -> dict:
    """The sounds of a folder of recordings by split; without a folder, tones that are made up."""
    from creature.codec_training import read_voices
    from creature.data.recordings.made_up import write_made_up_recordings
    from creature.data.recordings.schema import load_recordings

    if folder is not None:
        return read_voices(load_recordings(folder)[0], column, rate)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:  # Windows keeps files that are mapped
        write_made_up_recordings(Path(place, "speak"), "speak")
        return read_voices(load_recordings(Path(place, "speak"))[0], column, rate)


def format_figures(figures: dict, loss: float) -> str:
    """The figures of an evaluation as a table of two columns."""
    where = "held-out" if figures["held_out"] else "training"
    spread = [
        f"{min(figures[name]):.{digits}f} to {max(figures[name]):.{digits}f}"
        for name, digits in (("used", 2), ("perplexity", 0))
    ]
    rows = {
        "trained": f"{figures['steps']:,} steps in {figures['training_seconds']:,.0f} s, last losses {loss:.3f}",
        "log-mel distance": f"{figures['distance']:.3f} nats on {figures['seconds'] / 60:.1f} min of {where} voice",
        "  of the mean frame": f"{figures['distance_mean']:.3f}",
        "  of silence": f"{figures['distance_silence']:.3f}",
        "codes used": f"{spread[0]} of a book",
        "perplexity": f"{spread[1]} codes of a book",
    }
    return "\n".join(f"{name:<20}  {text}" for name, text in rows.items())


if __name__ == "__main__":
    run_main(main)
