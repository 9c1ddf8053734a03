"""The codec of the voice: causal, tick by tick as in one piece; and its way from recordings to a speaking creature."""

import json
import sys
import wave

import numpy as np
import pytest
import torch
import yaml
from creatures import GPT2, MICRO, load_script, micro_config
from transformers import AutoProcessor, MimiConfig, MimiModel

import codec_creature
import run_clm_creature
from codec_creature import CreatureCodec, CreatureCodecConfig, check_codec, codec_organs, decode_voice, encode_voice
from codec_creature import load_codec as load
from creature import checkpoints
from creature.codec_training import evaluate_codec, train_codec
from creature.data.recordings.clips import make_clips
from creature.data.recordings.made_up import write_made_up_recordings
from creature.data.recordings.schema import load_recordings
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from creature.rounds.evaluation import code_baselines, code_habits
from creature.settings import CONFIGS
from processing_creature import CreatureProcessor

TICK = 1280


def micro_codec(seed: int = 0, **changes) -> CreatureCodec:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_frame_layers": 1, "num_tick_layers": 1, "kernel_size": 3, "num_quantizers": 2}
    return CreatureCodec(CreatureCodecConfig(**{**sizes, "levels": [4, 4], **changes})).eval()


def sound(ticks: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 1, round(ticks * TICK), generator=torch.Generator().manual_seed(seed)) * 0.2


def micro_mimi(**changes) -> MimiModel:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, num_filters=2, num_residual_layers=1, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, intermediate_size=16, codebook_size=32, codebook_dim=8,
        vector_quantization_hidden_dimension=8, num_quantizers=12, upsample_groups=16, max_position_embeddings=64,
        sliding_window=16,
    )  # fmt: skip
    model = MimiModel(MimiConfig(**{**sizes, **changes})).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("embed_sum", "cluster_usage")):
            buffer.copy_(torch.randn(buffer.shape) if "sum" in name else torch.ones(buffer.shape))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A folder of made-up recordings with a voice."""
    folder = tmp_path_factory.mktemp("spoken") / "speak"
    write_made_up_recordings(folder, "speak", seconds=25.0)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a codec of two books of 16 codes."""
    folder = tmp_path_factory.mktemp("codecs") / "micro"
    micro_codec().save_pretrained(folder)
    return folder


def test_the_future_changes_neither_codes_nor_sound():
    codec, one, other = micro_codec(), sound(12, 1), sound(12, 2)
    other[..., : 7 * TICK] = one[..., : 7 * TICK]
    codes = codec.encode(one).audio_codes, codec.encode(other).audio_codes
    assert codes[0].shape == (2, 2, 12) and codes[0].dtype == torch.int64
    torch.testing.assert_close(codes[0][..., :7], codes[1][..., :7])
    assert (codes[0][..., 7:] != codes[1][..., 7:]).any()
    heard = [codec.decode(given).audio_values for given in codes]
    assert heard[0].shape == (2, 1, 12 * TICK)
    torch.testing.assert_close(heard[0][..., : 7 * TICK], heard[1][..., : 7 * TICK])
    assert (heard[0] - heard[1])[..., 7 * TICK :].abs().max() > 1e-3


def test_the_last_sample_of_a_tick_is_in_its_codes():
    torch.manual_seed(0)
    codec, quiet = micro_codec(), torch.zeros(1, 1, 3 * TICK)
    before = codec.encoder(quiet[:, 0])
    quiet[..., 2 * TICK - 100 : 2 * TICK] = 0.5
    after = codec.encoder(quiet[:, 0])
    assert torch.equal(before[:, 0], after[:, 0]) and (before[:, 1] != after[:, 1]).all()


