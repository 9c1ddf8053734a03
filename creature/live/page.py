"""The tab of scripts/demo.py on which a creature lives: its picture, and what sets it going."""

import base64
import html
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from creature.data.recordings.schema import load_recordings
from creature.errors import UserError, first_line, require_unicode
from creature.live.creature import LiveCreature
from creature.live.picture import draw
from creature.live.viewing import Viewer
from ticks_creature import TICK_SECONDS

UPDATE = 0.15  # s of living between two pictures


class Lives:
    """
    The lives of one creature: the recordings of a folder, one of which is open, or a life without a recording.

    Args:
        recordings: a folder of them. turn: held while the creature lives a tick, and by whatever else computes with its
            model.

    Raises:
        UserError: for a folder that holds no recordings, or whose first one does not fit the creature.
    """

    def __init__(self, creature: LiveCreature, recordings: str | None, turn: Lock):
        self.creature, self.turn = creature, turn
        self.order = 0  # the number of the latest order to play or to stop; an older one is over
        self.rows, self.joints = {}, []  # recording_id: its split and number
        if recordings is not None:
            self.splits, facts = load_recordings(recordings)
            self.joints = facts["names"].get("joints", [])
            for split in sorted(self.splits, reverse=True):  # what it was not trained on comes first
                for number, name in enumerate(self.splits[split].data.column("recording_id").to_pylist()):
                    self.rows[name] = (split, number)
        self.open(next(iter(self.rows), None))

    def open(self, name: str | None) -> None:
        """Begin the life of a recording; UserError where it does not fit the creature."""
        row = None
        if name is not None:
            split, number = self.rows[name]
            row = self.splits[split][number]
        try:
            with self.turn:
                self.viewer = Viewer(self.creature, row, self.joints)
        except ValueError as error:
            raise UserError(f"{name} cannot be lived through: {first_line(error)}") from error

    def stop(self, action: Callable[[], object] | None = None) -> str:
        """Stop playing, do something where it stands, and return the picture."""
        self.order += 1
        if action is not None:
            with self.turn:
                action()
        return self.picture()

    def step(self) -> None:
        """Live for one tick, if there is one left."""
        if not self.viewer.ended:
            self.viewer.step()

    def tell(self, text: str) -> None:
        """Let it hear what is typed."""
        require_unicode("what it hears", text)
        with self.turn:
            self.viewer.tell(text)

    def play(self, real_time: bool) -> Iterator[str]:
        """Yield a picture after each `UPDATE` of living, until the recording ends or another order comes."""
        self.order += 1
        order, begun, lived = self.order, time.perf_counter(), 0.0
        while self.order == order and not self.viewer.ended:
            until = time.perf_counter() + UPDATE
            while self.order == order and not self.viewer.ended and time.perf_counter() < until:
                with self.turn:
                    self.step()
                lived += TICK_SECONDS
                if real_time:
                    time.sleep(max(0.0, lived - (time.perf_counter() - begun)))
            if self.order == order:
                yield self.picture(f"{lived / (time.perf_counter() - begun):.1f} times real time")

    def picture(self, note: str = "") -> str:
        """The present moment as HTML: in the page itself, because files of a life of hours would fill a disk."""
        with self.turn:
            moment = self.viewer.moment()
        if note:
            moment.clock["at"] = note
        picture, file = draw(moment), io.BytesIO()
        picture.save(file, "JPEG", quality=92, subsampling=0)
        words = " ".join(word["word"] for name in ("thought", "said") for word in moment.words.get(name, ()))
        return (
            f'<img alt="{html.escape(f"{moment.seconds:.2f} s {words}")}" style="max-width: 100%; height: auto" '
            f'width="{picture.width}" height="{picture.height}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
        )


def add_life(page, lives: Lives) -> None:
    """Add the picture of a life to a page of gradio, what plays, pauses and resets it, and a box for what it hears."""
    import gradio as gr

    picture = gr.HTML(elem_id="life")
    with gr.Row():
        play, pause, step, reset = map(gr.Button, ("Play", "Pause", "Step", "Reset"))
        names = list(lives.rows)
        # A life without an end is one to talk to, and so not faster than who talks.
        real_time = gr.Checkbox(not names, label="Real time", info="not as fast as the machine can")
    with gr.Row():
        words = gr.Textbox(label="Say something that it hears", placeholder="Enter")
        recording = gr.Dropdown(names, value=names[0] if names else None, label="Recording", visible=bool(names))

    @contextmanager
    def in_words():
        try:
            yield
        except ValueError as error:  # of ours: a sentence, which the page shows
            raise gr.Error(first_line(error)) from error

    def play_on(real_time):
        with in_words():
            yield from lives.play(real_time)

    def open_recording(name):
        lives.stop()
        lives.open(name)
        return lives.picture()

    def tell(text):
        lives.tell(text)
        return ""

    def on(event, action, inputs=None, outputs=picture):
        gr.on([event], in_words()(action), inputs, outputs, show_progress="hidden")

    # Without a limit, because one that plays on in another window would keep this one waiting.
    gr.on([play.click], play_on, real_time, picture, show_progress="hidden", concurrency_limit=None)
    on(pause.click, lambda: lives.stop())
    on(step.click, lambda: lives.stop(lives.step))
    on(reset.click, lambda: lives.stop(lambda: lives.viewer.reset()))
    on(recording.input, open_recording, recording)
    on(words.submit, tell, words, words)
    on(page.load, lambda: lives.picture())
