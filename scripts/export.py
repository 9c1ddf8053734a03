"""Export a trained creature as a graph that runs without this library: ONNX, or a program of torch.export.

examples:
  python scripts/export.py --checkpoint checkpoints/text_only --format onnx
  python scripts/export.py --checkpoint checkpoints/text_only --format torch --output creature.pt2

The graph has the inputs input_ids and attention_mask [batch, length] and the output logits [batch, length, vocab_size],
in float32, for any batch and any length up to the creature's context. It reads the internal voice alone, and keeps no
cache. The file is read back and compared with the creature before the script ends.
"""

import argparse
import importlib.util
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, require_unicode, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

FILE_NAMES = {"onnx": "model.onnx", "torch": "model.pt2"}
TOLERANCE = 1e-4  # relative to the largest logit, at least 1; another order of summation changes less


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, help="folder of a run, of a checkpoint or of a saved model"
    )
    parser.add_argument("--format", required=True, choices=tuple(FILE_NAMES), help="what to write")
    parser.add_argument(
        "--output", type=user_path, help="file to write (default model.onnx or model.pt2 in the model's folder)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.format == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"an ONNX export needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from creature.files import require_writable
    from creature.loading import find_model, load_model

    folder = find_model(arguments.checkpoint)
    output = Path(arguments.output) if arguments.output else folder / FILE_NAMES[arguments.format]
    require_unicode("--output", str(output))
    ending = Path(FILE_NAMES[arguments.format]).suffix
    if output.suffix != ending or output.is_dir():
        raise UserError(f"--output {output} must be a file that ends in {ending}")
    require_writable(output.parent)

    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it recommends packages of its own
    warnings.simplefilter("ignore")  # between the parts of torch
    model = load_model(folder, "cpu", torch.float32)
    write = {"onnx": write_onnx, "torch": write_torch}[arguments.format]
    run = write(model, output)
    difference, largest = compare(model, run)
    if not difference <= TOLERANCE * max(largest, 1):
        raise UserError(
            f"the logits of {output} differ by up to {difference:.1e} from the creature's: report it, and do not use it"
        )
    size = sum(file.stat().st_size for file in (output, output.with_name(f"{output.name}.data")) if file.is_file())
    print(f"{output}: {size / 2**20:,.1f} MiB, largest difference of logits {difference:.1e}")


def text_model(model):
    """(the creature as a module of input_ids and attention_mask, example inputs, their dynamic sizes)."""
    import torch

    class TextModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.creature = model

        def forward(self, input_ids, attention_mask):
            return self.creature(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    ids = torch.zeros(2, 4, dtype=torch.int64)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.max_position_embeddings)}
    examples = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return TextModel().eval(), examples, {"input_ids": free, "attention_mask": free}


def write_torch(model, output: Path):
    """Write the program, read it back; returns a function from the two inputs to logits."""
    import torch

    module, examples, free = text_model(model)
    with torch.no_grad():
        program = torch.export.export(module, (), examples, dynamic_shapes=free)
    torch.export.save(program, output)
    read = torch.export.load(output).module()
    return lambda ids, mask: read(input_ids=ids, attention_mask=mask)


def write_onnx(model, output: Path):
    """Write the graph, read it back with onnxruntime; returns a function from the two inputs to logits."""
    import onnxruntime
    import torch

    module, examples, free = text_model(model)
    with torch.no_grad():
        program = torch.onnx.export(
            module, (), kwargs=examples, dynamic_shapes=free, output_names=["logits"], dynamo=True, verbose=False
        )
    program.save(output)  # with the weights in a second file, .onnx.data, beyond what one .onnx may hold
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    return lambda ids, mask: torch.from_numpy(
        session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    )


def compare(model, run) -> tuple[float, float]:
    """
    (largest difference between the logits of the creature and of `run`, largest logit), at other sizes than the
    examples and with some ticks padded; NaN if any value is.
    """
    import torch

    context = model.config.max_position_embeddings
    found = []
    for rows, ticks in ((1, 1), (3, min(37, context)), (1, min(300, context))):
        ids = torch.randint(0, model.config.vocab_size, (rows, ticks), generator=torch.Generator().manual_seed(rows))
        mask = torch.ones_like(ids)
        mask[1:, : ticks // 3] = 0
        with torch.inference_mode():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            difference = (run(ids, mask) - expected)[mask.bool()]
        found.append(torch.stack((difference.abs().max(), expected[mask.bool()].abs().max())))
    return tuple(torch.stack(found).amax(dim=0).tolist())


if __name__ == "__main__":
    run_main(main)