def test_tick_by_tick_is_as_in_one_piece(monkeypatch):
    codec, given = micro_codec(), sound(9)
    whole = codec.encode(given).audio_codes
    heard, state = codec.decode(whole).audio_values, {}
    codes = [codec.encode(piece, state=state).audio_codes for piece in given.split(TICK, dim=-1)]
    torch.testing.assert_close(torch.cat(codes, dim=-1), whole)
    sizes = {tuple(kept.shape) for kept in state.values()}
    state = {}
    pieces = [codec.decode(code, state=state).audio_values for code in whole.split((1, 3, 1, 4), dim=-1)]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), heard)
    alone = codec.decode(whole[..., 4:5]).audio_values
    assert (alone - pieces[2]).abs().max() > 1e-3  # what is kept matters
    assert all(size[1] <= 480 for size in sizes)  # and does not grow
    monkeypatch.setattr(codec_creature, "PIECE_TICKS", 4)  # of a long sound, which is cut
    torch.testing.assert_close(codec.encode(given).audio_codes, whole)
    torch.testing.assert_close(codec.decode(whole).audio_values, heard)
    with pytest.raises(ValueError, match="give a multiple of 1280"):
        codec.encode(given[..., :-1], state={})
    assert codec.encode(given[..., :-1]).audio_codes.shape == whole.shape


def test_every_code_is_numbers_and_back_and_rounding_passes_gradients():
    codec = micro_codec(levels=[4, 3, 2], num_quantizers=2)
    codes = torch.arange(24).repeat(2, 1)[None]
    numbers = codec.numbers_of(codes)
    assert numbers.shape == (1, 24, 6) and numbers.min() == -1 and numbers.max() == 1
    torch.testing.assert_close(codec.codes_of(numbers), codes)
    x = torch.randn(1, 50, 6, requires_grad=True)
    rounded = codec.round(x)
    torch.testing.assert_close(codec.numbers_of(codec.codes_of(rounded)), rounded)
    rounded.sum().backward()
    assert (x.grad > 0).all()
    assert sorted(set(rounded[..., 0].flatten().tolist())) == pytest.approx([-1, -1 / 3, 1 / 3, 1])


def test_training_brings_the_sound_closer(monkeypatch, capsys):
    monkeypatch.setattr("creature.codec_training.LOG_STEPS", 5)
    draw = np.random.default_rng(0)
    times = np.arange(2 * 16000) / 16000
    voices = [np.float32(0.3 * np.sin(2 * np.pi * pitch * times)) for pitch in draw.uniform(150, 400, 6)]
    codec = micro_codec()
    before = evaluate_codec(codec, voices[:4], voices[4:])
    losses = train_codec(codec, voices[:4], 12, 1e-2, "cpu")
    lines = capsys.readouterr().out.splitlines()  # there is no terminal
    assert [line.split("|")[0].split()[1] for line in lines] == ["1/12", "5/12", "10/12"]
    assert f"loss {losses[0]:.4f} | " in lines[0] and lines[0].endswith(" left")
    after = evaluate_codec(codec, voices[:4], voices[4:])
    assert losses[-1] < 0.8 * losses[0] and after["distance"] < 0.8 * before["distance"]
    assert after["distance_mean"] < after["distance_silence"] and after["seconds"] == 4
    assert all(1 <= perplexity <= 16 for perplexity in after["perplexity"]) and len(after["used"]) == 2


def test_a_codec_is_judged_by_so_much_voice_and_no_more(monkeypatch):
    monkeypatch.setattr("creature.codec_training.JUDGED_SECONDS", 3)
    draw = np.random.default_rng(0)
    voices = [np.float32(0.1 * draw.standard_normal(2 * 16000)) for _ in range(4)]
    assert evaluate_codec(micro_codec(), voices, voices)["seconds"] == 3


