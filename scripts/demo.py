"""A page in the browser on which a trained creature continues what is typed, and lives.

examples:
  python scripts/demo.py --checkpoint checkpoints/text_only
  python scripts/demo.py --checkpoint checkpoints/text_only/checkpoint-5000 --port 8080
  python scripts/demo.py --checkpoint checkpoints/whole --recording recordings/room

A creature with senses or streams beside text has a second tab, on which it lives through a recording: what it sees,
hears, feels, thinks, says and does, tick by tick. Without a recording it hears what is typed, and nothing else.

The page is at http://127.0.0.1:7860 until Ctrl+C, for this machine only; --host 0.0.0.0 opens it to the network. It
loads nothing from other sites. Needs `pip install gradio`.
"""

import argparse
import os
import sys
from pathlib import Path
from threading import Lock, Thread

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, require_unicode, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, help="folder of a run, of a checkpoint or of a saved model"
    )
    parser.add_argument("--recording", type=user_path, help="folder of recordings to live through, on the tab Live")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default 7860)")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: a GPU if there is one")
    arguments = parser.parse_args()
    if not 0 < arguments.port < 1 << 16:
        parser.error("--port must be from 1 to 65535")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from creature.loading import find_model, load_saved_tokenizer, load_to_generate

    folder = find_model(arguments.checkpoint)
    model, _ = load_to_generate(folder, arguments.device)
    page = build_page(model, load_saved_tokenizer(folder), folder, arguments.recording)
    print(f"the page is at {launch(page, arguments.host, arguments.port)} until Ctrl+C", flush=True)
    page.block_thread()


def build_page(model, tokenizer, folder: Path, recordings: str | None = None):
    """The page as `gradio.Blocks`: text and, of a creature with more than text or with recordings, its life."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("the page needs gradio: install it with `pip install gradio`") from error
    from creature.live import LiveCreature
    from creature.live.page import Lives, add_life
    from creature.live.viewing import is_more_than_text
    from creature.loading import load_processor, trained_ticks

    turn = Lock()  # text and life are of one model: one of them computes at a time
    with gr.Blocks(title=f"Creature: {folder.name}", analytics_enabled=False) as page:
        config, context = model.config, model.config.max_position_embeddings
        gr.Markdown(f"# {folder.name}\n{model.num_parameters():,} parameters, context {context:,} tokens")
        if recordings is None and not is_more_than_text(model):
            add_text(gr, model, tokenizer, folder, turn)
        else:
            with gr.Tab("Text"):
                add_text(gr, model, tokenizer, folder, turn)
            with gr.Tab("Live"):
                window = config.sliding_window or trained_ticks(folder, context)
                creature = LiveCreature(model, load_processor(folder, config), window=window)
                add_life(page, Lives(creature, recordings, turn))
    return page


def add_text(gr, model, tokenizer, folder: Path, turn: Lock) -> None:
    """Prompt, temperature and top-p, the text token by token, the run's loss plot."""
    context = model.config.max_position_embeddings
    # A checkpoint lies in the folder of its run, which has the plot.
    plot = next((place / "loss.png" for place in (folder, folder.parent) if (place / "loss.png").is_file()), None)
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox("Once upon a time", label="Prompt", lines=4)
            temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: all tokens; less: the likeliest alone")
            most = gr.Slider(1, context, min(200, context), step=1, label="New tokens, at most")
            button = gr.Button("Continue", variant="primary")
            if plot:
                gr.Image(str(plot), show_label=False, interactive=False, buttons=[], elem_id="loss")
        with gr.Column():
            text = gr.Textbox(label="Text", lines=32, interactive=False)

    def respond(prompt, temperature, top_p, most):
        try:
            with turn:
                yield from continue_text(model, tokenizer, prompt, temperature, top_p, int(most))
        except UserError as error:
            raise gr.Error(str(error)) from error

    gr.on([button.click, prompt.submit], respond, [prompt, temperature, top_p, most], text)


def continue_text(model, tokenizer, prompt: str, temperature: float, top_p: float, new_tokens: int):
    """Yield the prompt with its continuation, longer each time; UserError for a prompt that fills the context."""
    import torch
    from transformers import TextIteratorStreamer

    from creature.loading import ids_without_text

    require_unicode("the prompt", prompt)
    config = model.config
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [config.bos_token_id]
    room = config.max_position_embeddings - len(ids)
    if room < 1:
        raise UserError(f"the prompt has {len(ids):,} tokens and fills the context: shorten it")
    inputs = torch.tensor([ids], device=model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    failures = []

    def generate():
        try:
            with torch.inference_mode():
                model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=min(new_tokens, room),
                    streamer=streamer,
                    pad_token_id=tokenizer.pad_token_id,
                    suppress_tokens=ids_without_text(config, tokenizer) or None,
                    **(sampling if temperature else {"do_sample": False}),
                )
        except Exception as error:
            failures.append(error)
            streamer.end()  # or the page would wait for ever

    thread = Thread(target=generate)
    thread.start()
    try:
        text = prompt
        for piece in streamer:
            text += piece
            yield text
    finally:
        thread.join()  # where the page was closed: one text at a time
    if failures:
        raise failures[0]


def launch(page, host: str, port: int) -> str:
    """Serve the page from a thread, until `page.close()`; returns its address."""
    import gradio as gr

    # The system's fonts, because the default theme loads its own from the network; no links to other sites.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=theme,
            footer_links=[],
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used ({error}): give another --port") from error
    return address


if __name__ == "__main__":
    run_main(main)
