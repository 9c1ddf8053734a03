"""LiveCreature: one creature that perceives, thinks, speaks and moves, tick by tick."""

import math
import os
import time
from collections import deque

import numpy as np
import torch

from configuration_creature import STREAMS
from creature.errors import UserError
from creature.live.emission import Emission, VoiceStream, WordStream
from creature.live.perception import Perception
from creature.loading import find_model, load_config, load_processor, load_to_generate, trained_ticks
from generation_creature import FED_BACK, CreatureStep
from modeling_creature import MultiModalCreature
from motor_creature import unpack_animation
from processing_creature import CreatureProcessor, widen
from sampling_creature import Sampling
from senses_creature import SENSE_TABLE, check_names
from stepping_creature import Stepper, can_step
from ticks_creature import TICK_SECONDS

CLOCK_TICKS = 1000  # of which the clock knows the time


def default_sampling(config) -> dict[str, Sampling]:
    """
    How each stream is drawn unless the caller says otherwise; docs/decisions.md says why.

    Whether a tick is silent is drawn as likely as it was in training: at a temperature of 1, with the bias that undoes
    the smaller weight of silence in the loss. Which word is less random.
    """
    weight = config.null_loss_weight
    bias = -math.log(weight) if weight else 0.0
    text = Sampling(temperature=0.8, top_k=50, null_bias=bias, null_temperature=1.0)
    return {"internal_text": text, "external_text": text, "audio": Sampling(temperature=0.8, top_k=250)}


class Clock:
    """How long the latest ticks took: `p50`, `p95` in s of the last 1,000; `ticks` and `late` ones since the reset."""

    def __init__(self):
        self.ticks, self.late, self._seconds = 0, 0, deque(maxlen=CLOCK_TICKS)

    def add(self, seconds: float) -> None:
        self.ticks += 1
        self.late += seconds > TICK_SECONDS
        self._seconds.append(seconds)

    @property
    def p50(self) -> float:
        return float(np.percentile(self._seconds, 50)) if self._seconds else 0.0

    @property
    def p95(self) -> float:
        return float(np.percentile(self._seconds, 95)) if self._seconds else 0.0