def test_the_script_trains_on_tones_and_writes_what_it_names(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "trial"
    flags = ["--output", str(folder), "--max_steps", "2", "--hidden_size", "8", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["train_codec.py", *flags])
    script = load_script("train_codec")
    script.main()
    printed = capsys.readouterr().out
    assert "log-mel distance" in printed and "held-out voice" in printed and str(folder / "samples.png") in printed
    figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert len(figures["losses"]) == 2 and len(figures["perplexity"]) == 8
    with wave.open(str(folder / "sample_1_decoded.wav")) as file:
        assert (file.getframerate(), file.getnchannels()) == (16000, 1) and file.getnframes() > 16000
    codec = load(folder)
    assert codec_organs(codec) == {"num_audio_codebooks": 8, "audio_codebook_size": 1024}
    with pytest.raises(UserError, match="exists already"):
        script.main()
    flags = ["--data", str(tmp_path / "none"), "--output", str(tmp_path / "other")]
    monkeypatch.setattr("sys.argv", ["train_codec.py", *flags])
    with pytest.raises(UserError, match="no folder of recordings"):
        script.main()


def test_a_mimi_stands_in(tokenizer, tmp_path):
    micro_mimi().save_pretrained(tmp_path / "mimi")
    codec = load(tmp_path / "mimi")
    assert codec_organs(codec) == {"num_audio_codebooks": 8, "audio_codebook_size": 32}
    config = micro_config(**GPT2, **codec_organs(codec))
    processor = CreatureProcessor.from_config(config, tokenizer, codec)
    voice = {"array": sound(10)[0, 0].numpy(), "sampling_rate": 16000}
    codes = processor.encode({"duration": 0.8, "voice": voice})["audio_codes"]
    assert codes.shape == (10, 8) and codes.max() < 32
    (said,) = processor.decode_outputs({"audio": torch.from_numpy(codes)[None]})
    assert said["voice"]["sampling_rate"] == 24000 and len(said["voice"]["array"]) == 10 * 1920
    processor.save_pretrained(tmp_path / "saved")
    assert isinstance(CreatureProcessor.from_pretrained(tmp_path / "saved").codec, MimiModel)


def test_the_voice_becomes_copy_and_target_of_the_same_tick(tokenizer):
    codec = micro_codec()
    config = micro_config(**GPT2, **codec_organs(codec))
    processor = CreatureProcessor.from_config(config, tokenizer, codec)
    samples = sound(5)[0, 0].numpy()
    arguments = processor.encode({"duration": 0.48, "voice": {"array": samples, "sampling_rate": 16000}})
    expected = encode_voice(codec, samples, 16000, 2)
    for name in ("audio_codes", "audio_targets"):
        np.testing.assert_array_equal(arguments[name][:5], expected)
        assert (arguments[name][5:] == -100).all()  # the voice is not known there
    batch = processor(voice=samples, sampling_rate=16000)
    assert batch["audio_codes"].shape == (1, 5, 2) and "audio_targets" not in batch
    slower = encode_voice(codec, samples[::2], 8000, 2)
    assert slower.shape == expected.shape  # another rate is resampled
    empty = processor.encode({"duration": 0.48, "voice": {"array": samples[:0], "sampling_rate": 16000}})
    assert empty["audio_codes"].size == 0
    with pytest.raises(ValueError, match="sampling rate is None"):
        processor(voice=samples)


def test_what_is_emitted_is_heard_on_its_clock(tokenizer):
    codec = micro_codec()
    processor = CreatureProcessor.from_config(micro_config(**GPT2, **codec_organs(codec)), tokenizer, codec)
    codes = torch.randint(0, 16, (1, 4, 2))
    (decoded,) = processor.decode_outputs({"sequences": torch.zeros(1, 6, dtype=torch.long), "audio": codes})
    heard = decoded["voice"]["array"]
    assert decoded["voice"]["sampling_rate"] == 16000 and len(heard) == 6 * TICK and not heard[: 2 * TICK].any()
    np.testing.assert_array_equal(heard[2 * TICK :], decode_voice(codec, codes[0].numpy()))
    codes[0, 1] = -100
    assert not decode_voice(codec, codes[0].numpy())[TICK : 2 * TICK].any()
    processor.codec = None
    (decoded,) = processor.decode_outputs({"audio": codes})
    assert decoded.keys() == {"audio_codes"}
    with pytest.raises(ValueError, match="A voice needs a codec"):
        processor(voice=heard, sampling_rate=16000)


@pytest.mark.parametrize("ticks", [1000, 20])
def test_clips_have_the_codes_of_the_voice(spoken, tokenizer, tmp_path, ticks):
    codec, (recordings, facts) = micro_codec(), load_recordings(spoken)
    config = micro_config(**GPT2, **codec_organs(codec))
    processor = CreatureProcessor.from_config(config, tokenizer, codec)
    clips = make_clips(recordings, facts, processor, ticks, tmp_path)[0]["train"]
    for name in ("audio_codes", "audio_targets"):
        pieces = {}
        for clip in clips:
            pieces.setdefault(clip["recording_id"], []).append(clip[name])
        for row in recordings["train"]:
            whole = processor.encode(row)[name]
            np.testing.assert_array_equal(np.concatenate(pieces[row["recording_id"]]), whole)
            assert len(np.unique(whole[:, 0])) > 1 and not np.array_equal(whole[:, 0], whole[:, 1])


def test_the_codec_is_saved_with_the_processor(tokenizer, tmp_path):
    codec = micro_codec()
    processor = CreatureProcessor.from_config(micro_config(**GPT2, **codec_organs(codec)), tokenizer, codec)
    processor.save_pretrained(tmp_path / "with")
    assert not list((tmp_path / "with").rglob("*.bin"))
    for loaded in (
        CreatureProcessor.from_pretrained(tmp_path / "with"),
        AutoProcessor.from_pretrained(tmp_path / "with"),
    ):
        values = sound(3)
        torch.testing.assert_close(loaded.codec.encode(values).audio_codes, codec.encode(values).audio_codes)
    processor.codec = None
    processor.save_pretrained(tmp_path / "without")
    assert CreatureProcessor.from_pretrained(tmp_path / "without").codec is None


def test_what_does_not_fit_is_told_in_a_sentence(tokenizer, tmp_path):
    codec = micro_codec()
    with pytest.raises(ValueError, match="2 books of 16 codes, and the model 3 of 11: set num_audio_codebooks"):
        CreatureProcessor.from_config(micro_config(**GPT2), tokenizer, codec)
    with pytest.raises(ValueError, match="2 books of 16 codes, and the model 1 of 16"):
        check_codec(codec, 1, 16)  # without one of its books, nothing can be decoded
    with pytest.raises(ValueError, match="^There is no codec .*none: train one with scripts/train_codec.py"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="^There is no folder no/such, and from the Hub it cannot .*train_codec"):
        load("no/such")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="^The codec .* cannot be loaded .*train_codec"):
        load(tmp_path)
    micro_mimi(frame_rate=25.0).save_pretrained(tmp_path / "fast")
    with pytest.raises(ValueError, match="gives codes 25 times a second, and a tick lasts 0.08 s"):
        load(tmp_path / "fast")
    with pytest.raises(ValueError, match="hidden_size is 0; it must be at least 1"):
        CreatureCodecConfig(hidden_size=0)
    with pytest.raises(ValueError, match="give .rows, 1, samples."):
        codec.encode(torch.zeros(2, TICK))
    with pytest.raises(ValueError, match="give .rows, 2, ticks."):
        codec.decode(torch.zeros(1, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="holds 0 to 16: a book has the codes 0 to 15"):
        codec.decode(torch.tensor([[[0], [16]]]))


def test_clips_hold_the_codes_and_another_codec_makes_others(spoken, tokenizer, tmp_path):
    splits, facts = load_recordings(spoken)
    config = micro_config(**GPT2, num_cameras=1, num_audio_codebooks=2, audio_codebook_size=16)
    about = {}
    for name, codec in (("none", None), ("one", micro_codec(1)), ("same", micro_codec(1)), ("other", micro_codec(2))):
        processor = CreatureProcessor.from_config(config, tokenizer, codec)
        clips, about[name] = make_clips(splits, facts, processor, 32, tmp_path)
        assert ("audio_targets" in clips["train"].column_names) == (codec is not None)
    assert "--codec names it" in about["none"]["unused"]["voice"] and not about["one"]["unused"]
    assert about["one"]["streams"] == ["internal_text", "audio"] and about["none"]["streams"] == ["internal_text"]
    hashes = [about[name]["data_hash"] for name in ("none", "one", "same", "other")]
    assert hashes[1] == hashes[2] and len(set(hashes)) == 3


class Codes(dict):
    """Clips with the codes given, as far as `code_habits` reads them."""

    column_names = ("audio_targets",)

    def __init__(self, *clips):
        self.clips = [{"audio_targets": None if clip is None else np.array(clip)} for clip in clips]

    def select_columns(self, names):
        return self.clips


def test_the_baselines_of_codes_are_what_they_say():
    config = micro_config(num_audio_codebooks=1, audio_codebook_size=4, loss_weights={"audio": 1.0})
    habits = code_habits(config, [Codes([[0], [0], [0], [1], [-100]], None)])
    np.testing.assert_allclose(habits.shares, [[4 / 8, 2 / 8, 1 / 8, 1 / 8]])
    np.testing.assert_allclose(habits.repeats, [3 / 5])
    found = code_baselines(Codes([[1], [0], [0]]), habits)  # one change to the most frequent code, one repetition
    assert found["audio_frequent"] == 1
    assert found["audio_frequent_loss"] == pytest.approx(-np.log(1 / 2))
    assert found["audio_repeating_loss"] == pytest.approx(-(np.log(0.4 / 2) + np.log(0.6 + 0.4 / 2)) / 2)
    assert code_habits(config, [Codes(None)]) is None and code_baselines(Codes(None), habits) == {}
    assert code_habits(micro_config(loss_weights={"internal_text": 1.0}), [Codes([[0], [0]])]) is None


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the job on a micro creature that hears, thinks and speaks; its codes are 2 of 16, as those of `saved`."""
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((CONFIGS / "rounds" / "hear.yaml").read_text(encoding="utf-8"))
    settings["training"] |= MICRO["training"] | {"logging_steps": 1, "eval_steps": 4}
    settings["model"] = MICRO["model"] | {"max_position_embeddings": 64}
    del settings["model"]["num_audio_codebooks"], settings["model"]["audio_codebook_size"]
    settings["data"]["clip_ticks"] = 64
    (tmp_path / "speak.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    def start(*flags) -> None:
        flags = ("--config", "speak.yaml", "--train_streams", "internal_text", "audio", *map(str, flags))
        monkeypatch.setattr(sys, "argv", ["run_clm_creature.py", *flags])
        assert run_clm_creature.main() == 0

    return start


def test_a_round_trains_the_voice_and_the_model_holds_its_codec(run, spoken, saved, tmp_path, capsys, run_script):
    run("--data", spoken, "--codec", saved, "--max_steps", 4, "--output_dir", "run")
    capsys.readouterr()
    evaluated = checkpoints.read_metrics(tmp_path / "run")[-1]
    names = ("loss", "repeating", "repeating_loss", "frequent", "frequent_loss", "book_1_loss", "drop_own_voice")
    assert all(f"eval_audio_{name}" in evaluated for name in names) and "eval_internal_text_loss" in evaluated
    processor = CreatureProcessor.from_pretrained(tmp_path / "run")
    assert processor.config.num_audio_codebooks == 2 and processor.config.audio_codebook_size == 16
    values = sound(3)
    torch.testing.assert_close(processor.codec.encode(values).audio_codes, load(saved).encode(values).audio_codes)
    code, _, error = run_script("evaluate_recordings", "--checkpoint", "run", "--data", spoken, "--output", "a.json")
    assert code == 0, error
    found = json.loads((tmp_path / "a.json").read_text())["metrics"]
    assert all(evaluated[f"eval_{name}"] == pytest.approx(value, rel=1e-4) for name, value in found.items())

    # What it has learned to say goes with its codec, and no other.
    micro_codec(seed=5).save_pretrained(tmp_path / "another")
    with pytest.raises(UserError, match="has learned to speak with another codec"):
        run("--data", spoken, "--init_from", "run", "--codec", "another", "--max_steps", 1)
    run("--data", spoken, "--init_from", "run", "--max_steps", 1)
    assert "dry run passed" in capsys.readouterr().out
    assert "eval_audio_loss" in checkpoints.read_metrics(tmp_path / "checkpoints" / "dry_run")[-1]


def test_a_voice_needs_a_codec_and_a_codec_a_voice(run, spoken, saved, tmp_path):
    with pytest.raises(UserError, match="of the voice in the recordings there is no codec .*train_codec"):
        run("--data", spoken, "--max_steps", 1)
    with pytest.raises(UserError, match="2 books of 16 codes, and the model 3 of 16"):
        run("--data", spoken, "--codec", saved, "--num_audio_codebooks", 3, "--max_steps", 1)
    with pytest.raises(UserError, match="There is no codec .*nowhere"):
        run("--data", spoken, "--codec", tmp_path / "nowhere", "--max_steps", 1)
    write_made_up_recordings(tmp_path / "tones", "hear", seconds=12.0)
    with pytest.raises(UserError, match="is for a voice, and no recording has one: leave it out"):
        run("--data", tmp_path / "tones", "--codec", saved, "--max_steps", 1)
