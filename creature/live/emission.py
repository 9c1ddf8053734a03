"""What leaves a creature at a tick: words, voice, movements, and the numbers that they are made of."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from codec_creature import CreatureCodecConfig, decode_voice
from generation_creature import CreatureStep
from processing_creature import SPACES, CreatureProcessor

CODEC_TICKS = 25  # that a codec which cannot go on from tick to tick decodes again for each tick
LONGEST_WORD = 32  # ids; what never ends is cut, so that it does not grow


@dataclass
class Emission:
    """
    One tick of life. What it emits is thought, said and done at the next tick, 80 ms later.

    Args:
        tick: the tick that was perceived, from 0 on.
        thought, said: words that have become whole, {word, start, end} in s; most ticks have none. A word is whole when
            silence, another word or the end of a text follows, so it comes at least a tick late.
        voice_codes: [codebooks] ids of the codec. sound: [samples] float32 at the codec's sampling rate, 80 ms of a
            creature that has a codec.
        rotations: [sub-frames, joints, 4] unit quaternions (w, x, y, z) to command. blend_shapes: [shapes] in [0, 1].
            eyes: [2, 4] gaze x, y, z and openness. action: [sub-frames, action_size] in physical units.
        thought_id, said_id: the raw ids of this tick, NULL where silent.
        arguments: of `forward` [1, 1, ...], what was perceived, own outputs fed back among it, on the CPU.
        step: what the model returned, tensors of one row, logits among them.
        seconds: what the tick took.

    What the creature does not emit is None.
    """

    tick: int
    thought: list[dict] = field(default_factory=list)
    said: list[dict] = field(default_factory=list)
    voice_codes: np.ndarray | None = None
    sound: np.ndarray | None = None
    rotations: np.ndarray | None = None
    blend_shapes: np.ndarray | None = None
    eyes: np.ndarray | None = None
    action: np.ndarray | None = None
    thought_id: int | None = None
    said_id: int | None = None
    arguments: dict = field(default_factory=dict)
    step: CreatureStep | None = None
    seconds: float = 0.0


class WordStream:
    """Ids that come one a tick -> the words in them, each as soon as it is whole."""

    def __init__(self, processor: CreatureProcessor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        silent = {processor.config.null_token_id, processor.config.pad_token_id}
        self.ends = silent | set(self.tokenizer.all_special_ids)
        self.ids, self.first = [], 0  # of the word that is not whole yet, and its first tick

    def __call__(self, token: int, tick: int) -> list[dict]:
        """The word that ends before this id, {word, start, end} in s, as a list of none or one."""
        piece = self.tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(self.tokenizer) else None
        ends = token in self.ends or piece is None
        whole = self.finish() if ends or piece.startswith(SPACES) else []
        if not ends:
            if len(self.ids) == LONGEST_WORD:
                whole = self.finish()
            self.first = self.first if self.ids else tick
            self.ids.append(token)
        return whole

    def finish(self) -> list[dict]:
        """The word that is not whole yet, as if it were."""
        ids, self.ids = self.ids, []
        return self.processor.decode_words(np.array(ids), self.first) if ids else []


class VoiceStream:
    """Codes that come one tick at a time -> the sound of each tick; of our own codec, that of all ticks together."""

    def __init__(self, codec: PreTrainedModel):
        self.codec, self.state = codec, {}
        self.goes_on = codec.config.model_type == CreatureCodecConfig.model_type
        self.codes: deque[np.ndarray] = deque(maxlen=CODEC_TICKS)

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """codes [codebooks] -> samples [n] float32"""
        if self.goes_on:
            ids = torch.from_numpy(codes).to(self.codec.device)[None, :, None]
            return self.codec.decode(ids, self.state).audio_values[0, 0].float().cpu().numpy()
        self.codes.append(codes)
        samples = decode_voice(self.codec, np.stack(self.codes))
        return samples[-(len(samples) // len(self.codes)) :]