class LiveCreature:
    """
    A creature that lives: `tick` once every 80 ms with what has arrived, and act on what it returns.

        creature = LiveCreature.from_pretrained("checkpoints/whole")
        emission = creature.tick(audio=samples, images=[left, right], words=["look", "left"])

    What it emitted it feeds back itself. Memory does not grow: attention sees a window of ticks.

    Args:
        model: it is put into evaluation mode. processor: of the model.
        window: how many ticks attention sees; by default the configuration's sliding_window, or the context that the
            model was trained with.
        streams: those that it emits; by default those that have a weight in the loss, and so were trained.
        sampling: how each stream is drawn, by name, where that differs from `default_sampling`.
        seed: of the draws: the same one with the same senses gives the same life.
        sampling_rate: of the sound that arrives, in Hz.

    Raises:
        ValueError: for a stream that the model does not have.
        UserError: for a model that commands numbers (`action`) and has not their mean and standard deviation.
    """

    def __init__(
        self,
        model: MultiModalCreature,
        processor: CreatureProcessor,
        *,
        window: int | None = None,
        streams: tuple[str, ...] | None = None,
        sampling: dict[str, Sampling] | None = None,
        seed: int = 0,
        sampling_rate: int = 16000,
    ):
        config = model.config
        trained = tuple(name for name in model.streams.names if config.loss_weights[name])
        check_names("streams", streams or (), model.streams.names)
        check_names("sampling", sampling or (), STREAMS)
        self.model, self.processor, self.config = model.eval(), processor, config
        self.window = window or config.sliding_window or config.max_position_embeddings
        self.streams = trained if streams is None else tuple(streams)
        if "animation" in self.streams and config.action_size:
            try:
                processor.require_statistics("action")
            except ValueError as error:
                raise UserError(str(error)) from None
        self.sampling = default_sampling(config) | (sampling or {})
        self.seed, self.generator = seed, torch.Generator(model.device)
        self.perception = Perception(processor, sampling_rate)
        self.reset()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, device: str | None = None, **options) -> "LiveCreature":
        """
        The creature of a run, of its newest checkpoint or of a saved model, on a GPU if there is one.

        Args:
            folder: as `scripts/generate_text.py` takes it. device: "cuda", "mps" or "cpu".
            options: those of [`LiveCreature`].

        Raises:
            UserError: for a folder without a creature, a damaged one, or one that commands without statistics.
        """
        folder = find_model(folder)
        config = load_config(folder)
        model, _ = load_to_generate(folder, device)
        options.setdefault("window", config.sliding_window or trained_ticks(folder, config.max_position_embeddings))
        return cls(model, load_processor(folder, config), **options)

    def reset(self, seed: int | None = None) -> None:
        """Begin a new life: nothing is remembered. seed: of its draws, by default the one of the life before."""
        self.seed = self.seed if seed is None else seed
        self.generator.manual_seed(self.seed)
        self.perception.reset()
        self.clock, self.now = Clock(), 0  # the number of the tick that comes
        self.thinking, self.saying = WordStream(self.processor), WordStream(self.processor)
        self.speaking = VoiceStream(self.processor.codec) if self.processor.codec is not None else None
        self._past = Stepper(self.model, window=self.window) if can_step(self.model) else None
        self._copies = {}
        if self.config.null_token_id is not None:
            self._copies["input_ids"] = torch.full((1, 1), self.config.null_token_id)

    def tick(
        self,
        audio: np.ndarray | None = None,
        images=None,
        state: np.ndarray | None = None,
        joint_positions: np.ndarray | None = None,
        joint_rotations: np.ndarray | None = None,
        touch: list[dict] | None = None,
        words: str | list | None = None,
    ) -> Emission:
        """
        Live for 80 ms. Whatever is None did not arrive: that sense is absent at this tick.

        Args:
            audio: the samples [n] or [n, channels] since the tick before, 80 ms of them. Fewer wait for the rest of
                their tick; of several ticks at once, the last is heard.
            images: a picture for each camera, uint8 [H, W, 3] or of Pillow. A camera slower than 12.5 pictures a second
                gives its last one again, for up to a second: recordings are read so.
            state: [body_state_size] in physical units, or [sub-frames, body_state_size].
            joint_positions, joint_rotations: [joints, 3] m in the frame of the root and [joints, 4] quaternions (w, x,
                y, z), or [sub-frames, joints, ...]. A body that measures both and a state is felt if all are there.
            touch: contacts, {point, surface, force, x, y, z, temperature} each, in the units of recordings. A contact,
                or a body, with a number that is not finite was not measured.
            words: heard at this tick, text or a list of words; their tokens are heard one a tick, in a burst the later
                ones later. "" or [] is silence, None is nobody who could speak.

        Raises:
            ValueError: for a sense that does not fit the model, or with a number beyond 1e9, which would overflow in
                it. Nothing has changed then: the tick can be given again.
        """
        started = time.perf_counter()
        arguments = self.perception(audio, images, state, joint_positions, joint_rotations, touch, words)
        return self._live(arguments, self._copies, started)

    def step(self, arguments: dict[str, np.ndarray], feed_back: bool = True) -> Emission:
        """
        Live for one tick with the arguments of `forward` for it, [...] each without B and T: one row of what
        `processor.encode(recording)` gives.

        Own outputs among them (`input_ids`, `external_text_ids`, `audio_codes`, `animation`, `action`) are what it
        thinks, says and does now, in place of what it emitted. feed_back: False for a life that is replayed exactly,
        where own outputs that are not among the arguments are absent.
        """
        return self._live(arguments, self._copies if feed_back else {}, time.perf_counter())

    @torch.inference_mode()
    def _live(self, arguments: dict[str, np.ndarray], copies: dict[str, torch.Tensor], started: float) -> Emission:
        senses = self._senses(arguments, copies)
        step = self.model.step(
            self._past, output_streams=self.streams, sampling=self.sampling, generator=self.generator, **senses
        )
        emitted = on_host({name: getattr(step, name) for name in ("internal_text", *FED_BACK) if name in step})
        self._past, self._copies = step.past_key_values, self._copies_of(emitted)
        emission = self._emission(step, emitted, senses)
        emission.seconds = time.perf_counter() - started
        self.clock.add(emission.seconds)
        self.now += 1
        return emission

    def _senses(self, arguments: dict[str, np.ndarray], copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        The arguments of this tick [1, 1, ...] and the copies; what a mask or an id says is absent is left out. On the
        CPU, from where the step takes all of them at once.
        """
        senses, arguments = dict(copies), dict(arguments)
        for sense in SENSE_TABLE:
            mask = arguments.pop(sense.mask, None)
            names = [name for name in sense.arguments if name in arguments]
            if sense.name == "touch" and mask is not None:
                arguments |= {name: arguments[name][mask] for name in names}
                mask = mask.any()
            elif names and not sense.mask:
                mask = (arguments[names[0]] >= 0).all()
            if mask is not None and not mask:
                for name in names:
                    del arguments[name]
                    senses.pop(name, None)
        for name, value in arguments.items():
            senses[name] = torch.from_numpy(widen(np.array(value)))[None, None]
        return senses

    def _copies_of(self, emitted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What was emitted, as the arguments of the next tick: a creature hears itself speak and feels itself move."""
        copies, null = {}, self.config.null_token_id
        if "internal_text" in self.streams:
            copies["input_ids"] = emitted["internal_text"][:, None]
        elif null is not None:
            copies["input_ids"] = torch.full((1, 1), null)
        return copies | {name: emitted[output][:, None] for output, name in FED_BACK.items() if output in emitted}

    def _emission(
        self, step: CreatureStep, emitted: dict[str, torch.Tensor], arguments: dict[str, torch.Tensor]
    ) -> Emission:
        emission = Emission(self.now, arguments=arguments, step=step)
        coming = self.now + 1  # the tick at which it is thought, said and done
        if "internal_text" in emitted:
            emission.thought_id = int(emitted["internal_text"])
            emission.thought = self.thinking(emission.thought_id, coming)
        if "external_text" in emitted:
            emission.said_id = int(emitted["external_text"])
            emission.said = self.saying(emission.said_id, coming)
        if "audio" in emitted:
            emission.voice_codes = emitted["audio"][0].numpy()
            emission.sound = self.speaking(emission.voice_codes) if self.speaking else None
        if "animation" in emitted:
            parts = unpack_animation(self.config, emitted["animation"][0].float())
            present = [part.numpy() if part.numel() else None for part in parts]
            emission.rotations, emission.blend_shapes, emission.eyes = present
        if "action" in emitted:
            emission.action = self.processor.denormalize("action", emitted["action"][0].float().numpy())
        return emission


def on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU; from a GPU they come in one copy, because each one is a wait."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return tensors
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each begins at a multiple
    packed = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in ordered]).cpu()
    pieces = packed.split([tensor.nbytes for _, tensor in ordered])
    return {
        name: piece.view(tensor.dtype).view(tensor.shape) for (name, tensor), piece in zip(ordered, pieces, strict=True)
    }
